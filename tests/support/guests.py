"""Real QEMU guests, driven over QMP."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Callable, Optional

from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol

QEMU = "qemu-system-x86_64"
MACHINE: ContextVar[str] = ContextVar("MACHINE", default="q35")
TRACES: ContextVar[Optional[Path]] = ContextVar("TRACES", default=None)
"""A directory in which strace keeps the ioctls of each guest, as ``NAME.strace``."""
PATIENCE_S = 180
"""No test depends on how long a thing takes; this only ends one that hangs."""


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s} s for {what}")
        time.sleep(0.05)


class Guest:
    """A QEMU process that stands still (-S) until :meth:`start`.

    :param topology: what follows in ``-smp``, its comma included.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        cpu: str = "qemu64",
        smp: int = 2,
        maxcpus: int = 4,
        uuid: Optional[str] = None,
        incoming: Optional[str] = None,
        disk: Optional[Path] = None,
        debug_threads: bool = True,
        topology: str = "",
        extra: Sequence[str] = (),
    ) -> None:
        self.name = name
        wrapper = _wrapper(name)
        ours, theirs = socket.socketpair()
        arguments = [
            *wrapper,
            *_command(name, cpu, f"{smp},maxcpus={maxcpus}{topology}", debug_threads),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "qmp,mode=control"),
            *(("-uuid", uuid) if uuid else ()),
            *(("-incoming", incoming) if incoming else ()),
            *(("-drive", f"file={disk},if=virtio") if disk else ()),
            *extra,
        ]
        self._errors = directory / f"{name}.stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                arguments, stderr=errors, pass_fds=[theirs.fileno()], cwd=directory
            )
        theirs.close()
        self._qmp = QEMUMonitorProtocol(ours)
        self._qmp.settimeout(PATIENCE_S)
        self._qmp.connect()
        self.pid = _qemu_pid(self.process.pid) if wrapper else self.process.pid

    @staticmethod
    def that_fails(directory: Path, name: str, cpu: str) -> None:
        """A QEMU that gives up while it makes its vCPUs."""
        process = subprocess.run(
            [*_wrapper(name), *_command(name, cpu, "1", True)],
            stderr=subprocess.DEVNULL,
            cwd=directory,
            check=False,
            timeout=PATIENCE_S,
        )
        assert process.returncode == 1

    def execute(self, command: str, **arguments: Any) -> Any:
        return self._qmp.cmd(command, **arguments)

    def start(self) -> None:
        """Let it run, and wait until its first vCPU has really entered KVM_RUN."""
        self.execute("cont")
        wait_for(self._has_run, "the guest to run")

    def _has_run(self) -> bool:
        runners = Path("/sys/kernel/debug/kvm").glob(f"{self.pid}-*/vcpu0/pid")
        return any(int(runner.read_text()) for runner in runners)

    def plug(self) -> None:
        """device_add of a vCPU in the first free slot."""
        slots = self.execute("query-hotpluggable-cpus")
        free = [slot for slot in slots if "qom-path" not in slot]
        slot = min(free, key=lambda slot: sorted(slot["props"].items()))
        serial = len(slots) - len(free)
        self.execute("device_add", driver=slot["type"], id=f"cpu{serial}", **slot["props"])

    def unplug(self, vcpu: str) -> None:
        """device_del of a vCPU; takes a guest that lets go of it: see :func:`make_cooperative`."""
        wait_for(lambda: self._takes("device_del", id=vcpu), "the guest to be ready for it")
        path = f"/machine/peripheral/{vcpu}"
        wait_for(lambda: path not in str(self.execute("query-hotpluggable-cpus")), "its removal")

    def _takes(self, command: str, **arguments: Any) -> bool:
        try:
            self.execute(command, **arguments)
        except ExecuteError:
            return False
        return True

    def monitor(self, line: str) -> str:
        """A command of the human monitor, carried by QMP."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def migrate_to(self, target: Guest, directory: Path) -> None:
        uri = f"unix:{directory / 'migration.sock'}"
        target.execute("migrate-incoming", uri=uri)
        self.execute("migrate", uri=uri)
        wait_for(lambda: self.migrated() and target.migrated(), "the migration's end")

    def enable(self, *capabilities: str) -> None:
        """Of the migration to come."""
        states = [{"capability": name, "state": True} for name in capabilities]
        self.execute("migrate-set-capabilities", capabilities=states)

    def migration(self) -> str:
        """How it stands: QEMU's MigrationStatus."""
        return str(self.execute("query-migrate").get("status"))

    def migrated(self) -> bool:
        status = self.migration()
        if status == "failed":
            raise RuntimeError(f"migration of {self.name} failed: {self.errors()}")
        return status == "completed"

    def transferred(self) -> int:
        """Bytes of RAM that have left."""
        return int(self.execute("query-migrate").get("ram", {}).get("transferred", 0))

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def wait(self) -> None:
        """Until it ends by itself."""
        self._end()

    def quit(self) -> None:
        if self.process.poll() is None:
            self.execute("quit")
            self._end()

    def _end(self) -> None:
        self.process.wait(PATIENCE_S)
        with suppress(EOFError, ConnectionError):  # QEMU closed it first
            self._qmp.close()


def _wrapper(name: str) -> list[str]:
    directory = TRACES.get()
    if directory is None:
        return []
    options = ("-f", "-qq", "-e", "trace=ioctl", "-e", "signal=none")
    return ["strace", *options, "-o", str(directory / f"{name}.strace")]


def _command(name: str, cpu: str, smp: str, debug_threads: bool) -> list[str]:
    threads = "on" if debug_threads else "off"
    return [
        QEMU,
        *(
            "-M",
            f"{MACHINE.get()},accel=kvm",
            "-cpu",
            cpu,
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
        ),
        *("-smp", smp, "-name", f"guest={name},debug-threads={threads}", "-S"),
    ]


def make_disk(path: Path) -> Path:
    """A disk that can hold snapshots."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "16M"], check=True)
    return path


_HOTPLUG_PORTS = {"q35": 0x0CD8, "pc": 0xAF00}


def make_cooperative(path: Path) -> Path:
    """A disk that holds snapshots, and a guest that lets go of its CPUs (``unplug.S``)."""
    code, image = path.with_suffix(".o"), path.with_suffix(".raw")
    port = f"-DPORT={_HOTPLUG_PORTS[MACHINE.get()]:#x}"
    source = Path(__file__).with_name("unplug.S")
    for command in (
        ["gcc", "-m32", "-c", port, "-o", str(code), str(source)],
        ["objcopy", "-O", "binary", "-j", ".text", str(code), str(image)],
        ["truncate", "-s", "1M", str(image)],
        ["qemu-img", "convert", "-q", "-O", "qcow2", str(image), str(path)],
    ):
        subprocess.run(command, check=True)
    return path


def _qemu_pid(wrapper_pid: int) -> int:
    """QEMU below its wrapper (strace)."""
    for task in Path(f"/proc/{wrapper_pid}/task").iterdir():
        children = (task / "children").read_text().split()
        if children:
            return int(children[0])
    raise RuntimeError(f"process {wrapper_pid} has no child")
