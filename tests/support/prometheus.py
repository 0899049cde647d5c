"""Runs the real Prometheus, which scrapes tscwatch each second, and the real Alertmanager."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Optional

from tests.support.guests import PATIENCE_S, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/tscwatch.rules.yml"

_CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["127.0.0.1:{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: tscwatch
    static_configs: [{{targets: ["{tscwatch}"], labels: {{pool: here}}}}]
"""

_ALERTMANAGER = """
route: {{receiver: here, group_wait: 1s, group_interval: 1s, group_by: [alertname, vm]}}
receivers:
  - name: here
    webhook_configs: [{{url: "http://127.0.0.1:{webhook}/", send_resolved: true}}]
"""

Alert = tuple[str, str, str]
"""Status (``firing`` or ``resolved``), name of the alert, name of the VM."""


def faults(metrics: str) -> tuple[int, str, str]:
    """Return the exit status and the output of promtool's check of a page of metrics."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    return checked.returncode, checked.stdout, checked.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def server(directory: Path, program: str, *options: str) -> Iterator[None]:
    """Run a server program until the end of the context; its output goes to ``PROGRAM.log``."""
    with (directory / f"{program}.log").open("wb") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log, cwd=directory)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@contextmanager
def prometheus(directory: Path, tscwatch: str, alertmanager: Optional[int] = None) -> Iterator[str]:
    """Run Prometheus with our rules, and yield its ``HOST:PORT`` once it answers.

    Alerts fire at once: the rules' ``for`` lines are left out.

    :param tscwatch: the target to scrape, as ``HOST:PORT``.
    :param alertmanager: the port of an Alertmanager on this machine.
    """
    (directory / "rules.yml").write_text(re.sub(r"(?m)^ +for: .*$", "", RULES.read_text()))
    text = _CONFIGURATION.format(alertmanager=alertmanager or free_port(), tscwatch=tscwatch)
    (directory / "prometheus.yml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=tsdb")
    with server(directory, "prometheus", *options, f"--web.listen-address={address}"):
        wait_for(lambda: _answers(address), "Prometheus to answer")
        yield address


def _answers(address: str) -> bool:
    try:
        return bool(query(address, "up"))
    except OSError:
        return False


def query(address: str, expr: str) -> list[dict[str, Any]]:
    """Return the series of an instant query.

    :param address: the ``HOST:PORT`` of a Prometheus.
    """
    options = urllib.parse.urlencode({"query": expr})
    url = f"http://{address}/api/v1/query?{options}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
        return list(json.load(page)["data"]["result"])


class _Webhook(BaseHTTPRequestHandler):
    """Collects the alerts that Alertmanager sends."""

    received: list[Alert]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in body["alerts"]:
            labels = alert["labels"]
            self.received.append((alert["status"], labels["alertname"], labels.get("vm", "")))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Discard the line, which would go to standard error."""


@contextmanager
def _webhook(received: list[Alert]) -> Iterator[int]:
    handler = type("Handler", (_Webhook,), {"received": received})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def alerts(directory: Path, tscwatch: str) -> Iterator[list[Alert]]:
    """Run Prometheus with our rules, Alertmanager and a webhook; yield the alerts it receives.

    The list grows as alerts come in.
    """
    received: list[Alert] = []
    port = free_port()
    with ExitStack() as stack:
        webhook = stack.enter_context(_webhook(received))
        (directory / "alertmanager.yml").write_text(_ALERTMANAGER.format(webhook=webhook))
        listen = f"--web.listen-address=127.0.0.1:{port}"
        options = ("--config.file=alertmanager.yml", "--cluster.listen-address=", listen)
        stack.enter_context(server(directory, "prometheus-alertmanager", *options))
        stack.enter_context(prometheus(directory, tscwatch, port))
        yield received
