"""Each source reports the same calls of a guest as strace, which runs at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests import TRACES, Guest, make_disk
from tests.support.observer import Observer
from tests.support.strace import traced


@pytest.mark.also_in_lab
def test_the_same_calls_as_strace(observer: Observer, tmp_path: Path) -> None:
    token = TRACES.set(tmp_path)
    disk = make_disk(tmp_path / "disk.qcow2")
    guest = Guest(tmp_path, "traced", disk=disk)
    TRACES.reset(token)
    guest.plug()
    guest.start()
    guest.plug()
    guest.monitor("savevm one")
    guest.monitor("loadvm one")
    guest.quit()
    expected = traced(tmp_path / "traced.strace")
    count = sum(map(len, expected.values()))
    assert count == 20
    observer.wait_for_calls("traced", count)
    assert observer.by_thread("traced") == expected
    assert {call["pid"] for call in observer.calls("traced")} == {guest.pid}
