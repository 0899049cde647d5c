"""The clock of all timestamps: CLOCK_MONOTONIC, expressed as Unix time.

The difference between the two clocks is read once, at import, so that a step of the wall clock
never reorders events.
"""

from __future__ import annotations

import time

_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def unix_ns(monotonic_ns: int) -> int:
    """Convert a CLOCK_MONOTONIC time, as the kernel's probes record it, to Unix time.

    Both are in nanoseconds.
    """
    return monotonic_ns + _OFFSET_NS


def now_ns() -> int:
    """Return the current Unix time in nanoseconds; it never steps back."""
    return unix_ns(time.monotonic_ns())
