"""What the port answers, and the text file with the same metrics."""

from __future__ import annotations

import json
import shutil
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Callable, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric

from tscwatch.clock import now_ns
from tscwatch.errors import ListenFailed
from tscwatch.publish import web
from tscwatch.publish.web import Heartbeat, Textfile
from tscwatch.publish.web_config import WebConfig

SECOND_NS = 10**9
SetLater = Callable[[float], None]


@pytest.fixture
def set_later(monkeypatch: pytest.MonkeyPatch) -> SetLater:
    """Return a function that stops the clock some seconds after the beginning of the test."""
    begin = now_ns()

    def set_later(seconds: float) -> None:
        monkeypatch.setattr(web, "now_ns", lambda: begin + int(seconds * SECOND_NS))

    set_later(0)
    return set_later


class Scrapes:
    """A metric whose value is how many times it was scraped."""

    made = 0

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        self.made += 1
        return [GaugeMetricFamily("scrapes", "", self.made)]


def a_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(cast(Any, Scrapes()))
    return registry


def answer(heartbeat: Heartbeat, path: str) -> tuple[int, str, str]:
    """Return the HTTP status, the type and the text of a path."""
    answers: list[tuple[str, dict[str, str]]] = []
    served = web.application(a_registry(), heartbeat, lambda: [{"vm": "\u00e9"}])
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "QUERY_STRING": ""}
    body = served(environ, lambda line, headers: answers.append((line, dict(headers))))
    ((line, headers),) = answers
    return int(line.split()[0]), headers["Content-Type"], b"".join(body).decode()


def status(heartbeat: Heartbeat, path: str) -> int:
    return answer(heartbeat, path)[0]


def test_a_loop_is_alive_from_its_start_until_it_has_hung_for_ten_seconds(
    set_later: SetLater,
) -> None:
    """The loop's first beat comes only after all existing VMs were read."""
    heartbeat = Heartbeat()
    assert status(heartbeat, "/healthz") == 200
    heartbeat.beat()
    set_later(9.9)
    assert status(heartbeat, "/healthz") == 200
    set_later(10.1)
    assert status(heartbeat, "/healthz") == 503
    heartbeat.beat()
    assert status(heartbeat, "/healthz") == 200


def test_a_loop_is_ready_while_it_is_alive_and_all_probes_are_attached(
    set_later: SetLater,
) -> None:
    heartbeat = Heartbeat()
    assert status(heartbeat, "/readyz") == 503
    heartbeat.ready = True
    assert status(heartbeat, "/readyz") == 200
    set_later(20)
    assert status(heartbeat, "/readyz") == 503


def test_the_answer_of_each_path() -> None:
    heartbeat = Heartbeat(ready=True)
    plain = "text/plain; charset=utf-8"
    assert answer(heartbeat, "/healthz") == (200, plain, "alive\n")
    assert answer(heartbeat, "/readyz") == (200, plain, "ready\n")
    code, content_type, vms = answer(heartbeat, "/vms")
    assert (code, content_type, json.loads(vms)) == (200, "application/json", [{"vm": "\u00e9"}])
    code, content_type, metrics = answer(heartbeat, "/metrics")
    assert (code, content_type.partition(";")[0]) == (200, "text/plain")
    assert "\nscrapes 1.0\n" in metrics
    code, content_type, page = answer(heartbeat, "/")
    assert (code, content_type) == (200, "text/html; charset=utf-8")
    for path in ("/metrics", "/vms", "/healthz", "/readyz"):
        assert f'<a href="{path}">' in page
    for path in ("/else", "/metrics/", "/vms/", ""):
        code, _, text = answer(heartbeat, path)
        assert code == 404
        assert "/metrics, /vms, /healthz and /readyz" in text


def test_the_port_answers_while_it_is_served() -> None:
    started: list[str] = []
    application = web.application(CollectorRegistry(), Heartbeat(), list)
    settings = application, WebConfig(), "127.0.0.1"
    with web.serving(*settings, 0, lambda: started.append("thread")) as port:
        for _ in range(2):
            client = HTTPConnection("127.0.0.1", port, timeout=60)
            client.request("GET", "/vms")
            assert client.getresponse().read() == b"[]\n"
            client.close()
        with pytest.raises(ListenFailed, match=rf"listen on 127\.0\.0\.1 port {port} "):
            web.serving(*settings, port, lambda: None).__enter__()
    assert started == ["thread"]
    with pytest.raises(ConnectionRefusedError):
        HTTPConnection("127.0.0.1", port, timeout=60).connect()


def scrapes(file: Path) -> int:
    """Return how many times the metrics had been scraped when the file was written."""
    (line,) = (x for x in file.read_text().splitlines() if x.startswith("scrapes "))
    return int(float(line.split()[1]))


def test_the_text_file_is_written_each_15_seconds(tmp_path: Path, set_later: SetLater) -> None:
    file = tmp_path / "tscwatch.prom"
    textfile = Textfile(file, a_registry())
    written = []
    for second in (0, 1, 14.9, 15.1, 16, 30, 30.2, 45.3):
        set_later(second)
        textfile.write()
        written.append(scrapes(file))
    assert written == [1, 1, 1, 2, 2, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [file]


def test_a_text_file_that_cannot_be_written_is_logged_once(
    tmp_path: Path,
    set_later: SetLater,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = tmp_path / "later"
    textfile = Textfile(directory / "tscwatch.prom", a_registry())
    logged = []
    for number, is_there in enumerate([False, False, True, False, False]):
        if is_there:
            directory.mkdir()
        elif directory.exists():
            shutil.rmtree(directory)
        set_later(20 * number)
        textfile.write()
        logged.append(caplog.text.count("tscwatch.prom: cannot be written (No such file"))
    assert logged == [1, 1, 1, 2, 2]
