"""The dashboard's panels and variables, without a Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.grafana import DASHBOARD, panels, rows
from tscwatch.publish.metrics import FAMILIES

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy/RUNBOOK.md").read_text()
RULES = yaml.safe_load((ROOT / "deploy/prometheus/tscwatch.rules.yml").read_text())
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def configurations(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a panel's configuration of its fields, and that of each field it overrides."""
    overrides = panel["fieldConfig"]["overrides"] or []
    by_field: dict[str, dict[str, Any]] = {}
    for override in overrides:
        field = by_field.setdefault(override["matcher"]["options"], {})
        field.update({each["id"]: each["value"] for each in override["properties"]})
    return [panel["fieldConfig"]["defaults"], *by_field.values()]


def test_each_panel_is_explained() -> None:
    headings = re.findall(r"(?m)^#+ (.*)$", RUNBOOK)
    sections = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in headings}
    titles = [panel["title"] for panel in panels()]
    assert len(titles) > 20
    for row in rows().values():
        in_row = [panel["title"] for panel in row]
        assert len(set(in_row)) == len(in_row)
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        (link,) = panel["links"]
        base, _, section = link["url"].partition("#")
        assert base == "${runbook:raw}"
        assert section in sections | {""}, panel["title"]


def test_frequencies_show_1_khz() -> None:
    shown = [each for panel in panels() for each in configurations(panel)]
    of_hertz = [each for each in shown if each.get("unit") == "hertz"]
    assert len(of_hertz) == 2
    assert {each["decimals"] for each in of_hertz} == {6}


def test_only_the_fleet_and_the_guest_are_queried_at_first() -> None:
    collapsed = {name: row[0]["collapsed"] for name, row in rows().items()}
    assert collapsed == {"Fleet": False, "Pool": True, "Host": True, "Guest": False}


def test_all_hosts_need_no_long_expression_and_one_guest_is_shown() -> None:
    for name in ("pool", "instance"):
        assert VARIABLES[name]["current"]["value"] == ["$__all"]
        assert VARIABLES[name]["allValue"] == ".*"
    assert not VARIABLES["vm"]["includeAll"]
    assert not VARIABLES["vm"]["multi"]


def test_health_is_green_and_trouble_is_not() -> None:
    numbers = [panel for panel in rows()["Fleet"] if panel["type"] == "stat"]
    healthy = {"Hosts": 1, "Guests": 1}
    for panel in numbers:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]

        def colour(value: int, steps: list[dict[str, Any]] = steps) -> str:
            return str([s["color"] for s in steps if s["value"] is None or s["value"] <= value][-1])

        title = panel["title"]
        assert colour(healthy.get(title, 0)) == "green", title
        if title not in healthy:
            assert colour(1) != "green", title
    assert len(numbers) == 9
    assert sum(panel["gridPos"]["w"] for panel in numbers) == 24


@pytest.mark.parametrize(
    ("title", "alert"),
    [("Hosts blind", "TscwatchBlind"), ("No master clock", "TscMasterClockLost")],
)
def test_a_number_counts_what_its_alert_is_about(title: str, alert: str) -> None:
    (expr,) = (panel["targets"][0]["expr"] for panel in panels() if panel["title"] == title)
    rules = (rule for group in RULES["groups"] for rule in group["rules"])
    (condition,) = (rule["expr"] for rule in rules if rule.get("alert") == alert)
    of_all_pools = re.sub(r'pool=~"\$pool",?', "", expr).replace("{}", "")
    assert f"({' '.join(condition.split())})" in of_all_pools


def test_each_metric_is_one_of_tscwatchs() -> None:
    named = set(re.findall(r"\btscwatch_\w+", json.dumps(DASHBOARD)))
    assert len(named) > 15
    assert named <= {family.name for family in FAMILIES}


def test_the_packages_are_locked_and_come_from_any_registry() -> None:
    directory = ROOT / "tests/support/grafana"
    wanted = json.loads((directory / "package.json").read_text())["dependencies"]
    locked = json.loads((directory / "package-lock.json").read_text())["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert not any("resolved" in package for package in locked.values())
    assert all("integrity" in package for path, package in locked.items() if path)
