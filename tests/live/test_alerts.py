"""The alert rules, with the real promtool, Prometheus and Alertmanager."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.prometheus import DEPLOY, RULES, alerts
from tests.support.scenarios import skewed


@pytest.mark.parametrize("command", [["check", "rules"], ["test", "rules"]])
def test_promtool(command: list[str]) -> None:
    file = RULES if command[0] == "check" else RULES.with_name("tscwatch.rules.test.yml")
    checked = subprocess.run(
        ["promtool", *command, str(file)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout


def test_each_recipe_of_the_runbook_is_tested() -> None:
    recipes = re.findall(r"(?s)```promql\n(.*?)```", (DEPLOY / "RUNBOOK.md").read_text())
    tests = yaml.safe_load(RULES.with_name("tscwatch.rules.test.yml").read_text())["tests"]
    tested = {
        " ".join(each["expr"].split()) for t in tests for each in t.get("promql_expr_test", [])
    }
    assert len(recipes) >= 7
    assert [recipe for recipe in recipes if " ".join(recipe.split()) not in tested] == []


def test_each_metric_in_the_rules_is_one_of_tscwatchs(observer: Observer) -> None:
    named = set(re.findall(r"\btscwatch_\w+", re.sub(r"\w+:tscwatch\S*", "", RULES.read_text())))
    offered = set(re.findall(r"(?m)^# TYPE (\w+)", observer.metrics()))
    assert {name for name in named if name not in offered} == set()


def test_a_skewed_guest_reaches_the_webhook_and_its_end_resolves_it(tmp_path: Path) -> None:
    """The rules are the real ones, except that alerts fire at once."""
    with (
        Observer(tmp_path, "--source", "ftrace") as observer,
        alerts(tmp_path, observer.target) as received,
    ):
        with skewed(tmp_path, ""):
            wait_for(lambda: ("firing", "TscVcpuSkew", "target") in received, "the alert")
        wait_for(
            lambda: ("resolved", "TscVcpuSkew", "target") in received, "the alert to be resolved"
        )
