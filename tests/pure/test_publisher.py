"""The order of the log's lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.pure.test_repeats import SECOND_NS, call
from tests.support.histories import HOST_KHZ, History
from tscwatch import recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Call, Guest, Host, Mismatch, Risk
from tscwatch.publish import format
from tscwatch.publish.format import LogLine
from tscwatch.publish.publisher import Publisher
from tscwatch.publish.state import State

RECORDINGS = Path(__file__).parents[1] / "recordings"


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_times_of_the_log_never_step_back(file: Path) -> None:
    pipeline = Pipeline()
    logged: list[LogLine] = []
    publisher = Publisher(State(), logged.append)
    made = []
    for event in recording.read(file):
        items = list(pipeline.feed(event))
        made += [item.event.ts for item in items if isinstance(item, Call)]
        publisher.publish(items)
    publisher.close()
    shown = [format.fields(line)["ts"] for line in logged]
    assert shown == sorted(shown)
    calls = [line.item for line in logged if isinstance(line.item, Call)]
    assert {call.event.ts for call in calls} <= set(made)  # not falsified


def test_the_line_of_a_call_that_was_held_back() -> None:
    logged: list[LogLine] = []
    publisher = Publisher(State(), logged.append)
    publisher.publish([call(serial * SECOND_NS) for serial in range(5)])
    publisher.publish([call(7 * SECOND_NS, phase="hotplug")])
    publisher.publish([Risk(6 * SECOND_NS, "vm", Guest(1, "vmm"), True, "slow")])
    publisher.log_due(10 * SECOND_NS)
    shown = [format.fields(line) for line in logged]
    assert [line["ts"] for line in shown] == [0, 1, 2, 7, 7, 7]
    assert [line["late_seconds"] for line in shown] == [0, 0, 0, 0, 1, 3]
    assert format.as_text(logged[-1]).endswith("unknown  (the last of 2)  (3.0 s late)")


def test_a_vcpu_that_alternates_costs_few_lines_and_its_metrics_are_exact() -> None:
    """1,000 SETs in 10 s, each of which raises or clears mismatches."""
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    history.write_all("boot")
    history.runners[0] = history.threads[0]
    for serial in range(1000):
        history.call(0, "set", "regs", "unknown", "unknown", HOST_KHZ + serial % 2 * 260)
    state, pipeline = State(), Pipeline()
    logged: list[LogLine] = []
    publisher = Publisher(state, logged.append)
    publisher.publish(pipeline.feed(Host(HOST_KHZ, True, 250)))
    kinds: Counter[str] = Counter()
    for number, event in enumerate(history.events):
        items = list(pipeline.feed(event._replace(ts=number * SECOND_NS // 100)))
        kinds.update(i.kind for i in items if isinstance(i, Mismatch) and i.state == "raised")
        publisher.publish(items)
    publisher.close()
    assert kinds["changed"] >= 499
    assert state.mismatches == kinds
    assert len(logged) < 100
    found = [line.item for line in logged if isinstance(line.item, Mismatch)]
    for kind in kinds:
        last = [mismatch for mismatch in found if mismatch.kind == kind][-1]
        is_active = kind in state.vms["guest-100"].mismatches
        assert (last.state != "cleared") == is_active
