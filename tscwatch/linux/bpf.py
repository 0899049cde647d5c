"""BPF maps, programs, probes and ring buffers (bpf(2), perf_event_open(2)).

All of them are file descriptors and none is pinned in the BPF file system, so the kernel removes
them when the process ends, in whatever way that happens.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from tscwatch.errors import KernelUnfit
from tscwatch.linux import tracefs
from tscwatch.linux.compiler import Map, Program, relocated, with_offsets
from tscwatch.linux.syscall import SYS_BPF, SYS_PERF_EVENT_OPEN, syscall

KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
"""The perf type of kprobes.  It exists if the kernel has them (``perf_kprobe``, Linux 4.17)."""

KPROBE, TRACEPOINT = 2, 5
"""Program types (``enum bpf_prog_type``)."""

# enum bpf_cmd
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _OBJ_GET_INFO_BY_FD = 0, 2, 5, 15
_INSN_SIZE = 8
_VERIFIER_LOG_SIZE = 1 << 20

_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_ATTR_SIZE = 112  # PERF_ATTR_SIZE_VER5
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408

# struct bpf_prog_info, up to recursion_misses, and the offset of that
_PROG_INFO_SIZE, _RECURSION_MISSES = 216, 208

# struct bpf_ringbuf_hdr: the record's length with these bits, and a page offset
_RING_BUSY, _RING_DISCARDED = 1 << 31, 1 << 30
_RING_HEADER_SIZE = 8


class LoadedProgram:
    """A program in the kernel: descriptors of its maps and functions by name, not yet attached.

    :param offsets: the running kernel's, in the order of :attr:`compiler.Source.offsets`.
    :param program_type: :data:`KPROBE` or :data:`TRACEPOINT`.
    :raises KernelUnfit: the kernel refused a map or a function; the text ends with the last lines
        of the verifier's log.
    """

    def __init__(self, program: Program, offsets: Sequence[int], program_type: int) -> None:
        self.origin = program.origin
        self._descriptors: list[int] = []
        # Linux before 5.11 counts maps as locked memory.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
        try:
            maps = [self.take_ownership(_create_map(map_)) for map_ in program.maps]
            self.maps = {map_.name: fd for map_, fd in zip(program.maps, maps)}
            self.functions = {
                name: self.take_ownership(_load_function(name, code, program_type))
                for name, code in _complete(program, maps, offsets)
            }
        except KernelUnfit:
            self.close()
            raise

    def take_ownership(self, descriptor: int) -> int:
        """Close this descriptor, such as a probe's, together with the program, and return it."""
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Close all descriptors: the kernel then removes the probes, functions and maps."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def _complete(
    program: Program, maps: Sequence[int], offsets: Sequence[int]
) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each function, and its bytecode as the kernel takes it."""
    for name, code in program.functions.items():
        yield name, with_offsets(relocated(code, dict(enumerate(maps))), offsets)


def _create_map(map_: Map) -> int:
    attr = struct.pack(
        "=5I", map_.map_type, map_.key_size, map_.value_size, map_.max_entries, map_.map_flags
    )
    try:
        return _bpf(_MAP_CREATE, attr, f"create the map {map_.name}")
    except KernelUnfit as error:
        unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
        if unlimited or getattr(error.__cause__, "errno", None) != errno.EPERM:
            raise
        raise KernelUnfit(
            f"{error}: before Linux 5.11, raise the limit of locked memory, to which BPF maps are "
            "charged (LimitMEMLOCK=infinity, or --ulimit memlock=-1 for a container)"
        ) from error


def _load_function(name: str, code: bytes, program_type: int) -> int:
    """Load a function; if that fails, load it again for the verifier's log."""
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.c_char_p(b"GPL")

    def load(log: Optional[ctypes.Array[ctypes.c_char]] = None) -> int:
        # union bpf_attr from prog_type to prog_name
        attr = struct.pack(
            "=IIQQIIQII16s",
            program_type,
            len(code) // _INSN_SIZE,
            ctypes.addressof(instructions),
            ctypes.cast(license_, ctypes.c_void_p).value,
            0 if log is None else 1,
            0 if log is None else len(log),
            0 if log is None else ctypes.addressof(log),
            0,
            0,
            name.encode()[:15],
        )
        return _bpf(_PROG_LOAD, attr, f"load {name}")

    with suppress(KernelUnfit):
        return load()
    log = ctypes.create_string_buffer(_VERIFIER_LOG_SIZE)
    try:
        return load(log)
    except KernelUnfit as error:
        lines = log.value.decode(errors="replace").strip().splitlines()
        raise KernelUnfit("; ".join([str(error), *lines[-3:]])) from error


def attach_kprobe(function: int, symbol: str, is_return: bool) -> int:
    """Attach a function to the entry or the return of a kernel function.

    :param function: a descriptor from :attr:`LoadedProgram.functions`.
    :return: the probe's descriptor; closing it detaches the function.
    :raises KernelUnfit: the kernel has no such function, or allows no probe on it.
    """
    retprobe_bit = KPROBE_PMU.with_name("format") / "retprobe"  # "config:0"
    config = 1 << int(retprobe_bit.read_text().rpartition(":")[2]) if is_return else 0
    name = ctypes.create_string_buffer(symbol.encode())
    perf_type = int(KPROBE_PMU.read_text())
    return _attach(function, _perf_attr(perf_type, config, ctypes.addressof(name)), symbol)


def attach_tracepoint(function: int, tracepoint: str) -> int:
    """Attach a function to a tracepoint.

    :param function: a descriptor from :attr:`LoadedProgram.functions`.
    :param tracepoint: ``GROUP/NAME``.
    :return: the probe's descriptor; closing it detaches the function.
    :raises TracefsMissing: tracefs, which has the tracepoint's id, is not mounted.
    :raises KernelUnfit: there is no such tracepoint, or the kernel refused to attach to it.
    """
    id_ = tracefs.find_tracefs() / "events" / tracepoint / "id"
    if not id_.exists():
        raise KernelUnfit(f"this kernel has no tracepoint {tracepoint}: use --source ftrace")
    attr = _perf_attr(_PERF_TYPE_TRACEPOINT, int(id_.read_text()), 0)
    return _attach(function, attr, tracepoint)


def _perf_attr(perf_type: int, config: int, config1: int) -> bytes:
    """Return a struct perf_event_attr; for a kprobe, config1 is the address of its symbol."""
    head = struct.pack("=IIQ40xQ", perf_type, _PERF_ATTR_SIZE, config, config1)
    return head.ljust(_PERF_ATTR_SIZE, b"\0")


def _attach(function: int, attr: bytes, target: str) -> int:
    # The event needs a CPU, but its BPF program runs on whichever CPU hits the probe.
    pid, cpu, group = -1, 0, -1
    with _errors_as_unfit(f"attach to {target}"):
        event = syscall(SYS_PERF_EVENT_OPEN, attr, pid, cpu, group, _PERF_FLAG_FD_CLOEXEC)
        try:
            fcntl.ioctl(event, _IOC_SET_BPF, function)
            fcntl.ioctl(event, _IOC_ENABLE, 0)
        except OSError:
            os.close(event)
            raise
    return event


def skipped_runs(function: int) -> int:
    """Return how often the kernel skipped a function, as another program was active on its CPU.

    The kernel counts this for probes since Linux 6.7 (``trace_call_bpf``); before, return 0.
    """
    info = ctypes.create_string_buffer(_PROG_INFO_SIZE)
    attr = struct.pack("=IIQ", function, _PROG_INFO_SIZE, ctypes.addressof(info))
    try:
        syscall(SYS_BPF, _OBJ_GET_INFO_BY_FD, attr, len(attr))
    except OSError:  # EPERM without capabilities, before Linux 5.19
        return 0
    return int(struct.unpack_from("=Q", info, _RECURSION_MISSES)[0])


class Counters:
    """An array map of 64-bit counters with ``BPF_F_MMAPABLE``: reading one takes no system call.

    :param descriptor: the map's, which stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ)
        self._values = memoryview(self._page).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._values[index]

    def close(self) -> None:
        """Unmap the counters; the map's descriptor stays open."""
        self._values.release()
        self._page.close()


def set_element(descriptor: int, index: int, value: int) -> None:
    """Set an element of an array map of unsigned 32-bit values.

    :param value: a function's descriptor if the map is a program array, for tail calls.
    """
    key, element = ctypes.c_uint32(index), ctypes.c_uint32(value)
    attr = struct.pack("=I4xQQQ", descriptor, ctypes.addressof(key), ctypes.addressof(element), 0)
    _bpf(_MAP_UPDATE, attr, "update a map")


class Ring:
    """The consumer's side of a BPF ring buffer (``kernel/bpf/ringbuf.c``).

    Positions and lengths need acquire and release semantics, which aligned loads and stores have
    on x86.

    :param descriptor: the map's, which stays the caller's.
    :param size: of the data area in bytes: the map's ``max_entries``.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer_page = mmap.mmap(descriptor, page)
        # The data pages are mapped twice in a row, so that a record that wraps is contiguous.
        self._producer_pages = mmap.mmap(
            descriptor, page + 2 * size, prot=mmap.PROT_READ, offset=page
        )
        self._consumer_position = memoryview(self._consumer_page).cast("Q")
        self._producer_position = memoryview(self._producer_pages).cast("Q")
        self._data = memoryview(self._producer_pages)[page:]
        self._epoll = select.epoll()
        self._epoll.register(descriptor, select.EPOLLIN)

    def wait(self, timeout: float) -> None:
        """Wait until there is a record, for at most ``timeout`` seconds."""
        self._epoll.poll(timeout)

    def records(self) -> Iterator[bytes]:
        """Yield the records that are complete now, and free their space.

        Left for the next call are records that arrive during the iteration, and all that follow one
        that the kernel is still writing.
        """
        position, end = self._consumer_position[0], self._producer_position[0]
        while position < end:
            start = position & self._mask
            (header,) = struct.unpack_from("=I", self._data, start)
            if header & _RING_BUSY:
                return
            length = header & ~_RING_DISCARDED
            if not header & _RING_DISCARDED:
                content = start + _RING_HEADER_SIZE
                yield bytes(self._data[content : content + length])
            position += (_RING_HEADER_SIZE + length + 7) & ~7
            self._consumer_position[0] = position

    def close(self) -> None:
        """Unmap the buffer; its descriptor stays open."""
        self._epoll.close()
        for view in (self._consumer_position, self._producer_position, self._data):
            view.release()
        self._consumer_page.close()
        self._producer_pages.close()


def _bpf(command: int, attr: bytes, action: str) -> int:
    with _errors_as_unfit(action):
        return syscall(SYS_BPF, command, attr, len(attr))


@contextmanager
def _errors_as_unfit(action: str) -> Iterator[None]:
    """Raise :class:`KernelUnfit` for an OSError inside the context."""
    try:
        yield
    except OSError as error:
        raise KernelUnfit(f"the kernel refused to {action}: {error.strerror}") from error
