"""Converts Prometheus' alerting rules to those of Grafana's own alerting.

So a site can use either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import alerting, prometheus
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.alerting import RelativeTimeRange

_DATASOURCE_UID = "prometheus"


def alert_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of alert rules in the form of Grafana's provisioning files.

    :param groups: those of a rules file of Prometheus.
    """
    records = {r["record"]: r["expr"] for group in groups for r in group["rules"] if "record" in r}
    return [
        {
            "orgId": 1,
            "name": group["name"],
            "folder": "tscwatch",
            "interval": "1m",
            "rules": [_as_provisioned(_rule(r, records)) for r in group["rules"] if "alert" in r],
        }
        for group in groups
        if any("alert" in rule for rule in group["rules"])
    ]


def _rule(rule: dict[str, Any], records: dict[str, str]) -> alerting.Rule:
    """Return one alert rule.

    Its query A is 1 for each series that the expression yields, whatever the series' value; B is
    that value.
    """
    expr = _without_records(rule["expr"], records)
    built = (
        alerting.Rule(rule["alert"])
        .uid(rule["alert"].lower())
        .condition("A")
        .for_val(rule.get("for", "0s"))
        .labels(rule.get("labels", {}))  # a mismatch's series has its severity as a label
        .annotations(_annotations(rule))
        .no_data_state("OK")
        .exec_err_state("Error")
    )
    for ref_id, text in (("A", f"({expr}) * 0 + 1"), ("B", expr)):
        built = built.with_query(
            alerting.Query(ref_id)
            .datasource_uid(_DATASOURCE_UID)
            .relative_time_range(RelativeTimeRange(600, 0))
            .model(prometheus.Dataquery().ref_id(ref_id).expr(text).instant())
        )
    return built


def _without_records(expr: str, records: dict[str, str]) -> str:
    """Replace recorded series by their expressions, because Grafana has no recording rules here."""
    for name, recorded in records.items():
        expr = re.sub(rf"{name}\[(\w+)\]", rf"({recorded})[\1:1m]", expr)
        expr = expr.replace(name, f"({recorded})")
    return expr


def _annotations(rule: dict[str, Any]) -> dict[str, str]:
    """Return the annotations without the owner, who is known only by a query."""
    return {
        name: _without_queries(text)
        for name, text in rule["annotations"].items()
        if name != "owner"
    }


def _without_queries(text: str) -> str:
    """Remove queries, which Grafana's templates do not support, and rename ``$value``."""
    text = re.sub(r"\s*\{\{-? range .*?\{\{-? end \}\}", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text.replace("$value ", "$values.B.Value ")).strip()


def _as_provisioned(rule: alerting.Rule) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(JSONEncoder().encode(rule.build()))
    kept = ("uid", "title", "condition", "data", "for", "labels", "annotations")
    return {
        **{name: fields[name] for name in kept if name in fields},
        "noDataState": fields["noDataState"],
        "execErrState": fields["execErrState"],
    }
