"""The installed service under the real systemd: started, reloaded, restarted, hung and stopped.

The tests run a systemd of their own (``systemd --user``, as root) in a mount namespace, in which
the files of ``make install`` are mounted over ``/usr`` and ``/etc``.  Nothing outside is changed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import PATIENCE_S, Guest, wait_for
from tests.support.lab_vm import ROOT
from tests.support.observer import scrape
from tests.support.prometheus import free_port

RUNTIME = "/run/manager"  # ProtectHome hides /run/user
BEGIN = """
set -e
mount -t overlay -o lowerdir={tree}/usr:/usr none /usr
mount -t overlay -o lowerdir=/etc,upperdir={tree}/etc,workdir={work} none /etc
mount -t tmpfs none /run
mkdir -p /run/systemd/system /run/systemd/inaccessible/dir {runtime}/systemd/user
(cd /run/systemd/inaccessible; touch reg; mkfifo fifo; mknod chr c 0 0; chmod 0 *)
cp /usr/lib/systemd/system/tscwatch.service {runtime}/systemd/user
export XDG_RUNTIME_DIR={runtime} HOME=/root
exec /lib/systemd/systemd --user --log-target=console
"""
CAPABILITIES = {"SYS_ADMIN": 21, "SYS_PTRACE": 19, "DAC_READ_SEARCH": 2}


class Manager:
    """A systemd in its mount namespace; call it with the arguments of systemctl."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        (directory / "work").mkdir()
        subprocess.run(["make", "-s", "install", f"DESTDIR={self.tree}"], check=True, cwd=ROOT)
        self.port = free_port()
        script = BEGIN.format(tree=self.tree, work=directory / "work", runtime=RUNTIME)
        self._log = (directory / "systemd.log").open("wb")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdout=self._log,
            stderr=self._log,
        )
        wait_for(lambda: self._try("list-units").returncode == 0, "systemd to answer")
        self.configure("")

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the mount namespace."""
        enter = ("nsenter", "-m", "-t", str(self.process.pid), "env", f"XDG_RUNTIME_DIR={RUNTIME}")
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def _try(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.inside("systemctl", "--user", *arguments)

    def __call__(self, *arguments: str) -> str:
        result = self._try(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def show(self, name: str) -> str:
        """Return a property of the service's unit."""
        return self("show", "--value", "-p", name, "tscwatch").strip()

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def configure(self, text: str) -> None:
        """Write the configuration file: the port, and this text."""
        content = f"listen: {{port: {self.port}}}\n{text}"
        file = "/etc/tscwatch/tscwatch.yaml"
        assert self.inside("sh", "-c", f"echo '{content}' > {file}").returncode == 0

    def metrics(self) -> str:
        return scrape(f"http://127.0.0.1:{self.port}")

    def end(self) -> None:
        self._try("stop", "tscwatch")
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)
        self._log.close()


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    manager = Manager(tmp_path_factory.mktemp("systemd"))
    yield manager
    manager.end()


@pytest.fixture
def running(systemd: Manager) -> Iterator[Manager]:
    systemd.configure("metrics: {per_vcpu: all}")
    systemd("start", "tscwatch")
    yield systemd
    systemd("stop", "tscwatch")


def test_started_it_watches_with_its_capabilities_alone(running: Manager, tmp_path: Path) -> None:
    assert running.show("ActiveState") == "active"
    with Guest(tmp_path, "served") as served:
        served.start()
        served.plug()
        wait_for(lambda: 'vcpu="2",vm="served"' in running.metrics(), "the guest's third vCPU")
        wait_for(lambda: "watching 0 VMs" not in running.show("StatusText"), "the status line")
    assert re.fullmatch(r"watching \d+ VMs, \d+ mismatches", running.show("StatusText"))
    bounds = Path(f"/proc/{running.main_pid}/status").read_text()
    (held,) = re.findall(r"(?m)^CapBnd:\s*(\w+)$", bounds)
    assert int(held, 16) == sum(1 << bit for bit in CAPABILITIES.values())


def test_reloaded_it_keeps_its_counters(running: Manager, tmp_path: Path) -> None:
    with Guest(tmp_path, "kept") as kept:
        counted = 'op="set",phase="boot",scope="vcpu",step="post_init"} 2.0'
        wait_for(lambda: counted in running.metrics(), "its calls to be counted")
        pid = running.main_pid
        running.configure("tolerance_ppm: {unscaled: 200}")
        running("reload", "tscwatch")
        assert (running.main_pid, running.show("ActiveState")) == (pid, "active")
        assert counted in running.metrics()
        running.configure("tolerance_ppm: {unscaled: lots}")
        running("reload", "tscwatch")
        refused = "tscwatch_config_last_reload_successful 0.0"
        wait_for(lambda: refused in running.metrics(), "the metric")
        assert running.main_pid == pid
        kept.start()


def test_a_restarted_daemon_finds_the_running_guest(running: Manager, tmp_path: Path) -> None:
    with Guest(tmp_path, "stays") as stays:
        stays.start()
        pid = running.main_pid
        running("restart", "tscwatch")
        assert running.main_pid != pid
        read = 'tscwatch_vcpu_tsc_reported_hertz{vcpu="1",vm="stays"}'
        wait_for(lambda: read in running.metrics(), "the guest that ran before")
        stays.plug()
        place = 'op="set",phase="hotplug",scope="vcpu",step="post_init"} 1.0'
        wait_for(lambda: place in running.metrics(), "its hotplug")


def test_a_hung_loop_is_ended_by_the_watchdog_and_started_again(running: Manager) -> None:
    drop_in = f"{RUNTIME}/systemd/user/tscwatch.service.d"
    text = "[Service]\\nWatchdogSec=3\\nRestartSec=0\\n"
    made = running.inside("sh", "-c", f"mkdir -p {drop_in}; printf '{text}' > {drop_in}/soon.conf")
    assert made.returncode == 0
    running("daemon-reload")
    running("restart", "tscwatch")
    hung = running.main_pid
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: running.show("NRestarts") == "1", "the watchdog")
    wait_for(lambda: running.show("ActiveState") == "active", "the service to be active")
    assert running.main_pid not in (0, hung)
    assert running.show("Result") == "success"
    assert not list(Path("/sys/kernel/tracing/instances").glob(f"tscwatch-*-{hung}"))


def test_stopped_it_leaves_nothing(systemd: Manager) -> None:
    systemd("start", "tscwatch")
    pid = systemd.main_pid
    systemd("stop", "tscwatch")
    assert (systemd.show("ActiveState"), systemd.show("Result")) == ("inactive", "success")
    assert not list(Path("/sys/kernel/tracing/instances").glob(f"tscwatch-*-{pid}"))


def test_a_configuration_that_cannot_be_used_is_not_tried_again(systemd: Manager) -> None:
    systemd.configure("suorce: bcc")
    assert systemd._try("start", "tscwatch").returncode != 0
    assert systemd.show("ExecMainStatus") == "2"
    assert systemd.show("NRestarts") == "0"
    systemd("reset-failed", "tscwatch")
