"""Timestamps while the wall clock is set."""

from __future__ import annotations

import time

import pytest

from tscwatch import clock

HOUR_NS = 3_600_000_000_000


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_steps_ns", 0)


@pytest.mark.parametrize("step", [-HOUR_NS, HOUR_NS])
def test_shown_times_follow_a_step_and_timestamps_do_not(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = clock.now_ns(), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + step)
    clock.follow_wall_clock()
    after = clock.now_ns()
    assert 0 <= after - before < HOUR_NS
    assert abs(clock.wall_ns(after) - after - step) < HOUR_NS // 100
    assert clock.wall_ns(after) > clock.wall_ns(before)


def test_the_time_between_two_readings_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 1_000_000)
    clock.follow_wall_clock()
    assert clock.wall_ns(5) == 5
