"""The alert rules: what is generated, what each alert has, and that each one is tested."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from deploy.alerts import generate
from deploy.grafana import generate as dashboard

DEPLOY = generate.DEPLOY
FILES = generate.generated()
RULES = yaml.safe_load(FILES["prometheus/tscwatch.rules.yml"])
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
CASES = yaml.safe_load((DEPLOY / "prometheus/tscwatch.rules.test.yml").read_text())["tests"]


def name(alert: dict[str, Any]) -> str:
    return str(alert["alert"])


@pytest.mark.parametrize("path", FILES)
def test_what_is_committed_is_what_is_generated(path: str) -> None:
    assert (DEPLOY / path).read_text() == FILES[path], "run make rules"


def test_a_site_sets_the_selector_and_the_address_of_the_runbook() -> None:
    of_site = generate.generated('job=~"kvm/.*",dc="a"', "https://wiki/tscwatch")
    for path, content in of_site.items():
        ours = FILES[path].replace("\\", "")  # JSON escapes quotation marks
        assert f"up{{{generate.SELECTOR}}}" in ours
        text = content.replace("\\", "")
        assert text.count('up{job=~"kvm/.*",dc="a"}') == ours.count(f"up{{{generate.SELECTOR}}}")
        assert text.count("https://wiki/tscwatch#") == ours.count(f"{generate.RUNBOOK}#")
        assert generate.SELECTOR not in text
        assert generate.RUNBOOK not in text


def test_the_dashboard_has_the_same_address_of_the_runbook() -> None:
    address = "https://wiki/tscwatch"
    (board,) = dashboard.generated(address).values()
    assert address in board
    assert generate.RUNBOOK not in board
    command = ["make", "--dry-run", "rules", "kubernetes", f"RUNBOOK={address}"]
    made = subprocess.run(command, cwd=DEPLOY.parent, capture_output=True, text=True, check=True)
    for module in ("deploy.alerts.generate", "deploy.grafana.generate"):
        assert re.search(rf"-m {module} +--runbook '{address}'\n", made.stdout)


def test_the_selector_selects_what_the_examples_scrape() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus/scrape.yml").read_text())
    assert [f'job="{job["job_name"]}"' for job in scrape["scrape_configs"]] == [generate.SELECTOR]
    monitor = yaml.safe_load((DEPLOY / "kubernetes/base/podmonitor.yaml").read_text())
    daemonset = yaml.safe_load((DEPLOY / "kubernetes/base/daemonset.yaml").read_text())
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert f'job="{labels[monitor["spec"]["jobLabel"]]}"' == generate.SELECTOR


def test_each_alert_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"(?m)^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text())
    assert [alert["alert"] for alert in ALERTS] == sections


@pytest.mark.parametrize("alert", ALERTS, ids=name)
def test_it_states_what_whose_and_where_to_look_first(alert: dict[str, Any]) -> None:
    notes = alert["annotations"]
    of_guest = "$labels.vm" in notes["summary"]
    assert list(notes) == [
        *("summary", "description"),
        *(["owner"] if of_guest else []),
        *("query", "runbook_url"),
    ]
    assert notes["runbook_url"] == f"{generate.RUNBOOK}#{alert['alert'].lower()}"
    assert "$labels.instance" in notes["summary"] or not of_guest
    # The series of a mismatch have the severity as a label.
    assert "severity" in alert.get("labels", {}) or "tscwatch_mismatch_" in alert["expr"]


@pytest.mark.parametrize("alert", ALERTS, ids=name)
def test_a_case_for_promtool_sees_it_begin_and_end(alert: dict[str, Any]) -> None:
    changes = set()
    for case in CASES:
        fires = [bool(check.get("exp_alerts")) for check in checks_of(case, name(alert))]
        changes |= set(zip(fires, fires[1:]))
    assert changes >= {(False, True), (True, False)}


def checks_of(case: dict[str, Any], alert: str) -> list[dict[str, Any]]:
    """Return a case's checks of an alert in the order of time."""
    checks = (each for each in case.get("alert_rule_test", ()) if each["alertname"] == alert)
    return sorted(checks, key=lambda each: int(each["eval_time"].rstrip("m")))


def test_grafana_has_the_same_alerts() -> None:
    provisioned = yaml.safe_load(FILES["grafana/alerts.json"])  # YAML includes JSON
    rules = [rule for group in provisioned["groups"] for rule in group["rules"]]
    assert [rule["title"] for rule in rules] == [alert["alert"] for alert in ALERTS]
    for rule in rules:
        text = str([rule["annotations"], rule["data"]])
        assert "| query" not in text  # Grafana's templates have no such function
        assert "{{- " not in text
        assert not re.search(r"\b(uuid|pool):tscwatch", text)  # nor has it recorded series
