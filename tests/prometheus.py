"""The real Prometheus, scraping tscwatch each second."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from tests.guests import PATIENCE_S, wait_for
from tests.observer import Observer

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus/tscwatch.rules.yml"

_CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["127.0.0.1:{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: tscwatch
    static_configs: [{{targets: ["{tscwatch}"], labels: {{pool: here}}}}]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(directory: Path, program: str, *options: str) -> Iterator[None]:
    with (directory / f"{program}.log").open("wb") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log, cwd=directory)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@contextmanager
def prometheus(
    directory: Path, observer: Observer, alertmanager: Optional[int] = None
) -> Iterator[str]:
    """With our rules, but that an alert need not hold for a minute; gives its address."""
    tscwatch = observer.address.partition("://")[2]
    (directory / "rules.yml").write_text(re.sub(r"(?m)^ +for: .*$", "", RULES.read_text()))
    text = _CONFIGURATION.format(alertmanager=alertmanager or free_port(), tscwatch=tscwatch)
    (directory / "prometheus.yml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=tsdb")
    with running(directory, "prometheus", *options, f"--web.listen-address={address}"):
        wait_for(lambda: _answers(address), "Prometheus to answer")
        yield address


def _answers(address: str) -> bool:
    try:
        return bool(query(address, "up"))
    except OSError:
        return False


def query(address: str, expr: str) -> list[dict[str, Any]]:
    """The series of an instant query."""
    options = urllib.parse.urlencode({"query": expr})
    url = f"http://{address}/api/v1/query?{options}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
        return list(json.load(page)["data"]["result"])
