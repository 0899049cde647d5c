"""Find tracefs, record events in a trace instance of its own, and remove stale instances.

The names of an instance's directory and of its probes contain the start time and the id of their
process, so that a later start can recognise and remove those of a process that was killed.

See ``Documentation/trace/ftrace.rst`` for instances, ``kprobetrace.rst`` and ``uprobetracer.rst``
for dynamic events.
"""

from __future__ import annotations

import logging
import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from tscwatch.errors import TracefsMissing
from tscwatch.linux.files import read_text, selected
from tscwatch.linux.process import start_time
from tscwatch.linux.trace_pipe import Record, parse, with_process

log = logging.getLogger(__name__)

_SETTINGS = {
    "trace_clock": "boot",
    "options/record-tgid": "1",
    "set_event_pid": "",  # events of all processes
    "tracing_on": "1",
}
"""Files of an instance, and what they must contain."""

_MOUNT_POINTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_PROBE_FILES = ("kprobe_events", "uprobe_events")

_READ_SIZE = 1 << 16
_MAX_READS = 64  # each returns at most a page, about 40 records
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+) EVENTS\]")


def find_tracefs(mount_points: Sequence[Path] = _MOUNT_POINTS) -> Path:
    """Return the directory in which tracefs is mounted.

    :raises TracefsMissing: it is not mounted.
    """
    for mount_point in mount_points:
        if (mount_point / "events").is_dir():
            return mount_point
    raise TracefsMissing(
        "tracefs is not mounted: run 'mount -t tracefs none /sys/kernel/tracing', or enable "
        "sys-kernel-tracing.mount"
    )


class TraceInstance:
    """A trace instance, its trace_pipe, and the dynamic events defined for it.

    Events are named ``GROUP/NAME``, after their directory in ``events``.

    :param root: the directory from :func:`find_tracefs`.
    :param label: part of the instance's name, which must be unique in this process.
    :param buffer_kb: size of each CPU's buffer in KiB.
    :raises OSError: the kernel refused the instance.
    """

    def __init__(self, root: Path, label: str, buffer_kb: int) -> None:
        self.lost = 0
        """Records that the kernel dropped because a buffer was full."""
        self.unreadable = 0
        """Lines that were not records."""
        self.is_behind = False
        """The last :meth:`read` has left records behind."""
        self.gaps = 0
        """How often somebody else had disabled or removed an event."""
        self.is_complete = True
        """The last :meth:`restore` has found nothing to restore."""
        self._root = root
        self._path = _instance(root, label)
        self._group = _group(*_OWNER)
        self._enabled: dict[str, str] = {}
        """The filter of each event that is recorded."""
        self._probes: dict[str, tuple[str, str]] = {}
        """Of each dynamic event, the file in which it is defined, and its line there."""
        self._incomplete_line = ""
        self._pipe = -1
        try:
            self._path.mkdir()
            (self._path / "buffer_size_kb").write_text(str(buffer_kb))
            for name, value in _SETTINGS.items():
                (self._path / name).write_text(value)
            # At 0 percent, each record wakes the reader at once.  Old kernels lack the file.
            buffer_percent = self._path / "buffer_percent"
            if buffer_percent.exists():
                buffer_percent.write_text("0")
            self._pipe = os.open(self._path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            self.close()
            raise

    def has(self, event: str) -> bool:
        """Return whether an event, or a whole group, exists now."""
        return (self._path / "events" / event).is_dir()

    def enable(self, event: str, filter_: str = "") -> None:
        """Record an event from now on.

        :param filter_: an expression over its fields (``Documentation/trace/events.rst``).
        :raises OSError: the kernel has no such event, or refused the filter.
        """
        directory = self._path / "events" / event
        (directory / "filter").write_text(filter_ or "0")  # 0: no filter
        (directory / "enable").write_text("1")
        self._enabled[event] = filter_

    def forget(self, event: str) -> None:
        """Undo :meth:`enable` for an event that has disappeared with its module.

        It is off when it comes again, which nobody has done.
        """
        self._enabled.pop(event, None)

    def define(self, file: str, name: str, kind: str, definition: str, filter_: str = "") -> None:
        """Define a dynamic event and record it from now on.

        :param file: ``kprobe_events`` or ``uprobe_events``.
        :param kind: ``p`` for an entry, ``r`` for a return; a kprobe's can be followed by its
            maximum of concurrent calls, as in ``r64``.
        :param definition: the place and the fetch arguments.
        :param filter_: as for :meth:`enable`.
        :raises OSError: the kernel refused the event or the filter.
        """
        line = f"{kind}:{self._group}/{name} {definition}"
        _append(self._root / file, line)
        self._probes[f"{self._group}/{name}"] = file, line
        self.enable(f"{self._group}/{name}", filter_)

    def has_defined(self, name: str) -> bool:
        """Return whether a dynamic event of this name exists now."""
        return self.has(f"{self._group}/{name}")

    def drop(self, name: str) -> None:
        """Undo :meth:`define`.  Read the event's records before."""
        event = f"{self._group}/{name}"
        self._enabled.pop(event, None)  # it is not there if the kernel has refused to enable it
        (self._path / "events" / event / "enable").write_text("0")
        _append(self._root / self._probes.pop(event)[0], f"-:{event}")

    def restore(self) -> bool:
        """Record again what somebody else has disabled or removed; return whether that was so.

        The instance itself cannot be removed while its trace_pipe is open (``instance_rmdir``).
        """
        off = [name for name in (*_SETTINGS, *self._enabled) if self._is_off(name)]
        outcomes = [f"{name} ({self._restore(name)})" for name in off]
        if off and self.is_complete:  # else it is the same gap
            self.gaps += 1
            log.warning("another process has disabled trace events: %s", ", ".join(outcomes))
        self.is_complete = not off
        return bool(off)

    def _restore(self, name: str) -> str:
        """Restore a setting or an event; return what became of it, in words."""
        is_removed = name in self._probes and not self.has(name)
        if is_removed and self._probes[name][0] == "uprobe_events":
            # The file at that path may be another one now, in which the offset means nothing.
            del self._probes[name], self._enabled[name]
            return "no longer recorded"
        try:
            if is_removed:
                file, line = self._probes[name]
                _append(self._root / file, line)
            if name in _SETTINGS:
                (self._path / name).write_text(_SETTINGS[name])
            else:
                self.enable(name, self._enabled[name])
        except OSError as error:
            return f"cannot be restored: {error.strerror}"
        return "restored"

    def _is_off(self, name: str) -> bool:
        """Return whether a setting, or an event, is not as it was requested.

        An event of a kernel module disappears with the module; that is not off.
        """
        if name in _SETTINGS:
            return selected(read_text(self._path / name)) != _SETTINGS[name]
        directory = self._path / "events" / name
        if not directory.is_dir():
            return name in self._probes
        is_enabled = read_text(directory / "enable").startswith("1")
        filter_ = read_text(directory / "filter")
        return not is_enabled or filter_ != (self._enabled[name] or "none")

    def missed(self) -> int:
        """Return how many hits of this process's kprobes the kernel could not record."""
        profile = self._root / "kprobe_profile"
        lines = profile.read_text().splitlines() if profile.exists() else []
        columns = (line.split()[:3] for line in lines)  # event, hits, misses
        return sum(
            int(misses) for event, _, misses in columns if event.startswith(f"{self._group}/")
        )

    def wait(self, timeout: float) -> None:
        """Wait until there is a record to read, for at most ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        poller.poll(timeout * 1000)

    def read(self, until: int = 0) -> Iterator[Record | int]:
        """Yield records, and the number that the kernel dropped before the next one.

        The number of pages that one call reads is limited, because the kernel can write records
        faster than they can be read.  The next call continues.

        :param until: Unix time in ns.  Read all records before it, whatever the number of pages.
        """
        processes: dict[tuple[int, int], int] = {}
        pages = newest = 0
        self.is_behind = True
        while pages < _MAX_READS or newest < until:
            lines = self._read_lines()
            if not lines:
                self.is_behind = False
                return
            pages += 1
            for line in lines:
                if found := _LOST.search(line):
                    self.lost += int(found[1])
                    yield int(found[1])
                elif record := parse(line):
                    newest = record.ts
                    yield with_process(record, processes)
                else:
                    self.unreadable += 1

    def _read_lines(self) -> list[str]:
        """Read a page and return its complete lines; bytes that are not UTF-8 are escaped."""
        try:
            page = os.read(self._pipe, _READ_SIZE)
        except BlockingIOError:
            return []
        text = self._incomplete_line + page.decode("utf-8", "backslashreplace")
        *lines, self._incomplete_line = text.split("\n")
        return lines

    def close(self) -> None:
        """Remove the instance and the dynamic events that were defined for it."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        try:
            _remove_instance(self._path)
        except OSError as error:  # another process has a file of it open
            log.warning("%s cannot be removed: %s", self._path, error)
        for event, (file, _) in self._probes.items():
            if event in _defined(self._root / file):
                _append(self._root / file, f"-:{event}")
        self._probes.clear()


class TscCounter:
    """Reads the host's TSC through a trace instance whose clock it is.

    Nothing is recorded there.  With this clock, ``per_cpu/cpu0/stats`` has the TSC's value as
    ``now ts`` (``tracing_stats_read``, ``trace_clock_x86_tsc``).
    """

    def __init__(self, root: Path) -> None:
        self._path = _instance(root, "tsc")

    def read(self) -> Optional[int]:
        """Return the TSC's present value in cycles; None if CPU 0 is offline.

        The instance is created the first time, and again if somebody else has removed it; a clock
        that somebody else has changed is corrected.

        :raises OSError: the kernel refused the instance or its clock.
        """
        if selected(read_text(self._path / "trace_clock")) != "x86-tsc":
            self._path.mkdir(exist_ok=True)
            (self._path / "trace_clock").write_text("x86-tsc")
            (self._path / "buffer_size_kb").write_text("1")
        stats = read_text(self._path / "per_cpu/cpu0/stats")
        found = re.search(r"^now ts: (\d+)$", stats, re.MULTILINE)
        return int(found[1]) if found else None

    def close(self) -> None:
        """Remove the instance."""
        _remove_instance(self._path)


def clear_stale(root: Path) -> None:
    """Remove the instances and dynamic events of tscwatch processes that have certainly ended.

    This process must be in the host's process namespace (:func:`tscwatch.linux.process.
    sees_the_host`), else it cannot find the others.
    """
    instances = list((root / "instances").glob("tscwatch-*"))
    events = [event for file in _PROBE_FILES for event in _defined(root / file)]
    found = map(_OF_PROCESS.match, (*(instance.name for instance in instances), *events))
    owners = {(int(match[1]), int(match[2])) for match in found if match}
    for owner in filter(lambda owner: _has_ended(*owner), owners):
        start, pid = owner
        log.info("removing what tscwatch process %d left in tracefs", pid)
        left = [path for path in instances if path.name.endswith(f"-{start}-{pid}")]
        try:
            for instance in left:
                _remove_instance(instance)
            for file in _PROBE_FILES:
                _remove_probes(root / file, _group(*owner))
        except OSError as error:
            # Another tscwatch that starts at the same time may have removed them first.
            if any(instance.exists() for instance in left):
                log.warning("cannot remove the trace instances of process %d: %s", pid, error)


def _has_ended(start: int, pid: int) -> bool:
    """Return whether it is certain that a process has ended: its id is free, or is another's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return start_time(pid) not in (start, None)


# Instances and dynamic events in tracefs


_OWNER = start_time(os.getpid()) or 0, os.getpid()
_OF_PROCESS = re.compile(r"tscwatch(?:-\w+-(?=\d+-\d+$)|_(?=\d+_\d+/))(\d+)[-_](\d+)")
"""Matches the name of an instance, or the beginning of an event's."""


def _instance(root: Path, label: str) -> Path:
    """Return the directory of an instance of this process."""
    start, pid = _OWNER
    return root / "instances" / f"tscwatch-{label}-{start}-{pid}"


def _group(start: int, pid: int) -> str:
    """Return the group of a process's dynamic events."""
    return f"tscwatch_{start}_{pid}"


def _remove_instance(instance: Path, attempts: int = 50) -> None:
    """Disable the events of an instance and remove it, if it exists.

    ``instance_rmdir`` fails with EBUSY while a process has a file of the instance open, and one
    that was just killed may not have closed its files yet.
    """
    if not instance.exists():
        return
    (instance / "events/enable").write_text("0")
    for _ in range(attempts - 1):
        try:
            instance.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    instance.rmdir()


def _remove_probes(file: Path, group: str) -> None:
    for event in _defined(file):
        if event.startswith(f"{group}/"):
            _append(file, f"-:{event}")


def _defined(file: Path) -> list[str]:
    """Return ``GROUP/NAME`` of each dynamic event in a file of definitions."""
    return [line.split()[0].partition(":")[2] for line in read_text(file).splitlines()]


def _append(file: Path, line: str) -> None:
    """Append a line to a file of definitions.

    Python's mode "a" cannot be used: it seeks to the end first, which tracefs refuses (EINVAL).
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)
