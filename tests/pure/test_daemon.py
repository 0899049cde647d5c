"""The order in which the daemon's loop does its work."""

from __future__ import annotations

from typing import Any

import pytest

from tscwatch import daemon
from tscwatch.daemon import EventStream, SignalFlags
from tscwatch.host import rights, tsc
from tscwatch.model import Event, Host

POLLED, READ = (Event(1, op, "kvm:1", 1, 1, "vmm", 0) for op in ("set", "tsc_lines"))


class Steps:
    """Stands for the source and the inventory of a stream, and records what is called."""

    has_lines_due = is_behind = False

    def __init__(self) -> None:
        self.done: list[str] = []

    def poll(self, _timeout: float) -> list[Event]:
        self.done.append("poll")
        return [POLLED]

    def follow_wall_clock(self) -> None:
        self.done.append("follow the clock")

    def enrich(self, batch: list[Event], _drain: object) -> list[Event]:
        return batch

    def sweep(self) -> list[Event]:
        self.done.append("sweep")
        return []

    def restore(self) -> list[Event]:
        self.done.append("restore")
        return []

    def read_lines(self, *_: object) -> list[Event]:
        self.done.append("read lines")
        return [READ]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    replaced: dict[str, Any] = {
        "open_source": lambda _name: steps,
        "Inventory": lambda: steps,
        "follow_wall_clock": steps.follow_wall_clock,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(daemon, name, value)
    monkeypatch.setattr(tsc, "read", lambda: Host(shows_lines=True))
    monkeypatch.setattr(rights, "missing", list)
    return steps


@pytest.mark.parametrize("sweeps", [True, False])
def test_events_are_yielded_at_the_clocks_time_and_before_lines_are_read(
    steps: Steps, sweeps: bool
) -> None:
    stream = EventStream("auto")
    stream._next_sweep = 0 if sweeps else 2**63
    batch = next(stream.follow(SignalFlags()))
    assert next(batch) == POLLED
    assert steps.done == ["poll", "follow the clock"]
    assert list(batch) == [READ]
    assert steps.done[2:] == [*(["restore", "sweep"] if sweeps else []), "read lines"]
