"""What the port answers about the daemon's loop."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from tscwatch.clock import now_ns
from tscwatch.publish import web
from tscwatch.publish.web import Heartbeat


def status(heartbeat: Heartbeat, path: str) -> int:
    """Return the HTTP status of a path."""
    statuses: list[str] = []
    served = web.application(CollectorRegistry(), heartbeat, list)
    served({"PATH_INFO": path}, lambda line, _headers: statuses.append(line))
    (line,) = statuses
    return int(line.split()[0])


def test_a_loop_is_alive_from_its_start_until_it_has_hung_for_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop's first beat comes only after all existing VMs were read."""
    heartbeat = Heartbeat()
    assert status(heartbeat, "/healthz") == 200
    later = now_ns() + 10 * 10**9
    monkeypatch.setattr(web, "now_ns", lambda: later)
    assert status(heartbeat, "/healthz") == 503
    heartbeat.beat()
    assert status(heartbeat, "/healthz") == 200
    assert status(heartbeat, "/readyz") == 503  # its probes are not attached
