"""Calls that repeat are folded in the log, and each of them is counted there."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tscwatch.model import Call, Event, Guest, Phase
from tscwatch.publish import format
from tscwatch.publish.repeats import Repeats

SECOND_NS = 1_000_000_000


def call(ts: int, vcpu: int = 0, khz: int = 5, phase: Phase = "unknown") -> Call:
    event = Event(ts, "get", "kvm:1", 1, 2, "vmm", vcpu, khz)
    return Call(event, "vm", Guest(1, "vmm"), phase, "unknown", ())


def test_a_vmm_that_polls_costs_few_lines() -> None:
    repeats = Repeats()
    polled = [call(serial * SECOND_NS // 790) for serial in range(7905)]
    logged = [each for event in polled for each in repeats.fold(event)]
    assert [each.times for each in logged] == [1, 1, 1, 7897, 1, 1, 1]
    assert [each.times for each in repeats.all()] == [2]
    assert format.as_text(logged[3]).endswith("unknown  (7897 times)")


def test_a_single_repeat_is_logged_after_ten_seconds() -> None:
    repeats = Repeats()
    for serial in range(4):
        list(repeats.fold(call(serial)))
    assert list(repeats.due(9 * SECOND_NS)) == []
    assert [(each.event.ts, each.times) for each in repeats.due(10 * SECOND_NS)] == [(3, 1)]
    assert list(repeats.all()) == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5 * SECOND_NS),
            st.integers(0, 2),
            st.sampled_from([1, 2]),
            st.sampled_from(["unknown", "hotplug"]),
        )
    )
)
def test_no_call_is_missing_and_none_with_a_phase_waits(
    history: list[tuple[int, int, int, Phase]],
) -> None:
    repeats, ts, logged = Repeats(), 0, []
    counted: Counter[tuple[int, int, Phase]] = Counter()
    for later, vcpu, khz, phase in history:
        ts += later
        made = call(ts, vcpu, khz, phase)
        counted[vcpu, khz, phase] += 1
        now = list(repeats.fold(made))
        assert phase == "unknown" or now == [made]
        logged += now
    logged += repeats.all()
    found: Counter[tuple[int, int, Phase]] = Counter()
    for each in logged:
        assert each.event.vcpu is not None
        assert each.khz is not None
        found[each.event.vcpu, each.khz, each.phase] += each.times
    assert found == counted


def test_kinds_without_end_take_bounded_memory() -> None:
    repeats = Repeats()
    for serial in range(10_000):
        assert list(repeats.fold(call(0, khz=serial)))
    assert len(repeats._windows) <= 4096
