"""Parse the lines of ftrace's ``trace_pipe`` (``Documentation/trace/ftrace.rst``).

Expect the trace clock ``boot`` and the option ``record-tgid``, as in::

    CPU 0/KVM-30920   (  30916) [001] .....  1851.928247: sys_ioctl(fd: d, cmd: aea3, arg: 0)

These are a thread's name and id, its process id (``-------`` if the kernel has not recorded it),
the CPU, flags, the time in seconds, and the event.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple, Optional

from tscwatch.clock import unix_ns


class Record(NamedTuple):
    """One line of trace_pipe."""

    ts: int
    """Unix time in ns."""
    tid: int
    pid: int
    """The process id as :func:`with_process` found it; before that, as ftrace recorded it."""
    comm: str
    name: str
    """The event's name; ``enter`` or ``exit`` for the ioctl syscall."""
    values: dict[str, int]
    """The event's arguments; those that are not numbers, such as ``(fault)``, are left out."""


_LINE = re.compile(
    r"\s*(?P<comm>.*)-(?P<tid>\d+)\s+(?:\(\s*(?P<pid>\d+|-+)\)\s+)?\[\d+\]\s+\S+\s+"
    r"(?P<s>\d+)\.(?P<us>\d{6}): (?P<event>.*)"
)
_ENTER = re.compile(r"sys_ioctl\(fd: (\w+), cmd: (\w+), arg: (\w+)\)")
_EXIT = re.compile(r"sys_ioctl -> (\w+)")
_PROBE = re.compile(r"(\w+): \(.*?\) ?(.*)")
_TRACEPOINT = re.compile(r"(kvm_\w+): (.*)")
_NUMBER = re.compile(r"-?\d+|0x[0-9a-f]+")
_STATUS_SIZE = 4096  # bytes; Tgid is one of the first lines


def parse(line: str) -> Optional[Record]:
    """Return the record for a line, None if the line is not a complete record of a known form.

    A thread's name can contain anything, also what looks like a record.
    """
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    event = match["event"]
    values: dict[str, int] = {}
    if found := _ENTER.match(event):
        fd, cmd, arg = (int(text, 16) for text in found.groups())
        name, values = "enter", {"fd": fd, "cmd": cmd, "arg": arg}
    elif found := _EXIT.match(event):
        name, values = "exit", {"ret": _signed(int(found[1], 16))}
    elif found := _PROBE.match(event):
        name = found[1]
        values = _numbers(pair.partition("=")[::2] for pair in found[2].split())
    elif found := _TRACEPOINT.match(event):
        name, words = found[1], found[2].split()
        values = _numbers(zip(words[::2], words[1::2]))
    else:
        return None
    ts = int(match["s"]) * 1_000_000_000 + int(match["us"]) * 1000
    tid, pid = match["tid"], match["pid"] or ""
    return Record(
        unix_ns(ts),
        int(tid),
        int(pid if pid.isdigit() else tid),
        match["comm"],
        name,
        values,
    )


def _numbers(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    return {name: int(text, 0) for name, text in pairs if _NUMBER.fullmatch(text)}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def with_process(record: Record, cache: dict[tuple[int, int], int]) -> Record:
    """Return the record with its process id from :func:`process_of`.

    Syscall exits are returned as they are: every failing ioctl on the host produces one, a lookup
    in /proc for each is too costly, and the entry of the same syscall has the process id.

    :param cache: process ids by the record's ``(tid, pid)``.  Thread ids are reused, so it must not
        be kept for long.
    """
    if record.name == "exit":
        return record
    thread = record.tid, record.pid
    if thread not in cache:
        cache[thread] = process_of(record)
    return record._replace(pid=cache[thread])


def process_of(record: Record) -> int:
    """Return the id of the record's process, from /proc while the thread is alive.

    The id in the record can be wrong: ftrace stores one for each thread id that it has seen, and
    can still have that of an earlier process after the thread id has been reused.
    """
    pid, tid = record.pid, record.tid
    # Faster than the thread's status.
    if pid != tid and os.path.exists(f"/proc/{pid}/task/{tid}") and _is_leader(pid):  # noqa: PTH110
        return pid
    return _tgid(tid) or pid


def _is_leader(pid: int) -> bool:
    """Return whether this is a process and not another thread of one (``pidfd_open(2)``)."""
    try:
        os.close(os.pidfd_open(pid))
    except OSError:
        return False
    return True


def _tgid(tid: int) -> Optional[int]:
    try:
        with open(f"/proc/{tid}/status", "rb", buffering=0) as file:  # noqa: PTH123
            status = file.read(_STATUS_SIZE)
        return int(status.partition(b"\nTgid:")[2].split(maxsplit=1)[0])
    except (OSError, IndexError, ValueError):
        return None
