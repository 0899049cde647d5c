"""The interfaces of the daemon that have no test file of their own: HTTP, textfile and top."""

from __future__ import annotations

import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.openmetrics import parser

from tests.support import tiny_vmm
from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import EACH_VCPU, Observer, run
from tests.support.prometheus import faults


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Observer]:
    with Observer(tmp_path, "--json", "--source", "ftrace") as observer:
        yield observer


def answer(observer: Observer, path: str) -> tuple[int, str]:
    """Return the HTTP status and the body of a path."""
    try:
        with urllib.request.urlopen(observer.address + path, timeout=PATIENCE_S) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_what_the_port_answers(daemon: Observer) -> None:
    wait_for(lambda: answer(daemon, "/readyz") == (200, "ready\n"), "it to be ready")
    assert answer(daemon, "/healthz") == (200, "alive\n")
    assert answer(daemon, "/metrics")[0] == 200
    status, page = answer(daemon, "/")
    assert status == 200
    linked = re.findall(r'href="(.*?)"', page)
    assert [answer(daemon, path)[0] for path in linked] == [200] * 4
    code, paths = answer(daemon, "/else")
    assert (code, set(re.findall(r"/\w+", paths))) == (404, set(linked))


def test_openmetrics_for_a_client_that_accepts_it(daemon: Observer) -> None:
    url = f"{daemon.address}/metrics"
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=accept)) as page:
        assert page.headers["Content-Type"].startswith("application/openmetrics-text")
        parse = cast(Any, parser).text_string_to_metric_families  # old releases have no types
        families = list(parse(page.read().decode()))
    assert "tscwatch_tsc_ioctls" in {family.name for family in families}


def test_promtool_finds_no_fault_in_the_metrics(daemon: Observer) -> None:
    khz = tiny_vmm.khz_above_host(100)
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{khz}") as process:
        wait_for(lambda: bool(daemon.mismatches_of(process.pid, "unscaled")), "the mismatch")
        assert faults(daemon.metrics()) == (0, "", "")


@pytest.mark.parametrize("source", [pytest.param("bcc", marks=pytest.mark.also_in_lab), "ftrace"])
def test_the_series_of_a_host_without_guests(source: str, tmp_path: Path) -> None:
    with Observer(tmp_path, "--source", source) as observer:
        series = [line for line in observer.metrics().splitlines() if line[0] != "#"]
    assert "process_resident_memory_bytes" in {line.partition(" ")[0] for line in series}
    assert len([line for line in series if 'vm="' not in line]) <= 90


def test_a_changed_per_vcpu_takes_effect_at_a_reload(tmp_path: Path) -> None:
    steps = ("create-vcpu:0", "regs:0", "run:0", "set:0:2000000", "get:0")
    with (
        Observer(tmp_path, "--json", "--source", "ftrace") as observer,
        tiny_vmm.process(*steps) as process,
    ):
        label = f'vcpu="0",vm="{process.pid}"'
        wait_for(lambda: len(observer.calls(str(process.pid))) == 2, "its calls")
        assert label not in observer.series("vcpu_tsc_reported_hertz")
        (tmp_path / "tscwatch.yaml").write_text(EACH_VCPU)
        observer.process.send_signal(signal.SIGHUP)
        wait_for(lambda: label in observer.series("vcpu_tsc_reported_hertz"), "its vCPU")


def test_a_file_for_node_exporter(tmp_path: Path) -> None:
    file = tmp_path / "metrics/tscwatch.prom"
    with Observer(tmp_path, "--source", "ftrace", "--textfile", str(file)) as observer:
        wait_for(lambda: f"{file}: cannot be written" in observer.log.read_text(), "the warning")
    file.parent.mkdir()
    with Observer(tmp_path, "--source", "ftrace", "--textfile", str(file)) as observer:
        wait_for(file.exists, "the file")
        text = file.read_text()
        assert "tscwatch_build_info" in text
        assert not re.search("(?m)^process_", text)  # node_exporter has its own
        assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_top_shows_the_running_guests(daemon: Observer) -> None:
    khz = tiny_vmm.khz_above_host(100)
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{khz}") as process:
        wait_for(lambda: bool(daemon.mismatches_of(process.pid, "unscaled")), "the mismatch")
        shown = run("top", "--url", daemon.address)
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith(str(process.pid))]
    assert line.split()[1:3] == ["0", str(khz)]
    assert re.search(r"warning  unscaled \d+\.\d ppm$", line), line
    assert "\x1b" not in shown.stdout  # the output is not a terminal
