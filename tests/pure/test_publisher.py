"""The order of the log's lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pure.test_repeats import SECOND_NS, call
from tscwatch import recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Call, Guest, Risk
from tscwatch.publish import format
from tscwatch.publish.format import LogItem
from tscwatch.publish.publisher import Publisher
from tscwatch.publish.state import State

RECORDINGS = Path(__file__).parents[1] / "recordings"


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_times_of_the_log_never_step_back(file: Path) -> None:
    pipeline = Pipeline()
    logged: list[LogItem] = []
    publisher = Publisher(State(), logged.append)
    made = []
    for event in recording.read(file):
        items = list(pipeline.feed(event))
        made += [item.event.ts for item in items if isinstance(item, Call)]
        publisher.publish(items)
    publisher.close()
    shown = [format.fields(item)["ts"] for item in logged]
    assert shown == sorted(shown)
    calls = [item for item in logged if isinstance(item, Call)]
    assert {item.event.ts for item in calls} <= set(made)  # not falsified


def test_the_line_of_a_call_that_was_held_back() -> None:
    logged: list[LogItem] = []
    publisher = Publisher(State(), logged.append)
    publisher.publish([call(serial * SECOND_NS) for serial in range(5)])
    publisher.publish([call(7 * SECOND_NS, phase="hotplug")])
    publisher.publish([Risk(6 * SECOND_NS, "vm", Guest(1, "vmm"), True, "slow")])
    publisher.log_due(10 * SECOND_NS)
    shown = [format.fields(item) for item in logged]
    assert [line["ts"] for line in shown] == [0, 1, 2, 7, 7, 7]
    assert [line.get("late_seconds") for line in shown] == [0, 0, 0, 0, None, 3]
    assert format.as_text(logged[-1]).endswith("unknown  (2 times)  (made 3.0 s before)")
