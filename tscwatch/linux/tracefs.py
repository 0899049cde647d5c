"""Find tracefs, record events in a trace instance of its own, and remove stale instances.

The names of an instance's directory and of its probes contain the process id, so that a later start
can recognise and remove those of a process that was killed.

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
from tscwatch.linux.trace_pipe import Record, parse, with_process

log = logging.getLogger(__name__)

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
        self._root = root
        self._path = root / "instances" / f"tscwatch-{label}-{os.getpid()}"
        self._group = _group(os.getpid())
        self._probes: dict[str, str] = {}
        """The file in which each dynamic event is defined, by the event's name."""
        self._incomplete_line = ""
        self._pipe = -1
        try:
            self._path.mkdir()
            for name, value in (
                ("trace_clock", "mono"),
                ("buffer_size_kb", str(buffer_kb)),
                ("options/record-tgid", "1"),
            ):
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
        if filter_:
            (directory / "filter").write_text(filter_)
        (directory / "enable").write_text("1")

    def define(self, file: str, name: str, kind: str, definition: str, filter_: str = "") -> None:
        """Define a dynamic event and record it from now on.

        :param file: ``kprobe_events`` or ``uprobe_events``.
        :param kind: ``p`` for an entry, ``r`` for a return; a kprobe's can be followed by its
            maximum of concurrent calls, as in ``r64``.
        :param definition: the place and the fetch arguments.
        :param filter_: as for :meth:`enable`.
        :raises OSError: the kernel refused the event or the filter.
        """
        _append(self._root / file, f"{kind}:{self._group}/{name} {definition}")
        self._probes[name] = file
        self.enable(f"{self._group}/{name}", filter_)

    def has_defined(self, name: str) -> bool:
        """Return whether a dynamic event of this name exists now."""
        return self.has(f"{self._group}/{name}")

    def drop(self, name: str) -> None:
        """Undo :meth:`define`.  Read the event's records before."""
        (self._path / "events" / self._group / name / "enable").write_text("0")
        _append(self._root / self._probes.pop(name), f"-:{self._group}/{name}")

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
        _remove_instance(self._path)
        for name, file in self._probes.items():
            if f"{self._group}/{name}" in _defined(self._root / file):
                _append(self._root / file, f"-:{self._group}/{name}")
        self._probes.clear()


class TscCounter:
    """Reads the host's TSC through a trace instance whose clock it is.

    Nothing is recorded there.  With this clock, ``per_cpu/cpu0/stats`` has the TSC's value as
    ``now ts`` (``tracing_stats_read``, ``trace_clock_x86_tsc``).

    :raises OSError: the kernel refused the instance.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "instances" / f"tscwatch-tsc-{os.getpid()}"
        self._path.mkdir()
        (self._path / "trace_clock").write_text("x86-tsc")
        (self._path / "buffer_size_kb").write_text("1")

    def read(self) -> Optional[int]:
        """Return the TSC's present value in cycles; None if it cannot be read."""
        try:
            stats = (self._path / "per_cpu/cpu0/stats").read_text()
        except OSError:
            return None
        found = re.search(r"^now ts: (\d+)$", stats, re.MULTILINE)
        return int(found[1]) if found else None

    def close(self) -> None:
        """Remove the instance."""
        _remove_instance(self._path)


def clear_stale(root: Path) -> None:
    """Remove the instances and dynamic events of tscwatch processes that no longer run."""
    stale: dict[int, list[Path]] = {}
    for instance in (root / "instances").glob("tscwatch-*"):
        suffix = instance.name.rpartition("-")[2]
        if suffix.isdigit() and not _is_tscwatch(int(suffix)):
            stale.setdefault(int(suffix), []).append(instance)
    for pid, instances in stale.items():
        log.info("removing the trace instances that tscwatch process %d left in tracefs", pid)
        try:
            for instance in instances:
                _remove_instance(instance)
            for file in _PROBE_FILES:
                _remove_probes(root / file, _group(pid))
        except OSError as error:
            # Another tscwatch that starts at the same time may have removed them first.
            if any(instance.exists() for instance in instances):
                log.warning("cannot remove the trace instances of process %d: %s", pid, error)


def _is_tscwatch(pid: int) -> bool:
    try:
        return b"tscwatch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# Instances and dynamic events in tracefs


def _group(pid: int) -> str:
    """Return the group of a process's dynamic events."""
    return f"tscwatch_{pid}"


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
    if not file.exists():
        return []
    return [line.split()[0].partition(":")[2] for line in file.read_text().splitlines()]


def _append(file: Path, line: str) -> None:
    """Append a line to a file of definitions.

    Python's mode "a" cannot be used: it seeks to the end first, which tracefs refuses (EINVAL).
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)
