"""The alerts, with the real promtool, Prometheus and Alertmanager."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.guests import wait_for
from tests.observer import Observer
from tests.prometheus import DEPLOY, RULES, free_port, prometheus, running
from tests.scenarios import skewed

ALERTMANAGER = """
route: {{receiver: here, group_wait: 1s, group_interval: 1s, group_by: [alertname, vm]}}
receivers:
  - name: here
    webhook_configs: [{{url: "http://127.0.0.1:{webhook}/", send_resolved: true}}]
"""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("command", [["check", "rules"], ["test", "rules"]])
def test_promtool(command: list[str]) -> None:
    file = RULES if command[0] == "check" else RULES.with_name("tscwatch.rules.test.yml")
    checked = subprocess.run(
        ["promtool", *command, str(file)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout


def test_each_alert_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"(?m)^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text())
    assert [alert["alert"] for alert in alerts()] == sections
    for alert in alerts():
        notes = alert["annotations"]
        assert notes["runbook_url"].endswith(f"RUNBOOK.md#{alert['alert'].lower()}")
        assert notes["summary"]
        assert notes["description"]
        # A mismatch has its severity from tscwatch.
        assert "severity" in alert.get("labels", {}) or "tscwatch_mismatch_" in alert["expr"]


def test_each_metric_in_the_rules_is_one_of_tscwatchs(observer: Observer) -> None:
    named = set(re.findall(r"\btscwatch_\w+", re.sub(r"\w+:tscwatch\S*", "", RULES.read_text())))
    offered = set(re.findall(r"(?m)^# TYPE (\w+)", observer.metrics()))
    assert {name for name in named if name not in offered} == set()


class Webhook(BaseHTTPRequestHandler):
    """Keeps what Alertmanager sends."""

    received: list[tuple[str, str, str]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in body["alerts"]:
            labels = alert["labels"]
            self.received.append((alert["status"], labels["alertname"], labels.get("vm", "")))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""


@contextmanager
def webhook() -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    handler = type("Handler", (Webhook,), {"received": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, handler.received  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


def test_a_skewed_guest_reaches_the_webhook_and_its_end_resolves_it(tmp_path: Path) -> None:
    """All real: only that an alert must hold for a minute is left out."""
    alertmanager = free_port()
    with ExitStack() as stack:
        port, received = stack.enter_context(webhook())
        (tmp_path / "alertmanager.yml").write_text(ALERTMANAGER.format(webhook=port))
        listen = f"--web.listen-address=127.0.0.1:{alertmanager}"
        options = ("--config.file=alertmanager.yml", "--cluster.listen-address=", listen)
        stack.enter_context(running(tmp_path, "prometheus-alertmanager", *options))
        observer = stack.enter_context(Observer(tmp_path, "--source", "ftrace"))
        stack.enter_context(prometheus(tmp_path, observer, alertmanager))
        with skewed(tmp_path, ""):
            fired = ("firing", "TscVcpuSkew", "target")
            wait_for(lambda: fired in received, "the alert")
        resolved = ("resolved", "TscVcpuSkew", "target")
        wait_for(lambda: resolved in received, "its end")
