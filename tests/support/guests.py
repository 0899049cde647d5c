"""Starts real QEMU guests and drives them over QMP."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar, Union

from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import lab_vm

QEMU = "qemu-system-x86_64"
MACHINE: ContextVar[str] = ContextVar("MACHINE", default="q35")
TRACES: ContextVar[Optional[Path]] = ContextVar("TRACES", default=None)
"""The directory to which strace writes the ioctls of each guest, as ``NAME.strace``; None runs
guests without strace."""
PATIENCE_S = 600 if lab_vm.inside() else 180
"""Ends a test that hangs.  No result depends on how long a step takes."""


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until a condition holds, the less often the longer it takes: polling costs time too.

    :param what: what is waited for, for the error message.
    :raises TimeoutError: the condition did not hold within ``patience_s`` seconds.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > patience_s:
            raise TimeoutError(f"waited {patience_s} s for {what}")
        time.sleep(max(0.05, min(waited / 10, 1)))


_Process = TypeVar("_Process", bound="Qemu")


class Qemu:
    """A QEMU process with a QMP connection; as a context manager it quits QEMU at the end.

    :param directory: QEMU's working directory, where also its standard error goes.
    :param command: the command line without the monitor.
    :param executable: what to execute, if not ``command[0]``.
    """

    def __init__(
        self, directory: Path, name: str, command: Sequence[str], executable: Optional[str] = None
    ) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        monitor = ("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "qmp,mode=control")
        self._errors = directory / f"{name}.stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *monitor],
                executable=executable,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                cwd=directory,
            )
        theirs.close()
        self.pid = self.process.pid
        self._connect(ours)

    def _connect(self, address: Union[socket.socket, str]) -> None:
        self._qmp = QEMUMonitorProtocol(address)
        self._qmp.settimeout(PATIENCE_S)
        self._qmp.connect()

    def __enter__(self: _Process) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.quit()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command and return its result."""
        return self._qmp.cmd(command, **arguments)

    def errors(self) -> str:
        """Return what QEMU has written to standard error."""
        return self._errors.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def wait(self) -> None:
        """Wait until QEMU exits by itself."""
        self._end()

    def quit(self) -> None:
        """Quit QEMU, if it has not exited yet."""
        if self.process.poll() is None:
            self.execute("quit")
            self._end()

    def _end(self) -> None:
        self.process.wait(PATIENCE_S)
        with suppress(EOFError, ConnectionError):  # QEMU closed the connection first
            self._qmp.close()


class Guest(Qemu):
    """A QEMU process, whose vCPUs are stopped (``-S``) until :meth:`start`.

    :param topology: the rest of the ``-smp`` option, with its leading comma.
    :param machine: the rest of the ``-M`` option, with its leading comma.
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
        machine: str = "",
        extra: Sequence[str] = (),
    ) -> None:
        wrapper = _wrapper(name)
        self._command = [
            *_command(name, cpu, f"{smp},maxcpus={maxcpus}{topology}", debug_threads, machine),
            *(("-uuid", uuid) if uuid else ()),
            *(("-incoming", incoming) if incoming else ()),
            *(("-drive", f"file={disk},if=virtio") if disk else ()),
            *extra,
        ]
        super().__init__(directory, name, [*wrapper, *self._command])
        if wrapper:
            self.pid = _qemu_pid(self.process.pid)

    @staticmethod
    def that_fails(directory: Path, name: str, cpu: str) -> None:
        """Run a QEMU that exits with an error while it creates its vCPUs."""
        process = subprocess.run(
            [*_wrapper(name), *_command(name, cpu, "1", True)],
            stderr=subprocess.DEVNULL,
            cwd=directory,
            check=False,
            timeout=PATIENCE_S,
        )
        assert process.returncode == 1

    def execute_anew(self, directory: Path) -> None:
        """Let QEMU execute another QEMU in its process, which takes the guest over (cpr-exec)."""
        monitor, uri = directory / f"{self.name}.qmp", f"file:{directory / self.name}.state"
        options = ("-chardev", f"socket,id=qmp,path={monitor},server=on,wait=off")
        command = [*self._command, *options, "-mon", "qmp,mode=control", "-incoming", uri]
        self.execute("migrate-set-parameters", mode="cpr-exec", **{"cpr-exec-command": command})
        self.execute("migrate", uri=uri)
        wait_for(monitor.exists, "the new QEMU's monitor")
        self._connect(str(monitor))
        wait_for(self.migrated, "the migration's end")

    def start(self) -> None:
        """Start the guest, and wait until its first vCPU has entered KVM_RUN."""
        self.execute("cont")
        wait_for(self._has_run, "the guest to run")

    def _has_run(self) -> bool:
        vms = list(Path("/sys/kernel/debug/kvm").glob(f"{self.pid}-*"))
        counters = [vm / "vcpu0/pid" for vm in vms]
        if not all(counter.exists() for counter in counters):  # before Linux 6.0
            counters = [vm / "exits" for vm in vms]
        return any(int(counter.read_text()) for counter in counters)

    def plug(self) -> None:
        """Add a vCPU in the first free slot, with device_add."""
        slots = self.execute("query-hotpluggable-cpus")
        free = [slot for slot in slots if "qom-path" not in slot]
        slot = min(free, key=lambda slot: sorted(slot["props"].items()))
        serial = len(slots) - len(free)
        self.execute("device_add", driver=slot["type"], id=f"cpu{serial}", **slot["props"])

    def unplug(self, vcpu: str) -> None:
        """Remove a vCPU with device_del, and wait for the end of its thread.

        The guest must cooperate: see :func:`ejecting`.  QEMU can crash if its vCPUs are
        stopped before that thread's end, as ``kvm_cpu_kick`` writes to memory that
        ``kvm_destroy_vcpu`` has unmapped.
        """
        path = f"/machine/peripheral/{vcpu}"
        vcpus = self.execute("query-cpus-fast")
        thread = next(each["thread-id"] for each in vcpus if each["qom-path"] == path)
        wait_for(lambda: self._accepts("device_del", id=vcpu), "the guest to be ready for it")
        wait_for(lambda: path not in str(self.execute("query-hotpluggable-cpus")), "its removal")
        wait_for(lambda: not Path(f"/proc/{self.pid}/task/{thread}").exists(), "its thread's end")

    def _accepts(self, command: str, **arguments: Any) -> bool:
        try:
            self.execute(command, **arguments)
        except ExecuteError:
            return False
        return True

    def monitor(self, line: str) -> str:
        """Execute a command of the human monitor over QMP, and return its output."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def migrate_to(self, target: Guest, directory: Path) -> None:
        """Migrate to a guest that was started with ``-incoming defer``, and wait for the end."""
        uri = f"unix:{directory / 'migration.sock'}"
        target.execute("migrate-incoming", uri=uri)
        self.execute("migrate", uri=uri)
        wait_for(lambda: self.migrated() and target.migrated(), "the migration's end")

    def enable(self, *capabilities: str) -> None:
        """Enable capabilities for the next migration."""
        states = [{"capability": name, "state": True} for name in capabilities]
        self.execute("migrate-set-capabilities", capabilities=states)

    def run_job(self, command: str, **arguments: Any) -> None:
        """Execute a QMP command that starts a job, and wait for the job's end."""
        self.execute(command, **{"job-id": "job"}, **arguments)
        wait_for(lambda: self.execute("query-jobs")[0]["status"] == "concluded", command)
        (job,) = self.execute("query-jobs")
        assert "error" not in job, job
        self.execute("job-dismiss", id="job")

    def migration(self) -> str:
        """Return the state of the migration, as QEMU's MigrationStatus."""
        return str(self.execute("query-migrate").get("status"))

    def migrated(self) -> bool:
        """Return whether the migration is complete.

        :raises RuntimeError: it failed.
        """
        status = self.migration()
        if status == "failed":
            raise RuntimeError(f"migration of {self.name} failed: {self.errors()}")
        return status == "completed"

    def transferred(self) -> int:
        """Return how many bytes of RAM the migration has sent."""
        return int(self.execute("query-migrate").get("ram", {}).get("transferred", 0))


def _wrapper(name: str) -> list[str]:
    directory = TRACES.get()
    if directory is None:
        return []
    options = ("-f", "-qq", "-e", "trace=ioctl", "-e", "signal=none")
    return ["strace", *options, "-o", str(directory / f"{name}.strace")]


def _command(name: str, cpu: str, smp: str, debug_threads: bool, machine: str = "") -> list[str]:
    threads = "on" if debug_threads else "off"
    return [
        QEMU,
        *("-M", f"{MACHINE.get()},accel=kvm{machine}", "-cpu", cpu, "-m", "64"),
        *("-nodefaults", "-display", "none"),
        *("-smp", smp, "-name", f"guest={name},debug-threads={threads}", "-S"),
    ]


@cache
def qemu_version() -> tuple[int, ...]:
    """Return the major and minor version of this machine's QEMU; nothing without QEMU."""
    if shutil.which(QEMU) is None:
        return ()
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, text.split()[3].split(".")[:2]))


def make_disk(path: Path) -> Path:
    """Create an empty disk that can store snapshots."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "16M"], check=True)
    return path


_HOTPLUG_PORTS = {"q35": 0x0CD8, "pc": 0xAF00}


def ejecting(directory: Path) -> tuple[str, ...]:
    """Return QEMU's options for a guest that ejects its CPUs, whose firmware is ``unplug.S``.

    A disk's boot sector would do, but newer firmware takes minutes to boot under emulation.
    """
    code, firmware = directory / "unplug.o", directory / "unplug.bin"
    port = f"-DPORT={_HOTPLUG_PORTS[MACHINE.get()]:#x}"
    source = Path(__file__).with_name("unplug.S")
    for command in (
        ["gcc", "-m32", "-c", port, "-o", str(code), str(source)],
        ["objcopy", "-O", "binary", "-j", ".text", str(code), str(firmware)],
    ):
        subprocess.run(command, check=True)
    return "-bios", str(firmware)


def _qemu_pid(wrapper_pid: int) -> int:
    """Return the process id of the QEMU that strace runs."""
    for task in Path(f"/proc/{wrapper_pid}/task").iterdir():
        children = (task / "children").read_text().split()
        if children:
            return int(children[0])
    raise RuntimeError(f"process {wrapper_pid} has no child")
