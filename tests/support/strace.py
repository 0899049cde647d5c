"""Reads the TSC calls from a trace of strace, which serves as an independent oracle."""

from __future__ import annotations

import errno
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_CALL = re.compile(r"ioctl\(\d+, KVM_(GET|SET)_TSC_KHZ, (\w+)\) += (-?\w+)(?: (E\w+) .*)?")
CallsByThread = dict[int, list[tuple[str, int, int]]]
"""By thread id: operation, frequency in kHz and result, in order.  A result is 0 or -errno."""


def traced(path: Path) -> CallsByThread:
    """Return the calls in the output of ``strace -f -o PATH``."""
    calls: CallsByThread = defaultdict(list)
    for tid, text in _completed(path.read_text().splitlines()):
        if match := _CALL.match(text):
            op, argument, result, error = match.groups()
            khz = int(argument, 0) if op == "SET" else int(result, 0)
            calls[tid].append((op.lower(), khz, -int(getattr(errno, error)) if error else 0))
    return dict(calls)


def _completed(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield thread id and text of each call, with "unfinished" and "resumed" lines joined."""
    unfinished: dict[str, str] = {}
    for line in lines:
        tid, _, call = line.partition(" ")
        call = call.lstrip()
        if call.endswith(" <unfinished ...>"):
            unfinished[tid] = call[: -len(" <unfinished ...>")]
            continue
        if match := re.match(r"<\.\.\. ioctl resumed>", call):
            call = unfinished.pop(tid, "") + call[match.end() :]
        yield int(tid), call
