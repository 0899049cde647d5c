"""What tscwatch finds in a command line is what QEMU itself reports over QMP.

QEMU emulates the CPU, because KVM refuses most frequencies on a host that does not scale.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guests import QEMU, Qemu
from tscwatch.host.inventory import Inventory
from tscwatch.model import Guest
from tscwatch.vmm import qemu_options

ONE, TWO = "6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11", "7E0B1D3A-5A43-4A4C-9A0E-0D6A4C3F7B11"
COMMON = ("-S", "-display", "none", "-nodefaults", "-m", "16")
CONFIGS = {
    "all.cfg": f"""
# a comment
[name]
  guest = "of a file, with a comma"
[machine]
  type = "q35"
  smp.cpus = "1"
[smp-opts]
  maxcpus = "8"
[global]
  driver = "x86_64-cpu"
  property = "tsc-frequency"
  value = "0x600000"
[smbios]
  type = "1"
  uuid = "{ONE}"
[object "random"]
  qom-type = "rng-random"
""",
    "some.cfg": '[smp-opts]\ncpus = "3"\n[machine]\nusb = "off"\n[name]\nprocess = "other"\n',
}
FRAGMENTS = [
    ("-name", "a"),
    ("--name", "guest=b,,c,process=x"),
    ("-name", "debug-threads=on"),
    ("-name", "guest="),
    ("-name", ""),
    ("-name", '{"guest":"a"}'),
    ("-uuid", ONE),
    ("-smbios", f"type=1,uuid={TWO}"),
    ("-smbios", "type=0x1,serial=x"),
    ("-smbios", "type=2,serial=x"),
    ("-M", "q35"),
    ("-machine", "type=pc,usb=off"),
    ("--machine", "usb=off"),
    ("-M", "smp.maxcpus=8"),
    ("-machine", "pc,smp.cpus=2"),
    ("-smp", "2"),
    ("-smp", "0x4,maxcpus=8"),
    ("-smp", "maxcpus=010"),
    ("-smp", "sockets=2,cores=2,threads=2,maxcpus=8"),
    ("-smp", "cpus=1"),
    ("-cpu", "qemu64"),
    ("-cpu", "qemu64,tsc-frequency=0x9abcdef0,-vmx"),
    ("-cpu", "max"),
    ("-cpu", "max,tsc_freq=2.596148G"),
    ("-cpu", "Skylake-Client,,tsc-freq=3M,tsc_frequency=4000000"),
    ("-cpu", "Skylake-Client"),
    ("-global", "cpu.tsc-frequency=2000000"),
    ("-global", "driver=max-x86_64-cpu,property=tsc-frequency,value=3000000"),
    ("-global", "qemu64-x86_64-cpu.tsc-frequency=05000000"),
    ("-global", "Skylake-Client-x86_64-cpu.tsc-frequency=7000000"),
    ("-readconfig", "all.cfg"),
    ("-readconfig", "some.cfg"),
    ("-object", '{"qom-type":"rng-random","id":"json"}'),
    ("-pidfile", "-name"),
    ("-D", "-uuid"),
    ("-no-reboot",),
    ("--nographic",),
]


def found(qemu: Qemu) -> Guest:
    return Inventory().identify(qemu.pid, "")


def reported(qemu: Qemu) -> Guest:
    """Return what QEMU reports of itself, in the form of what is found."""
    machine = str(qemu.execute("qom-get", path="/machine", property="type"))
    path = qemu.execute("query-cpus-fast")[0]["qom-path"]
    hertz = qemu.execute("qom-get", path=path, property="tsc-frequency")
    uuid = qemu.execute("query-uuid")["UUID"]
    return Guest(
        qemu.pid,
        "qemu",
        qemu.execute("query-name").get("name") or None,
        uuid if uuid.strip("0-") else None,
        machine[: -len("-machine")],
        hertz // 1000 or None,
        max_vcpus=len(qemu.execute("query-hotpluggable-cpus")),
    )


def named_in_full(guest: Guest, qemu: Qemu) -> Guest:
    """Replace a machine's alias, or the default machine, by the machine's name."""
    for machine in qemu.execute("query-machines"):
        if guest.machine == machine.get("alias", "") or (
            guest.machine is None and machine.get("is-default")
        ):
            return guest._replace(machine=machine["name"])
    return guest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qemu")
    for name, text in CONFIGS.items():
        (directory / name).write_text(text)
    return directory


def check(directory: Path, arguments: Sequence[str], accelerator: str = "tcg") -> None:
    command = (QEMU, "-accel", accelerator, *COMMON, *arguments)
    with Qemu(directory, "qemu", command) as qemu:
        assert named_in_full(found(qemu), qemu) == reported(qemu)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=2, max_size=8, unique=True))
def test_options_in_any_combination(directory: Path, fragments: list[tuple[str, ...]]) -> None:
    check(directory, [argument for fragment in fragments for argument in fragment])


@pytest.mark.parametrize(
    "frequency",
    [
        "tsc-freq=0x10k",
        "tsc-freq=010k",
        "tsc-freq=0x9ABCDEB",
        "tsc-freq=1.k",
        "tsc-freq=2.5964999999g",
        "tsc-freq=2000000B",
        "tsc-freq=1P",
        "tsc-freq= +5M",
        "tsc-frequency=+5000000",
        "tsc-frequency=010000000",
        "tsc-frequency=999",
    ],
)
def test_numbers(directory: Path, frequency: str) -> None:
    check(directory, ["-cpu", f"qemu64,{frequency}"])


@pytest.mark.parametrize("smp", ["sockets=2,dies=2,threads=2", "3", "cpus=0x3", "010,sockets=2"])
def test_topologies(directory: Path, smp: str) -> None:
    check(directory, ["-M", "q35", "-smp", smp])


def test_kvms_guests_are_read_likewise(directory: Path) -> None:
    """Without a frequency KVM's default is reported, so there is one, which KVM tolerates."""
    with Qemu(directory, "default", (QEMU, "-accel", "kvm", *COMMON, "-cpu", "qemu64")) as qemu:
        khz = reported(qemu).tsc_khz
    assert khz is not None
    check(directory, ["-global", f"cpu.tsc-frequency={(khz + 26) * 1000:#x}"], "kvm")
    check(directory, ["-cpu", f"qemu64,tsc-freq={(khz + 26) / 1e6:.6f}G"], "kvm")


def test_a_configuration_file_that_is_gone(directory: Path) -> None:
    config = directory / "gone.cfg"
    config.write_text('[smp-opts]\ncpus = "1"\nmaxcpus = "8"\n')
    command = (
        QEMU,
        "-accel",
        "tcg",
        *COMMON,
        "-name",
        "a",
        "-smp",
        "2",
        "-readconfig",
        config.name,
    )
    with Qemu(directory, "gone", command) as qemu:
        assert found(qemu) == Guest(qemu.pid, "qemu", "a", max_vcpus=8)
        config.unlink()
        assert found(qemu) == Guest(qemu.pid, "qemu", "a", max_vcpus=None)


def test_which_options_have_an_argument() -> None:
    """QEMU reports the first argument that is no option; an option's own argument is none."""
    text = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"^--?([\w-]+)", text, re.MULTILINE))
    assert len(names) > 80
    for name in sorted(names):
        arguments = [f"-{name}", "-first", "-second"]
        process = subprocess.run([QEMU, *arguments], capture_output=True, text=True, check=False)
        has_argument = "-second: invalid option" in process.stderr
        assert has_argument or "-first: invalid option" in process.stderr
        assert dict(qemu_options(arguments))[name] == ("-first" if has_argument else ""), name


def test_the_ancestors_of_the_cpu_models(directory: Path) -> None:
    with Qemu(directory, "types", (QEMU, "-M", "none", *COMMON)) as qemu:

        def descendants(name: str) -> set[str]:
            return {each["name"] for each in qemu.execute("qom-list-types", implements=name)}

        assert {"host-x86_64-cpu", "max-x86_64-cpu"} <= descendants("max-x86_64-cpu")
        models = {name for name in descendants("cpu") if name.endswith("-x86_64-cpu")}
        assert models <= descendants("x86_64-cpu")
        for name in models - {"max-x86_64-cpu"}:
            assert descendants(name) <= {name}


LOADER = "/lib64/ld-linux-x86-64.so.2"


@pytest.mark.parametrize(
    ("executable", "argv"),
    [
        (None, ["/usr/bin/kvm"]),
        (QEMU, ["another-name"]),
        (LOADER, [LOADER, f"/usr/bin/{QEMU}"]),
        (LOADER, ["another-name", "--library-path", "/usr/lib", f"/usr/bin/{QEMU}"]),
    ],
)
def test_an_executable_by_any_name(
    directory: Path, executable: Optional[str], argv: list[str]
) -> None:
    options = ("-M", "none", "-accel", "kvm", *COMMON, "-name", "a")
    with Qemu(directory, "named", [*argv, *options], executable) as qemu:
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")


@pytest.mark.parametrize(
    ("file", "name"),
    [(".qemu-system-x86_64-wrapped", "another-name"), ("kvm", "another-name"), ("renamed", QEMU)],
)
def test_an_executable_that_was_renamed_and_one_that_was_deleted(
    directory: Path, file: str, name: str
) -> None:
    program = directory / file
    shutil.copy(f"/usr/bin/{QEMU}", program)
    command = (name, "-M", "none", "-accel", "kvm", *COMMON, "-name", "a")
    with Qemu(directory, "copy", command, str(program)) as qemu:
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")
        program.unlink()
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")
