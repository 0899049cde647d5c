"""The lines that the kernel writes into ``trace_pipe``, as records."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

from tscwatch.clock import unix_ns


class Record(NamedTuple):
    """One line of trace_pipe."""

    ts: int
    tid: int
    pid: int
    """By ftrace's word in the exit of a syscall, which ends what its entry began."""
    comm: str
    name: str
    """The event's name; ``enter`` or ``exit`` for the ioctl syscall."""
    values: dict[str, int]


_LINE = re.compile(
    r"\s*(?P<comm>.*)-(?P<tid>\d+)\s+(?:\(\s*(?P<pid>\d+|-+)\)\s+)?\[\d+\]\s+\S+\s+"
    r"(?P<s>\d+)\.(?P<us>\d{6}): (?P<what>.*)"
)
_ENTER = re.compile(r"sys_ioctl\(fd: (\w+), cmd: (\w+), arg: (\w+)\)")
_EXIT = re.compile(r"sys_ioctl -> (\w+)")
_PROBE = re.compile(r"(\w+): \(.*?\) ?(.*)")
_TRACEPOINT = re.compile(r"(kvm_\w+): (.*)")
_NUMBER = re.compile(r"-?\d+|0x[0-9a-f]+")


def parse(line: str) -> Optional[Record]:
    """A record, or None for a line that is none (a torn or forged one among them)."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    what = match["what"]
    values: dict[str, int] = {}
    if found := _ENTER.match(what):
        fd, cmd, arg = (int(text, 16) for text in found.groups())
        name, values = "enter", {"fd": fd, "cmd": cmd, "arg": arg}
    elif found := _EXIT.match(what):
        name, values = "exit", {"ret": _signed(int(found[1], 16))}
    elif found := _PROBE.match(what):
        name = found[1]
        values = _numbers(pair.partition("=")[::2] for pair in found[2].split())
    elif found := _TRACEPOINT.match(what):
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
    return {key: int(text, 0) for key, text in pairs if _NUMBER.fullmatch(text)}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def process_of(record: Record) -> int:
    """The record's process.

    ftrace keeps a process for each thread id it has seen, also when the id has gone to another
    process since; so /proc goes first, while the thread lives.
    """
    return _tgid(record.tid) or record.pid


def _of_process(record: Record, known: dict[tuple[int, int], int]) -> Record:
    """The record with its process, which is looked up once for a thread.

    Not for the exit of an ioctl: any that fails on this host has one, and none is asked whose.
    """
    if record.name == "exit":
        return record
    thread = record.tid, record.pid
    if thread not in known:
        known[thread] = process_of(record)
    return record._replace(pid=known[thread])


def _tgid(tid: int) -> Optional[int]:
    """The process of a thread that lives."""
    try:
        status = Path(f"/proc/{tid}/status").read_text(errors="replace")
        return int(status.partition("\nTgid:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return None
