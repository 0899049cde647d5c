"""Read libvirt's status file of a running guest, the live XML of its domain.

libvirt writes the file before it lets QEMU start (``qemuProcessLaunch``), replaces it at each
change and removes it at the end.  It is read through ``/proc/PID/root``: libvirt may run in the
container of its guest, as KubeVirt's does, and this daemon's own mount namespace may hide
directories.

What is behind that root may belong to a hostile VMM.  So no symbolic link is followed, only a
regular file is opened, and a file system that never answers does not stop the daemon.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from threading import Thread

from tscwatch.clock import now_ns

_DIRECTORIES = (("run", "libvirt", "qemu"), ("run", "libvirt", "qemu", "run"))
"""Of the system's libvirt, and of a user's whose XDG_RUNTIME_DIR is ``/run``, as in KubeVirt."""
_MAX_SIZE = 1 << 18  # bytes; libvirt writes some 10 kB, and the metadata before the devices
_PATIENCE_S = 0.25
_MAX_HANGING = 8
_PART = 10  # at most a tenth of the time is spent on reading,
_AT_ONCE_NS = 2_000_000_000  # or this much after a long pause


class StatusFiles:
    """Reads status files, but none while 8 reads hang or too much time was spent on slow ones."""

    def __init__(self) -> None:
        self._hanging: list[Thread] = []
        self._paid_until = 0
        """Unix time in ns: each read takes up the time that it took, times :data:`_PART`."""

    def read(self, root: Path, name: str) -> bytes:
        """Return the beginning of a guest's status file, nothing if there is none.

        :param root: the root directory of the guest's process.
        :param name: the guest's name, which may contain anything.
        """
        begin = now_ns()
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if "/" in name or len(self._hanging) >= _MAX_HANGING or self._paid_until > begin:
            return b""
        found: list[bytes] = []
        thread = Thread(target=lambda: found.append(_read(root, f"{name}.xml")), daemon=True)
        thread.start()
        thread.join(_PATIENCE_S)
        if thread.is_alive():
            self._hanging.append(thread)
        paid_until = max(self._paid_until, begin - _PART * _AT_ONCE_NS)
        self._paid_until = paid_until + _PART * (now_ns() - begin)
        return found[0] if found else b""


def _read(root: Path, name: str) -> bytes:
    for directory in _DIRECTORIES:
        try:
            file = _find(root, (*directory, name))
        except (OSError, ValueError):  # ValueError: no file can have this name
            continue
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                with Path(f"/proc/self/fd/{file}").open("rb") as content:
                    return content.read(_MAX_SIZE)
        except OSError:
            continue
        finally:
            os.close(file)
    return b""


def _find(root: Path, parts: tuple[str, ...]) -> int:
    """Return a file descriptor with which a file can be inspected, but not read.

    Opening a device for reading could already have an effect, such as starting a watchdog.

    :raises OSError: it does not exist, or a symbolic link is in the way.
    """
    found = os.open(root, os.O_PATH | os.O_DIRECTORY)
    for part in parts:
        directory = found
        try:
            found = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        finally:
            os.close(directory)
    return found
