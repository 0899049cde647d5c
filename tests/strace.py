"""An oracle that is not ours: which TSC calls strace saw."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

_TRACED = re.compile(r"(\d+) +ioctl\(\d+, KVM_(GET|SET)_TSC_KHZ, (\w+)\) += (-?\w+)(?: (E\w+) .*)?")
Seen = dict[int, list[tuple[str, int, int]]]
"""By thread: operation, kHz and result, in order."""


def traced(path: Path) -> Seen:
    seen: Seen = defaultdict(list)
    text = re.sub(
        r"(?m)^(\d+) +(ioctl.*) <unfinished \.\.\.>\n((?:.*\n)*?)\1 +<\.\.\. ioctl "
        r"resumed>",
        r"\3\1 \2",
        path.read_text(),
    )
    for line in text.splitlines():
        if match := _TRACED.match(line):
            tid, op, argument, result, error = match.groups()
            assert error is None
            khz = int(argument, 0) if op == "SET" else int(result, 0)
            seen[int(tid)].append((op.lower(), khz, 0))
    return dict(seen)
