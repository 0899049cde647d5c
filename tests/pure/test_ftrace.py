"""Lines of trace_pipe, real and forged, the events they make, and the source that reads them."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_btf import parsed, vcpu_types
from tests.support.fake_tracefs import FakeTracefs
from tscwatch.capture import existing, ftrace
from tscwatch.capture.assembler import KprobeAssembler, SyscallAssembler, runner_of
from tscwatch.capture.ftrace import FtraceSource, kprobe_events
from tscwatch.clock import now_ns, unix_ns
from tscwatch.errors import KernelUnfit
from tscwatch.linux import btf, kvm, tracefs
from tscwatch.linux.kprobes import KprobesSwitch
from tscwatch.linux.trace_pipe import Record, parse, process_of, with_process

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
        ("sys_ioctl -> 0x7fffffffffffffff", "exit", {"ret": 2**63 - 1}),
        ("sys_ioctl -> 0x8000000000000000", "exit", {"ret": -(2**63)}),
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
    assert record.ts == unix_ns(1_851_928_247_000)
    assert (record.tid, record.pid, record.comm) == (30916, 30916, "qemu-system-x86")
    assert (record.name, record.values) == (name, values)


def test_a_thread_may_be_called_anything() -> None:
    record = parse("  a-1 [0] (x)-42   (-------) [000] d..1.  1.000001: sys_ioctl -> 0x1")
    assert record is not None
    assert (record.comm, record.tid, record.pid) == ("a-1 [0] (x)", 42, 42)


def test_ftrace_may_not_have_recorded_the_process() -> None:
    for process in ("(-------) ", ""):  # not of this thread; or of none, without record-tgid
        record = parse(f" qemu-42   {process}[000] d..1.  1.000001: sys_ioctl -> 0x1")
        assert record is not None
        assert (record.comm, record.tid, record.pid) == ("qemu", 42, 42)


@pytest.mark.parametrize(
    "line",
    [
        "",
        HEAD,
        HEAD[:-3],
        HEAD + "sys_ioctl(fd: 3, cmd: 0xae01",
        HEAD + "sys_ioctl ->",
        HEAD + "sys_openat(dfd: 3, filename: 7)",
        HEAD + "enter: kvm=0xff id=2",
        HEAD + "sched_switch: prev_pid 1",
        HEAD.replace("928247", "92824") + "sys_ioctl -> 0x8",
        HEAD.replace("[001]", "001") + "sys_ioctl -> 0x8",
        HEAD.replace("-30916", "-") + "sys_ioctl -> 0x8",
    ],
)
def test_what_is_no_complete_record_of_a_known_form(line: str) -> None:
    assert parse(line) is None


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


def test_a_get_that_failed_has_no_frequency() -> None:
    assert syscalls(*MADE, enter(2, 9, 0xAEA3), leave(2, -22))[2:] == [("get", 5, None, -22)]


def test_of_a_sets_argument_kvm_takes_the_lower_half() -> None:
    assert ("set", 5, 7, 0) in syscalls(*MADE, enter(2, 9, 0xAEA2, 1 << 32 | 7))


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


def test_the_process_of_a_thread_is_looked_up_once() -> None:
    record = enter(threading.get_native_id(), 9, 0xAEA3)._replace(pid=1 << 23)
    cache: dict[tuple[int, int], int] = {}
    assert with_process(record, cache).pid == os.getpid()
    assert cache == {(record.tid, 1 << 23): os.getpid()}
    cache[record.tid, 1 << 23] = 7
    assert with_process(record, cache) == record._replace(pid=7)


def test_the_process_of_an_exit_is_not_looked_up() -> None:
    """Each ioctl on the host that fails has one."""
    record = leave(threading.get_native_id(), -22)._replace(pid=1 << 23)
    cache: dict[tuple[int, int], int] = {}
    assert with_process(record, cache) == record
    assert cache == {}


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
    ("command", "after"),
    [
        (0x4008AE90, "cpuid"),
        (0x4138AE84, "sregs"),
        (0x4140AECD, "sregs"),  # KVM_SET_SREGS2, which QEMU prefers
        (0x4090AE82, "regs"),
    ],
)
def test_each_command_that_sets_up_a_vcpu_is_remembered(command: int, after: str) -> None:
    assembler = SyscallAssembler(lambda _pid, _fd: "", lambda _tid: True)
    records = (*MADE, enter(2, 9, command), enter(2, 9, 0xAEA3), leave(2, 7))
    *_, event = (event for record in records for event in assembler.feed(record))
    assert (event.op, event.after, event.sync) == ("get", after, after == "sregs")


def test_of_a_vm_that_has_ended_no_command_is_remembered() -> None:
    assembler = KprobeAssembler()
    for name in ("vm", "vcpu", "sregs", "end"):
        list(assembler.feed(Record(0, 2, 100, "qemu", name, {"kvm": 1, "id": 0, "ran": 0})))
    assert not assembler._marks


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


# The source


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[Optional[int]]:
    """Let KVM be a module with known types, whose generation is the list's first element.

    While there are several, each look takes one away.
    """
    generations: list[Optional[int]] = [None]
    monkeypatch.setattr(
        kvm,
        "module_generation",
        lambda: generations.pop(0) if len(generations) > 1 else generations[0],
    )
    monkeypatch.setattr(kvm, "is_module", lambda: True)
    monkeypatch.setattr(btf, "kernel_btf", lambda _module: parsed(vcpu_types()))
    monkeypatch.setattr(ftrace, "KprobesSwitch", lambda: KprobesSwitch(()))
    return generations


def defined(fake: FakeTracefs) -> list[str]:
    """Return the name of each kprobe event that is defined."""
    return [definition.split()[1] for definition in fake.defined("kprobe_events")]


ALL = ["enter", "leave", "sregs", "regs", "vm", "vcpu", "clock", "vmenter", "vmleave", "end"]


def test_kprobes_are_attached_once_kvm_is_loaded(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    source = FtraceSource(fake_tracefs.root)
    assert (defined(fake_tracefs), source.health().probes) == ([], {"kvm_arch_vcpu_ioctl": False})
    generations[:] = [7]
    assert source.restore() == []
    assert (defined(fake_tracefs), source.health().probes) == (ALL, {"kvm_arch_vcpu_ioctl": True})
    first, *_ = fake_tracefs.defined("kprobe_events")
    assert first.startswith("p enter kvm:kvm_arch_vcpu_ioctl kvm=+16(+8(%di)):x64 id=+24(")
    for generation in (None, 8):  # the kernel itself puts them on the functions again
        generations[:] = [generation]
        assert source.restore() == []
        assert source.health().probes == {"kvm_arch_vcpu_ioctl": generation is not None}
    assert defined(fake_tracefs) == ALL
    source.close()
    assert defined(fake_tracefs) == []
    assert list((fake_tracefs.root / "instances").iterdir()) == []


@pytest.mark.parametrize("refused", ["enter", "vcpu", "end"])
def test_a_kprobe_that_is_refused_after_kvm_was_loaded_is_an_error(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]], refused: str
) -> None:
    """tscwatch could not observe this host, so it ends, with the reason."""
    source = FtraceSource(fake_tracefs.root)
    fake_tracefs.refused = refused
    generations[:] = [7]
    with pytest.raises(KernelUnfit, match=r"refused a kprobe event .*Invalid argument.*lockdown"):
        source.restore()
    assert (defined(fake_tracefs), source.health().probes) == ([], {"kvm_arch_vcpu_ioctl": False})


def test_a_kprobe_that_is_refused_because_kvm_is_unloaded_again_is_tried_later(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    source = FtraceSource(fake_tracefs.root)
    fake_tracefs.refused = "vcpu"
    generations[:] = [7, None]
    assert source.restore() == []
    assert (defined(fake_tracefs), source.health().probes) == ([], {"kvm_arch_vcpu_ioctl": False})
    fake_tracefs.refused = ""
    generations[:] = [8]
    assert source.restore() == []
    assert (defined(fake_tracefs), source.health().probes) == (ALL, {"kvm_arch_vcpu_ioctl": True})


def test_a_kprobe_that_is_refused_at_the_start_leaves_nothing(
    fake_tracefs: FakeTracefs,
    generations: list[Optional[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_tracefs.refused = "vcpu"
    generations[:] = [7]
    monkeypatch.setattr(tracefs, "find_tracefs", lambda: fake_tracefs.root)
    with pytest.raises(KernelUnfit, match=f"{fake_tracefs.root}/error_log"):
        ftrace.open_ftrace()
    assert defined(fake_tracefs) == []
    assert list((fake_tracefs.root / "instances").iterdir()) == []


def test_records_that_cannot_be_parsed_are_lost(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    generations[:] = [7]
    source = FtraceSource(fake_tracefs.root)
    vcpu = "kvm=0xff id=2 ran=0x0 runner=(fault)"
    fake_tracefs.print(
        HEAD + f"vcpu: (kvm_arch_vcpu_postcreate+0x0) {vcpu}",
        HEAD[:30],
        "CPU:3 [LOST 5 EVENTS]",
        HEAD + "what is this",
    )
    assert [(event.op, event.lost_events) for event in source.poll(0)] == [
        ("vcpu_create", 0),
        ("lost", 5),
    ]
    health = source.health()
    assert (health.sent, health.received) == (1, 2)
    assert {key: count for key, count in health.lost.items() if count} == {
        ("capture", "unreadable"): 2,
        ("kernel", "ring_full"): 5,
    }


def test_what_happened_while_a_kprobe_was_off_is_lost(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    generations[:] = [7]
    source = FtraceSource(fake_tracefs.root)
    (fake_tracefs.event("leave") / "enable").write_text("0")
    assert [event.op for event in source.restore()] == ["lost"]
    assert source.health().lost["kernel", "disabled"] == 1
    assert source.health().probes == {"kvm_arch_vcpu_ioctl": False}
    assert source.restore() == []
    assert source.health().probes == {"kvm_arch_vcpu_ioctl": True}


def test_without_kprobes_the_syscalls_are_recorded(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    (fake_tracefs.root / "kprobe_events").unlink()
    source = FtraceSource(fake_tracefs.root)
    events = fake_tracefs.instance() / "events/syscalls"
    for name in ("sys_enter_ioctl", "sys_exit_ioctl"):
        assert (events / name / "enable").read_text() == "1"
    commands = set((events / "sys_enter_ioctl/filter").read_text().split(" || "))
    assert {f"cmd=={cmd:#x}" for cmd in (kvm.SET_TSC_KHZ, kvm.GET_TSC_KHZ)} < commands
    assert f"cmd=={kvm.RUN:#x}" not in commands
    assert (events / "sys_exit_ioctl/filter").read_text() == ("ret != 0 && ret != -4 && ret != -11")
    assert source.health().probes == {"sys_enter_ioctl": True}
    assert (source.info.attach, source.info.function) == ("syscall", "sys_enter_ioctl")


def test_a_kernel_with_neither_is_unfit(
    fake_tracefs: FakeTracefs, generations: list[Optional[int]]
) -> None:
    (fake_tracefs.root / "kprobe_events").unlink()
    shutil.rmtree(fake_tracefs.root / "events/syscalls")
    with pytest.raises(KernelUnfit, match="CONFIG_KPROBE_EVENTS"):
        FtraceSource(fake_tracefs.root)
    assert list((fake_tracefs.root / "instances").iterdir()) == []


def test_the_probe_for_existing_vcpus_is_there_only_meanwhile(
    fake_tracefs: FakeTracefs,
    generations: list[Optional[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It costs each KVM_RUN."""

    def poke(files: list[tuple[int, int]]) -> None:
        assert defined(fake_tracefs) == [*ALL, "existing"]
        assert (
            f"common_pid=={os.getpid()}" in (fake_tracefs.event("existing") / "filter").read_text()
        )
        for pid, descriptor in files:
            values = f"kvm=0xff id={descriptor} ran=0x0 runner=0 khz=2600000 arg={pid}"
            fake_tracefs.print(HEAD + f"existing: (kvm_vcpu_ioctl+0x0) {values}")

    monkeypatch.setattr(ftrace, "poke_existing", poke)
    source = FtraceSource(fake_tracefs.root)
    source.report_existing([(100, 3)])  # KVM is not loaded
    generations[:] = [7]
    source.restore()
    source.report_existing([])
    source.report_existing([(100, 3), (200, 4)])
    assert defined(fake_tracefs) == ALL
    assert [(event.op, event.pid, event.vcpu) for event in source.poll(60)] == [
        ("vcpu_found", 100, 3),
        ("vcpu_found", 200, 4),
    ]
    fake_tracefs.refused = "existing"
    source.report_existing([(100, 3)])
    assert "refused a probe on kvm_vcpu_ioctl" in caplog.text
    assert source.poll(0) == []
    assert defined(fake_tracefs) == ALL
