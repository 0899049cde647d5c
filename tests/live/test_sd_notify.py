"""The messages that systemd receives (sd_notify): readiness, status, watchdog, reload and stop."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import Observer


class NotifySocket:
    """systemd's side of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)

    def close(self) -> None:
        self._socket.close()

    def is_silent(self, seconds: float) -> bool:
        """Return whether no message arrives within that time."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE_S)
        return False

    def receive(self, state: str) -> str:
        """Wait for a message that contains a state, such as ``READY=1``, and return all of it."""
        while True:
            message = self._socket.recv(4096).decode()
            if state in message.split("\n"):
                return message


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifySocket]:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    systemd = NotifySocket(path)
    yield systemd
    systemd.close()


@pytest.fixture
def service(systemd: NotifySocket, tmp_path: Path) -> Iterator[Observer]:
    with Observer(tmp_path, "--json", "--source", "ftrace") as observer:
        yield observer


def test_what_systemd_is_sent_in_a_daemons_life(systemd: NotifySocket, service: Observer) -> None:
    assert re.search(r"(?m)^STATUS=watching \d+ VMs, \d+ mismatches$", systemd.receive("READY=1"))
    before = len(service.mismatches())
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{tiny_vmm.khz_above_host(100)}"):
        wait_for(lambda: len(service.mismatches()) > before, "the mismatch")
        none = "STATUS=watching 0 VMs"
        wait_for(lambda: none not in systemd.receive("WATCHDOG=1"), "a status with the VM")
    service.process.send_signal(signal.SIGTERM)
    systemd.receive("STOPPING=1")
    assert service.process.wait(PATIENCE_S) == 0


def test_a_loop_that_hangs_does_not_beat(systemd: NotifySocket, service: Observer) -> None:
    systemd.receive("WATCHDOG=1")
    service.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: systemd.is_silent(3), "the last watchdog message")
    service.process.send_signal(signal.SIGCONT)
    systemd.receive("WATCHDOG=1")


def test_a_new_configuration_without_a_restart(
    systemd: NotifySocket, service: Observer, tmp_path: Path
) -> None:
    config = tmp_path / "tscwatch.yaml"
    khz = tiny_vmm.khz_above_host(100)
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{khz}") as process:
        wait_for(lambda: bool(service.mismatches_of(process.pid, "unscaled")), "the mismatch")
        config.write_text("listen: {port: 0}\ntolerance_ppm: {unscaled: 200}\n")
        systemd.receive("WATCHDOG=1")
        service.process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in systemd.receive("RELOADING=1")
        systemd.receive("READY=1")
        states = [m["state"] for m in service.mismatches_of(process.pid, "unscaled")]
        assert states == ["raised", "cleared"]
        assert service.series("config_last_reload_successful") == {"": 1}
        assert service.series("mismatches_total")['kind="unscaled"'] == 1

        config.write_text("tolerance_ppm: {unscaled: lots}\n")
        service.process.send_signal(signal.SIGHUP)
        systemd.receive("RELOADING=1")
        systemd.receive("READY=1")
        assert service.series("config_last_reload_successful") == {"": 0}
        assert f"{config}:1: tolerance_ppm.unscaled" in service.log.read_text()
        # The last valid configuration stays in force.
        assert len(service.mismatches_of(process.pid, "unscaled")) == 2
