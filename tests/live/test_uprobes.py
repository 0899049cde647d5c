"""Uprobes on the functions of a QEMU with symbols, in whose place a test program runs."""

from __future__ import annotations

import lzma
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.tiny_vmm import until_closed
from tscwatch.linux import elf
from tscwatch.vmm import QEMU

SOURCE = Path(__file__).parents[1] / "support/qemu_functions.c"


def build(directory: Path, *flags: str, name: str = "qemu-system-symbols") -> Path:
    """Compile the program and return its path; its name is recognised as QEMU's."""
    program = directory / name
    subprocess.run(["gcc", "-O1", *flags, "-o", str(program), str(SOURCE)], check=True)
    return program


@contextmanager
def running(program: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program; yield it once it has created its VM."""
    vmm = subprocess.Popen(
        [str(program), "-name", f"guest={name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with until_closed(vmm):
        yield vmm


def execute(vmm: subprocess.Popen[str], *commands: str) -> None:
    """Let the program execute commands: boot, complete, plug or load."""
    assert vmm.stdin is not None
    assert vmm.stdout is not None
    for line in commands:
        vmm.stdin.write(line + "\n")
        assert vmm.stdout.readline() == "done\n"


def wait_for_symbols(observer: Observer, program: Path) -> None:
    wait_for(lambda: f"{program} has symbols" in observer.log.read_text(), "its symbols")


def test_symbols_confirm_what_the_sequence_proves(observer: Observer, tmp_path: Path) -> None:
    program, name = build(tmp_path), f"{tmp_path.name}true"
    with running(program, name) as vmm:
        wait_for_symbols(observer, program)
        execute(vmm, "boot", "boot", "complete", "plug", "load")
        observer.wait_for_calls(name, 2 + 4 + 3 + 6)
        places = [(c["phase"], c["step"]) for c in observer.calls(name)]
        assert places == [
            *[("boot", "init")] * 2,
            *[("boot", "post_init")] * 4,
            ("prelaunch", "init"),
            *[("prelaunch", "post_init")] * 2,
            *[("loadvm", "post_init")] * 6,
        ]
        assert [call for call in observer.calls(name) if call["evidence"][-1] != "symbols"] == []
    assert [item for item in observer.contradictions() if item["vm"] == name] == []


def test_a_sequence_that_symbols_contradict(observer: Observer, tmp_path: Path) -> None:
    """Without symbols, the first write of all vCPUs counts as the machine's completion."""
    program, name = build(tmp_path), f"{tmp_path.name}false"
    before = observer.series("contradictions_total")['claim="phase"']
    with running(program, name) as vmm:
        wait_for_symbols(observer, program)
        execute(vmm, "boot", "load")
        observer.wait_for_calls(name, 3)
        ours = [item for item in observer.contradictions() if item["vm"] == name]
        assert {item["claim"] for item in ours} == {"phase"}
        assert "boot/post_init" in ours[0]["detail"]
        assert "load_snapshot" in ours[0]["detail"]
        assert "symbols" not in observer.calls(name)[-1]["evidence"]
        assert observer.series("contradictions_total")['claim="phase"'] == before + len(ours)


def test_a_running_guest_is_known_by_its_symbols_too(tmp_path: Path) -> None:
    program = build(tmp_path)
    with running(program, "early") as vmm:
        execute(vmm, "boot", "complete")
        with Observer(tmp_path, "--json") as observer:
            wait_for_symbols(observer, program)
            execute(vmm, "plug")
            observer.wait_for_calls("early", 3)
            assert {c["step"] for c in observer.calls("early")} == {"init", "post_init"}
            assert all(c["evidence"][-1] == "symbols" for c in observer.calls("early"))


def test_nothing_is_left_in_the_executable(tmp_path: Path) -> None:
    program = build(tmp_path, name=".qemu-system-symbols-wrapped")  # as on NixOS
    probes = Path("/sys/kernel/tracing/uprobe_events")
    with Observer(tmp_path, "--json") as observer, running(program, "brief"):
        wait_for_symbols(observer, program)
        ours = f"_{observer.process.pid}/"
        assert ours in probes.read_text()
        observer.stop()
        assert ours not in probes.read_text()


FOUND = sorted(
    {
        "kvm_arch_init_vcpu",
        "do_kvm_cpu_synchronize_post_init",
        "qdev_machine_creation_done",
        "qdev_device_add_from_qdict",
        "load_snapshot",
    }
)


@pytest.mark.parametrize("flags", [[], ["-static"], ["-no-pie"]])
def test_functions_are_where_the_symbol_table_has_them(flags: list[str], tmp_path: Path) -> None:
    program = build(tmp_path, *flags)
    found = elf.function_offsets(program, QEMU.functions)
    assert sorted(found) == FOUND
    code = subprocess.run(
        ["objdump", "-d", "-F", str(program)], capture_output=True, text=True, check=True
    ).stdout
    for name, offset in found.items():
        assert f"<{name}> (File Offset: {offset:#x}):" in code


def test_a_stripped_executable_has_no_functions(tmp_path: Path) -> None:
    assert elf.function_offsets(build(tmp_path, "-s"), QEMU.functions) == {}


def test_minidebuginfo(tmp_path: Path) -> None:
    program = build(tmp_path)
    full = elf.function_offsets(program, QEMU.functions)
    debug = tmp_path / "debug"
    subprocess.run(["objcopy", "--only-keep-debug", str(program), str(debug)], check=True)
    debug.write_bytes(lzma.compress(debug.read_bytes()))
    subprocess.run(["strip", str(program)], check=True)
    subprocess.run(
        ["objcopy", "--add-section", f".gnu_debugdata={debug}", str(program)], check=True
    )
    assert elf.function_offsets(program, QEMU.functions) == full


def test_a_separate_debug_file(tmp_path: Path) -> None:
    program = build(tmp_path, "-Wl,--build-id=0xabcdef01")
    full = elf.function_offsets(program, QEMU.functions)
    debug = tmp_path / "files/ab/cdef01.debug"
    debug.parent.mkdir(parents=True)
    subprocess.run(["objcopy", "--only-keep-debug", str(program), str(debug)], check=True)
    subprocess.run(["strip", str(program)], check=True)
    assert elf.function_offsets(program, QEMU.functions, tmp_path) == {}
    assert elf.function_offsets(program, QEMU.functions, tmp_path / "files") == full


@pytest.mark.parametrize("cut", [0, 5, 63, 64, 200, 4000, 9000, 15000])
def test_a_torn_executable_has_no_functions(cut: int, tmp_path: Path) -> None:
    program = build(tmp_path)
    program.write_bytes(program.read_bytes()[:cut])
    assert elf.function_offsets(program, QEMU.functions) == {}
