"""Trace instances: what they record, what is put back, what is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.fake_tracefs import NO_FIELD, FakeTracefs
from tscwatch.clock import unix_ns
from tscwatch.errors import TracefsMissing
from tscwatch.linux import tracefs
from tscwatch.linux.process import start_time
from tscwatch.linux.trace_pipe import Record
from tscwatch.linux.tracefs import TraceInstance, TscCounter, clear_stale, find_tracefs

_append = tracefs._append  # what the fixture replaces
FREE_PID = 1 << 23  # above the kernel's limit of process ids


@pytest.fixture
def trace(fake_tracefs: FakeTracefs) -> TraceInstance:
    return TraceInstance(fake_tracefs.root, "calls", 64)


def line(serial: int, what: str = "sys_ioctl -> 0x1") -> str:
    return f" qemu-30916   (  30916) [001] .....  0.{serial:06}: {what}"


def times(records: list[Record | int]) -> list[int]:
    """Return the microseconds of records from :func:`line`, and lost ones as negative numbers."""
    return [
        -record if isinstance(record, int) else (record.ts - unix_ns(0)) // 1000
        for record in records
    ]


def test_it_is_found_at_the_first_mount_point_that_has_events(tmp_path: Path) -> None:
    for name in ("empty", "first", "second"):
        (tmp_path / name).mkdir()
    for name in ("first", "second"):
        (tmp_path / name / "events").mkdir()
    places = [tmp_path / name for name in ("none", "empty", "first", "second")]
    assert find_tracefs(places) == tmp_path / "first"
    with pytest.raises(TracefsMissing, match="mount -t tracefs"):
        find_tracefs(places[:2])


@pytest.mark.parametrize("has_percent", [True, False])
def test_an_instance_has_its_settings(fake_tracefs: FakeTracefs, has_percent: bool) -> None:
    if not has_percent:
        (fake_tracefs.root / "new/buffer_percent").unlink()
    TraceInstance(fake_tracefs.root, "calls", 64)
    directory = fake_tracefs.instance()
    assert directory.name == f"tscwatch-calls-{start_time(os.getpid())}-{os.getpid()}"
    expected = {
        "trace_clock": "boot",
        "options/record-tgid": "1",
        "set_event_pid": "",
        "tracing_on": "1",
        "buffer_size_kb": "64",
    }
    assert {name: (directory / name).read_text() for name in expected} == expected
    percent = directory / "buffer_percent"
    assert (percent.read_text() if percent.exists() else None) == ("0" if has_percent else None)


def test_an_instance_that_the_kernel_refuses_is_removed_again(fake_tracefs: FakeTracefs) -> None:
    for missing in ("tracing_on", "trace_pipe"):
        (fake_tracefs.root / "new" / missing).unlink()
        with pytest.raises(FileNotFoundError):
            TraceInstance(fake_tracefs.root, "calls", 64)
        assert list((fake_tracefs.root / "instances").iterdir()) == []


# Reading


def test_records_that_cannot_be_parsed_are_counted(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    fake_tracefs.print(line(1), "", line(2)[:-20], line(3, "something else"), line(4))
    assert times(list(trace.read())) == [1, 4]
    assert (trace.unreadable, trace.lost) == (3, 0)


def test_lost_records_are_yielded_at_their_place_and_counted(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    fake_tracefs.print(line(1), "CPU:1 [LOST 7 EVENTS]", line(2), "CPU:10 [LOST 12 EVENTS]")
    assert times(list(trace.read())) == [1, -7, 2, -12]
    assert (trace.unreadable, trace.lost) == (0, 19)


def test_a_record_may_be_split_between_pages(
    fake_tracefs: FakeTracefs, trace: TraceInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefs, "_READ_SIZE", 100)
    fake_tracefs.print(line(1), line(2), line(3))
    assert times(list(trace.read())) == [1, 2, 3]
    with (fake_tracefs.instance() / "trace_pipe").open("a") as pipe:
        pipe.write(line(4)[:-5])
        pipe.flush()
        assert times(list(trace.read())) == []
        pipe.write(line(4)[-5:] + "\n")
    assert times(list(trace.read())) == [4]
    assert trace.unreadable == 0


def test_a_threads_name_that_is_not_utf_8_is_escaped(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    raw = line(1).encode().replace(b"qemu", b"q\xffmu")
    (fake_tracefs.instance() / "trace_pipe").write_bytes(raw + b"\n")
    (record,) = trace.read()
    assert isinstance(record, Record)
    assert record.comm == r"q\xffmu"


def test_one_call_reads_a_limited_number_of_pages(
    fake_tracefs: FakeTracefs, trace: TraceInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefs, "_READ_SIZE", len(line(0)) + 1)
    monkeypatch.setattr(tracefs, "_MAX_READS", 3)
    fake_tracefs.print(*map(line, range(10)))
    assert times(list(trace.read())) == [0, 1, 2]
    assert trace.is_behind
    assert times(list(trace.read(until=unix_ns(8_000)))) == [3, 4, 5, 6, 7, 8]
    assert trace.is_behind
    assert times(list(trace.read())) == [9]
    assert not trace.is_behind


def test_an_empty_pipe_is_no_error(trace: TraceInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without O_NONBLOCK, reading it would wait."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setattr(trace, "_pipe", reader)
    assert list(trace.read()) == []
    assert not trace.is_behind
    begin = time.monotonic()
    trace.wait(0.05)
    assert time.monotonic() - begin > 0.04
    os.write(writer, f"{line(1)}\n".encode())
    trace.wait(10)
    assert times(list(trace.read())) == [1]
    os.close(writer)


# Events


def test_events_are_enabled_with_their_filters(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    trace.define("kprobe_events", "enter", "p", "kvm:f cmd=%si:x32", "cmd==0x1")
    trace.define("kprobe_events", "leave", "r64", "kvm:f ret=$retval:s64")
    assert fake_tracefs.defined("kprobe_events") == [
        "p enter kvm:f cmd=%si:x32",
        "r64 leave kvm:f ret=$retval:s64",
    ]
    assert fake_tracefs.defined("uprobe_events") == []
    for name, filter_ in (("enter", "cmd==0x1"), ("leave", "none")):
        assert (fake_tracefs.event(name) / "enable").read_text() == "1"
        assert (fake_tracefs.event(name) / "filter").read_text() == filter_
    assert trace.has_defined("enter")
    trace.drop("enter")
    assert not trace.has_defined("enter")
    assert fake_tracefs.defined("kprobe_events") == ["r64 leave kvm:f ret=$retval:s64"]
    assert trace.has("kvm")
    assert not trace.has("sched")


def test_an_event_that_cannot_be_enabled_can_still_be_dropped(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        trace.define("kprobe_events", "enter", "p", "f", NO_FIELD)
    assert trace.has_defined("enter")
    trace.drop("enter")
    assert fake_tracefs.defined("kprobe_events") == []
    assert not trace.restore()


def test_what_nobody_has_changed_needs_no_restoring(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    (fake_tracefs.instance() / "trace_clock").write_text("local global [boot] x86-tsc")  # as shown
    trace.enable("kvm/kvm_track_tsc")
    trace.define("kprobe_events", "enter", "p", "f", "cmd==0x1")
    (fake_tracefs.event("enter") / "enable").write_text("1*\n")  # with a trigger
    assert not trace.restore()
    assert (trace.gaps, trace.is_complete) == (0, True)


@pytest.mark.parametrize(
    ("file", "changed", "right"),
    [
        ("tracing_on", "0", "1"),
        ("trace_clock", "[local] boot", "boot"),
        ("set_event_pid", "7", ""),
        ("options/record-tgid", "0", "1"),
        ("events/kvm/kvm_track_tsc/enable", "0", "1"),
        ("events/kvm/kvm_track_tsc/filter", "vcpu_id==1", "none"),
    ],
)
def test_what_somebody_else_has_changed_is_restored(
    fake_tracefs: FakeTracefs,
    trace: TraceInstance,
    caplog: pytest.LogCaptureFixture,
    file: str,
    changed: str,
    right: str,
) -> None:
    trace.enable("kvm/kvm_track_tsc")
    (fake_tracefs.instance() / file).write_text(changed)
    assert trace.restore()
    assert (fake_tracefs.instance() / file).read_text() == right
    assert (trace.gaps, trace.is_complete) == (1, False)
    assert "(restored)" in caplog.text
    assert not trace.restore()
    assert (trace.gaps, trace.is_complete) == (1, True)


def test_a_gap_that_lasts_is_counted_and_logged_once(
    fake_tracefs: FakeTracefs, trace: TraceInstance, caplog: pytest.LogCaptureFixture
) -> None:
    trace.define("kprobe_events", "enter", "p", "f")
    group = fake_tracefs.event("enter").parent.name
    fake_tracefs.remove_event(f"{group}/enter")
    fake_tracefs.refused = "enter"
    for _ in range(3):
        assert trace.restore()
    assert (trace.gaps, trace.is_complete) == (1, False)
    assert caplog.text.count("cannot be restored: Invalid argument") == 1
    fake_tracefs.refused = ""
    assert trace.restore()
    assert not trace.restore()
    assert trace.gaps == 1
    assert fake_tracefs.defined("kprobe_events") == ["p enter f"]
    fake_tracefs.remove_event(f"{group}/enter")
    assert trace.restore()
    assert trace.gaps == 2


def test_a_uprobe_that_was_removed_is_not_defined_again(
    fake_tracefs: FakeTracefs, trace: TraceInstance, caplog: pytest.LogCaptureFixture
) -> None:
    """Another file can be at its path by now."""
    trace.define("uprobe_events", "f__1", "p", "/usr/bin/qemu:0x10")
    fake_tracefs.remove_event(f"{fake_tracefs.event('f__1').parent.name}/f__1")
    assert trace.restore()
    assert "no longer recorded" in caplog.text
    assert fake_tracefs.defined("uprobe_events") == []
    assert not trace.restore()
    trace.close()


def test_an_event_that_disappears_with_its_module_is_not_off(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    trace.enable("kvm/kvm_track_tsc")
    fake_tracefs.remove_event("kvm/kvm_track_tsc")
    assert not trace.restore()
    trace.forget("kvm/kvm_track_tsc")
    fake_tracefs.add_event("kvm/kvm_track_tsc")  # the module was loaded again, its events are off
    assert not trace.restore()


def test_hits_that_were_missed_are_those_of_its_own_kprobes(
    fake_tracefs: FakeTracefs, trace: TraceInstance
) -> None:
    assert trace.missed() == 0  # the kernel has no such file
    trace.define("kprobe_events", "enter", "p", "f")
    own = fake_tracefs.event("enter").parent.name
    profile = [
        f"  {own}/enter      12      3",
        f"  {own}/leave      10      4",
        f"  {own}x/enter     99      50",
        "  other/enter       99      60",
    ]
    (fake_tracefs.root / "kprobe_profile").touch()
    (fake_tracefs.root / "kprobe_profile").write_text("\n".join(profile))
    assert trace.missed() == 7


def test_closing_removes_only_its_own(fake_tracefs: FakeTracefs, trace: TraceInstance) -> None:
    other = TraceInstance(fake_tracefs.root, "witness", 64)
    other.define("uprobe_events", "f__1", "p", "/usr/bin/qemu:0x10")
    trace.define("kprobe_events", "enter", "p", "f")
    trace.define("kprobe_events", "leave", "r", "f")
    fake_tracefs.remove_event(f"{tracefs._group(*tracefs._OWNER)}/enter")  # somebody else did
    trace.close()
    trace.close()
    assert fake_tracefs.defined("kprobe_events") == []
    assert fake_tracefs.defined("uprobe_events") == ["p f__1 /usr/bin/qemu:0x10"]
    assert fake_tracefs.instance().name.startswith("tscwatch-witness-")


def test_an_instance_that_another_process_has_open_stays(
    fake_tracefs: FakeTracefs,
    trace: TraceInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    trace.define("kprobe_events", "enter", "p", "f")
    (fake_tracefs.instance() / "busy").touch()
    (fake_tracefs.instance() / "events/enable").write_text("1")
    trace.close()
    assert sum(waits) == pytest.approx(4.9)
    assert "cannot be removed" in caplog.text
    assert (fake_tracefs.instance() / "events/enable").read_text() == "0"
    assert fake_tracefs.defined("kprobe_events") == []


def test_an_instance_is_removed_once_it_is_closed(
    fake_tracefs: FakeTracefs, trace: TraceInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = fake_tracefs.instance() / "busy"
    busy.touch()
    monkeypatch.setattr(time, "sleep", lambda _: busy.unlink())
    trace.close()
    assert list((fake_tracefs.root / "instances").iterdir()) == []


# The host's TSC


def test_the_hosts_tsc(fake_tracefs: FakeTracefs) -> None:
    counter = TscCounter(fake_tracefs.root)
    assert counter.read() == 12345
    assert (fake_tracefs.instance() / "trace_clock").read_text() == "x86-tsc"
    assert (fake_tracefs.instance() / "buffer_size_kb").read_text() == "1"
    stats = fake_tracefs.instance() / "per_cpu/cpu0/stats"
    stats.write_text("now ts: 23456\n")
    (fake_tracefs.instance() / "trace_clock").write_text("[local] x86-tsc")  # somebody else did
    assert counter.read() == 23456
    assert (fake_tracefs.instance() / "trace_clock").read_text() == "x86-tsc"
    stats.write_text("")  # CPU 0 is offline
    assert counter.read() is None
    counter.close()
    counter.close()
    assert counter.read() == 12345


# What ended processes have left


def test_what_ended_processes_have_left_is_removed(fake_tracefs: FakeTracefs) -> None:
    pid, start = os.getpid(), start_time(os.getpid()) or 0
    ended = [(5, FREE_PID), (start + 1, pid)]  # the id is free, or is another process's
    others = [
        "tscwatch-calls",
        "tscwatch-5",
        f"mine-calls-5-{FREE_PID}",
        f"tscwatch-calls-{start}-{pid}",
    ]
    for owner in ended:
        for label in ("calls", "witness", "tsc"):
            (fake_tracefs.root / "instances/tscwatch-{}-{}-{}".format(label, *owner)).mkdir()
        fake_tracefs.append(
            fake_tracefs.root / "kprobe_events", "p:tscwatch_{}_{}/enter f".format(*owner)
        )
        fake_tracefs.append(
            fake_tracefs.root / "uprobe_events", "p:tscwatch_{}_{}/f__1 /q:0x1".format(*owner)
        )
    for name in others:
        (fake_tracefs.root / "instances" / name).mkdir()
    for group in (f"tscwatch_{start}_{pid}", "tscwatch_5", f"mine_5_{FREE_PID}"):
        fake_tracefs.append(fake_tracefs.root / "kprobe_events", f"p:{group}/enter f")
    clear_stale(fake_tracefs.root)
    assert sorted(path.name for path in (fake_tracefs.root / "instances").iterdir()) == sorted(
        others
    )
    assert len(fake_tracefs.defined("kprobe_events")) == 3
    assert fake_tracefs.defined("uprobe_events") == []


def test_an_instance_that_cannot_be_removed_does_not_protect_the_others(
    fake_tracefs: FakeTracefs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for pid in (FREE_PID, FREE_PID + 1):
        (fake_tracefs.root / f"instances/tscwatch-calls-5-{pid}").mkdir()
    (fake_tracefs.root / f"instances/tscwatch-calls-5-{FREE_PID}/busy").touch()
    clear_stale(fake_tracefs.root)
    assert fake_tracefs.instance().name == f"tscwatch-calls-5-{FREE_PID}"
    assert caplog.text.count("cannot remove") == 1


def test_a_line_is_appended(tmp_path: Path) -> None:
    """The first definition is still in the file, and no file is created."""
    file = tmp_path / "kprobe_events"
    file.write_text("p:a/b f\n")
    _append(file, "-:a/b")
    assert file.read_text() == "p:a/b f\n-:a/b\n"
    with pytest.raises(FileNotFoundError):
        _append(tmp_path / "none", "p:a/b f")
