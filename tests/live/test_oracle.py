"""The calls that each source sees are those that strace sees of the same QEMU run."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.guests import Guest, make_disk
from tests.observer import Observer

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


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_the_same_calls_as_strace(source: str, tmp_path: Path) -> None:
    trace = tmp_path / "strace"
    wrapper = ("strace", "-f", "-qq", "-e", "trace=ioctl", "-e", "signal=none", "-o", str(trace))
    disk = make_disk(tmp_path / "disk.qcow2")
    with Observer(tmp_path, "--json", "--source", source) as observer:
        guest = Guest(tmp_path, "traced", disk=disk, wrapper=wrapper)
        guest.plug()
        guest.start()
        guest.plug()
        guest.monitor("savevm one")
        guest.monitor("loadvm one")
        guest.quit()
        expected = traced(trace)
        count = sum(map(len, expected.values()))
        assert count == 20
        observer.wait_for_calls("traced", count)
        seen: Seen = defaultdict(list)
        for call in observer.calls("traced"):
            seen[call["tid"]].append((call["op"], call["khz"], call["result"]))
    assert dict(seen) == expected
    assert {call["pid"] for call in observer.calls("traced")} == {guest.pid}
