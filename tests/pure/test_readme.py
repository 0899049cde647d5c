"""The README's tables match the code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.pure.test_metrics import feed, skewed
from tests.support.histories import HOST_KHZ
from tscwatch import cli, errors
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import KINDS, PHASES, Event, Health, Host, Line, SourceInfo
from tscwatch.publish.metrics import Metrics
from tscwatch.publish.state import State

README = (Path(__file__).parents[2] / "README.md").read_text()


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_metrics_has_each_metric_with_its_labels() -> None:
    state, pipeline = State(), Pipeline()
    for item in pipeline.feed(Host(HOST_KHZ, False, 250, "tsc", shows_lines=True)):
        state.update(item)
    history = skewed()
    lines = (Line(0, 0), Line(1, HOST_KHZ))
    history.events.append(Event(9, "tsc_lines", "kvm:1", 100, 0, "", lines=lines))
    feed(state, history, pipeline)
    health = Health({"kvm_vcpu_ioctl": True}, 1, 1, {("kernel", "ring_full"): 0})
    state.update_health(SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl"), health)
    offered = {}
    for family in Metrics(state).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        offered[name] = labels
    named: dict[str, set[str]] = {}
    for row in re.findall(r"(?m)^\| (`tscwatch_.*) \|(.*)\|$", section("Metrics")):
        metrics_of_row = re.findall(r"`(\w+)`", row[0])
        labels_of_row = [re.sub(r" \(.*?\)", "", part) for part in row[1].split(";")]
        if len(labels_of_row) == 1:
            labels_of_row *= len(metrics_of_row)
        for name, text in zip(metrics_of_row, labels_of_row):
            named[name] = {label.strip() for label in text.split(",")} - {""}
    assert named == offered


def test_every_kind_phase_and_exit_status_has_a_row() -> None:
    for name in (*KINDS, *PHASES):
        assert f"| `{name}` |" in README, f"{name} is in no table"
    statuses = {int(number) for number in re.findall(r"(?m)^\| (\d+) \|", README)}
    classes = [getattr(errors, name) for name in dir(errors)]
    offered = {
        each.exit_status
        for each in classes
        if isinstance(each, type) and issubclass(each, errors.TscwatchError)
    }
    assert statuses == offered - {errors.TscwatchError.exit_status}


def test_every_command_is_named() -> None:
    help_text = cli.parser().format_help()
    for command in ("run", "record", "replay", "report", "top", "doctor", "explain"):
        assert f"tscwatch {command}" in section("Run it")
        assert command in help_text


def test_each_line_of_the_threat_model_names_a_test_that_there_is() -> None:
    text = (Path(__file__).parents[2] / "deploy/SECURITY.md").read_text()
    sources = "".join(file.read_text() for file in Path(__file__).parents[1].glob("*/test_*.py"))
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(re.findall(r"def (test_\w+)", sources))
    rows = [
        row for row in re.findall(r"(?m)^\| .*$", text) if not row.startswith(("| may", "| ---"))
    ]
    assert [row for row in rows if "`test_" not in row] == []
