"""The alert rules, with the real promtool, Prometheus and Alertmanager."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.alerts import generate
from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import run
from tests.support.prometheus import (
    ALERTMANAGER,
    DEPLOY,
    RULES,
    Notification,
    alertmanager,
    api,
    check,
    check_rules,
    includes,
    notifications,
    page,
    post_alerts,
    prometheus,
    query,
    series,
)

CASES = RULES.with_name("tscwatch.rules.test.yml")
RECORDINGS = Path(__file__).parents[1] / "recordings"


def firing(by: str, eval_time: str, *labels: str) -> dict[str, Any]:
    """Expect one alert for each of these sets of labels, and no other."""
    return {
        "expr": f'count by ({by}) (ALERTS{{alertstate="firing"}})',
        "eval_time": eval_time,
        "exp_samples": [{"labels": f"{{{each}}}", "value": 1} for each in labels],
    }


def test_promtool_accepts_the_rules_and_their_cases_pass() -> None:
    check("promtool", "check", "rules", str(RULES))
    check("promtool", "test", "rules", str(CASES))


def test_alertmanager_accepts_the_example() -> None:
    check("amtool", "check-config", str(ALERTMANAGER))


def test_the_rules_of_a_site_with_another_name_for_the_job(tmp_path: Path) -> None:
    files = generate.generated('job=~"kvm/.*"', "https://wiki/tscwatch")
    case = {
        "input_series": [
            series("up", "1x10 0x20", job="kvm/hosts", instance="h1"),
            series("up", "1x30", job="kvm/hosts", instance="h2"),
        ],
        "promql_expr_test": [
            firing("alertname, instance", "20m", 'alertname="TscwatchDown",instance="h1"')
        ],
    }
    check_rules(tmp_path, files["prometheus/tscwatch.rules.yml"], case)


HOSTS, GUESTS = 90, 12


def fleet() -> Iterator[dict[str, str]]:
    """Hosts of one model, calibrated some kHz apart, with guests pinned to a round number."""
    for host in range(HOSTS):
        khz = 2_599_955 + host
        at = {"instance": f"h{host}:9978"}
        here = {"pool": "a", **at}
        yield series("up", "1x30 0x30" if host == 7 else "1x60", job="tscwatch", **here)
        yield series("up", "1x60", job="node", instance=f"h{host}:9100")
        yield series("tscwatch_host_tsc_hertz", f"{khz}000x60", **here)
        yield series("tscwatch_host_tsc_scaling_supported", "1x60", **here)
        yield series("tscwatch_host_tsc_tolerance_ratio", "0.00025x60", **here)
        yield series("tscwatch_probe_attached", "1x60", **at, probe="kvm_vcpu_ioctl")
        clocksource = "hpet" if host == 8 else "tsc"
        yield series("tscwatch_host_clocksource_info", "1x60", **at, clocksource=clocksource)
        for guest in range(GUESTS):
            vm = {**at, "vm": f"{host}-{guest}"}
            by_design = {"kind": "unscaled", "severity": "info"}
            yield series("tscwatch_vm_info", "1x60", **vm, uuid=vm["vm"], pid="7")
            yield series("tscwatch_vm_tsc_effective_min_hertz", f"{khz}000x60", **vm)
            yield series("tscwatch_vm_tsc_effective_max_hertz", f"{khz}000x60", **vm)
            yield series("tscwatch_mismatch_active", "1x60", **vm, **by_design)
            yield series("tscwatch_vm_hotplug_risk", "1x60", **vm)
            clock = {8: "0x60", 9: "1x30 0x30"}.get(host, "1x60")
            yield series("tscwatch_vm_master_clock", clock, **vm)
            if host == 9:
                for kind in ("desync", "vcpu_skew"):
                    off = {"kind": kind, "severity": "critical"}
                    yield series("tscwatch_mismatch_active", "_x30 1x30", **vm, **off)


def test_in_a_fleet_one_cause_is_one_alert(tmp_path: Path) -> None:
    """A host that does not answer, one without a TSC, and one whose guests are apart."""
    apart = (f'alertname="TscDesync",instance="h9:9978",vm="9-{n}"' for n in range(GUESTS))
    of_host = 'alertname="TscHostClocksource",instance="h8:9978"'
    case = {
        "input_series": list(fleet()),
        "promql_expr_test": [
            firing("alertname, instance, vm", "20m", of_host),
            firing(
                "alertname, instance, vm",
                "50m",
                of_host,
                'alertname="TscwatchDown",instance="h7:9978"',
                *apart,
            ),
        ],
    }
    check_rules(tmp_path, RULES.read_text(), case)


@pytest.fixture
def replayed(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a file with the metrics at the end of a recording."""
    file = tmp_path / "metrics"
    replay = run("replay", "--metrics", str(RECORDINGS / f"{request.param}.jsonl"))
    assert replay.returncode == 0, replay.stderr
    file.write_text(replay.stdout)
    return file


@pytest.mark.parametrize(
    ("replayed", "vm", "paged"),
    [
        ("bcc-tracepoint-skewed_migration", "target", ["TscDesync"]),
        ("bcc-kprobe-refused", "refused", ["TscMismatch", "TscMismatch"]),
    ],
    indirect=["replayed"],
)
def test_one_cause_on_one_guest_is_one_notification(
    tmp_path: Path, replayed: Path, vm: str, paged: list[str]
) -> None:
    """Both guests have further alerts, of severity warning."""

    def about_the_guest() -> list[Notification]:
        return [each for each in received if any(alert[2] == vm for alert in each.alerts)]

    def expected(status: str) -> Notification:
        return Notification("pager", tuple((status, alert, vm) for alert in paged))

    with page(replayed) as address, notifications(tmp_path, address) as received:
        wait_for(lambda: bool(about_the_guest()), "the notification")
        replayed.write_text("")
        wait_for(lambda: includes(received, ("resolved", paged[0], vm)), "its end")
    assert about_the_guest() == [expected("firing"), expected("resolved")]


def test_hosts_that_do_not_answer_are_one_notification_for_a_pool(tmp_path: Path) -> None:
    down = {"alertname": "TscwatchDown", "severity": "warning"}
    with alertmanager(tmp_path) as (port, received):
        wait_for(lambda: answers(port), "Alertmanager to answer")
        post_alerts(port, [{**down, "pool": "a", "instance": f"a{n}"} for n in range(40)])
        post_alerts(port, [{**down, "pool": "b", "instance": "b1"}])
        wait_for(lambda: len(received) >= 2, "both notifications")
        post_alerts(port, [{**down, "pool": "c", "instance": "c1"}])
        wait_for(lambda: len(received) >= 3, "a later one")
    assert sorted(len(each.alerts) for each in received) == [1, 1, 40]
    assert {each.receiver for each in received} == {"tickets"}


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=PATIENCE_S) as it:
            return bool(it.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("replayed", ["bcc-tracepoint-skewed_migration"], indirect=True)
def test_the_first_query_of_each_alert_can_be_made(tmp_path: Path, replayed: Path) -> None:
    checks = [
        each for case in yaml.safe_load(CASES.read_text())["tests"] for each in alert_checks(case)
    ]
    queries = {each["exp_annotations"]["query"] for each in checks}
    with page(replayed) as target, prometheus(tmp_path, target) as address:
        for expr in queries:
            query(address, expr)  # raises an error if Prometheus cannot parse it
        fired = {"TscDesync", "TscMismatch"}
        wait_for(lambda: fired <= {name for name, _ in first_queries(address)}, "the alerts")
        for name, expr in first_queries(address):
            assert query(address, expr), name


def alert_checks(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for each in case.get("alert_rule_test", ()):
        yield from each.get("exp_alerts", ())


def first_queries(address: str) -> list[tuple[str, str]]:
    """Return the name and the annotation ``query`` of each alert that fires."""
    alerts = api(address, "alerts")["alerts"]
    return [(alert["labels"]["alertname"], alert["annotations"]["query"]) for alert in alerts]


def test_each_recipe_of_the_runbook_is_tested() -> None:
    recipes = re.findall(r"(?s)```promql\n(.*?)```", (DEPLOY / "RUNBOOK.md").read_text())
    tests = yaml.safe_load(CASES.read_text())["tests"]
    tested = {
        " ".join(each["expr"].split()) for t in tests for each in t.get("promql_expr_test", [])
    }
    assert len(recipes) >= 7
    assert [recipe for recipe in recipes if " ".join(recipe.split()) not in tested] == []
