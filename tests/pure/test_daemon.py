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
        self.timeouts: list[float] = []
        self.batches: list[list[Event]] = []
        self.found: list[Event] = []
        self.reported: list[list[tuple[int, int]]] = []

    def poll(self, timeout: float) -> list[Event]:
        self.done.append("poll")
        self.timeouts.append(timeout)
        return self.batches.pop(0) if self.batches else [POLLED]

    def existing(self) -> list[Event]:
        return self.found

    def report_existing(self, files: list[tuple[int, int]]) -> None:
        self.done.append("report existing")
        self.reported.append(files)

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


def test_it_looks_often_while_lines_are_due(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = EventStream("auto").follow(SignalFlags())
    list(next(batches))
    steps.has_lines_due = True
    list(next(batches))
    monkeypatch.setattr(tsc, "read", Host)
    without_lines = EventStream("auto").follow(SignalFlags())
    list(next(without_lines))
    assert steps.timeouts == [1.0, 0.05, 1.0]


@pytest.mark.parametrize("reason", ["the source is behind", "the host shows no lines"])
def test_lines_are_not_read(steps: Steps, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    steps.is_behind = reason == "the source is behind"
    monkeypatch.setattr(tsc, "read", lambda: Host(shows_lines=steps.is_behind))
    list(next(EventStream("auto").follow(SignalFlags())))
    assert "read lines" not in steps.done


def test_it_ends_when_that_is_requested(steps: Steps) -> None:
    flags = SignalFlags()
    batches = EventStream("auto").follow(flags)
    list(next(batches))
    flags.stop = True
    assert list(batches) == []


def test_it_looks_for_vms_each_second(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr(daemon, "now_ns", lambda: now[0])
    batches = EventStream("auto").follow(SignalFlags())
    sweeps = []
    for tenths in (0, 5, 9, 10, 15, 20, 31):
        now[0] = tenths * 10**8
        list(next(batches))
        sweeps.append(steps.done.count("sweep"))
    assert sweeps == [1, 1, 1, 2, 2, 3, 4]


def test_the_host_is_yielded_again_when_it_has_changed(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = EventStream("auto")
    hosts = []
    for khz in (None, 5, 5, 6):
        monkeypatch.setattr(tsc, "read", lambda khz=khz: Host(khz, shows_lines=True))
        stream._next_sweep = 0
        hosts.append([each for each in next(stream.follow(SignalFlags())) if type(each) is Host])
    changed = [Host(khz, shows_lines=True) for khz in (5, 6)]
    assert hosts == [[], [changed[0]], [], [changed[1]]]


def test_what_exists_is_yielded_once(steps: Steps) -> None:
    """The source reports what was created since it was opened, and vCPUs in portions."""
    empty = POLLED._replace(op="vm_found", vcpu=None, pid=7)
    vcpus = [empty._replace(op="vcpu_found", vcpu=index, fd=index + 9) for index in range(1000)]
    without_file = empty._replace(op="vcpu_found", vcpu=1000)
    created = empty._replace(op="vm_create", pid=8)
    steps.found = [empty, *vcpus, without_file, empty._replace(pid=8, fd=3)]
    steps.batches = [[created, POLLED], [], [READ]]
    first, *others = EventStream("auto").existing()
    assert first == Host(shows_lines=True)
    assert others == [empty, *vcpus, without_file, created, POLLED, READ, READ]
    assert steps.done == ["sweep", "poll", *["report existing", "poll"] * 2, "read lines"]
    assert steps.timeouts == [0, 0, 0]
    files = [(7, index + 9) for index in range(1000)]
    assert steps.reported == [files[:512], files[512:]]
