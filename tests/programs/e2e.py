"""From the package to the alert, on a Debian 13 of its own with systemd: ``make e2e``.

The VM is a hypervisor host; this machine is where its Prometheus and Alertmanager are.  Exit
status 0 means that the package was installed, the service watched, a skewed guest's alert came
to the webhook and was resolved, and that nothing was left when the package was removed.
"""

from __future__ import annotations

import base64
import json
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
from tests.support.prometheus import alerts, free_port
from tests.support.scenarios import skewed

_PORT = 9978
_CONFIGURATION = f"listen: {{address: 0.0.0.0, port: {_PORT}}}\n"
_LIBRARIES = next((ROOT / ".venv/lib").glob("python3*/site-packages"))
_FIRING, _RESOLVED = ((state, "TscVcpuSkew", "target") for state in ("firing", "resolved"))
_SKEW = 'tscwatch_mismatch_active{kind="vcpu_skew",severity="warning",vm="target"} 1.0'
_SLOW_S = 300  # a start with bcc under emulation takes about a minute


class Machine:
    """A booted Debian; commands go in through its guest agent."""

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
                *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0"),
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
        """A command's exit status and what it says."""
        options = {"path": "/usr/bin/env", "arg": list(command), "capture-output": True}
        pid = self._ask("guest-exec", **options)["pid"]
        deadline = time.monotonic() + _SLOW_S
        while not (state := self._ask("guest-exec-status", pid=pid))["exited"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {_SLOW_S} s for {command}")
            time.sleep(0.2)
        said = b"".join(base64.b64decode(state.get(k, "")) for k in ("out-data", "err-data"))
        return state["exitcode"], said.decode(errors="replace")

    def _ask(self, command: str, **arguments: Any) -> Any:
        return self._agent.cmd(command, **arguments)

    def run(self, *command: str) -> str:
        """What a command says that must go well."""
        status, said = self.status(*command)
        assert status == 0, f"{' '.join(command)}: {status}\n{said}"
        return said

    def show(self, name: str) -> str:
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
    """Enables and starts nothing."""
    host.run("apt-get", "install", "-qy", str(package))
    assert host.status("systemctl", "is-enabled", "tscwatch")[1] == "disabled\n"
    assert host.show("ActiveState") == "inactive"
    host.run("sh", "-c", f"echo '{_CONFIGURATION}' > /etc/tscwatch/tscwatch.yaml")


def make_skewed_guest(host: Machine) -> None:
    """It stands on the host until its unit is stopped."""
    where = (f"--property=WorkingDirectory={ROOT}", f"--setenv=PYTHONPATH={_LIBRARIES}")
    host.run("systemd-run", "--unit=guest", *where, "python3", "-m", "tests.programs.e2e", "guest")


def hold_skewed_guest() -> None:
    """What :func:`make_skewed_guest` runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with tempfile.TemporaryDirectory() as name, skewed(Path(name), ""):
        signal.sigwait({signal.SIGTERM})


def look_at_the_journal(host: Machine) -> None:
    lines = host.run("journalctl", "-u", "tscwatch", "-o", "json", "TSCWATCH_KIND=vcpu_skew")
    assert [json.loads(line)["TSCWATCH_STATE"] for line in lines.splitlines()][:1] == ["raised"]


def renew(host: Machine, how: str) -> None:
    """The service goes on: as the same process after a reload, as another after a restart."""
    pid = host.show("MainPID")
    host.run("systemctl", how, "tscwatch")
    assert (host.show("MainPID") == pid) == (how == "reload")


def hang(host: Machine) -> None:
    pid = host.show("MainPID")
    host.run("kill", "-STOP", pid)
    wait_for(lambda: host.show("NRestarts") == "1", "the watchdog", _SLOW_S)
    wait_for(lambda: host.show("ActiveState") == "active", "it to be back", _SLOW_S)


def remove(host: Machine) -> None:
    """Leaves no probe, no trace instance and no file but the journal's."""
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
    with alerts(directory, f"127.0.0.1:{host.port}") as received:
        step("a guest is migrated, and a vCPU hotplugged: the alert comes to the webhook")
        make_skewed_guest(host)
        wait_for(lambda: _FIRING in received, "the alert", _SLOW_S)
        look_at_the_journal(host)
        step("reload and restart under the guest: the skew is still known")
        renew(host, "reload")
        renew(host, "restart")
        wait_for(lambda: _SKEW in host.metrics(), "the skew", _SLOW_S)
        step("the guest ends: the alert is resolved")
        host.run("systemctl", "stop", "guest")
        wait_for(lambda: _RESOLVED in received, "its end", _SLOW_S)
    step("the loop hangs: the watchdog restarts the service")
    hang(host)
    step("the package is removed")
    remove(host)
    step("all as it must be")


def main(package: Path) -> None:
    began = time.monotonic()

    def step(title: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {title}", flush=True)

    with tempfile.TemporaryDirectory(prefix="e2e-") as name:
        step("a Debian 13 is made and booted")
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
