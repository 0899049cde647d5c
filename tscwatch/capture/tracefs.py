"""Where tracefs is mounted.  tscwatch never mounts it: an operator's host is not ours to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tscwatch.errors import TracefsMissing

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
