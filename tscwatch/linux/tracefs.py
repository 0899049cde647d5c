"""A trace instance of our own in tracefs, and the lines that the kernel writes into it.

Its directory and its probes carry our pid in their names, so that the next start can clear away
what a killed tscwatch left.
"""

from __future__ import annotations

import logging
import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tscwatch.errors import TracefsMissing
from tscwatch.linux.trace_pipe import Record, _of_process, parse

log = logging.getLogger(__name__)

_READ = 1 << 16
_MAX_READS = 64  # at once; the kernel gives at most a page (about 40 records) a time
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+) EVENTS\]")
_PROBE_FILES = ("kprobe_events", "uprobe_events")
MOUNT_POINTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def require(mount_points: Sequence[Path] = MOUNT_POINTS) -> Path:
    """The mounted tracefs.

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
    """A trace instance, its pipe, and the probes that were defined for it.

    :param label: tells one of our instances from another.
    :param buffer_kb: for each CPU.
    :raises OSError: the kernel refused it.
    """

    def __init__(self, root: Path, label: str, buffer_kb: int) -> None:
        self.lost = 0
        """Records that the kernel had no room for."""
        self.unreadable = 0
        self._root = root
        self._path = root / "instances" / f"tscwatch-{label}-{os.getpid()}"
        self._group = _group(os.getpid())
        self._probes: dict[str, str] = {}
        """The file that each probe of this instance is defined in."""
        self._rest = ""
        self._pipe = -1
        try:
            self._path.mkdir()
            for name, value in (
                ("trace_clock", "mono"),
                ("buffer_size_kb", str(buffer_kb)),
                ("options/record-tgid", "1"),
            ):
                (self._path / name).write_text(value)
            wake_at_once = self._path / "buffer_percent"
            if wake_at_once.exists():
                wake_at_once.write_text("0")
            self._pipe = os.open(self._path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            self.close()
            raise

    def has(self, event: str) -> bool:
        """Whether the kernel knows this ``system/name`` now."""
        return (self._path / "events" / event).is_dir()

    def enable(self, event: str, filter_: str = "") -> None:
        """Record this ``system/name`` from now on."""
        directory = self._path / "events" / event
        if filter_:
            (directory / "filter").write_text(filter_)
        (directory / "enable").write_text("1")

    def define(self, file: str, name: str, kind: str, what: str, filter_: str = "") -> None:
        """A dynamic event of this name, recorded from now on.

        :param file: ``kprobe_events`` or ``uprobe_events``.
        :param kind: ``p``, or ``r`` with what may follow it.
        :param what: place and fetch arguments (Documentation/trace/kprobetrace.rst).
        """
        _append(self._root / file, f"{kind}:{self._group}/{name} {what}")
        self._probes[name] = file
        self.enable(f"{self._group}/{name}", filter_)

    def has_defined(self, name: str) -> bool:
        """Whether a dynamic event is there (it goes when a module that it is in does)."""
        return self.has(f"{self._group}/{name}")

    def drop(self, name: str) -> None:
        """Undo :meth:`define`; what it recorded must have been read."""
        (self._path / "events" / self._group / name / "enable").write_text("0")
        _append(self._root / self._probes.pop(name), f"-:{self._group}/{name}")

    def missed(self) -> int:
        """Kprobes of ours that the kernel could not run."""
        profile = self._root / "kprobe_profile"
        lines = profile.read_text().splitlines() if profile.exists() else []
        ours = (line.split()[:3] for line in lines)
        return sum(int(misses) for event, _, misses in ours if event.startswith(f"{self._group}/"))

    def wait(self, timeout: float) -> None:
        """Until there is something to read, or ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        poller.poll(timeout * 1000)

    def read(self, until: int = 0) -> Iterator[Record | int]:
        """What waits in the pipe: records, and how many the kernel lost before the next.

        What comes faster than it can be read must not keep us here: some pages are read, the rest
        is for the next time.

        :param until: read on to the last record before this moment (Unix, ns).
        """
        processes: dict[tuple[int, int], int] = {}  # of this moment: ids come again
        pages = newest = 0
        while pages < _MAX_READS or newest < until:
            lines = self._page()
            if not lines:
                return
            pages += 1
            for line in lines:
                if found := _LOST.search(line):
                    self.lost += int(found[1])
                    yield int(found[1])
                elif record := parse(line):
                    newest = record.ts
                    yield _of_process(record, processes)
                else:
                    self.unreadable += 1

    def _page(self) -> list[str]:
        """Its whole lines; bytes that are no UTF-8 are shown, not dropped."""
        try:
            chunk = os.read(self._pipe, _READ)
        except BlockingIOError:
            return []
        text = self._rest + chunk.decode("utf-8", "backslashreplace")
        *lines, self._rest = text.split("\n")
        return lines

    def close(self) -> None:
        """Leave nothing behind."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        _remove_instance(self._path)
        for name, file in self._probes.items():
            if f"{self._group}/{name}" in _defined(self._root / file):
                _append(self._root / file, f"-:{self._group}/{name}")
        self._probes.clear()


def clear_stale(root: Path) -> None:
    """Remove the instances and probes of a tscwatch that was killed."""
    stale: dict[int, list[Path]] = {}
    for instance in (root / "instances").glob("tscwatch-*"):
        pid = instance.name.rpartition("-")[2]
        if pid.isdigit() and not _is_tscwatch(int(pid)):
            stale.setdefault(int(pid), []).append(instance)
    for killed, instances in stale.items():
        log.info("clearing away what tscwatch process %d left in tracefs", killed)
        try:
            for instance in instances:
                _remove_instance(instance)
            for file in _PROBE_FILES:
                _remove_probes(root / file, _group(killed))
        except OSError as error:  # another tscwatch that starts now may have been faster
            if any(instance.exists() for instance in instances):
                log.warning("it stays there: %s", error)


def _group(pid: int) -> str:
    return f"tscwatch_{pid}"


def _remove_instance(instance: Path, attempts: int = 50) -> None:
    """The kernel says EBUSY until a reader that was just killed has let go."""
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


def _defined(definitions: Path) -> list[str]:
    if not definitions.exists():
        return []
    lines = definitions.read_text().splitlines()
    return [line.split()[0].partition(":")[2] for line in lines]


def _remove_probes(definitions: Path, group: str) -> None:
    for event in _defined(definitions):
        if event.startswith(f"{group}/"):
            _append(definitions, f"-:{event}")


def _append(path: Path, line: str) -> None:
    """Python's own "a" mode seeks to the end first, which tracefs refuses (EINVAL)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def _is_tscwatch(pid: int) -> bool:
    try:
        return b"tscwatch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
