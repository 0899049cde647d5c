"""Which VMs are on this host, who they are and whether they still live: ``/proc`` and debugfs.

A source reports what happens from now on.  This adds what was there before, and what no probe
reports: a VM's identity, whether it has run, its vCPUs' scaling ratio, the end of a VM that was
not seen, and unplugged vCPUs.  Everything read here can vanish while it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional, TypeVar

from tscwatch import vmm
from tscwatch.clock import now_ns
from tscwatch.model import Event, Guest

PROC = Path("/proc")
KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")

_VM_FILE = "anon_inode:kvm-vm"
_VCPU_FILE = re.compile(r"anon_inode:kvm-vcpu:(\d+)$")
_THREAD_CHECK_NS = 10_000_000_000
_MAX_CHECKS = 8  # of VMs for one batch, because each check may add events that need another
_MAX_VMS = 16384
_MAX_VMS_PER_PROCESS = 64  # QEMU has one VM per process
_MAX_CMDLINE = 1 << 18  # bytes; QEMU's has a few kB, a hostile one may have 2 MiB


@dataclass
class TrackedVm:
    """What is kept of a VM from one event to the next."""

    pid: int
    start: Optional[int]
    """Start time of the process in clock ticks: a pid alone can be reused."""
    fd: Optional[int]
    seen_created: bool
    """Its creation was seen, so the first start that is seen is its first start."""
    name: Optional[str] = None
    """The guest's name, once the VM has been identified."""
    has_vcpu_threads: bool = False
    threads: dict[int, int] = field(default_factory=dict)
    """The threads of its vCPUs, as far as they made calls."""
    idle_until: int = 0
    """The last time at which the VM was seen not to have run yet."""
    ran_since: Optional[int] = None
    directory: Optional[Path] = None
    """In KVM's debugfs, once it was found."""


class Inventory:
    """Completes a source's events with what the source cannot determine.

    :param proc: where procfs is mounted.
    :param debugfs: KVM's directory in debugfs; it need not exist.
    """

    def __init__(self, proc: Path = PROC, debugfs: Path = KVM_DEBUGFS) -> None:
        self._proc = proc
        self._debugfs = debugfs
        self._vms: dict[str, TrackedVm] = {}
        self._of_process: dict[int, set[str]] = {}
        self._of_name: dict[Optional[str], set[str]] = {}
        self._new: dict[str, TrackedVm] = {}
        """Created in the batch that is being completed."""
        self._starts: dict[str, int] = {}
        self._missing: set[str] = set()
        self._next_thread_check = 0

    def existing(self) -> Iterator[Event]:
        """Yield the VMs and vCPUs that exist now, as ``vm_found`` and ``vcpu_found`` events."""
        for process in self._proc.iterdir():
            if process.name.isdigit():
                yield from self._existing_in(int(process.name))

    def enrich(self, batch: list[Event], drain: Callable[[], list[Event]]) -> list[Event]:
        """Return a batch completed: who a new VM is, whether a VM has run, and implied ends.

        The end of a VM is implied by a new VM with its file descriptor, or with its name if its
        process is gone, so that a guest that restarts keeps its name.

        :param drain: returns the events that the source has by now.
        """
        batch = self._until_decided(batch, drain)
        return [event for raw in batch for event in self._complete(raw)]

    def sweep(self) -> list[Event]:
        """Return what no probe reports: VMs that have ended, and unplugged vCPUs.

        To be called about once a second.  It also notes which VMs have begun to run, if their
        source cannot determine that: later events on them then come after their start.
        """
        events = [*self._ended(), *self._unplugged()]
        for vm in self._vms.values():
            if vm.idle_until:
                self._check_whether_run(vm)
        return events

    def identify(self, pid: int, comm: str) -> Guest:
        """Return the guest of a process; by ``comm`` alone if the process is gone already."""
        return vmm.identify(pid, self._argv(pid), comm)

    def _until_decided(self, batch: list[Event], drain: Callable[[], list[Event]]) -> list[Event]:
        """Extend the batch until each VM's first-run state at each event is known.

        KVM_SET_CLOCK precedes the first KVM_RUN.  So if a check now shows that a VM has run, its
        start is among the events that ``drain`` returns after the check, if QEMU made that call at
        all, and what precedes that start happened before it.  If the check shows that the VM has
        not run, that holds for all events before the check; what ``drain`` returns after it needs
        another check.
        """
        for _ in range(_MAX_CHECKS):
            undecided = self._undecided(batch)
            decided = [self._check_whether_run(vm) for vm in undecided]
            if undecided:
                batch = batch + drain()
            if not any(decided):
                break
        for event in batch:
            if event.op == "vm_started" and len(self._starts) < _MAX_VMS:
                self._starts.setdefault(event.vm, event.ts)
        return batch

    def _undecided(self, batch: list[Event]) -> list[TrackedVm]:
        """Return the VMs with events at which it is not known whether they had run."""
        undecided: dict[str, TrackedVm] = {}
        for event in batch:
            vm = self._vms.get(event.vm) or self._new.get(event.vm)
            if event.op == "vm_create" and vm is None:
                self._new[event.vm] = self._track(event)
            if vm is not None and _needs_ran(event) and _is_open(vm, event.ts):
                undecided[event.vm] = vm
        return list(undecided.values())

    def _track(self, event: Event) -> TrackedVm:
        seen_created = event.op == "vm_create"
        return TrackedVm(event.pid, self._start_time(event.pid), event.fd, seen_created)

    def _complete(self, event: Event) -> Iterator[Event]:
        if not event.vm or (event.op == "vm_end" and event.vm not in self._vms):
            yield event
            return
        if event.op == "vm_create":
            yield from self._superseded(event)
        vm = self._vms.get(event.vm)
        if vm is None:
            vm = self._new.pop(event.vm, None)
            if self._is_full(event.pid):
                yield event
                return
            vm = vm or self._track(event)
            guest = self.identify(event.pid, event.comm)
            yield from self._ended_namesakes(event, guest.name)
            vm.name, vm.has_vcpu_threads = guest.name, vmm.of_guest(guest).has_vcpu_threads
            self._remember(event.vm, vm)
            event = event._replace(guest=guest)
        if event.op == "vm_end":
            self._forget(event.vm)
        own = event.pid == vm.pid and vm.has_vcpu_threads
        if event.vcpu is not None and event.op in ("get", "set") and own:
            vm.threads[event.vcpu] = event.tid
        if _needs_ran(event):
            if _is_open(vm, event.ts):
                self._check_whether_run(vm)
            event = event._replace(ran=_ran_at(vm, self._starts.get(event.vm), event.ts))
        if event.op == "set" and event.vcpu is not None:
            event = event._replace(scale=self._scale(vm, event.vcpu))
        yield event

    def _is_full(self, pid: int) -> bool:
        """Return whether new VMs of a process are left out: it creates them without end."""
        siblings = self._of_process.get(pid, ())
        return len(self._vms) >= _MAX_VMS or len(siblings) >= _MAX_VMS_PER_PROCESS

    def _remember(self, key: str, vm: TrackedVm) -> None:
        self._vms[key] = vm
        self._of_process.setdefault(vm.pid, set()).add(key)
        self._of_name.setdefault(vm.name, set()).add(key)

    def _superseded(self, event: Event) -> Iterator[Event]:
        siblings = self._of_process.get(event.pid, set())
        files = {key for key in siblings if self._vms[key].fd == event.fd is not None}
        for key in files | ({event.vm} & self._vms.keys()):
            self._forget(key)
            yield event._replace(op="vm_end", vm=key)

    def _ended_namesakes(self, event: Event, name: Optional[str]) -> Iterator[Event]:
        for key in list(self._of_name.get(name, ()) if name else ()):
            if not self._lives(self._vms[key]):
                self._forget(key)
                yield event._replace(op="vm_end", vm=key, guest=None)

    def _ended(self) -> list[Event]:
        """Return the end of each VM whose process is gone or has closed its file descriptor.

        Only the second check that misses a VM reports it: by then, what the VM did before the
        first check has been read from the source.
        """
        missing = {key for key, vm in self._vms.items() if not self._lives(vm)}
        dead = missing & self._missing
        self._missing = missing - dead
        ends = [Event.vm_ended(now_ns(), key, self._vms[key].pid) for key in dead]
        for key in dead:
            self._forget(key)
        return ends

    def _unplugged(self) -> Iterator[Event]:
        """Yield the vCPUs whose threads have ended while their VM lives on; every 10 s."""
        now = now_ns()
        if now < self._next_thread_check:
            return
        self._next_thread_check = now + _THREAD_CHECK_NS
        for key, vm in self._vms.items():
            try:
                alive = {int(task.name) for task in (self._proc / f"{vm.pid}/task").iterdir()}
            except OSError:
                continue
            for vcpu, thread in list(vm.threads.items()):
                if thread not in alive:
                    del vm.threads[vcpu]
                    yield Event.vcpu_unplugged(now, key, vm.pid, thread, vcpu)

    def _forget(self, key: str) -> None:
        vm = self._vms.pop(key)
        _discard(self._of_process, vm.pid, key)
        _discard(self._of_name, vm.name, key)
        self._starts.pop(key, None)
        self._missing.discard(key)

    def _existing_in(self, pid: int) -> Iterator[Event]:
        files = dict(self._files(pid))
        vms = [fd for fd, target in files.items() if target == _VM_FILE]
        vcpus = sorted(
            (fd, int(match[1])) for fd, name in files.items() if (match := _VCPU_FILE.match(name))
        )
        comm = self._comm(pid)
        now = now_ns()
        for fd in vms:
            key = f"{pid}:{fd}"
            ran = self._ran(self._directory(pid, fd))
            yield from self._complete(Event(now, "vm_found", key, pid, pid, comm, ran=ran, fd=fd))
            if len(vms) == 1:  # else their VM cannot be determined
                for vcpu_fd, vcpu in vcpus:
                    found = Event(now, "vcpu_found", key, pid, pid, comm, vcpu, ran=ran)
                    yield found._replace(fd=vcpu_fd)

    def _lives(self, vm: TrackedVm) -> bool:
        if vm.start is None or self._start_time(vm.pid) != vm.start:
            return False
        if vm.fd is None:
            return True
        try:
            return str((self._proc / f"{vm.pid}/fd/{vm.fd}").readlink()) == _VM_FILE
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not readable: only the end of the process can be seen

    def _check_whether_run(self, vm: TrackedVm) -> bool:
        """Note whether a VM has run; return whether that could be determined."""
        if vm.ran_since is not None:
            return True
        now = now_ns()
        ran = self._ran(self._directory_of(vm))
        if ran:
            vm.ran_since = now_ns()
        elif ran is False:
            vm.idle_until = now
        return ran is not None

    def _directory(self, pid: int, fd: Optional[int]) -> Optional[Path]:
        """Return the VM's directory in debugfs; None unless there is exactly one candidate."""
        directories = list(self._debugfs.glob(f"{pid}-{'*' if fd is None else fd}"))
        return directories[0] if len(directories) == 1 else None

    def _directory_of(self, vm: TrackedVm) -> Optional[Path]:
        if vm.directory is None:
            vm.directory = self._directory(vm.pid, vm.fd)
        return vm.directory

    def _scale(self, vm: TrackedVm, vcpu: int) -> Optional[float]:
        """Return a vCPU's scaling ratio (``arch/x86/kvm/debugfs.c``); None if there is none.

        While a nested guest runs, the file shows the nested guest's ratio.
        """
        directory = self._directory_of(vm)
        if directory is None:
            return None
        own = directory / f"vcpu{vcpu}"
        try:
            if int((own / "guest_mode").read_text()):
                return None
            ratio = int((own / "tsc-scaling-ratio").read_text())
            bits = int((own / "tsc-scaling-ratio-frac-bits").read_text())
        except (OSError, ValueError):
            return None
        return ratio / (1 << bits)

    @staticmethod
    def _ran(directory: Optional[Path]) -> Optional[bool]:
        """Return whether a VM has run, by the thread of each vCPU's last KVM_RUN.

        Before Linux 6.0, which added that file, by KVM's exit counter.  None if debugfs does not
        show it or is locked down.
        """
        if directory is None:
            return None
        counters = list(directory.glob("vcpu*/pid")) or [directory / "exits"]
        try:
            return any(int(counter.read_text()) for counter in counters)
        except (OSError, ValueError):
            return None

    def _argv(self, pid: int) -> list[str]:
        try:
            with (self._proc / f"{pid}/cmdline").open("rb") as file:
                raw = file.read(_MAX_CMDLINE)
        except OSError:
            return []
        return raw.decode("utf-8", "backslashreplace").rstrip("\0").split("\0") if raw else []

    def _comm(self, pid: int) -> str:
        try:
            raw = (self._proc / f"{pid}/comm").read_bytes()
        except OSError:
            return ""
        return raw.decode("utf-8", "backslashreplace").rstrip("\n")

    def _start_time(self, pid: int) -> Optional[int]:
        """Return field 22 of /proc/PID/stat; the name in field 2 may contain any character."""
        try:
            stat = (self._proc / f"{pid}/stat").read_bytes()
            return int(stat[stat.rindex(b")") :].split()[20])
        except (OSError, ValueError, IndexError):
            return None

    def _files(self, pid: int) -> Iterator[tuple[int, str]]:
        try:
            for link in (self._proc / f"{pid}/fd").iterdir():
                yield int(link.name), str(link.readlink())
        except OSError:
            return


_Key = TypeVar("_Key")


def _discard(index: dict[_Key, set[str]], at: _Key, key: str) -> None:
    index[at].discard(key)
    if not index[at]:
        del index[at]


def _needs_ran(event: Event) -> bool:
    return event.ran is None and event.op in ("vcpu_create", "get", "set")


def _is_open(vm: TrackedVm, ts: int) -> bool:
    return vm.ran_since is None and ts > vm.idle_until


def _ran_at(vm: TrackedVm, start: Optional[int], ts: int) -> Optional[bool]:
    if start is not None and (ts >= start or vm.seen_created):
        return ts >= start
    if vm.ran_since is not None and ts >= vm.ran_since:
        return True
    return False if ts <= vm.idle_until else None
