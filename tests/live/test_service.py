"""tscwatch as a service: what systemd hears, a new configuration, and who asks whether it lives."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.openmetrics import parser

from tests.live.test_frequency import INSIDE, of_vm, series
from tests.support import vmm
from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import Observer, run
from tests.support.prometheus import DEPLOY
from tests.support.scenarios import guest, plug

UNIT = DEPLOY / "systemd/tscwatch.service"


class Systemd:
    """Its side of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)

    def close(self) -> None:
        self._socket.close()

    def is_silent(self, seconds: float) -> bool:
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE_S)
        return False

    def hear(self, state: str) -> str:
        """Wait for a message with this state; gives it whole."""
        while True:
            message = self._socket.recv(4096).decode()
            if state in message.split("\n"):
                return message


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    systemd = Systemd(path)
    yield systemd
    systemd.close()


@pytest.fixture
def service(systemd: Systemd, tmp_path: Path) -> Iterator[Observer]:
    with Observer(tmp_path, "--json", "--source", "ftrace") as observer:
        yield observer


def answer(observer: Observer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(observer.address + path, timeout=PATIENCE_S) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_life_as_systemd_hears_it(systemd: Systemd, service: Observer) -> None:
    assert re.search(r"(?m)^STATUS=watching \d+ VMs, \d+ mismatches$", systemd.hear("READY=1"))
    before = len(service.mismatches())
    with vmm.process("create-vcpu:0", "regs:0", f"set:0:{INSIDE}"):
        wait_for(lambda: len(service.mismatches()) > before, "the mismatch")
        none = "STATUS=watching 0 VMs"
        wait_for(lambda: none not in systemd.hear("WATCHDOG=1"), "a beat that tells of it")
    service.process.send_signal(signal.SIGTERM)
    systemd.hear("STOPPING=1")
    assert service.process.wait(PATIENCE_S) == 0


def test_a_loop_that_hangs_does_not_beat(systemd: Systemd, service: Observer) -> None:
    systemd.hear("WATCHDOG=1")
    service.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: systemd.is_silent(3), "the last beat")
    service.process.send_signal(signal.SIGCONT)
    systemd.hear("WATCHDOG=1")


def test_a_new_configuration_without_a_restart(
    systemd: Systemd, service: Observer, tmp_path: Path
) -> None:
    config = tmp_path / "tscwatch.yaml"
    with vmm.process("create-vcpu:0", "regs:0", f"set:0:{INSIDE}") as process:
        wait_for(lambda: bool(of_vm(service, process.pid, "unscaled")), "the mismatch")
        config.write_text("listen: {port: 0}\ntolerance_ppm: {unscaled: 200}\n")
        systemd.hear("WATCHDOG=1")
        service.process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in systemd.hear("RELOADING=1")
        systemd.hear("READY=1")
        states = [m["state"] for m in of_vm(service, process.pid, "unscaled")]
        assert states == ["raised", "cleared"]
        assert series(service, "config_last_reload_successful") == {"": 1}
        raised = 'kind="unscaled",phase="unknown"'
        assert series(service, "mismatches_total")[raised] == 1

        config.write_text("tolerance_ppm: {unscaled: lots}\n")
        service.process.send_signal(signal.SIGHUP)
        systemd.hear("RELOADING=1")
        systemd.hear("READY=1")
        assert series(service, "config_last_reload_successful") == {"": 0}
        assert f"{config}:1: tolerance_ppm.unscaled" in service.log.read_text()
        assert len(of_vm(service, process.pid, "unscaled")) == 2  # what was in force still is


def test_what_the_port_answers(service: Observer) -> None:
    wait_for(lambda: answer(service, "/readyz") == (200, "ready\n"), "it to be ready")
    assert answer(service, "/healthz") == (200, "alive\n")
    assert answer(service, "/metrics")[0] == 200
    assert answer(service, "/else")[0] == 404


def test_openmetrics_for_those_who_ask(service: Observer) -> None:
    url = f"{service.address}/metrics"
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=accept)) as page:
        assert page.headers["Content-Type"].startswith("application/openmetrics-text")
        parse = cast(Any, parser).text_string_to_metric_families  # typed in newer releases only
        families = list(parse(page.read().decode()))
    assert "tscwatch_tsc_ioctls" in {family.name for family in families}


def test_a_file_for_node_exporter(tmp_path: Path) -> None:
    file = tmp_path / "metrics/tscwatch.prom"
    with Observer(tmp_path, "--source", "ftrace", "--textfile", str(file)) as observer:
        wait_for(lambda: f"{file}: cannot be written" in observer.log.read_text(), "the complaint")
    file.parent.mkdir()
    with Observer(tmp_path, "--source", "ftrace", "--textfile", str(file)) as observer:
        wait_for(file.exists, "the file")
        assert "tscwatch_build_info" in file.read_text()
        assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    """But for the program and its manual, which are not installed here."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/usr/bin/tscwatch", "/bin/true")
    unit.write_text(text.replace("Documentation=man:tscwatch(1)\n", ""))
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    ours = [line for line in checked.stderr.splitlines() if "tscwatch" in line]
    assert (checked.returncode, ours) == (0, [])


def unprivileged() -> list[str]:
    """As the unit has it run: root with the unit's capabilities alone."""
    (capabilities,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", UNIT.read_text())
    kept = ",".join(f"+{name[len('CAP_') :].lower()}" for name in capabilities.split())
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"]


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_the_units_capabilities_suffice(source: str, tmp_path: Path) -> None:
    with guest(tmp_path, "older") as older:
        older.start()
        options = ("--json", "--source", source)
        with Observer(tmp_path, *options, within=unprivileged()) as observer:
            wait_for(lambda: 'vm="older"' in observer.metrics(), "the guest from before")
            if source == "bcc":  # ftrace's syscall events cannot read a vCPU
                assert 'tscwatch_vcpu_tsc_reported_hertz{vcpu="1",vm="older"}' in observer.metrics()
            older.plug()
            observer.wait_for_calls("older", 3)
            assert observer.places("older") == plug(2, "hotplug")
            label = 'vm="older"'
            wait_for(lambda: label in series(observer, "vm_tsc_matched_vcpus"), "KVM's word")
        status = observer.stop()
    assert status == 0
    assert "could not be read" not in observer.log.read_text()


def test_the_unit_is_hardened() -> None:
    checked = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(UNIT)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
        check=False,
    )
    (exposure,) = re.findall(r"Overall exposure level .*?: (\S+)", checked.stdout)
    assert float(exposure) < 3.0
    assert checked.returncode == 0


def test_top_shows_the_running_guests(service: Observer) -> None:
    with vmm.process("create-vcpu:0", "regs:0", f"set:0:{INSIDE}") as process:
        wait_for(lambda: bool(service.mismatches()), "the mismatch")
        shown = run("top", "--url", service.address)
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith(str(process.pid))]
    assert line.split()[1:3] == ["0", str(INSIDE)]
    assert re.search(r"unscaled \d+\.\d ppm \(warning\)$", line), line
    assert "\x1b" not in shown.stdout  # it is no terminal
