"""Command lines as libvirt, Proxmox and people write them, and what else identifies a VMM."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.model import Guest
from tscwatch.vmm import identify, of_guest

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
            Guest(1, "qemu", "vm100", None, "q35+pve0", max_vcpus=1),
        ),
        (
            ["/usr/libexec/qemu-kvm", "--name=x", "--name", "plain"],
            Guest(1, "qemu", "plain", max_vcpus=1),
        ),
        (["qemu-system-x86_64", "-name", "a,,b"], Guest(1, "qemu", "a,b", max_vcpus=1)),
        (
            ["qemu-system-x86_64", "-cpu", "qemu64,tsc-freq=2.5G"],
            Guest(1, "qemu", tsc_khz=2_500_000, max_vcpus=1),
        ),
        (["qemu-system-x86_64", "-cpu", "qemu64,tsc-frequency=0"], Guest(1, "qemu", max_vcpus=1)),
        (["qemu-system-x86_64", "-name"], Guest(1, "qemu", max_vcpus=1)),
        (["/usr/bin/cloud-hypervisor", "-name", "no"], Guest(1, "cloud-hypervisor")),
        (["/usr/sbin/libvirtd"], Guest(1, "libvirtd")),
    ],
)
def test_known_forms(argv: list[str], expected: Guest) -> None:
    assert identify(1, argv) == expected


@pytest.mark.parametrize(
    ("smp", "expected"),
    [
        ("4", 4),
        ("cpus=4", 4),
        ("2,maxcpus=8", 8),
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


def test_a_machine_can_have_its_vcpus_in_its_own_option() -> None:
    machine = "q35,accel=kvm,smp.cpus=2,smp.maxcpus=8"
    assert identify(1, ["qemu-system-x86_64", "-machine", machine]).max_vcpus == 8


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


@given(st.lists(st.text()))
def test_no_command_line_breaks_it(arguments: list[str]) -> None:
    for option in ("-x", "-smp", "-object", "-machine", "-cpu"):
        guest = identify(1, ["qemu-system-x86_64", option, *arguments])
        assert guest.vmm == "qemu"
        assert len(guest.name or "") <= 200
