"""SYS_BPF as the kernel offers it (bpf(2), perf_event_open(2)): maps, programs, probes, the ring.

All are file descriptors: nothing is pinned, and the kernel takes everything down with the
process that held it, however that ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import resource
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tscwatch.errors import KernelUnfit
from tscwatch.linux import tracefs
from tscwatch.linux.compiler import Map, Program, relocated
from tscwatch.linux.syscall import SYS_BPF, SYS_PERF_EVENT_OPEN, syscall

KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
"""There where kprobes are (perf_kprobe, Linux 4.17)."""

KPROBE, TRACEPOINT = 2, 5  # enum bpf_prog_type

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD = 0, 1, 2, 5
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_ATTR_SIZE = 112  # PERF_ATTR_SIZE_VER5
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408
_LOG_SIZE = 1 << 20
_BUSY, _DISCARDED = 1 << 31, 1 << 30


class LoadedProgram:
    """A program in the kernel: its maps and functions by name, attached to nothing yet.

    :raises KernelUnfit: the kernel refused a map or a function, with the verifier's last word.
    """

    def __init__(self, program: Program, kind: int) -> None:
        self._descriptors: list[int] = []
        with suppress(OSError, ValueError):  # Linux before 5.11 takes maps for locked memory
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
        try:
            places = {place: self.own(_create(each)) for place, each in enumerate(program.maps)}
            self.maps = {each.name: places[place] for place, each in enumerate(program.maps)}
            self.functions = {
                name: self.own(_load(name, relocated(code, places), kind))
                for name, code in program.functions.items()
            }
        except KernelUnfit:
            self.close()
            raise

    def own(self, descriptor: int) -> int:
        """Close this one, a probe's, with the program."""
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Nothing of it is left in the kernel then, but for what others hold."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def _create(each: Map) -> int:
    sizes = (each.map_type, each.key_size, each.value_size, each.max_entries, each.map_flags)
    return _bpf(_MAP_CREATE, struct.pack("=5I", *sizes), f"make the map {each.name}")


def _load(name: str, code: bytes, kind: int) -> int:
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.c_char_p(b"GPL")
    what = f"load {name}"

    def attempt(log: ctypes.Array[ctypes.c_char]) -> int:
        is_wanted = len(log) > 1
        attr = struct.pack(
            "=IIQQIIQII16s",
            kind,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.cast(license_, ctypes.c_void_p).value,
            is_wanted,
            len(log) if is_wanted else 0,
            ctypes.addressof(log) if is_wanted else 0,
            0,
            0,
            name.encode()[:15],
        )
        return _bpf(_PROG_LOAD, attr, what)

    with suppress(KernelUnfit):
        return attempt(ctypes.create_string_buffer(1))
    log = ctypes.create_string_buffer(_LOG_SIZE)
    try:
        return attempt(log)
    except KernelUnfit as error:
        said = log.value.decode(errors="replace").strip().splitlines()
        raise KernelUnfit("; ".join([str(error), *said[-3:]])) from error


def attach_kprobe(function: int, to: str, is_return: bool) -> int:
    """At the entry or the return of a kernel function; the descriptor holds it.

    :raises KernelUnfit: the kernel has no such function, or no probe on it.
    """
    bit = KPROBE_PMU.with_name("format") / "retprobe"  # "config:0"
    config = 1 << int(bit.read_text().rpartition(":")[2]) if is_return else 0
    symbol = ctypes.create_string_buffer(to.encode())
    kind = int(KPROBE_PMU.read_text())
    return _attach(function, _event(kind, config, ctypes.addressof(symbol)), to)


def attach_tracepoint(function: int, to: str) -> int:
    """At a tracepoint, ``GROUP/NAME``; the descriptor holds it.

    :raises TracefsMissing: tracepoints have their numbers there.
    :raises KernelUnfit: there is no such tracepoint.
    """
    number = tracefs.require() / "events" / to / "id"
    if not number.exists():
        raise KernelUnfit(f"this kernel has no tracepoint {to}: use --source ftrace")
    return _attach(function, _event(_PERF_TYPE_TRACEPOINT, int(number.read_text()), 0), to)


def _event(kind: int, config: int, address: int) -> bytes:
    """struct perf_event_attr: type, size, config, ..., config1 (a kprobe's function)."""
    head = struct.pack("=IIQ40xQ", kind, _PERF_ATTR_SIZE, config, address)
    return head.ljust(_PERF_ATTR_SIZE, b"\0")


def _attach(function: int, attr: bytes, to: str) -> int:
    every_process, cpu, group = -1, 0, -1  # a probe fires on each CPU, whatever this one is
    with _refusing(f"attach to {to}"):
        event = syscall(SYS_PERF_EVENT_OPEN, attr, every_process, cpu, group, _PERF_FLAG_FD_CLOEXEC)
        try:
            fcntl.ioctl(event, _IOC_SET_BPF, function)
            fcntl.ioctl(event, _IOC_ENABLE, 0)
        except OSError:
            os.close(event)
            raise
    return event


class Counters:
    """A per-CPU array of 64-bit counters."""

    def __init__(self, descriptor: int) -> None:
        possible = Path("/sys/devices/system/cpu/possible").read_text()
        cpus = 1 + max(int(number) for number in re.findall(r"\d+", possible))
        self._map = descriptor
        self._values = (ctypes.c_uint64 * cpus)()

    def sum(self, which: int) -> int:
        """Over all CPUs."""
        key = ctypes.c_uint32(which)
        _element(_MAP_LOOKUP, self._map, key, self._values)
        return sum(self._values)


def put(descriptor: int, value: int) -> None:
    """Into the one place of an array of 32-bit numbers."""
    _element(_MAP_UPDATE, descriptor, ctypes.c_uint32(0), ctypes.c_uint32(value))


def _element(command: int, descriptor: int, key: ctypes.c_uint32, value: ctypes._CData) -> None:
    attr = struct.pack("=I4xQQQ", descriptor, ctypes.addressof(key), ctypes.addressof(value), 0)
    _bpf(command, attr, "reach a map")


class Ring:
    """The reader's side of a SYS_BPF ring buffer (kernel/bpf/ringbuf.c).

    Eight aligned bytes are read and written at once, in order: x86 does that by itself.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._ours = mmap.mmap(descriptor, page)
        # The data follow twice: no record is ever cut.
        self._theirs = mmap.mmap(descriptor, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        self._consumed = memoryview(self._ours).cast("Q")
        self._produced = memoryview(self._theirs).cast("Q")
        self._data = memoryview(self._theirs)[page:]
        self._waiting = select.epoll()
        self._waiting.register(descriptor, select.EPOLLIN)

    def wait(self, timeout: float) -> None:
        """Until there is something, in seconds at the longest."""
        self._waiting.poll(timeout)

    def records(self) -> Iterator[bytes]:
        """What is there now; what comes while it is read is left for the next time."""
        at, end = self._consumed[0], self._produced[0]
        while at < end:
            start = at & self._mask
            (length,) = struct.unpack_from("=I", self._data, start)
            if length & _BUSY:
                return
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                yield bytes(self._data[start + 8 : start + 8 + size])
            at += (8 + size + 7) & ~7
            self._consumed[0] = at

    def close(self) -> None:
        """The descriptor stays open: it is not the ring's."""
        self._waiting.close()
        for view in (self._consumed, self._produced, self._data):
            view.release()
        self._ours.close()
        self._theirs.close()


def _bpf(command: int, attr: bytes, what: str) -> int:
    with _refusing(what):
        return syscall(SYS_BPF, command, attr, len(attr))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelUnfit(f"the kernel did not let us {what}: {error.strerror}") from error
