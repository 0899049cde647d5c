"""Items that repeat are folded in the log, and each of them is counted there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_replay import RECORDINGS, replay
from tscwatch import recording
from tscwatch.model import Call, Change, Event, Guest, Kind, Mismatch, Phase, Risk
from tscwatch.publish import format
from tscwatch.publish.format import LogItem, LogLine
from tscwatch.publish.repeats import Repeats

SECOND_NS = 1_000_000_000
GUEST = Guest(1, "vmm")


def call(ts: int, vcpu: int = 0, khz: int = 5, phase: Phase = "unknown") -> Call:
    event = Event(ts, "get", "kvm:1", 1, 2, "vmm", vcpu, khz)
    return Call(event, "vm", GUEST, phase, "unknown", ())


def mismatch(ts: int, state: Change, kind: Kind = "changed", vm: str = "vm") -> Mismatch:
    return Mismatch(ts, state, kind, vm, GUEST, (0,), 100, "warning", "unknown", "off")


def fold(items: Sequence[LogItem]) -> list[LogLine]:
    repeats = Repeats()
    return [*(line for item in items for line in repeats.fold(item)), *repeats.all()]


@pytest.mark.parametrize("values", [1, 7905])
def test_a_vmm_that_polls_costs_few_lines(values: int) -> None:
    """Even if each answer is another one."""
    polled = [call(serial * SECOND_NS // 790, khz=serial % values) for serial in range(7905)]
    logged = fold(polled)
    assert [line.times for line in logged] == [1, 1, 1, 7897, 1, 1, 1, 2]
    assert format.as_text(logged[3]).endswith("unknown  (the last of 7897)")


def test_a_single_repeat_is_logged_after_ten_seconds() -> None:
    repeats = Repeats()
    for serial in range(4):
        list(repeats.fold(call(serial)))
    assert list(repeats.due(9 * SECOND_NS)) == []
    assert list(repeats.due(10 * SECOND_NS)) == [LogLine(call(3))]
    assert list(repeats.all()) == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5 * SECOND_NS),
            st.integers(0, 2),
            st.integers(1, 2),
            st.sampled_from(["unknown", "hotplug"]),
        )
    )
)
def test_no_call_is_missing_and_none_with_a_phase_waits(
    history: list[tuple[int, int, int, Phase]],
) -> None:
    repeats, ts, logged = Repeats(), 0, []
    counted: Counter[tuple[int, Phase]] = Counter()
    for later, vcpu, khz, phase in history:
        ts += later
        made = call(ts, vcpu, khz, phase)
        counted[vcpu, phase] += 1
        now = list(repeats.fold(made))
        assert phase == "unknown" or now[-1] == LogLine(made)
        logged += now
    logged += repeats.all()
    found: Counter[tuple[int, Phase]] = Counter()
    for line in logged:
        assert isinstance(line.item, Call)
        found[line.item.target, line.item.phase] += line.times
    assert found == counted


def test_a_mismatch_that_is_raised_and_cleared_all_the_time_costs_few_lines() -> None:
    states: list[Change] = ["raised", "cleared"] * 500
    logged = fold([mismatch(serial, state) for serial, state in enumerate(states)])
    assert [line.times for line in logged] == [1] * 8 + [992]
    assert format.as_text(logged[-1]).endswith(
        "MISMATCH cleared: changed 100.0 ppm, 8.6 s a day (warning, since unknown): off"
        "  (the last of 992)"
    )
    others = [mismatch(0, "raised", "refused"), mismatch(0, "raised", vm="other")]
    risks = [Risk(serial, "vm", GUEST, serial % 2 == 0, "slow") for serial in range(1000)]
    assert [line.times for line in fold([*others, *risks])] == [1] * 10 + [992]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * SECOND_NS),
            st.sampled_from(["raised", "updated", "cleared"]),
            st.sampled_from(["changed", "refused"]),
        )
    )
)
def test_the_last_line_of_a_mismatch_shows_its_present_state(
    history: list[tuple[int, Change, Kind]],
) -> None:
    """After 10 s; and no change is missing in the counts."""
    repeats, ts = Repeats(), 0
    made: dict[Kind, list[Mismatch]] = {"changed": [], "refused": []}
    lines: dict[Kind, list[LogLine]] = {"changed": [], "refused": []}
    for later, state, kind in history:
        ts += later
        made[kind].append(mismatch(ts, state, kind))
        for line in repeats.fold(made[kind][-1]):
            assert isinstance(line.item, Mismatch)
            lines[line.item.kind].append(line)
        for each, items in made.items():  # what the log lacks has happened in the last 10 s
            shown = sum(line.times for line in lines[each])
            assert all(ts - item.ts < 10 * SECOND_NS for item in items[shown:])
            assert [line.item for line in lines[each][-1:]] == items[:shown][-1:]
    for line in repeats.due(ts + 10 * SECOND_NS):
        assert isinstance(line.item, Mismatch)
        lines[line.item.kind].append(line)
    for each, items in made.items():
        assert sum(line.times for line in lines[each]) == len(items)
        assert [line.item for line in lines[each][-1:]] == items[-1:]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_no_finding_about_a_recorded_guest_is_folded(path: Path) -> None:
    items = replay(recording.read(path))
    found = [item for item in items if isinstance(item, (Mismatch, Risk))]
    assert [line.item for line in fold(found)] == found


def test_kinds_without_end_take_bounded_memory() -> None:
    repeats = Repeats()
    for serial in range(10_000):
        assert list(repeats.fold(call(0, vcpu=serial)))
    assert len(repeats._windows) <= 4096
