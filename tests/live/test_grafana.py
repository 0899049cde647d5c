"""Grafana's alert rules, whose queries a real Prometheus evaluates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.grafana import generate
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.prometheus import DEPLOY, prometheus, query
from tests.support.scenarios import skewed

ALERTS = json.loads((DEPLOY / "grafana/alerts.json").read_text())
UUID = "6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11"


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def test_what_is_committed_is_what_is_generated() -> None:
    for name, content in generate.generated().items():
        assert (DEPLOY / "grafana" / name).read_text() == content, "run make grafana"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a Prometheus that has scraped a skewed guest."""
    directory = tmp_path_factory.mktemp("grafana")
    with (
        Observer(directory, "--source", "ftrace") as observer,
        prometheus(directory, observer.target) as address,
        skewed(directory, "", uuid=UUID),
    ):
        skew = 'tscwatch_mismatch_active{kind="vcpu_skew"}'
        wait_for(lambda: bool(query(address, skew)), "the skew to be scraped")
        wait_for(lambda: bool(query(address, "increase(up[1m])")), "two scrapes")
        yield address


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["title"]))
def test_each_alerts_series_exist(address: str, rule: dict[str, Any]) -> None:
    """Most alerts do not fire here, but the series that they select must exist."""
    condition, value = (query_["model"]["expr"] for query_ in rule["data"])
    metrics = set(re.findall(r"\b(?:tscwatch_\w+|up)\b", value))
    assert metrics
    wait_for(lambda: all(query(address, metric) for metric in metrics), str(metrics))
    fires = query(address, condition)
    assert {series["value"][1] for series in fires} <= {"1"}
    if rule["title"] in ("TscVcpuSkew", "TscMismatch"):
        assert fires
