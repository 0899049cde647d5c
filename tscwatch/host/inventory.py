"""Which VMs are on this host, who they are and whether they still live: /proc and debugfs.

The kernel tells a source what happens; this tells what was there before, and what no probe
says.  Everything read here can vanish while it is read.
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
_MAX_LOOKS = 8  # at VMs for one batch: events that come while we look are looked after too
_MAX_KNOWN = 16384
_MAX_KNOWN_OF_A_PROCESS = 64  # QEMU has one VM in a process
_MAX_CMDLINE = 1 << 18  # QEMU's are some kB; a hostile one can be 2 MiB


@dataclass
class TrackedVm:
    """What is kept of a VM from one event to the next."""

    pid: int
    start: Optional[int]
    """Start time of the process in clock ticks: a pid alone can come again."""
    fd: Optional[int]
    seen_created: bool
    """We saw it made, so its first start that we see is its first start."""
    name: Optional[str] = None
    """The guest's, once it was asked."""
    is_qemu: bool = False
    threads: dict[int, int] = field(default_factory=dict)
    """Of a QEMU's vCPUs, as far as they made calls."""
    idle_until: int = 0
    """The last time at which the VM was seen not to have run yet."""
    ran_since: Optional[int] = None
    directory: Optional[Path] = None
    """In KVM's debugfs, once it was found."""


class Inventory:
    """Adds to a source's events what the source cannot know.

    :param proc: where procfs is mounted.
    :param debugfs: KVM's directory in debugfs; it need not exist.
    """

    def __init__(self, proc: Path = PROC, debugfs: Path = KVM_DEBUGFS) -> None:
        self._proc = proc
        self._debugfs = debugfs
        self._known: dict[str, TrackedVm] = {}
        self._of_process: dict[int, set[str]] = {}
        self._of_name: dict[Optional[str], set[str]] = {}
        self._fresh: dict[str, TrackedVm] = {}
        """Made in the batch that is being looked at."""
        self._starts: dict[str, int] = {}
        self._missing: set[str] = set()
        self._threads_seen = 0

    def with_starts(self, batch: list[Event], drain: Callable[[], list[Event]]) -> list[Event]:
        """A batch, made long enough to tell whether its VMs had run when its events happened.

        KVM_SET_CLOCK comes before the first KVM_RUN.  So where a look now says that a VM has
        run, its start is among the events that ``drain`` gives after that look, if QEMU sent
        one at all; and what stands before that start happened before it.  Where a look says
        that it has not run, that holds for all events before the look; what ``drain`` gives
        after it needs another.
        """
        for _ in range(_MAX_LOOKS):
            undecided = self._undecided(batch)
            learnt = [self._look_whether_run(known) for known in undecided]
            if undecided:
                batch = batch + drain()
            if not any(learnt):
                break
        for event in batch:
            if event.op == "vm_started" and len(self._starts) < _MAX_KNOWN:
                self._starts.setdefault(event.vm, event.ts)
        return batch

    def _undecided(self, batch: list[Event]) -> list[TrackedVm]:
        """VMs with events of which it is not known whether they had run by then."""
        undecided: dict[str, TrackedVm] = {}
        for event in batch:
            known = self._known.get(event.vm) or self._fresh.get(event.vm)
            if event.op == "vm_create" and known is None:
                self._fresh[event.vm] = self._meet(event)
            if known is not None and _wants_ran(event) and _is_open(known, event.ts):
                undecided[event.vm] = known
        return list(undecided.values())

    def _meet(self, event: Event) -> TrackedVm:
        seen_created = event.op == "vm_create"
        return TrackedVm(event.pid, self._start_time(event.pid), event.fd, seen_created)

    def admit(self, event: Event) -> Iterator[Event]:
        """The event with its VM's guest, when the VM is new here, and whether it has run.

        Before a new VM comes the end of the one that had its file descriptor, or that had its name
        and is gone: a guest that starts again keeps its name.
        """
        if not event.vm or (event.op == "vm_end" and event.vm not in self._known):
            yield event
            return
        if event.op == "vm_create":
            yield from self._superseded(event)
        known = self._known.get(event.vm)
        if known is None:
            known = self._fresh.pop(event.vm, None)
            if self._is_full(event.pid):
                yield event
                return
            known = known or self._meet(event)
            who = self.identify(event.pid, event.comm)
            yield from self._ended_namesakes(event, who.name)
            known.name, known.is_qemu = who.name, who.vmm == "qemu"
            self._remember(event.vm, known)
            event = event._replace(guest=who)
        if event.op == "vm_end":
            self._forget(event.vm)
        ours = event.pid == known.pid and known.is_qemu
        if event.vcpu is not None and event.op in ("get", "set") and ours:
            known.threads[event.vcpu] = event.tid
        if _wants_ran(event):
            if _is_open(known, event.ts):
                self._look_whether_run(known)
            event = event._replace(ran=_ran_at(known, self._starts.get(event.vm), event.ts))
        if event.op == "set" and event.vcpu is not None:
            event = event._replace(scale=self._scale(known, event.vcpu))
        yield event

    def _is_full(self, pid: int) -> bool:
        """Then new VMs are told of by their events alone: somebody makes them without end."""
        siblings = self._of_process.get(pid, ())
        return len(self._known) >= _MAX_KNOWN or len(siblings) >= _MAX_KNOWN_OF_A_PROCESS

    def _remember(self, key: str, known: TrackedVm) -> None:
        self._known[key] = known
        self._of_process.setdefault(known.pid, set()).add(key)
        self._of_name.setdefault(known.name, set()).add(key)

    def _superseded(self, event: Event) -> Iterator[Event]:
        siblings = self._of_process.get(event.pid, set())
        files = {key for key in siblings if self._known[key].fd == event.fd is not None}
        for key in files | ({event.vm} & self._known.keys()):
            self._forget(key)
            yield event._replace(op="vm_end", vm=key)

    def _ended_namesakes(self, event: Event, name: Optional[str]) -> Iterator[Event]:
        for key in list(self._of_name.get(name, ()) if name else ()):
            if not self._lives(self._known[key]):
                self._forget(key)
                yield event._replace(op="vm_end", vm=key, guest=None)

    def identify(self, pid: int, comm: str) -> Guest:
        """The guest of a process; by ``comm`` alone where the process is gone already."""
        return vmm.parse(pid, self._argv(pid), comm)

    def found(self) -> Iterator[Event]:
        """The VMs and vCPUs that exist now, as events."""
        for process in self._proc.iterdir():
            if process.name.isdigit():
                yield from self._found_in(int(process.name))

    def gone(self) -> list[Event]:
        """The end of each VM whose process is gone or holds its file no longer.

        Said only at the second look that misses a VM: by then what it did before the first has
        been read from the source.
        """
        missing = {key for key, known in self._known.items() if not self._lives(known)}
        dead = missing & self._missing
        self._missing = missing - dead
        ends = [Event(now_ns(), "vm_end", key, self._known[key].pid, 0, "") for key in dead]
        for key in dead:
            self._forget(key)
        return ends

    def unplugged(self) -> Iterator[Event]:
        """The vCPUs whose threads have ended while their VM lives on; looked at now and then.

        QEMU's vCPU threads make their vCPU's calls, and end at its hot-unplug.
        """
        now = now_ns()
        if now - self._threads_seen < _THREAD_CHECK_NS:
            return
        self._threads_seen = now
        for key, known in self._known.items():
            try:
                alive = {int(task.name) for task in (self._proc / f"{known.pid}/task").iterdir()}
            except OSError:
                continue
            for vcpu, thread in list(known.threads.items()):
                if thread not in alive:
                    del known.threads[vcpu]
                    yield Event(now, "vcpu_unplugged", key, known.pid, thread, "", vcpu)

    def check_running(self) -> None:
        """Note which VMs have begun to run: what happens to them later is then known to be later.

        Only VMs whose source cannot tell are looked at.
        """
        for known in self._known.values():
            if known.idle_until:
                self._look_whether_run(known)

    def _forget(self, key: str) -> None:
        known = self._known.pop(key)
        _discard(self._of_process, known.pid, key)
        _discard(self._of_name, known.name, key)
        self._starts.pop(key, None)
        self._missing.discard(key)

    def _found_in(self, pid: int) -> Iterator[Event]:
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
            yield from self.admit(Event(now, "vm_found", key, pid, pid, comm, ran=ran, fd=fd))
            if len(vms) == 1:  # else whose vCPUs they are cannot be told
                for vcpu_fd, vcpu in vcpus:
                    found = Event(now, "vcpu_found", key, pid, pid, comm, vcpu, ran=ran)
                    yield found._replace(fd=vcpu_fd)

    def _lives(self, known: TrackedVm) -> bool:
        if known.start is None or self._start_time(known.pid) != known.start:
            return False
        if known.fd is None:
            return True
        try:
            return str((self._proc / f"{known.pid}/fd/{known.fd}").readlink()) == _VM_FILE
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not ours to read: only the process's end will tell

    def _look_whether_run(self, known: TrackedVm) -> bool:
        """Gives whether that could be seen."""
        if known.ran_since is not None:
            return True
        now = now_ns()
        ran = self._ran(self._directory_of(known))
        if ran:
            known.ran_since = now_ns()
        elif ran is False:
            known.idle_until = now
        return ran is not None

    def _directory(self, pid: int, fd: Optional[int]) -> Optional[Path]:
        """The VM's in debugfs; None where there is none that is surely its own."""
        directories = list(self._debugfs.glob(f"{pid}-{'*' if fd is None else fd}"))
        return directories[0] if len(directories) == 1 else None

    def _directory_of(self, known: TrackedVm) -> Optional[Path]:
        if known.directory is None:
            known.directory = self._directory(known.pid, known.fd)
        return known.directory

    def _scale(self, known: TrackedVm, vcpu: int) -> Optional[float]:
        """A vCPU's scaling ratio (arch/x86/kvm/debugfs.c), where the hardware scales.

        Of a guest that runs a guest of its own, the file may show the inner one's.
        """
        directory = self._directory_of(known)
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
        """By the thread of each vCPU's last KVM_RUN, else by KVM's exit counter (before 6.0).

        None where debugfs does not show it, or is locked down.
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
        """Field 22 of /proc/PID/stat; the name before it may hold anything, ``)`` included."""
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


def _wants_ran(event: Event) -> bool:
    return event.ran is None and event.op in ("vcpu_create", "get", "set")


def _is_open(known: TrackedVm, ts: int) -> bool:
    return known.ran_since is None and ts > known.idle_until


def _ran_at(known: TrackedVm, start: Optional[int], ts: int) -> Optional[bool]:
    if start is not None and (ts >= start or known.seen_created):
        return ts >= start
    if known.ran_since is not None and ts >= known.ran_since:
        return True
    return False if ts <= known.idle_until else None
