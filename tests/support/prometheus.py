"""Runs the real Prometheus, which scrapes tscwatch each second, and the real Alertmanager."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml

from tests.support.guests import PATIENCE_S, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/tscwatch.rules.yml"
ALERTMANAGER = DEPLOY / "prometheus/alertmanager.yml"

_CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["127.0.0.1:{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: tscwatch
    static_configs: [{{targets: ["{tscwatch}"], labels: {{pool: here}}}}]
"""


class Span(NamedTuple):
    """A range of time, in Unix time, and the interval between two scrapes."""

    start: int
    end: int
    every_s: int

    @staticmethod
    def until_now(seconds: int, every_s: int) -> Span:
        end = int(time.time())
        return Span(end - seconds, end, every_s)


Alert = tuple[str, str, str]
"""Status (``firing`` or ``resolved``), name of the alert, name of the VM."""


class Notification(NamedTuple):
    """What Alertmanager sends at once."""

    receiver: str
    alerts: tuple[Alert, ...]


def faults(metrics: str) -> tuple[int, str, str]:
    """Return the exit status and the output of promtool's check of a page of metrics."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    return checked.returncode, checked.stdout, checked.stderr


def check(*command: str) -> None:
    """Run a command, and fail with its output if it fails."""
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def check_rules(directory: Path, rules: str, case: dict[str, Any]) -> None:
    """Run a case of a unit test with promtool."""
    (directory / "rules.yml").write_text(rules)
    file = directory / "rules.test.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": ["rules.yml"],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", **case}],
            }
        )
    )
    check("promtool", "test", "rules", str(file))


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """Return a series of a case's input, with values in promtool's notation."""
    matchers = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{matchers}}}", "values": values}


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
    return list(api(address, "query", query=expr)["result"])


def api(address: str, path: str, **parameters: str) -> Any:
    """Return the data that Prometheus' HTTP API has for a path.

    :param address: the ``HOST:PORT`` of a Prometheus.
    :raises urllib.error.HTTPError: Prometheus refuses the query.
    """
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
        return json.load(page)["data"]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Discard the line, which would go to standard error."""

    def answer(self, body: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body.encode())


class _Webhook(_Handler):
    """Collects what Alertmanager sends."""

    received: list[Notification]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        alerts = sorted(
            (alert["status"], alert["labels"]["alertname"], alert["labels"].get("vm", ""))
            for alert in body["alerts"]
        )
        self.received.append(Notification(body["receiver"], tuple(alerts)))
        self.answer()


class _Page(_Handler):
    file: Path

    def do_GET(self) -> None:
        self.answer(self.file.read_text())


@contextmanager
def _serving(handler: type[_Handler]) -> Iterator[int]:
    """Serve HTTP on a port of this machine, and yield the port.

    Each connection has a thread, because a client may keep one open.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def page(file: Path) -> Iterator[str]:
    """Serve a file as a page of metrics, as it is at each scrape; yield its ``HOST:PORT``."""
    with _serving(type("Page", (_Page,), {"file": file})) as port:
        yield f"127.0.0.1:{port}"


@contextmanager
def alertmanager(directory: Path) -> Iterator[tuple[int, list[Notification]]]:
    """Run Alertmanager with our example of a configuration.

    It waits for seconds in place of minutes, and sends to a webhook of this process.  Yield its
    port, and the list of the notifications, which grows as they come in.
    """
    received: list[Notification] = []
    port = free_port()
    config = yaml.safe_load(ALERTMANAGER.read_text())
    _hurry(config["route"])
    with _serving(type("Webhook", (_Webhook,), {"received": received})) as webhook:
        for receiver in config["receivers"]:
            for hook in receiver["webhook_configs"]:
                hook["url"] = f"http://127.0.0.1:{webhook}/"
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(config))
        options = (
            "--config.file=alertmanager.yml",
            "--storage.path=alertmanager",  # Debian's default has the notifications of other runs
            "--cluster.listen-address=",
            f"--web.listen-address=127.0.0.1:{port}",
        )
        with server(directory, "prometheus-alertmanager", *options):
            yield port, received


def _hurry(route: dict[str, Any]) -> None:
    route.update(group_wait="2s", group_interval="1s")
    for child in route.get("routes", ()):
        _hurry(child)


def post_alerts(port: int, alerts: Sequence[dict[str, str]]) -> None:
    """Send alerts, each given by its labels, to an Alertmanager on this machine."""
    body = json.dumps([{"labels": labels} for labels in alerts]).encode()
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{port}/api/v2/alerts"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE_S):
        pass


@contextmanager
def notifications(directory: Path, tscwatch: str) -> Iterator[list[Notification]]:
    """Run Prometheus with our rules, and Alertmanager; yield the notifications as they come in."""
    with (
        alertmanager(directory) as (port, received),
        prometheus(directory, tscwatch, port),
    ):
        yield received


def includes(received: Sequence[Notification], alert: Alert) -> bool:
    return any(alert in notification.alerts for notification in received)
