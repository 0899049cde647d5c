"""One clock for everything: monotonic time, shown as Unix time.

The offset is taken once, so a step of the wall clock never reorders events.
"""

from __future__ import annotations

import time

_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def unix_ns(monotonic_ns: int) -> int:
    """A CLOCK_MONOTONIC reading, as the kernel's probes give it, in Unix nanoseconds."""
    return monotonic_ns + _OFFSET_NS


def now_ns() -> int:
    """Unix nanoseconds that never step back."""
    return unix_ns(time.monotonic_ns())
