"""The alert rules on the real daemon: its metrics, and a skewed guest's alert up to the webhook."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.prometheus import RULES, includes, notifications
from tests.support.scenarios import skewed


def test_each_metric_in_the_rules_is_one_of_tscwatchs(observer: Observer) -> None:
    named = set(re.findall(r"\btscwatch_\w+", re.sub(r"\w+:tscwatch\S*", "", RULES.read_text())))
    offered = set(re.findall(r"(?m)^# TYPE (\w+)", observer.metrics()))
    assert {name for name in named if name not in offered} == set()


def test_a_skewed_guest_reaches_the_webhook_and_its_end_resolves_it(tmp_path: Path) -> None:
    """The rules are the real ones, except that alerts fire at once."""
    with (
        Observer(tmp_path, "--source", "ftrace") as observer,
        notifications(tmp_path, observer.target) as received,
    ):
        with skewed(tmp_path, ""):
            wait_for(lambda: includes(received, ("firing", "TscVcpuSkew", "target")), "the alert")
        wait_for(
            lambda: includes(received, ("resolved", "TscVcpuSkew", "target")),
            "the alert to be resolved",
        )
