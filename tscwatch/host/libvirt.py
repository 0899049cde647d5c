"""Read libvirt's status file of a running guest, the live XML of its domain.

libvirt writes the file before it lets QEMU start (``qemuProcessLaunch``), replaces it at each
change and removes it at the end.  It is read through ``/proc/PID/root``: libvirt may run in the
container of its guest, as KubeVirt's does, and this daemon's own mount namespace may hide
directories.
"""

from __future__ import annotations

from pathlib import Path

from tscwatch.host.files import ForeignFiles

_DIRECTORIES = ("run/libvirt/qemu", "run/libvirt/qemu/run")
"""Of the system's libvirt, and of a user's whose XDG_RUNTIME_DIR is ``/run``, as in KubeVirt."""
_MAX_SIZE = 1 << 18  # bytes; libvirt writes some 10 kB, and the metadata before the devices


def read_status(files: ForeignFiles, root: Path, name: str) -> bytes:
    """Return the beginning of a guest's status file, nothing if there is none.

    :param root: the root directory of the guest's process.
    :param name: the guest's name, which may contain anything.
    """
    if "/" in name:
        return b""
    found = (files.read(root, f"{directory}/{name}.xml", _MAX_SIZE) for directory in _DIRECTORIES)
    return next((text for text in found if text is not None), b"")
