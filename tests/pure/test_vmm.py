"""Command lines as libvirt, Proxmox and people write them, and what else identifies a VMM."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.model import Guest
from tscwatch.vmm import identify, of_guest, qemu_options

UUID = "6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [
                "/usr/bin/qemu-system-x86_64",
                "-name",
                "guest=web,debug-threads=on",
                "-S",
                "-machine",
                "pc-q35-7.2,usb=off,accel=kvm",
                "-cpu",
                "host,tsc-frequency=2500000000",
                "-uuid",
                UUID,
                "-incoming",
                "defer",
            ],
            Guest(1, "qemu", "web", UUID, "pc-q35-7.2", 2_500_000, True, max_vcpus=1),
        ),
        (
            [
                "/usr/bin/kvm",
                "-id",
                "100",
                "-name",
                "vm100,debug-threads=on",
                "-smbios",
                f"type=1,uuid={UUID}",
                "-machine",
                "type=q35+pve0",
            ],
            Guest(1, "qemu", "vm100", UUID, "q35+pve0", max_vcpus=1, vmid="100"),
        ),
        (
            ["/usr/libexec/qemu-kvm", "--name", "plain", "-name", "debug-threads=on"],
            Guest(1, "qemu", "plain", max_vcpus=1),
        ),
        (["qemu-system-x86_64", "-name", "a,,b"], Guest(1, "qemu", "a,b", max_vcpus=1)),
        (
            ["qemu-system-x86_64", "-cpu", "qemu64,tsc-freq=2.5G"],
            Guest(1, "qemu", tsc_khz=2_500_000, max_vcpus=1),
        ),
        (["qemu-system-x86_64", "-cpu", "qemu64,tsc-frequency=0"], Guest(1, "qemu", max_vcpus=1)),
        (
            ["kvm", "-machine", '{"type":"q35","usb":false}', "-append", "-name", "-S", "disk"],
            Guest(1, "qemu", machine="q35", max_vcpus=1),
        ),
        (["kvm", "-M", '{"type":["q35"]}', "-name", "{a}"], Guest(1, "qemu", "{a}", max_vcpus=1)),
        (
            [
                "kvm",
                "-cpu",
                "host,+tsc-deadline",
                "-global",
                "max-x86_64-cpu.tsc-frequency=0x2540BE400",
            ],
            Guest(1, "qemu", tsc_khz=10_000_000, max_vcpus=1),
        ),
        (["qemu-system-x86_64", "-name"], Guest(1, "qemu", max_vcpus=1)),
        (["/usr/bin/cloud-hypervisor", "-name", "no"], Guest(1, "cloud-hypervisor")),
        (["/usr/sbin/libvirtd"], Guest(1, "libvirtd")),
    ],
)
def test_known_forms(argv: list[str], expected: Guest) -> None:
    assert identify(1, argv) == expected


# QEMU 5.2 to 11.1: qemu-options.hx in the sources of 5.2, each release from 6.0 to 9.0, 10.0 and
# 10.2, and the table qemu_options in the executable of Debian's 11.1. A live test compares with the
# QEMU that is installed (tests/live/test_command_lines.py).
WITH_ARGUMENT = """
    D L M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev
    chroot compat cpu d debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev
    fw_cfg g gdb global hda hdb hdc hdd icount incoming initrd iscsi k kernel loadvm m machine
    mem-path mon monitor msg mtdblock name net netdev nic numa object option-rom overcommit parallel
    pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig realtime rotate rtc
    run-with runas sandbox sd seed semihosting-config serial set shim smbios smp soundhw spice
    tb-size tpmdev trace usbdevice uuid vga virtfs vnc watchdog watchdog-action writeconfig
    xen-domid
"""
WITHOUT_ARGUMENT = """
    S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm
    enable-sync-profile full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet
    no-quit no-reboot no-shutdown no-user-config nodefaults nographic old-param only-migratable
    perfmap portrait preconfig s sdl semihosting show-cursor singlestep snapshot usb version
    win2k-hack xen-attach xen-domid-restrict
"""


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_which_options_of_qemu_have_an_argument(dashes: str) -> None:
    for name in WITH_ARGUMENT.split():
        assert list(qemu_options([dashes + name, "-name", "a"])) == [(name, "-name")]
    for name in WITHOUT_ARGUMENT.split():
        assert list(qemu_options([dashes + name, "-name", "a"])) == [(name, ""), ("name", "a")]


@pytest.mark.parametrize(
    ("smp", "expected"),
    [
        ("4", 4),
        ("cpus=4", 4),
        ("2,maxcpus=8", 8),
        ("0x10", 16),
        ("cpus=0", None),
        ("08", None),
        ("2,sockets=2,cores=4", 2),
        ("sockets=2,cores=4,threads=2", 16),
        ("maxcpus=6,sockets=3,cores=2,threads=1", 6),
        ("nonsense", None),
        ("\u00b2", None),  # a digit, but no number
        ("9" * 5000, None),
    ],
)
def test_for_how_many_vcpus_a_machine_has_room(smp: str, expected: Optional[int]) -> None:
    assert identify(1, ["qemu-system-x86_64", "-smp", smp]).max_vcpus == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ("-machine", "q35,accel=kvm,smp.cpus=2,smp.maxcpus=8"),
        ("-smp", "2", "-smp", "maxcpus=8"),
        ("-smp", "maxcpus=4", "-M", "smp.cpus=2", "-machine", "smp.maxcpus=8"),
    ],
)
def test_the_topology_can_be_spread_over_options(arguments: tuple[str, ...]) -> None:
    assert identify(1, ["qemu-system-x86_64", *arguments]).max_vcpus == 8


def test_a_configuration_file_takes_effect_where_it_is_named() -> None:
    files = {
        "incus.conf": """
            # Machine
            [machine]
            type = "q35"
            [smp-opts]
            cpus = "1"
            maxcpus = "64"
            [object "tdx"]
            qom-type = "tdx-guest"
        """.replace("    ", ""),
        "name.conf": '[name]\n guest = "b"\n process = ""\n',
    }
    command = ["kvm", "-name", "a", "-readconfig", "name.conf", "-M", "pc"]
    command += ["-readconfig", "incus.conf", "-smp", "2"]
    guest = identify(1, command, read_config=files.get)
    assert guest == Guest(1, "qemu", "b", machine="q35", max_vcpus=64, protected=True)


def test_what_a_configuration_file_holds_is_not_known_if_it_cannot_be_read() -> None:
    assert identify(1, ["kvm", "-smp", "2", "-readconfig", "gone"]).max_vcpus is None


def test_few_configuration_files_are_read() -> None:
    paths: list[str] = []

    def read(path: str) -> str:
        paths.append(path)
        return ""

    assert identify(1, ["kvm", *["-readconfig", "x"] * 1000], read_config=read).max_vcpus is None
    assert len(paths) < 10


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tdx-guest,id=tdx", True),
        ('{"qom-type":"tdx-guest","id":"tdx"}', True),
        ("sev-snp-guest,id=sev,secure-tsc=on", True),
        ("sev-snp-guest,id=sev", False),
        ("memory-backend-ram,id=m", False),
        ('{"qom-type":"sev-snp-guest","secure-tsc":true}', True),
        ('{"qom-type":"sev-snp-guest","secure-tsc":false}', False),
        ("qom-type=sev-snp-guest,secure-tsc=yes", True),
        ('{"qom-type":["tdx-guest"]}', False),
        ('{"a":' * 100_000, False),
        ('{"qom-type":"tdx-guest","n":%s}' % ("9" * 5000), True),
        ("{", False),
    ],
)
def test_whose_tsc_is_out_of_kvms_hands(value: str, expected: bool) -> None:
    arguments = ["qemu-system-x86_64", "-object", "rng-random,id=r", "-object", value]
    assert identify(1, arguments).protected is expected


def test_a_sandbox_is_no_guest_that_keeps_time() -> None:
    assert of_guest(identify(1, ["runsc-sandbox", "--root=/x"])).is_sandbox
    assert of_guest(Guest(1, "runsc-sandbox")).is_sandbox
    assert not of_guest(Guest(1, "qemu")).is_sandbox


def test_a_process_that_is_gone_is_known_by_its_comm() -> None:
    assert identify(1, [], "qemu-system-x86") == Guest(1, "qemu")
    assert identify(1, [], "cloud-hyperviso") == Guest(1, "cloud-hypervisor")
    assert identify(1, [], "") == Guest(1, "unknown")


LOADER = "ld-linux-x86-64.so.2"


@pytest.mark.parametrize(
    ("executable", "argv", "comm", "expected"),
    [
        ("firecracker", ["qemu-system-x86_64"], "qemu-system-x86", "firecracker"),
        ("renamed", ["/x/firecracker"], "qemu-system-x86", "firecracker"),
        ("renamed", ["other"], "firecracker", "firecracker"),
        ("renamed", ["other"], "another", "renamed"),
        ("", ["/x/other"], "another", "other"),
        (".qemu-system-x86_64-wrapped", ["x"], "x", "qemu"),
        (".qemu-kvm-wrapped__", ["x"], "x", "qemu"),
        ("", [], ".qemu-system-x8", "qemu"),
        ("", [], ".cloud-hypervis", "cloud-hypervisor"),
        ("kvm-spice", ["x"], "x", "qemu"),
        ("qemu-img", ["x"], "x", "qemu-img"),
        (
            LOADER,
            [f"/lib64/{LOADER}", "--argv0", "x", "/x/kvm", "firecracker"],
            LOADER[:15],
            "qemu",
        ),
        (LOADER, ["x", "--inhibit-cache", "--preload", "/x/firecracker", "/x/kvm"], "", "qemu"),
        (LOADER, ["/x/kvm", "renamed"], "", "qemu"),
        ("", ["/lib/ld-musl-x86_64.so.1", "--", "/x/kvm"], "", "qemu"),
        ("ld.so", ["ld.so", "--argv0"], "", "ld.so"),
    ],
)
def test_by_which_name_a_vmm_is_recognised(
    executable: str, argv: list[str], comm: str, expected: str
) -> None:
    assert identify(1, argv, comm, executable).vmm == expected


def test_the_arguments_of_a_program_that_a_dynamic_loader_runs() -> None:
    argv = [LOADER, "--library-path", "/x", "/x/kvm", "-name", "a"]
    assert identify(1, argv, executable=LOADER).name == "a"


@given(st.lists(st.text()), st.text())
def test_no_command_line_breaks_it(arguments: list[str], config: str) -> None:
    for option in ("-x", "-smp", "-object", "-machine", "-cpu", "-global", "-readconfig"):
        guest = identify(
            1, ["qemu-system-x86_64", option, *arguments], read_config=lambda path: config
        )
        assert guest.vmm == "qemu"
        assert len(guest.name or "") <= 200
