"""Which executables get uprobes, and what becomes of the evidence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, cast

import pytest

from tests.pure.test_elf import Symbol, image, symbols
from tests.pure.test_ftrace import HEAD
from tests.pure.test_tracefs import FREE_PID
from tests.support.fake_tracefs import FakeTracefs
from tscwatch.capture import Source, crosscheck
from tscwatch.capture.crosscheck import CrossCheckedSource
from tscwatch.linux import kvm, tracefs
from tscwatch.model import Event, Health

STEP, CAUSE = "kvm_arch_init_vcpu", "load_snapshot"


class Quiet:
    """A source that has only the events that a test gives it."""

    is_behind = False

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []

    def poll(self, _timeout: float) -> list[Event]:
        return self.batches.pop(0) if self.batches else []

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        pass

    def restore(self) -> list[Event]:
        return []

    def health(self) -> Health:
        return Health({"kvm_vcpu_ioctl": True}, lost={("kernel", "ring_full"): 3})


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> list[Optional[int]]:
    """Let the only element be KVM's generation."""
    generation: list[Optional[int]] = [7]
    monkeypatch.setattr(kvm, "module_generation", lambda: generation[0])
    return generation


@pytest.fixture
def checked(
    quiet: Quiet,
    generation: list[Optional[int]],
    fake_tracefs: FakeTracefs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> CrossCheckedSource:
    monkeypatch.setattr(crosscheck, "PROC", tmp_path / "proc")
    return CrossCheckedSource(cast(Source, quiet), fake_tracefs.root)


def executable(root: Path, name: str, *functions: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(symbols(*map(Symbol, functions))))
    return path


def run(root: Path, pid: int, path: Path) -> None:
    """Let a process run an executable."""
    link = root / f"proc/{pid}/exe"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)


def probed(fake: FakeTracefs) -> list[str]:
    """Return the name and the offset of each uprobe."""
    definitions = [definition.split() for definition in fake.defined("uprobe_events")]
    assert all(path.startswith("/proc/self/fd/") for _, _, path in definitions)
    return [f"{name} {path.rpartition(':')[2]}" for _, name, path in definitions]


# The executables


def test_each_executable_that_has_symbols_is_probed_once(
    checked: CrossCheckedSource, quiet: Quiet, fake_tracefs: FakeTracefs, tmp_path: Path
) -> None:
    first = executable(tmp_path, "a/qemu-system-x86_64", STEP, "main", CAUSE)
    others = [
        executable(tmp_path, "a/cloud-hypervisor", STEP),
        executable(tmp_path, "a/other", STEP),
        executable(tmp_path, "b/qemu-kvm", CAUSE),  # no call follows it at once
        executable(tmp_path, "c/qemu-kvm"),
    ]
    last = executable(tmp_path, "d/qemu-kvm", STEP)
    for pid, path in enumerate([first, first, *others, last], 101):
        run(tmp_path, pid, path)
    checked.report_existing([(pid, 3) for pid in range(100, 107)])  # 100 has ended
    expected = [f"{STEP}__1 0x1000", f"{CAUSE}__1 0x1000"]
    assert probed(fake_tracefs) == expected
    quiet.batches = [[Event(1, "vm_create", "kvm:1", 107, 107, "qemu")]]
    checked.poll(0)
    assert probed(fake_tracefs) == [*expected, f"{STEP}__4 0x1000"]


def test_a_path_is_no_part_of_a_definition(
    checked: CrossCheckedSource, fake_tracefs: FakeTracefs, tmp_path: Path
) -> None:
    """The user who executes a program chooses its path, which could contain other definitions."""
    for pid, name in enumerate(("a:0x1\n-:b\n#", "a:0x1 #", os.fsdecode(b"\xff")), 101):
        run(tmp_path, pid, executable(tmp_path, f"{name}/qemu-kvm", STEP))
        checked.report_existing([(pid, 3)])
    assert probed(fake_tracefs) == [f"{STEP}__{number} 0x1000" for number in (1, 2, 3)]


def test_the_uprobes_are_on_the_file_that_is_executed(
    checked: CrossCheckedSource,
    fake_tracefs: FakeTracefs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another file can be at its path when the kernel looks it up."""
    path = executable(tmp_path, "a/qemu-kvm", STEP)
    run(tmp_path, 101, path)
    wanted = path.stat().st_ino
    append, looked_up = fake_tracefs.append, []

    def replace_and_append(file: Path, line: str) -> None:
        path.rename(path.with_name("moved"))
        executable(tmp_path, "a/qemu-kvm", STEP)
        looked_up.append(os.stat(line.split()[1].rpartition(":")[0]).st_ino)  # noqa: PTH116
        append(file, line)

    monkeypatch.setattr(tracefs, "_append", replace_and_append)
    checked.report_existing([(101, 3)])
    assert looked_up == [wanted]
    assert path.stat().st_ino != wanted


def test_files_of_two_devices_may_have_one_inode_number(
    checked: CrossCheckedSource,
    fake_tracefs: FakeTracefs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two executables, and one in a container whose path on the host is another file's."""
    paths = [executable(tmp_path, f"{name}/qemu-kvm", STEP) for name in "abc"]
    on_host = dict(zip(paths, (1, 2, 3)))
    opened = dict(zip((path.stat().st_ino for path in paths), (1, 2, 4)))
    stat, fstat = Path.stat, os.fstat

    def on_device(real: os.stat_result, device: int) -> os.stat_result:
        return os.stat_result((real.st_mode, 7, device, *real[3:10]))

    def of_path(path: Path, **more: Any) -> os.stat_result:
        real = stat(path, **more)
        return on_device(real, on_host[path]) if path in on_host else real

    def of_file(file: int) -> os.stat_result:
        real = fstat(file)
        return on_device(real, opened[real.st_ino]) if real.st_ino in opened else real

    monkeypatch.setattr(Path, "stat", of_path)
    monkeypatch.setattr(os, "fstat", of_file)
    for pid, path in enumerate(paths, 101):
        run(tmp_path, pid, path)
    checked.report_existing([(pid, 3) for pid in (101, 102, 103)])
    assert probed(fake_tracefs) == [f"{STEP}__1 0x1000", f"{STEP}__2 0x1000"]


def test_the_number_of_executables_is_bounded(
    checked: CrossCheckedSource,
    fake_tracefs: FakeTracefs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crosscheck, "_MAX_EXECUTABLES", 2)
    for pid in (101, 102, 103):
        run(tmp_path, pid, executable(tmp_path, f"{pid}/qemu-kvm", STEP))
        checked.report_existing([(pid, 3)])
    assert len(probed(fake_tracefs)) == 2


# The evidence


def test_evidence_that_cannot_be_parsed_is_counted(
    checked: CrossCheckedSource, fake_tracefs: FakeTracefs
) -> None:
    head = HEAD.replace("30916", str(FREE_PID))
    fake_tracefs.print(
        head + f"{STEP}__12: (0x5581a2b3c4d5)",
        head + "kvm_track_tsc: vcpu_id 2 masterclock 1 offsetmatched 1 nr_online 3 hostclock tsc",
        head + "kvm_track_tsc",
        "CPU:3 [LOST 5 EVENTS]",
        head + "kvm_update_master_clock: masterclock 0 hostclock hpet offsetmatched 0",
    )
    entered, tracked, updated = checked.poll(0)
    assert (entered.op, entered.function) == ("entered", STEP)
    assert (tracked.op, tracked.vcpu, tracked.master_clock) == ("tsc_tracked", 2, True)
    assert (tracked.matched_vcpus, tracked.online_vcpus) == (1, 3)
    assert (updated.op, updated.vcpu, updated.master_clock) == ("clock_updated", None, False)
    assert {(event.vm, event.pid, event.tid) for event in (tracked, updated, entered)} == {
        ("", FREE_PID, FREE_PID)
    }
    assert checked.health().lost == {
        ("kernel", "ring_full"): 3,
        ("kernel", "witness_full"): 5,
        ("kernel", "witness_disabled"): 0,
        ("capture", "witness_unreadable"): 1,
    }


def test_the_tracepoints_follow_the_module(
    checked: CrossCheckedSource, fake_tracefs: FakeTracefs, generation: list[Optional[int]]
) -> None:
    names = ("kvm_track_tsc", "kvm_update_master_clock")

    def attached() -> set[bool]:
        probes = checked.health().probes
        assert probes.pop("kvm_vcpu_ioctl")
        assert tuple(probes) == names
        return set(probes.values())

    assert attached() == {True}
    for name in names:
        fake_tracefs.remove_event(f"kvm/{name}")
    generation[0] = None
    checked.restore()
    assert attached() == {False}
    generation[0] = 8
    checked.restore()  # it is gone again by now
    assert attached() == {False}
    for name in names:
        fake_tracefs.add_event(f"kvm/{name}")
    checked.restore()
    assert attached() == {True}
    for name in names:
        assert (fake_tracefs.instance() / f"events/kvm/{name}/enable").read_text() == "1"
    assert checked.health().lost["kernel", "witness_disabled"] == 0
    (fake_tracefs.instance() / "events/kvm/kvm_track_tsc/enable").write_text("0")
    checked.restore()
    assert attached() == {False}
    assert checked.health().lost["kernel", "witness_disabled"] == 1
