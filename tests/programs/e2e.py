"""Tests the package end to end, in an emulated Debian 13 with systemd: ``make e2e``.

The VM is the hypervisor host; Prometheus and Alertmanager run on this machine.  Exit status 0 means
that the package was installed, that the service ran with the package's bytecode, that the alert of
a skewed guest reached the webhook and was resolved, that the watchdog restarted the service when it
hung, and that removing the package left nothing behind.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support.guests import PATIENCE_S, QEMU, wait_for
from tests.support.lab_vm import DEBIAN_13, EMULATED, ROOT, kernel
from tests.support.observer import scrape
from tests.support.prometheus import free_port, includes, notifications
from tests.support.scenarios import skewed

_PORT = 9978
_CONFIGURATION = f"listen: {{address: 0.0.0.0, port: {_PORT}}}\n"
_LIBRARIES = next((ROOT / ".venv/lib").glob("python3*/site-packages"))
_FIRING, _RESOLVED = ((state, "TscDesync", "target") for state in ("firing", "resolved"))
_DESYNC = 'tscwatch_mismatch_active{kind="desync",severity="critical",vm="target"} 1.0'
_SLOW_S = 300  # the VM is emulated


class Machine:
    """A VM that boots Debian; its guest agent executes commands."""

    def __init__(self, directory: Path) -> None:
        image = directory / "disk.img"
        subprocess.run(["mkfs.ext4", "-q", "-d", str(DEBIAN_13), str(image), "6G"], check=True)
        self.port = free_port()
        self._agent_socket = directory / "agent.sock"
        self._console = directory / "console.log"
        booted = kernel(DEBIAN_13)
        assert booted is not None
        share = f"local,path={ROOT},mount_tag=project,security_model=none,readonly=on"
        forward = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:{_PORT}"
        self.process = subprocess.Popen(
            [
                *(QEMU, "-nodefaults", "-display", "none", "-smp", "2", "-m", "3G"),
                *EMULATED,
                *("-kernel", str(booted)),
                *("-initrd", str(booted).replace("vmlinuz", "initrd.img")),
                *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 tsc=reliable"),
                *("-serial", f"file:{self._console}"),
                *("-drive", f"file={image},if=virtio,format=raw,cache=unsafe"),
                *("-virtfs", share),
                *("-netdev", forward, "-device", "virtio-net-pci,netdev=net"),
                *("-chardev", f"socket,path={self._agent_socket},server=on,wait=off,id=agent"),
                *("-device", "virtio-serial"),
                *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            ],
        )

    def wait_for_boot(self) -> None:
        wait_for(lambda: "login:" in self.console(), "the login prompt", _SLOW_S)
        self._agent = QEMUMonitorProtocol(str(self._agent_socket))
        self._agent.settimeout(PATIENCE_S)
        self._agent.connect(negotiate=False)
        for command in (
            "ip address add 10.0.2.15/24 dev eth0; ip link set eth0 up",
            f"mkdir -p {ROOT} && mount -t 9p -o trans=virtio,version=9p2000.L project {ROOT}",
        ):
            self.run("sh", "-c", command)

    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def status(self, *command: str) -> tuple[int, str]:
        """Execute a command; return its exit status, and its output and errors."""
        options = {"path": "/usr/bin/env", "arg": list(command), "capture-output": True}
        pid = self._query("guest-exec", **options)["pid"]
        deadline = time.monotonic() + _SLOW_S
        while not (state := self._query("guest-exec-status", pid=pid))["exited"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {_SLOW_S} s for {command}")
            time.sleep(0.2)
        output = b"".join(base64.b64decode(state.get(k, "")) for k in ("out-data", "err-data"))
        return state["exitcode"], output.decode(errors="replace")

    def _query(self, command: str, **arguments: Any) -> Any:
        return self._agent.cmd(command, **arguments)

    def run(self, *command: str) -> str:
        """Execute a command, which must succeed; return its output and errors."""
        status, output = self.status(*command)
        assert status == 0, f"{' '.join(command)}: {status}\n{output}"
        return output

    def show(self, name: str) -> str:
        """Return a property of the service's unit."""
        return self.run("systemctl", "show", "--value", "-p", name, "tscwatch").strip()

    def metrics(self) -> str:
        return scrape(f"http://127.0.0.1:{self.port}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    host = Machine(directory)
    try:
        host.wait_for_boot()
        yield host
    finally:
        host.end()


def install(host: Machine, package: Path) -> None:
    """Install the package, which must neither enable nor start the service; configure it."""
    host.run("apt-get", "install", "-qy", "--no-install-recommends", str(package))
    assert host.status("systemctl", "is-enabled", "tscwatch")[1] == "disabled\n"
    assert host.show("ActiveState") == "inactive"
    host.run("sh", "-c", f"echo '{_CONFIGURATION}' > /etc/tscwatch/tscwatch.yaml")


def check_source(host: Machine) -> None:
    """The source must be the package's bytecode: without it, ftrace would take over."""
    (labels,) = re.findall(r"(?m)^tscwatch_source_info{(.*)} 1\.0$", host.metrics())
    assert {'source="bcc"', 'program="packaged"'} <= set(labels.split(",")), labels


def make_skewed_guest(host: Machine) -> None:
    """Run a skewed guest on the host as a unit, until the unit is stopped."""
    options = (f"--property=WorkingDirectory={ROOT}", f"--setenv=PYTHONPATH={_LIBRARIES}")
    program = ("python3", "-m", "tests.programs.e2e", "guest")
    host.run("systemd-run", "--unit=guest", *options, *program)


def hold_skewed_guest() -> None:
    """Keep a skewed guest until SIGTERM; this runs in the VM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with tempfile.TemporaryDirectory() as name, skewed(Path(name), ""):
        signal.sigwait({signal.SIGTERM})


def check_journal(host: Machine) -> None:
    lines = host.run("journalctl", "-u", "tscwatch", "-o", "json", "TSCWATCH_KIND=desync")
    assert [json.loads(line)["TSCWATCH_STATE"] for line in lines.splitlines()][:1] == ["raised"]


def reload_or_restart(host: Machine, how: str) -> None:
    """A reload must keep the process, and a restart must replace it."""
    pid = host.show("MainPID")
    host.run("systemctl", how, "tscwatch")
    assert (host.show("MainPID") == pid) == (how == "reload")


def hang(host: Machine) -> None:
    """Stop the daemon's process; the watchdog must restart the service."""
    pid = host.show("MainPID")
    host.run("kill", "-STOP", pid)
    wait_for(lambda: host.show("NRestarts") == "1", "the watchdog", _SLOW_S)
    wait_for(lambda: host.show("ActiveState") == "active", "the service to be active", _SLOW_S)


def remove(host: Machine) -> None:
    """Stop and purge; no probe, no trace instance and no file may be left."""
    host.run("systemctl", "stop", "tscwatch")
    assert host.show("Result") == "success"
    tracing = "cd /sys/kernel/tracing; ls -A instances; cat kprobe_events uprobe_events"
    assert host.run("sh", "-c", tracing) == ""
    host.run("apt-get", "purge", "-qy", "tscwatch")
    assert (
        host.run("find", "/usr", "/etc", "/run", "/var/cache", "-xdev", "-name", "*tscwatch*") == ""
    )


def watch(host: Machine, directory: Path, package: Path, step: Callable[[str], None]) -> None:
    assert host.run("cat", "/proc/1/comm") == "systemd\n"
    step("the package is installed")
    install(host, package)
    step("systemd starts the service")
    host.run("systemctl", "start", "tscwatch")
    assert host.show("StatusText") == "watching 0 VMs, 0 mismatches"
    check_source(host)
    with notifications(directory, f"127.0.0.1:{host.port}") as received:
        step("a guest is migrated and a vCPU hotplugged; the webhook receives the alert")
        make_skewed_guest(host)
        wait_for(lambda: includes(received, _FIRING), "the alert", _SLOW_S)
        check_journal(host)
        step("the service is reloaded and restarted, and still reports the skew")
        reload_or_restart(host, "reload")
        reload_or_restart(host, "restart")
        wait_for(lambda: _DESYNC in host.metrics(), "the desync", _SLOW_S)
        step("the guest exits, and the alert is resolved")
        host.run("systemctl", "stop", "guest")
        wait_for(lambda: includes(received, _RESOLVED), "the alert to be resolved", _SLOW_S)
    step("the daemon hangs, and the watchdog restarts the service")
    hang(host)
    step("the package is removed")
    remove(host)
    step("OK: all steps succeeded")


def main(package: Path) -> None:
    began = time.monotonic()

    def step(title: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {title}", flush=True)

    with tempfile.TemporaryDirectory(prefix="e2e-") as name:
        step("a Debian 13 is created and boots")
        with machine(Path(name)) as host:
            try:
                watch(host, Path(name), package, step)
            except BaseException:
                print(host.run("journalctl", "-u", "tscwatch", "-u", "guest"), file=sys.stderr)
                raise


if __name__ == "__main__":
    if sys.argv[1:] == ["guest"]:
        hold_skewed_guest()
    else:
        main(Path(sys.argv[1]).resolve())
