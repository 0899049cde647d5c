"""Each source sees real guests as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import lab_vm
from tests.support.observer import Observer
from tests.support.scenarios import ENDS_AT_ONCE, HOST_SCENARIOS, LAB_SCENARIOS, Scenario, unknowns


@pytest.mark.parametrize(
    "scenario",
    LAB_SCENARIOS if lab_vm.inside() else HOST_SCENARIOS,
    ids=lambda scenario: scenario.__name__,
)
def test_every_call_gets_its_phase_and_step(
    observer: Observer, scenario: Scenario, tmp_path: Path
) -> None:
    expected = scenario(tmp_path, "")
    for vm, places in expected.items():
        observer.wait_for_calls(vm, len(places))
        if scenario in ENDS_AT_ONCE and 'source="ftrace"' in observer.metrics():
            assert unknowns(observer.places(vm), places) is not None
        else:
            assert observer.places(vm) == places
