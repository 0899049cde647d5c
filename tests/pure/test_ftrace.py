"""Lines of trace_pipe as kernels 6.1 and 6.18 print them, forged ones, and the events they make."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.capture import existing, ftrace
from tscwatch.capture.assembler import KprobeAssembler, SyscallAssembler, runner_of
from tscwatch.capture.ftrace import kprobe_events
from tscwatch.clock import now_ns
from tscwatch.linux.trace_pipe import Record, parse, process_of

HEAD = " qemu-system-x86-30916   (  30916) [001] .....  1851.928247: "


@pytest.mark.parametrize(
    ("what", "name", "values"),
    [
        ("sys_ioctl(fd: 3, cmd: 0xae01, arg: 0)", "enter", {"fd": 3, "cmd": 0xAE01, "arg": 0}),
        (
            "sys_ioctl(fd: d, cmd: aea2, arg: 27a1c4)",
            "enter",
            {"fd": 13, "cmd": 0xAEA2, "arg": 0x27A1C4},
        ),
        ("sys_ioctl -> 0x8", "exit", {"ret": 8}),
        ("sys_ioctl -> 0xffffffffffffffea", "exit", {"ret": -22}),
        (
            "enter: (kvm_arch_vcpu_ioctl+0x0) kvm=0xff id=2 ran=0x0 runner=(fault) cmd=0x1",
            "enter",
            {"kvm": 0xFF, "id": 2, "ran": 0, "cmd": 1},
        ),
        (
            "leave: (kvm_vcpu_ioctl+0x5/0x9 [kvm] <- kvm_arch_vcpu_ioctl) ret=-22",
            "leave",
            {"ret": -22},
        ),
        (
            "kvm_track_tsc: vcpu_id 2 masterclock 1 offsetmatched 0 nr_online 3 hostclock tsc",
            "kvm_track_tsc",
            {"vcpu_id": 2, "masterclock": 1, "offsetmatched": 0, "nr_online": 3},
        ),
        (
            "kvm_update_master_clock: masterclock 0 hostclock tsc offsetmatched 0",
            "kvm_update_master_clock",
            {"masterclock": 0, "offsetmatched": 0},
        ),
    ],
)
def test_forms(what: str, name: str, values: dict[str, int]) -> None:
    record = parse(HEAD + what)
    assert record is not None
    assert (record.tid, record.pid, record.comm) == (30916, 30916, "qemu-system-x86")
    assert (record.name, record.values) == (name, values)


def test_a_thread_may_be_called_anything() -> None:
    record = parse("  a-1 [0] (x)-42   (-------) [000] d..1.  1.000001: sys_ioctl -> 0x1")
    assert record is not None
    assert (record.comm, record.tid, record.pid) == ("a-1 [0] (x)", 42, 42)


@given(st.text())
def test_no_line_breaks_it(line: str) -> None:
    parse(line)
    parse(HEAD + line)


def enter(tid: int, fd: int, cmd: int, arg: int = 0) -> Record:
    return Record(now_ns(), tid, 100, "qemu", "enter", {"fd": fd, "cmd": cmd, "arg": arg})


def leave(tid: int, ret: int) -> Record:
    return Record(now_ns(), tid, 100, "qemu", "exit", {"ret": ret})


def syscalls(
    *records: Record, link: str = ""
) -> list[tuple[str, Optional[int], Optional[int], int]]:
    assembler = SyscallAssembler(lambda _pid, _fd: link, lambda _tid: False)
    events = [event for record in records for event in assembler.feed(record)]
    for _ in range(2):
        events += assembler.settle(now_ns())
    return [(event.op, event.vcpu, event.khz, event.status) for event in events]


MADE = (enter(1, 3, 0xAE01), leave(1, 8), enter(1, 8, 0xAE41, 5), leave(1, 9))


def test_descriptors_are_known_from_the_calls_that_made_them() -> None:
    assert syscalls(*MADE, enter(2, 9, 0xAEA3), leave(2, 2_600_000)) == [
        ("vm_create", None, None, 0),
        ("vcpu_create", 5, None, 0),
        ("get", 5, 2_600_000, 0),
    ]


def test_a_set_without_an_exit_has_succeeded() -> None:
    going_on = syscalls(*MADE, enter(2, 9, 0xAEA2, 7), enter(2, 9, 0x4090AE82))
    waiting = syscalls(*MADE, enter(2, 9, 0xAEA2, 7))
    assert ("set", 5, 7, 0) in going_on
    assert ("set", 5, 7, 0) in waiting


def test_a_set_that_may_still_be_under_way_is_not_reported() -> None:
    assembler = SyscallAssembler(lambda _pid, _fd: "", lambda _tid: True)
    for record in (*MADE, enter(2, 9, 0xAEA2, 7)):
        list(assembler.feed(record))
    assert list(assembler.settle(now_ns())) == list(assembler.settle(now_ns())) == []
    assert [event.status for event in assembler.feed(leave(2, -22))] == [-22]


def test_a_set_that_failed() -> None:
    assert ("set", 5, 7, -22) in syscalls(*MADE, enter(2, 9, 0xAEA2, 7), leave(2, -22))


@pytest.mark.parametrize("exit_of_another", [-25, -7, 33])
def test_the_exit_of_a_later_ioctl_is_not_the_sets(exit_of_another: int) -> None:
    """A SET cannot return this; the entry of the ioctl that did was filtered out."""
    records = (*MADE, enter(2, 9, 0xAEA2, 7), leave(2, exit_of_another))
    assert syscalls(*records)[2:] == [("set", 5, 7, 0)]


def test_an_enable_cap_that_fails_is_not_a_set_that_failed() -> None:
    records = (*MADE, enter(2, 9, 0xAEA2, 7), enter(2, 9, 0x4068AEA3), leave(2, -22))
    assert syscalls(*records)[2:] == [("set", 5, 7, 0)]


def test_a_thread_id_that_had_another_process_before() -> None:
    """ftrace can still record the earlier process; /proc is right while the thread lives."""
    record = enter(threading.get_native_id(), 9, 0xAEA3)
    assert process_of(record) == os.getpid()
    assert process_of(record._replace(tid=1 << 23)) == record.pid


def test_a_thread_belongs_to_the_process_that_has_it_whatever_ftrace_recorded() -> None:
    both = threading.Barrier(2)

    def native_id(_: int) -> int:
        both.wait()
        return threading.get_native_id()

    with ThreadPoolExecutor(2) as pool:
        tid, another = pool.map(native_id, range(2))
        for recorded in (os.getpid(), os.getppid(), tid, another):
            assert process_of(enter(tid, 9, 0xAEA3)._replace(pid=recorded)) == os.getpid()


def test_an_end_without_a_beginning_is_ignored() -> None:
    assert syscalls(*MADE, leave(2, 2_600_000), enter(2, 9, 0xAEA3), leave(2, 7))[2:] == [
        ("get", 5, 7, 0)
    ]


def test_a_beginning_without_an_end_is_counted() -> None:
    assembler = SyscallAssembler(lambda _pid, _fd: "", lambda _tid: True)
    for record in (*MADE, enter(2, 9, 0xAEA3), enter(2, 9, 0xAEA3), leave(2, 7)):
        list(assembler.feed(record))
    assert assembler.no_return == 1


def test_a_file_that_is_no_vcpu_does_not_count() -> None:
    call = (enter(2, 4, 0xAEA3), leave(2, 2_600_000))
    assert syscalls(*call, link="/dev/null") == []
    assert syscalls(*call, link="anon_inode:kvm-vcpu:3") == [("get", 3, 2_600_000, 0)]


def test_only_a_vm_is_started() -> None:
    """The number of KVM_SET_CLOCK means something else on another file."""
    start = enter(2, 8, 0x4030AE7B)
    for link in ("/dev/null", "anon_inode:kvm-vcpu:3", ""):
        assert syscalls(start, link=link) == []
    assert syscalls(start, link="anon_inode:kvm-vm") == [("vm_started", None, None, 0)]
    assert syscalls(*MADE, start)[2:] == [("vm_started", None, None, 0)]


def test_processes_that_end_are_forgotten_without_another_vm() -> None:
    assembler = SyscallAssembler(lambda _pid, _fd: "anon_inode:kvm-vcpu:3", lambda _pid: False)
    now = now_ns()
    for pid in range(1000):
        list(assembler.feed(enter(pid, 9, 0x4090AE82)._replace(pid=pid)))
        list(assembler.settle(now))
    for later in (1, 2):
        list(assembler.settle(now + later * 10_000_000_001))
    assert not assembler._files
    assert not assembler._marks


def test_the_last_calls_of_a_process_that_has_ended() -> None:
    """They are read together with the creation of another process's VM."""
    alive = {100, 101}
    assembler = SyscallAssembler(lambda _pid, _fd: "", alive.__contains__)

    def feed(*records: Record) -> list[str]:
        events = [event for record in records for event in assembler.feed(record)]
        return [event.op for event in (*events, *assembler.settle(now_ns()))]

    def creation(pid: int) -> Iterator[Record]:
        return (record._replace(tid=pid, pid=pid) for record in MADE[:2])

    assert feed(*MADE) == ["vm_create", "vcpu_create"]
    alive.remove(100)
    assert feed(*creation(101), enter(2, 9, 0xAEA3), leave(2, 7)) == ["vm_create", "get"]
    assert feed(*creation(101), enter(2, 9, 0xAEA3), leave(2, 7)) == ["vm_create", "get"]
    assert feed(enter(2, 9, 0xAEA3), leave(2, 7)) == []
    assert assembler.unidentified == 1


@pytest.mark.parametrize(
    ("call", "foreign", "unidentified"),
    [
        ((enter(2, 4, 0xAEA3), leave(2, -5)), 1, 0),
        ((enter(2, 4, 0xAEA3), leave(2, -9)), 0, 0),
        ((enter(2, 4, 0xAEA3), leave(2, -25)), 0, 0),
        ((enter(2, 4, 0xAEA3), leave(2, 2_600_000)), 0, 1),
        ((enter(2, 4, 0xAEA2, 7),), 0, 1),
        ((enter(2, 4, 0xAEA2, 7), leave(2, 33)), 0, 1),  # of a later ioctl
        ((enter(2, 4, 0xAEA2, 7), leave(2, -9)), 0, 0),
        ((enter(2, 4, 0xAEA2, 7), leave(2, -25)), 0, 0),
    ],
)
def test_a_call_on_a_file_that_is_gone(
    call: tuple[Record, ...], foreign: int, unidentified: int
) -> None:
    assembler = SyscallAssembler(lambda _pid, _fd: "", lambda _tid: False)
    for record in call:
        assert list(assembler.feed(record)) == []
    assert list(assembler.settle(now_ns())) == list(assembler.settle(now_ns())) == []
    assert (assembler.foreign, assembler.unidentified) == (foreign, unidentified)


def test_calls_whose_ends_are_lost_take_bounded_memory() -> None:
    assembler = KprobeAssembler()
    values = {"kvm": 1, "id": 0, "ran": 0, "cmd": 0xAEA3, "arg": 0}
    for tid in range(70_000):
        list(assembler.feed(Record(0, tid, 100, "qemu", "enter", values)))
    assert len(assembler._pending) + assembler.no_return == 70_000
    assert assembler.no_return > 0


def test_kprobe_records() -> None:
    assembler = KprobeAssembler()
    vcpu = {"kvm": 1, "id": 0, "ran": 0}

    def feed(name: str, **values: int) -> list[tuple[str, Optional[str], int, Optional[int]]]:
        record = Record(0, 2, 100, "qemu", name, {**vcpu, **values})
        return [(e.op, e.after, e.sync, e.runner) for e in assembler.feed(record)]

    assert feed("vm") == [("vm_create", None, 0, None)]
    assert feed("vcpu") == [("vcpu_create", "create", 0, None)]
    assert feed("enter", cmd=0xAEA3, arg=0) == []
    assert feed("leave", ret=7) == [("get", "create", 0, 0)]
    assert feed("enter", cmd=0x4008AE90, arg=0) == [("vcpu_setup", "create", 0, None)]
    assert feed("leave", ret=0) == []
    assert feed("sregs") == []
    assert feed("enter", cmd=0xAEA2, arg=7, ran=1, runner=2) == []
    assert feed("leave", ret=0) == [("set", "sregs", 1, 2)]


@pytest.mark.parametrize(
    ("values", "runner"),
    [
        ({"ran": 0, "runner": 32766}, 0),  # what a fetch through a null pointer can leave behind
        ({"ran": 0}, 0),
        ({"ran": 1, "runner": 2}, 2),
        ({"ran": 1}, None),
        ({}, None),
    ],
)
def test_a_vcpu_that_has_never_run_has_no_runner(
    values: dict[str, int], runner: Optional[int]
) -> None:
    assert runner_of(Record(0, 2, 100, "qemu", "enter", values)) == runner


def test_an_existing_vcpu_is_reported_for_the_process_in_the_argument() -> None:
    values = {"kvm": 1, "id": 3, "ran": 0, "runner": 32766, "khz": 2_600_000, "arg": 100}
    record = Record(0, 2, 50, "tscwatch", "existing", values)
    (event,) = KprobeAssembler().feed(record)
    assert (event.op, event.pid, event.tid, event.comm) == ("vcpu_found", 100, 100, "")
    assert (event.vm, event.vcpu, event.khz, event.runner) == ("kvm:1", 3, 2_600_000, 0)


def test_the_record_of_an_unknown_event_is_ignored() -> None:
    record = Record(0, 2, 100, "qemu", "else", {})
    assert list(KprobeAssembler().feed(record)) == []
    assert list(SyscallAssembler(lambda _pid, _fd: "", lambda _tid: True).feed(record)) == []


def test_no_kprobe_event_sits_on_the_path_of_kvm_run() -> None:
    offset = dict.fromkeys(("file.private_data", "vcpu.kvm", "vcpu.id", "vcpu.pid", "pid.nr"), 8)
    functions = {what.split()[0] for _, _, what, _ in kprobe_events(offset, "kvm:")}
    assert "kvm:kvm_vcpu_ioctl" not in functions
    assert "kvm:kvm_arch_vcpu_ioctl" in functions


@pytest.mark.parametrize(("cpus", "kb"), [(1, 1024), (16, 1024), (64, 256), (512, 128)])
def test_the_buffers_of_a_large_host_stay_small(cpus: int, kb: int) -> None:
    assert ftrace._buffer_kb(cpus) == kb


def test_a_vcpu_whose_descriptor_cannot_be_copied_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_pid: int, _descriptor: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(existing, "_copy", refuse)
    existing.poke_existing([(1, 8), (1, 9)])
    assert (
        "2 vCPUs that are older than tscwatch could not be read (Too many open files)"
        in caplog.text
    )


class Refusing:
    """A trace instance in a kernel that refuses the third event."""

    def __init__(self) -> None:
        self.defined: list[str] = []

    def define(self, _file: str, name: str, *_more: str) -> None:
        if len(self.defined) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.defined.append(name)

    def has_defined(self, name: str) -> bool:
        return name in self.defined

    def drop(self, name: str) -> None:
        self.defined.remove(name)


def test_of_events_that_are_refused_none_stays() -> None:
    source = object.__new__(ftrace.FtraceSource)
    trace = Refusing()
    source._trace = trace  # type: ignore[assignment]
    with pytest.raises(OSError, match="Invalid"):
        source._define([(name, "p", "f", "") for name in ("one", "two", "three")])
    assert trace.defined == []
