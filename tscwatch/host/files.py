"""Read files that belong to a VMM's process: its configuration, and libvirt's file about it.

What is behind ``/proc/PID/root`` may belong to a hostile VMM.  So no symbolic link is followed,
only a regular file with a size is opened, and a file system that never answers does not stop the
daemon.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from threading import Thread
from typing import Optional

from tscwatch.clock import now_ns

_PATIENCE_S = 0.25
_MAX_HANGING = 8
_MAX_HANGING_PER_PROCESS = 2
_PART = 10  # at most a tenth of the time is spent on reading,
_AT_ONCE_NS = 2_000_000_000  # or this much after a long pause


class ForeignFiles:
    """Reads files, but none while too many reads hang or too much time was spent on slow ones."""

    def __init__(self) -> None:
        self._hanging: list[tuple[Path, Thread]] = []
        """The directory of a process in procfs, and the thread that reads there."""
        self._paid_until = 0
        """Unix time in ns: each read takes up the time that it took, times :data:`_PART`."""

    def read(self, top: Path, path: str, limit: int) -> Optional[bytes]:
        """Return the beginning of a regular file beneath a directory, None if it cannot be read.

        :param top: ``/proc/PID/root`` or ``/proc/PID/cwd``.
        :param path: relative to ``top``, even if it begins with a slash; it may contain anything.
        :param limit: in bytes.
        """
        begin = now_ns()
        process = top.parent
        self._hanging = [(where, thread) for where, thread in self._hanging if thread.is_alive()]
        of_process = sum(where == process for where, _ in self._hanging)
        if of_process >= _MAX_HANGING_PER_PROCESS or len(self._hanging) >= _MAX_HANGING:
            return None
        if self._paid_until > begin:
            return None
        found: list[Optional[bytes]] = []
        thread = Thread(target=lambda: found.append(_read(top, path, limit)), daemon=True)
        thread.start()
        thread.join(_PATIENCE_S)
        if thread.is_alive():
            self._hanging.append((process, thread))
        paid_until = max(self._paid_until, begin - _PART * _AT_ONCE_NS)
        # The host may have slept meanwhile, and the clock counts that.
        self._paid_until = paid_until + _PART * min(now_ns() - begin, int(2e9 * _PATIENCE_S))
        return found[0] if found else None


def _read(top: Path, path: str, limit: int) -> Optional[bytes]:
    try:
        file = _find(top, path)
    except (OSError, ValueError):  # ValueError: no file can have this name
        return None
    try:
        # Opening a device for reading could already have an effect, such as starting a watchdog.
        # The files of procfs and tracefs have no size: reading trace_pipe consumes others' records.
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return None
        with Path(f"/proc/self/fd/{file}").open("rb") as content:
            return content.read(limit)
    except OSError:
        return None
    finally:
        os.close(file)


def _find(top: Path, path: str) -> int:
    """Return a file descriptor with which a file can be inspected, but not read.

    A symbolic link or ``..`` could lead out of the directory, which root may do and the owner of
    the directory may not, so neither is followed.

    :raises OSError: it does not exist, or a symbolic link or ``..`` is in the way.
    """
    found = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.split("/"):
        directory = found
        if part in ("", "."):
            continue
        try:
            if part == "..":
                raise FileNotFoundError(path)
            found = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
    return found
