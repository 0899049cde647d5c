"""What a command prints, which exit status it has, and which configuration it uses."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pure.test_metrics import EXACT, skewed
from tests.pure.test_web_config import serving
from tests.support.histories import History
from tscwatch import cli, doctor, recording
from tscwatch.model import Event, Host
from tscwatch.publish import top
from tscwatch.publish.client import Client
from tscwatch.publish.web_config import WebConfig


def write(path: Path, *events: Event | Host) -> None:
    with closing(recording.Writer(path)) as writer:
        for event in events:
            writer.write(event)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a recording with a skewed guest."""
    path = tmp_path / "run.jsonl"
    write(path, EXACT, *skewed().events)
    return path


def settings(tmp_path: Path, text: str) -> tuple[str, str]:
    """Write a configuration, and return the option that names it."""
    file = tmp_path / "tscwatch.yaml"
    file.write_text(f"{text}\n")
    return "--config", str(file)


def test_a_replay_as_text_and_as_json(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(run)]) == 0
    text = capfd.readouterr().out.splitlines()
    assert sum("MISMATCH raised: vcpu_skew" in line for line in text) == 1
    assert cli.main(["replay", str(run), "--json"]) == 0
    by_option = capfd.readouterr().out
    assert len(by_option.splitlines()) == len(text)
    assert {json.loads(line)["type"] for line in by_option.splitlines()} == {"call", "mismatch"}
    assert cli.main(["replay", str(run), *settings(tmp_path, "log_format: json")]) == 0
    assert capfd.readouterr().out == by_option


def test_the_metrics_of_a_replay(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(run), "--metrics"]) == 0
    metrics = capfd.readouterr().out
    assert 'tscwatch_mismatches_total{kind="vcpu_skew"} 1.0' in metrics.splitlines()
    assert {line.split("_")[0] for line in metrics.splitlines()} <= {
        "tscwatch",
        "# HELP tscwatch",
        "# TYPE tscwatch",
    }


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ("limits: {vcpus: 1}", r'tracking_dropped_total\{what="vcpu"\} [1-9]'),
        ("limits: {vms: 1}", r'tracking_dropped_total\{what="vm"\} [1-9]'),
        ("tolerance_ppm: {vcpu_skew: 101}", r'mismatches_total\{kind="vcpu_skew"\} 0.0'),
        ("metrics: {per_vcpu: all}", r'requested_hertz\{vcpu="0",vm="guest-200"\}'),
    ],
)
def test_the_configuration_of_a_replay(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], chosen: str, line: str
) -> None:
    other = History("kvm:2", 200)
    other.emit("vm_create")
    other.new_vcpu(0, "boot")
    other.write_all("boot")
    path = tmp_path / "two.jsonl"
    write(path, EXACT, *skewed().events, *other.events)
    shown = []
    for option in ((), settings(tmp_path, chosen)):
        assert cli.main(["replay", str(path), "--metrics", *option]) == 0
        shown.append(re.search(line, capfd.readouterr().out) is not None)
    assert shown == [False, True]


def test_a_report_uses_the_tolerance(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for tolerance, is_off in ((99, True), (101, False)):
        option = settings(tmp_path, f"tolerance_ppm: {{vcpu_skew: {tolerance}}}")
        assert cli.main(["report", str(run), "-o", str(page), *option]) == 0
        assert ("vcpu_skew (critical)" in page.read_text()) == is_off


def test_the_lines_that_are_folded_are_printed_at_the_end_of_a_replay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "polled.jsonl"
    write(path, *[skewed().events[-2]._replace(op="get", after=None)] * 9)
    assert cli.main(["replay", str(path)]) == 0
    assert capfd.readouterr().out.endswith("(the last of 6)\n")


@pytest.mark.parametrize(
    ("options", "installed", "url"),
    [
        ((), None, "http://127.0.0.1:9978"),
        ((), "listen: {port: 7}", "http://127.0.0.1:7"),
        (("--config", "own.yaml"), "listen: {port: 7}", "http://127.0.0.1:8"),
        (("--url", "http://127.0.0.1:9/"), "listen: {port: 7}", "http://127.0.0.1:9"),
    ],
)
def test_which_daemon_top_connects_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    installed: str | None,
    url: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("listen: {port: 8}\n")
    monkeypatch.setattr(cli, "_INSTALLED_CONFIG", Path("installed.yaml"))
    if installed is not None:
        Path("installed.yaml").write_text(f"{installed}\n")
    found: list[str] = []

    def connect(client: Client) -> None:
        found.append(client.url)

    monkeypatch.setattr(top, "run", connect)
    assert cli.main(["top", *options]) == 0
    assert found == [url]


def test_top_may_not_read_where_the_configuration_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> bool:
        raise PermissionError

    found: list[str] = []
    monkeypatch.setattr(cli, "_INSTALLED_CONFIG", SimpleNamespace(exists=forbidden))
    monkeypatch.setattr(top, "run", lambda client: found.append(client.url))
    assert cli.main(["top"]) == 0
    assert found == ["http://127.0.0.1:9978"]


def test_top_prints_a_table_if_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(WebConfig()) as port:
        assert cli.main(["top", "--url", f"http://127.0.0.1:{port}"]) == 0
    (head,) = capfd.readouterr().out.splitlines()
    assert head.split()[:3] == ["vm", "vcpu", "requested"]


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("warning", 1), ("failure", 2)])
def test_doctor_prints_each_check(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    state: doctor.State,
    status: int,
) -> None:
    caplog.set_level("WARNING")  # and restores it, which the command changes
    checks = [doctor.Check("kernel", "ok", "7.2"), doctor.Check("bcc", state, "none", "install")]
    source = doctor.Check("source", "ok", "bcc", details={"source": "bcc"})
    monkeypatch.setattr(doctor, "checks", lambda: checks)
    monkeypatch.setattr(doctor, "source", lambda: source)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().out.splitlines() == [
        "ok       kernel         7.2",
        f"{state:<8} bcc            none -> install",
        "ok       source         bcc",
    ]
    assert cli.main(["doctor", "--json"]) == status
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == [check._asdict() for check in (*checks, source)]


def test_an_interrupt_has_the_exit_status_of_shells(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(_path: Path) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(recording, "read", interrupted)
    assert cli.main(["replay", str(run), "--metrics"]) == 130
    assert caplog.text == ""


def test_a_reader_that_has_gone_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end, begin = os.pipe()
    os.close(end)
    with os.fdopen(begin, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["replay", str(run)]) == 0
        print("at exit, Python flushes what is left", file=output, flush=True)


def test_an_error_is_logged_and_has_its_exit_status(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli.main(["replay", str(tmp_path / "none.jsonl")]) == 10
    assert "none.jsonl: cannot be read (No such file" in caplog.text
    assert cli.main(["replay", "none", *settings(tmp_path, "sauce: bcc")]) == 2
    assert "sauce is not a setting" in caplog.text
