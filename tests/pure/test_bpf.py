"""What bpf(2) and perf_event_open(2) are called with, and the consumer's side of a ring buffer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_compiler import instruction, load
from tscwatch.errors import KernelUnfit
from tscwatch.linux import bpf, compiler, tracefs
from tscwatch.linux.bpf import Counters, LoadedProgram, Ring
from tscwatch.linux.compiler import Map, Program

BPF, PERF_EVENT_OPEN = 321, 298
MAP_CREATE, MAP_UPDATE, PROG_LOAD, OBJ_GET_INFO_BY_FD = 0, 2, 5, 15
SET_BPF, ENABLE = 0x40042408, 0x2400


class Load(NamedTuple):
    """The members of ``union bpf_attr`` for BPF_PROG_LOAD, with what its pointers point to."""

    program_type: int
    code: bytes
    license: bytes
    log_size: int
    name: bytes


class Kernel:
    """Records system calls, and returns descriptors; it refuses those that a test wants refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.maps: list[tuple[int, ...]] = []
        self.loads: list[Load] = []
        self.updates: list[tuple[int, int, int, int]] = []
        self.probes: list[tuple[int, int, int, bytes, tuple[int, ...]]] = []
        """Perf type, size, config, symbol, and the arguments after the attributes."""
        self.ioctls: list[tuple[int, int, int]] = []
        self.descriptors: list[int] = []
        self.recursion_misses = 0
        self.refuse: Callable[[str], Optional[int]] = lambda _: None
        """Returns the errno with which something is refused, by a word for it."""
        self.verifier_log = b""
        monkeypatch.setattr(bpf, "syscall", self._syscall)
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)
        self.limits: list[tuple[int, tuple[int, int]]] = []
        monkeypatch.setattr(resource, "setrlimit", lambda *limit: self.limits.append(limit))

    def open_descriptors(self) -> list[int]:
        return [fd for fd in self.descriptors if Path(f"/proc/self/fd/{fd}").exists()]

    def _syscall(self, number: int, *arguments: Any) -> int:
        if number == PERF_EVENT_OPEN:
            attr, *more = arguments
            *head, symbol = struct.unpack_from("=IIQ40xQ", attr)
            assert len(attr) == head[1]
            name = ctypes.string_at(symbol) if symbol else b""
            self.probes.append((*head, name, tuple(more)))
            return self._descriptor("probe")
        assert number == BPF
        command, attr, size = arguments
        assert size == len(attr)
        if command == MAP_CREATE:
            self.maps.append(struct.unpack("=5I", attr))
            return self._descriptor("map")
        if command == PROG_LOAD:
            self.loads.append(self._load(attr))
            return self._descriptor(self.loads[-1].name.decode())
        self._refuse("update" if command == MAP_UPDATE else "info")
        if command == MAP_UPDATE:
            descriptor, key, value, flags = struct.unpack("=I4xQQQ", attr)
            self.updates.append((descriptor, _u32_at(key), _u32_at(value), flags))
        else:
            assert command == OBJ_GET_INFO_BY_FD
            _, size, info = struct.unpack("=IIQ", attr)
            members = struct.pack("=208xQ", self.recursion_misses)  # struct bpf_prog_info
            assert size == len(members)
            ctypes.memmove(info, members, size)
        return 0

    def _load(self, attr: bytes) -> Load:
        program_type, count, code, license_, level, log_size, log, version, flags, name = (
            struct.unpack("=IIQQIIQII16s", attr)
        )
        assert (version, flags) == (0, 0)
        assert (level, log_size, log) == (0, 0, 0) or (level, log_size) == (1, 1 << 20)
        if log:
            ctypes.memmove(log, self.verifier_log + b"\0", len(self.verifier_log) + 1)
        return Load(
            program_type,
            ctypes.string_at(code, 8 * count),
            ctypes.string_at(license_),
            log_size,
            name.rstrip(b"\0"),
        )

    def _ioctl(self, descriptor: int, command: int, argument: int) -> int:
        self._refuse(f"ioctl {command:#x}")
        self.ioctls.append((descriptor, command, argument))
        return 0

    def _refuse(self, what: str) -> None:
        number = self.refuse(what)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def _descriptor(self, what: str) -> int:
        self._refuse(what)
        self.descriptors.append(os.open("/dev/null", os.O_RDONLY))
        return self.descriptors[-1]


def _u32_at(address: int) -> int:
    return ctypes.c_uint32.from_address(address).value


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


REST = instruction(0x95, 0, 0) * 8
MAPS = [Map("events", 27, 0, 0, 4096, 0), Map("counters", 2, 4, 8, 512, 1024)]
PROGRAM = Program(
    MAPS,
    {
        "enter": instruction(0x18, 1, 1)
        + instruction(0, 0, 0)
        + load(compiler._PLACEHOLDER + 1)
        + REST,
        "a_function_of_a_long_name": instruction(0x18, 1, 0) + instruction(0, 0, 0),
    },
    "packaged",
)


# Programs


def test_a_program_is_loaded_with_its_maps_and_offsets(kernel: Kernel) -> None:
    program = LoadedProgram(PROGRAM, [16, 40], bpf.KPROBE)
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    assert kernel.limits == [(resource.RLIMIT_MEMLOCK, unlimited)]
    assert kernel.maps == [map_[1:] for map_ in MAPS]
    events, counters, enter, long_name = kernel.descriptors
    assert program.maps == {"events": events, "counters": counters}
    assert program.functions == {"enter": enter, "a_function_of_a_long_name": long_name}
    assert program.origin == "packaged"
    code = [
        instruction(0x18, 1, counters) + instruction(0, 0, 0) + load(40) + REST,
        instruction(0x18, 1, events) + instruction(0, 0, 0),
    ]
    assert kernel.loads == [
        Load(2, code[0], b"GPL", 0, b"enter"),
        Load(2, code[1], b"GPL", 0, b"a_function_of_a"),
    ]
    probe = program.take_ownership(os.open("/dev/null", os.O_RDONLY))
    kernel.descriptors.append(probe)
    assert kernel.open_descriptors() == kernel.descriptors
    program.close()
    assert kernel.open_descriptors() == []


@pytest.mark.parametrize("refused", ["a_function_of_a", "enter", "map"])
def test_of_a_program_that_is_refused_nothing_stays(kernel: Kernel, refused: str) -> None:
    kernel.refuse = lambda what: errno.EACCES if what == refused else None
    kernel.verifier_log = b"1\n2\nR1 is\n\xff invalid\nprocessed 3 insns\n"
    with pytest.raises(KernelUnfit) as caught:
        LoadedProgram(PROGRAM, [16, 40], bpf.TRACEPOINT)
    assert kernel.open_descriptors() == []
    if refused == "map":
        expected = "the kernel refused to create the map events: Permission denied"
    else:
        name = next(name for name in PROGRAM.functions if name.startswith(refused))
        expected = (
            f"the kernel refused to load {name}: Permission denied; R1 is; \ufffd invalid; "
            "processed 3 insns"
        )
        assert [each.log_size for each in kernel.loads][-2:] == [0, 1 << 20]
        assert {each.program_type for each in kernel.loads} == {5}
    assert str(caught.value) == expected


def test_a_function_that_is_loaded_at_the_second_attempt_is_taken(kernel: Kernel) -> None:
    """The kernel returns EAGAIN if a signal interrupts the verifier."""
    answers = iter([errno.EAGAIN])
    kernel.refuse = lambda what: next(answers, None) if what == "enter" else None
    program = LoadedProgram(PROGRAM, [16, 40], bpf.KPROBE)
    assert sorted(program.functions.values()) == kernel.descriptors[2:]


@pytest.mark.parametrize(
    ("number", "limit", "is_named"),
    [
        (errno.EPERM, 1 << 16, True),
        (errno.EPERM, resource.RLIM_INFINITY, False),
        (errno.EINVAL, 1 << 16, False),
    ],
)
def test_the_limit_of_locked_memory_is_named_if_it_may_be_the_reason(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int, limit: int, is_named: bool
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    kernel.refuse = lambda what: number if what == "map" else None
    with pytest.raises(KernelUnfit, match="create the map events") as caught:
        LoadedProgram(PROGRAM, [16, 40], bpf.KPROBE)
    assert ("LimitMEMLOCK=infinity" in str(caught.value)) == is_named


# Probes


@pytest.fixture
def pmu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write sysfs' description of the perf type of kprobes."""
    directory = tmp_path / "kprobe"
    (directory / "format").mkdir(parents=True)
    (directory / "type").write_text("8\n")
    (directory / "format/retprobe").write_text("config:3\n")
    monkeypatch.setattr(bpf, "KPROBE_PMU", directory / "type")
    return directory


@pytest.mark.parametrize("is_return", [False, True])
def test_a_kprobe_is_attached(kernel: Kernel, pmu: Path, is_return: bool) -> None:
    probe = bpf.attach_kprobe(7, "kvm_vcpu_ioctl", is_return)
    config = 1 << 3 if is_return else 0
    # Any process, CPU 0, no group, close on exec.
    assert kernel.probes == [(8, 112, config, b"kvm_vcpu_ioctl", (-1, 0, -1, 8))]
    assert kernel.ioctls == [(probe, SET_BPF, 7), (probe, ENABLE, 0)]
    assert kernel.open_descriptors() == [probe]
    os.close(probe)


@pytest.mark.parametrize("command", [SET_BPF, ENABLE])
def test_a_probe_that_cannot_be_enabled_is_removed(kernel: Kernel, pmu: Path, command: int) -> None:
    kernel.refuse = lambda what: errno.EINVAL if what == f"ioctl {command:#x}" else None
    with pytest.raises(KernelUnfit, match="refused to attach to f: Invalid argument"):
        bpf.attach_kprobe(7, "f", is_return=False)
    assert len(kernel.probes) == 1
    assert kernel.open_descriptors() == []


def test_a_tracepoint_is_attached_by_its_id(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefs, "find_tracefs", lambda: tmp_path)
    directory = tmp_path / "events/syscalls/sys_enter_ioctl"
    with pytest.raises(KernelUnfit, match="no tracepoint syscalls/sys_enter_ioctl"):
        bpf.attach_tracepoint(7, "syscalls/sys_enter_ioctl")
    directory.mkdir(parents=True)
    (directory / "id").write_text("431\n")
    probe = bpf.attach_tracepoint(7, "syscalls/sys_enter_ioctl")
    assert kernel.probes == [(2, 112, 431, b"", (-1, 0, -1, 8))]
    assert kernel.ioctls == [(probe, SET_BPF, 7), (probe, ENABLE, 0)]
    os.close(probe)


def test_skipped_runs(kernel: Kernel) -> None:
    kernel.recursion_misses = 1 << 40
    assert bpf.skipped_runs(7) == 1 << 40
    kernel.refuse = lambda what: errno.EPERM if what == "info" else None
    assert bpf.skipped_runs(7) == 0


# Maps


def test_an_element_is_set(kernel: Kernel) -> None:
    bpf.set_element(7, 3, 0xFFFFFFFF)
    assert kernel.updates == [(7, 3, 0xFFFFFFFF, 0)]
    kernel.refuse = lambda what: errno.E2BIG if what == "update" else None
    with pytest.raises(KernelUnfit, match="refused to update a map"):
        bpf.set_element(7, 3, 1)


def test_counters_are_read_where_the_kernel_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "map"
    file.write_bytes(bytes(mmap.PAGESIZE))
    with file.open("r+b", buffering=0) as map_:
        counters = Counters(map_.fileno())
        os.pwrite(map_.fileno(), struct.pack("=QQ", 5, 1 << 63), 8)
        assert [counters[index] for index in range(4)] == [0, 5, 1 << 63, 0]
        counters.close()


BUSY, DISCARDED = 1 << 31, 1 << 30
SIZE = mmap.PAGESIZE


class Epoll:
    """Stands for epoll, which a file that is not a map does not support."""

    def __init__(self) -> None:
        self.calls: list[tuple[Union[str, float], ...]] = []

    def register(self, descriptor: int, events: int) -> None:
        self.calls.append(("register", descriptor, events))

    def poll(self, timeout: float) -> None:
        self.calls.append(("poll", timeout))

    def close(self) -> None:
        self.calls.append(("close",))


class Producer:
    """The kernel's side of a ring buffer, in a file: two pages with positions, and twice the data.

    See ``bpf_ringbuf_area_alloc`` and ``__bpf_ringbuf_reserve``.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("ring")
        os.truncate(self.file, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.position = 0

    def reserve(self, content: bytes, flags: int = 0) -> int:
        """Write a record, and return its position."""
        at = self.position
        self._write(at, struct.pack("=II", len(content) | flags, 0xFFFFFFFF) + content)
        self.position += (8 + len(content) + 7) // 8 * 8
        os.pwrite(self.file, struct.pack("=Q", self.position), mmap.PAGESIZE)
        return at

    def set_header(self, at: int, header: int) -> None:
        self._write(at, struct.pack("=I", header))

    @property
    def consumed(self) -> int:
        return int(struct.unpack("=Q", os.pread(self.file, 8, 0))[0])

    def _write(self, at: int, data: bytes) -> None:
        """Write at a position of the data, which the kernel maps twice in a row."""
        at %= SIZE
        for offset, part in ((at, data[: SIZE - at]), (0, data[SIZE - at :])):
            for copy in (0, SIZE):
                os.pwrite(self.file, part, 2 * mmap.PAGESIZE + offset + copy)


@contextmanager
def ring() -> Iterator[tuple[Producer, Ring, Epoll]]:
    producer, epoll = Producer(), Epoll()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(select, "epoll", lambda: epoll)
        consumer = Ring(producer.file, SIZE)
    yield producer, consumer, epoll
    consumer.close()
    os.close(producer.file)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 255), st.integers(0, 300), st.booleans()), max_size=6),
        max_size=12,
    )
)
def test_each_record_is_read_once_and_its_space_is_freed(
    rounds: list[list[tuple[int, int, bool]]],
) -> None:
    with ring() as (producer, consumer, _):
        for records in rounds:
            expected = []
            for byte, length, is_discarded in records:
                content = bytes([byte]) * length
                producer.reserve(content, DISCARDED if is_discarded else 0)
                expected += [] if is_discarded else [content]
            assert list(consumer.records()) == expected
            assert producer.consumed == producer.position


def test_what_follows_a_record_that_is_being_written_has_to_wait() -> None:
    with ring() as (producer, consumer, _):
        producer.reserve(b"first")
        second = producer.reserve(b"second", BUSY)
        producer.reserve(b"third")
        discarded = producer.reserve(b"fourth", BUSY)
        assert list(consumer.records()) == [b"first"]
        assert list(consumer.records()) == []
        assert producer.consumed == second
        producer.set_header(second, len(b"second"))
        assert list(consumer.records()) == [b"second", b"third"]
        producer.set_header(discarded, len(b"fourth") | DISCARDED)
        assert list(consumer.records()) == []
        assert producer.consumed == producer.position


def test_records_that_arrive_meanwhile_are_left_for_the_next_call() -> None:
    """Otherwise a producer without end would keep the caller here."""
    with ring() as (producer, consumer, _):
        producer.reserve(b"first")
        for record in consumer.records():
            assert record == b"first"
            producer.reserve(b"second")
        assert list(consumer.records()) == [b"second"]


def test_it_waits_for_the_map() -> None:
    with ring() as (producer, consumer, epoll):
        consumer.wait(0.25)
    assert epoll.calls == [
        ("register", producer.file, select.EPOLLIN),
        ("poll", 0.25),
        ("close",),
    ]
