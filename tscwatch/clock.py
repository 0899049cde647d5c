"""The clock of all timestamps: CLOCK_BOOTTIME, expressed as Unix time.

It counts while the host sleeps, and a step of the wall clock never reorders events: the difference
between the two clocks is read once, at import.  :func:`wall_ns` corrects a timestamp for people,
who compare it with other logs.
"""

from __future__ import annotations

import time

_STEP_NS = 10_000_000
"""A smaller difference of the two clocks is the time between reading them, not a step."""

_UNIX_AT_BOOT_NS = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
_steps_ns = 0


def unix_ns(boot_ns: int) -> int:
    """Convert a CLOCK_BOOTTIME time, as the kernel's probes record it, to Unix time.

    Both are in nanoseconds.
    """
    return boot_ns + _UNIX_AT_BOOT_NS


def now_ns() -> int:
    """Return the current Unix time in nanoseconds; it never steps back."""
    return unix_ns(time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def follow_wall_clock() -> None:
    """Let :func:`wall_ns` follow what the wall clock was set to meanwhile."""
    global _steps_ns  # noqa: PLW0603
    steps = time.time_ns() - now_ns()
    if abs(steps - _steps_ns) > _STEP_NS:
        _steps_ns = steps


def wall_ns(ts: int) -> int:
    """Return what the wall clock, as it is set now, shows at a timestamp.

    Both are Unix times in nanoseconds.
    """
    return ts + _steps_ns
