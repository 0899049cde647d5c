"""Each source sees real guests as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import lab_vm
from tests.observer import Observer
from tests.scenarios import LAB_SCENARIOS, SCENARIOS, Scenario


@pytest.fixture(scope="module", params=["bcc", "ftrace"])
def observer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    directory = tmp_path_factory.mktemp(request.param)
    with Observer(directory, "--json", "--source", request.param) as it:
        yield it
        assert "lost" not in {item["type"] for item in it.items()}
        assert it.stop() == 0
    assert "Traceback" not in it.log.read_text()


@pytest.mark.parametrize(
    "scenario",
    LAB_SCENARIOS if lab_vm.inside() else SCENARIOS,
    ids=lambda scenario: scenario.__name__,
)
def test_every_call_gets_its_phase_and_step(
    observer: Observer, scenario: Scenario, tmp_path: Path
) -> None:
    expected = scenario(tmp_path, "")
    for vm, places in expected.items():
        observer.wait_for_calls(vm, len(places))
        assert observer.places(vm) == places
