"""An oracle that is not ours: which TSC calls strace saw."""

from __future__ import annotations

import errno
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_CALL = re.compile(r"ioctl\(\d+, KVM_(GET|SET)_TSC_KHZ, (\w+)\) += (-?\w+)(?: (E\w+) .*)?")
Seen = dict[int, list[tuple[str, int, int]]]
"""By thread: operation, kHz and result, in order."""


def traced(path: Path) -> Seen:
    seen: Seen = defaultdict(list)
    for tid, call in _whole(path.read_text().splitlines()):
        if match := _CALL.match(call):
            op, argument, result, error = match.groups()
            khz = int(argument, 0) if op == "SET" else int(result, 0)
            seen[tid].append((op.lower(), khz, -int(getattr(errno, error)) if error else 0))
    return dict(seen)


def _whole(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Calls with their threads; one that others interrupted in the trace is put together."""
    begun: dict[str, str] = {}
    for line in lines:
        tid, _, call = line.partition(" ")
        call = call.lstrip()
        if call.endswith(" <unfinished ...>"):
            begun[tid] = call[: -len(" <unfinished ...>")]
            continue
        if match := re.match(r"<\.\.\. ioctl resumed>", call):
            call = begun.pop(tid, "") + call[match.end() :]
        yield int(tid), call
