"""Each source reports all calls of each scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import lab_vm
from tests.support.observer import Observer
from tests.support.scenarios import (
    FTRACE_MAY_MISS_PHASE,
    LAB_SCENARIOS,
    LIVE_SCENARIOS,
    Scenario,
    unknowns,
)


@pytest.mark.also_in_lab
@pytest.mark.parametrize(
    "scenario",
    LAB_SCENARIOS if lab_vm.inside() else LIVE_SCENARIOS,
    ids=lambda scenario: scenario.__name__,
)
def test_every_call_gets_its_phase_and_step(
    observer: Observer, scenario: Scenario, tmp_path: Path
) -> None:
    expected = scenario(tmp_path, "")
    for vm, places in expected.items():
        observer.wait_for_calls(vm, len(places))
        if scenario in FTRACE_MAY_MISS_PHASE and 'source="ftrace"' in observer.metrics():
            assert unknowns(observer.places(vm), places) is not None
        else:
            assert observer.places(vm) == places
