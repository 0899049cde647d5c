"""Find the VMs on this host, and complete a source's events, from ``/proc`` and KVM's debugfs.

A source reports only what happens while it is open, and only what its probes can read.  The rest
comes from here:

* the VMs and vCPUs that are older than the source: the links ``anon_inode:kvm-vm`` and
  ``anon_inode:kvm-vcpu:ID`` in ``/proc/PID/fd``;
* which guest a VM is: its process's executable and command line, and the configuration files that
  the command line names (:mod:`tscwatch.vmm`);
* whose guest it is: the command line, and libvirt's file about the guest (:mod:`tscwatch.owner`);
* whether a VM has run: the file ``pid`` of each vCPU in debugfs, which is 0 until the vCPU's first
  KVM_RUN (``vcpu_get_pid``), or before Linux 6.0, which added that file, KVM's count of exits;
* the lines of a VM's vCPUs: debugfs (:mod:`tscwatch.host.lines`);
* the end of a VM that no probe reported, and unplugged vCPUs, whose threads have ended.

All of these files can vanish at any moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional, TypeVar

from tscwatch import owner, vmm
from tscwatch.clock import now_ns
from tscwatch.host.files import ForeignFiles
from tscwatch.host.libvirt import read_status
from tscwatch.host.lines import read_lines
from tscwatch.linux import kvm
from tscwatch.linux.files import entries, read_text
from tscwatch.linux.process import PROC, start_time
from tscwatch.model import Event, Guest, Line

KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")

_THREAD_CHECK_NS = 10_000_000_000
_LINES_INTERVAL_NS = 10_000_000_000
_LINES_AT_ONCE = 512  # vCPUs; reading takes about 20 ms
_TSC_WRITES = ("set", "tsc_tracked", "clock_updated", "vm_started")  # or the end of them
_PAUSE_PER_LINE_NS = 1_000_000  # so that a VM that writes without end costs 4 % of a CPU at most
_MAX_CHECKS = 8  # of the VMs of one batch; each check can extend it by events that need another
_MAX_VMS = 16384
_MAX_VMS_PER_PROCESS = 64  # QEMU has one VM per process
_MAX_CONFIG = 1 << 16  # bytes
_DELETED = " (deleted)"
_MAX_CMDLINE = 1 << 18  # bytes; QEMU's command line has a few kB, a hostile one can have 2 MiB


@dataclass
class TrackedVm:
    """What is kept of a VM from one event to the next."""

    pid: int
    start: Optional[int]
    """Start time of the process in clock ticks: a pid alone can be reused."""
    fd: Optional[int]
    seen_created: bool
    """Its creation was seen, so the first start that was seen is its first start."""
    name: Optional[str] = None
    """The guest's name, once the VM has been identified."""
    program: vmm.Vmm = vmm.OTHER
    """Its VMM, once the VM has been identified."""
    threads: dict[int, int] = field(default_factory=dict)
    """The thread of each vCPU, as far as it is known: the one that makes its TSC calls, or if
    another thread makes them, the one that runs it."""
    unplugged: set[int] = field(default_factory=set)
    """The vCPUs whose threads have ended, until they have others."""
    idle_until: int = 0
    """Unix time in ns of the last check that found that the VM had not run yet; 0: none did."""
    ran_since: Optional[int] = None
    """Unix time in ns of the first check that found that the VM had run."""
    directory: Optional[Path] = None
    """Its directory in KVM's debugfs, once that was found."""
    replaced: Optional[frozenset[int]] = None
    """Inode numbers of the directories of the VMs that it replaces, None if it replaces none.  KVM
    creates no second directory of the same name, so it may have none itself
    (``kvm_create_vm_debugfs``)."""
    lines_due: int = 0
    """Unix time in ns at which its lines are to be read; 0: at once."""
    lines_not_before: int = 0
    """Unix time in ns until which its lines are not read again, although they may be due."""
    lines: Optional[tuple[Line, ...]] = None
    """The lines that were reported last."""
    lines_are_new: bool = False
    """They were reported after a write, and no later reading has confirmed them."""


class Inventory:
    """The VMs on this host, by :attr:`tscwatch.model.Event.vm`.

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
        """VMs created in the batch that is being completed."""
        self._starts: dict[str, int] = {}
        """Unix time in ns of the first start that was seen of each VM."""
        self._missing: set[str] = set()
        """VMs that the last sweep did not find."""
        self._files_of_vmms = ForeignFiles()
        self._next_thread_check = 0
        """Unix time in ns."""

    @property
    def has_lines_due(self) -> bool:
        """Whether there was a write after which no line has been read yet."""
        return any(not vm.lines_due for vm in self._vms.values())

    def existing(self) -> Iterator[Event]:
        """Yield a ``vm_found`` for each VM that exists now, and a ``vcpu_found`` for each vCPU.

        The vCPUs of a process with several VMs are left out: ``/proc`` does not show to which VM
        each belongs.
        """
        for process in self._proc.iterdir():
            if process.name.isdigit():
                yield from self._existing_in(int(process.name))

    def enrich(self, batch: list[Event], drain: Callable[[], list[Event]]) -> list[Event]:
        """Complete a batch of events, and add events that they imply.

        The first event of a VM gets its guest.  Creations of vCPUs and TSC calls get whether the
        VM had run by then, if that is known and the source has not determined it.

        A new VM implies the end of the VMs that it replaces (:meth:`_superseded`), and also of a VM
        that had its guest's name if that VM is gone.  So a guest that restarts keeps its name.

        :param drain: returns the events that the source has by now; it may be called several times.
        :return: the completed events of the batch and of ``drain``, in order.
        """
        batch = self._until_decided(batch, drain)
        events = [event for raw in batch for event in self._complete(raw)]
        for event in events:
            if event.op in _TSC_WRITES:
                for key in self._of_process.get(event.pid, ()):
                    self._vms[key].lines_due = 0
        if len(self._starts) > len(self._vms):  # there were VMs beyond the limits
            self._starts = {key: ts for key, ts in self._starts.items() if key in self._vms}
        return events

    def read_lines(
        self,
        drain: Callable[[], list[Event]],
        is_behind: Callable[[], bool],
        host_tsc: Callable[[], Optional[int]],
    ) -> list[Event]:
        """Return a ``tsc_lines`` for each VM whose lines are due, and what happened meanwhile.

        They are due after a write of a TSC or a frequency, and every 10 s, because a guest can
        write its own TSC.  Lines belong to the moment at which they are read, so those of a process
        that did something meanwhile are dropped and stay due.  Lines are reported only if they are
        news: they differ from the last ones, or there was a write before them or before the last
        ones, or their ratios differ, so that the vCPUs drift apart.

        :param drain: as for :meth:`enrich`.
        :param is_behind: returns whether ``drain`` has left events behind; no line counts then.
        :param host_tsc: returns the host's TSC now, None if that is not known.
        """
        due = list(self._due())
        # A vCPU that is unplugged keeps its line in the kernel, and no reset reaches it.
        unplugged = [event for key in due for event in self._unplugged_from(key, now_ns())]
        readings = [self._reading(key, host_tsc) for key in due]
        later = self.enrich(drain(), drain) if readings else []
        busy = {event.pid for event in later}
        if is_behind():
            readings = []
        news = self._news(event for event in readings if event.pid not in busy)
        return [*unplugged, *news, *later]

    def _due(self) -> Iterator[str]:
        """Yield the VMs whose lines are due, first those due longest, up to the limit of vCPUs."""
        now, vcpus = now_ns(), 0
        due = [
            key for key, vm in self._vms.items() if max(vm.lines_due, vm.lines_not_before) <= now
        ]
        seen: set[Optional[Path]] = set()
        for key in sorted(due, key=lambda key: self._vms[key].lines_due):
            vm = self._vms[key]
            directory = self._directory_of(vm)
            # A VM can be known twice: as found in /proc, and as the source sees it.
            if directory is not None and directory in seen:
                vm.lines_due = now + _LINES_INTERVAL_NS
                continue
            seen.add(directory)
            yield key
            vcpus += len(vm.lines or ()) or 1
            if vcpus >= _LINES_AT_ONCE:
                return

    def _reading(self, key: str, host_tsc: Callable[[], Optional[int]]) -> Event:
        vm = self._vms[key]
        directory = self._directory_of(vm)
        lines = read_lines(directory) if directory is not None else ()
        vm.lines_not_before = now_ns() + _PAUSE_PER_LINE_NS * max(1, len(lines))
        differ = len({line.ratio for line in lines}) > 1
        tsc = host_tsc() if differ else None
        return Event(now_ns(), "tsc_lines", key, vm.pid, 0, "", lines=lines, host_tsc=tsc)

    def _news(self, readings: Iterable[Event]) -> Iterator[Event]:
        for event in readings:
            vm = self._vms.get(event.vm)
            if vm is None:
                continue
            after_write = not vm.lines_due
            drifting = event.host_tsc is not None
            if after_write or vm.lines_are_new or drifting or event.lines != vm.lines:
                yield event
            vm.lines, vm.lines_are_new = event.lines, after_write
            vm.lines_due = event.ts + _LINES_INTERVAL_NS

    def sweep(self) -> list[Event]:
        """Return the events that no probe reports: VMs that have ended, and unplugged vCPUs.

        Call this about once a second.  It also checks which VMs have begun to run, unless their
        source determines that, so that :meth:`enrich` can mark later events accordingly.
        """
        events = [*self._ended(), *self._unplugged()]
        for vm in self._vms.values():
            if vm.idle_until:
                self._check_whether_run(vm)
        return events

    def identify(self, pid: int, comm: str) -> Guest:
        """Return the guest that a process runs; if the process is gone, from ``comm`` alone."""
        argv = self._argv(pid)
        guest = vmm.identify(
            pid, argv, comm, self._executable(pid), lambda path: self._config(pid, path)
        )
        status = b""
        if guest.vmm == vmm.QEMU.name and guest.name:
            status = read_status(self._files_of_vmms, self._proc / f"{pid}/root", guest.name)
        pids = self._pids(pid) if status else ()
        return guest._replace(owner=owner.of_guest(guest, argv[1:], status, pids))

    def _until_decided(self, batch: list[Event], drain: Callable[[], list[Event]]) -> list[Event]:
        """Extend the batch until it is known, at each event, whether the VM had run by then.

        A check shows whether a VM has run by the time of the check, not by that of an event:

        * If the VM has not run, it had not run at any event before the check.  The events that
          ``drain`` returns after the check may be later than it, and need another.
        * If the VM has run, its first start decides.  QEMU calls KVM_SET_CLOCK before the first
          KVM_RUN (``kvmclock_vm_state_change``), so the start is among the events read so far or
          those that ``drain`` returns after the check, and what precedes it happened before the VM
          ran.  If the VMM makes no such call, the answer stays unknown.
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
        """Return the VMs with an event at which it is not known whether they had run."""
        undecided: dict[str, TrackedVm] = {}
        for event in batch:
            vm = self._vms.get(event.vm) or self._new.get(event.vm)
            if event.op == "vm_create" and vm is None:
                self._new[event.vm] = self._track(event)
            if vm is not None and _needs_ran(event) and _needs_check(vm, event.ts):
                undecided[event.vm] = vm
        return list(undecided.values())

    def _track(self, event: Event) -> TrackedVm:
        seen_created = event.op == "vm_create"
        vm = TrackedVm(event.pid, start_time(event.pid, self._proc), event.fd, seen_created)
        siblings = [self._vms[key] for key in self._of_process.get(event.pid, ())]
        old = [
            sibling.directory
            for sibling in siblings
            if sibling.program.has_vcpu_threads and sibling.start == vm.start
        ]
        if old:
            vm.replaced = frozenset(_inode(path) for path in old if path is not None)
        return vm

    def _complete(self, event: Event) -> Iterator[Event]:
        """Yield the ends that an event implies, and the completed event."""
        if not event.vm or (event.op == "vm_end" and event.vm not in self._vms):
            yield event
            return
        if event.op == "vm_create":
            if event.vm not in self._new:
                self._new[event.vm] = self._track(event)
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
            vm.name, vm.program = guest.name, vmm.of_guest(guest)
            self._remember(event.vm, vm)
            event = event._replace(guest=guest)
        if event.op == "vm_end":
            self._forget(event.vm)
        self._note_thread(event)
        if _needs_ran(event):
            if _needs_check(vm, event.ts):
                self._check_whether_run(vm)
            # When QEMU replaces a VM, it calls KVM_SET_CLOCK even if it does not start the new one.
            start = self._starts.get(event.vm) if vm.replaced is None else None
            event = event._replace(ran=_ran_at(vm, start, event.ts))
        yield event

    def _note_thread(self, event: Event) -> None:
        """Note the thread of a vCPU that makes a call, for each of the keys of a VM.

        A VM that is older than tscwatch is known twice, as found in /proc and as the source sees
        it, and its process has no other.
        """
        if event.vcpu is None or event.op not in ("get", "set"):
            return
        for vm in (self._vms[key] for key in self._of_process.get(event.pid, ())):
            if vm.program.has_vcpu_threads:
                vm.threads[event.vcpu] = event.tid
                vm.unplugged.discard(event.vcpu)

    def _is_full(self, pid: int) -> bool:
        """Return whether there are too many VMs to track another one of a process.

        The events of the VMs that are not tracked stay as they are.
        """
        siblings = self._of_process.get(pid, ())
        return len(self._vms) >= _MAX_VMS or len(siblings) >= _MAX_VMS_PER_PROCESS

    def _remember(self, key: str, vm: TrackedVm) -> None:
        self._vms[key] = vm
        self._of_process.setdefault(vm.pid, set()).add(key)
        self._of_name.setdefault(vm.name, set()).add(key)

    def _superseded(self, event: Event) -> Iterator[Event]:
        """Yield the end of each VM whose file descriptor, or identity, a new VM has now.

        QEMU has one VM at a time, so any of its new VMs replaces the old one, whose own end may
        still come (``kvm_reset_vmfd``); for such a VM, yield nothing.  A process that has the id
        of an earlier one has none of its VMs.
        """
        new = self._new[event.vm]
        for key in {event.vm, *self._of_process.get(event.pid, ())} & self._vms.keys():
            vm = self._vms[key]
            same_process = (vm.pid, vm.start) == (new.pid, new.start)
            if vm.program.has_vcpu_threads and same_process:
                self._forget(key)
            elif key == event.vm or not same_process or vm.fd == event.fd is not None:
                self._forget(key)
                yield event._replace(op="vm_end", vm=key)

    def _ended_namesakes(self, event: Event, name: Optional[str]) -> Iterator[Event]:
        """Yield the end of each VM that had the name of a new VM's guest and is gone."""
        for key in list(self._of_name.get(name, ()) if name else ()):
            if not self._lives(self._vms[key]):
                self._forget(key)
                yield event._replace(op="vm_end", vm=key, guest=None)

    def _ended(self) -> list[Event]:
        """Return the end of each VM whose process is gone or has closed its file descriptor.

        A VM is reported by the second check in a row that does not find it: by then, all that it
        did before the first check has been read from the source.
        """
        missing = {key for key, vm in self._vms.items() if not self._lives(vm)}
        dead = missing & self._missing
        self._missing = missing - dead
        ends = [Event.vm_ended(now_ns(), key, self._vms[key].pid) for key in dead]
        for key in dead:
            self._forget(key)
        return ends

    def _unplugged(self) -> Iterator[Event]:
        """Yield the vCPUs whose threads have ended while their VM lives on; check every 10 s."""
        now = now_ns()
        if now < self._next_thread_check:
            return
        self._next_thread_check = now + _THREAD_CHECK_NS
        for key in self._vms:
            yield from self._unplugged_from(key, now)

    def _unplugged_from(self, key: str, now: int) -> Iterator[Event]:
        vm = self._vms[key]
        try:
            alive = {int(task.name) for task in (self._proc / f"{vm.pid}/task").iterdir()}
        except OSError:
            return
        plugs_silently = vm.program.can_hotplug and not vm.program.has_vcpu_threads
        if plugs_silently and (directory := self._directory_of(vm)):
            for vcpu, thread in _runners(directory):  # also threads that have ended
                if thread not in alive:
                    continue
                vm.threads[vcpu] = thread
                if vcpu in vm.unplugged:  # it was plugged again, which takes no TSC call
                    vm.unplugged.discard(vcpu)
                    yield Event(now, "vcpu_found", key, vm.pid, thread, "", vcpu)
        for vcpu, thread in list(vm.threads.items()):
            if thread not in alive:
                del vm.threads[vcpu]
                vm.unplugged.add(vcpu)
                vm.lines_due = 0  # without that vCPU, the lines that are known mean something else
                yield Event.vcpu_unplugged(now, key, vm.pid, thread, vcpu)

    def _forget(self, key: str) -> None:
        vm = self._vms.pop(key)
        _discard(self._of_process, vm.pid, key)
        _discard(self._of_name, vm.name, key)
        self._starts.pop(key, None)
        self._missing.discard(key)

    def _existing_in(self, pid: int) -> Iterator[Event]:
        files = dict(self._files(pid))
        vms = [fd for fd, target in files.items() if target == kvm.VM_FILE]
        vcpus = sorted(
            (fd, int(match[1]))
            for fd, target in files.items()
            if (match := kvm.VCPU_FILE.fullmatch(target))
        )
        comm = self._comm(pid)
        now = now_ns()
        for fd in vms:
            key = f"{pid}:{fd}"
            directory = self._directory(pid, fd)
            runners = {} if directory is None else dict(_runners(directory))
            ran = bool(runners) or self._ran(directory)
            yield from self._complete(Event(now, "vm_found", key, pid, pid, comm, ran=ran, fd=fd))
            tracked = self._vms.get(key)
            if tracked is not None and tracked.program.can_hotplug:
                tracked.threads.update(runners)
            if len(vms) == 1:  # else it is not known to which VM each vCPU belongs
                for vcpu_fd, vcpu in vcpus:
                    found = Event(now, "vcpu_found", key, pid, pid, comm, vcpu, ran=ran)
                    yield found._replace(fd=vcpu_fd)

    def _lives(self, vm: TrackedVm) -> bool:
        """Return whether a VM's process exists and still has the VM's file descriptor."""
        if vm.start is None or start_time(vm.pid, self._proc) != vm.start:
            return False
        if vm.fd is None:
            return True
        try:
            return str((self._proc / f"{vm.pid}/fd/{vm.fd}").readlink()) == kvm.VM_FILE
        except FileNotFoundError:
            return False
        except OSError:
            return True  # /proc/PID/fd is not readable: only the end of the process shows

    def _check_whether_run(self, vm: TrackedVm) -> bool:
        """Record whether a VM has run by now; return whether that could be determined."""
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
        """Return a VM's directory in debugfs, ``PID-FD`` (``kvm_create_vm_debugfs``).

        ``PID`` is the thread that created the VM, which need not be the main one.

        :param fd: the VM's file descriptor; if None, take the process's only directory.
        :return: None if there is none, or more than one.
        """
        if fd is None:
            threads = {str(pid), *entries(self._proc / f"{pid}/task")}
            names = [name for name in entries(self._debugfs) if name.partition("-")[0] in threads]
        elif (self._debugfs / f"{pid}-{fd}").is_dir():
            names = [f"{pid}-{fd}"]
        else:
            of_threads = (f"{thread}-{fd}" for thread in entries(self._proc / f"{pid}/task"))
            names = [name for name in of_threads if (self._debugfs / name).is_dir()]
        return self._debugfs / names[0] if len(names) == 1 else None

    def _directory_of(self, vm: TrackedVm) -> Optional[Path]:
        if vm.directory is None:
            directory = self._directory(vm.pid, vm.fd)
            if directory is not None and _inode(directory) not in (vm.replaced or ()):
                vm.directory = directory
        return vm.directory

    @staticmethod
    def _ran(directory: Optional[Path]) -> Optional[bool]:
        """Return whether a VM has run, None if debugfs does not show it or is locked down.

        ``vcpu*/pid`` is the thread of the vCPU's last KVM_RUN; Linux before 6.0 has only ``exits``.
        """
        if directory is None:
            return None
        counters = _pid_files(directory) or [directory / "exits"]
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

    def _executable(self, pid: int) -> str:
        """Return the file name of a process's executable, empty if it cannot be read.

        The kernel marks the path of a file that has been deleted, as after an upgrade (``d_path``).
        """
        try:
            path = os.fsencode((self._proc / f"{pid}/exe").readlink())
        except OSError:
            return ""
        name = path.rpartition(b"/")[2].decode("utf-8", "backslashreplace")
        return name[: -len(_DELETED)] if name.endswith(_DELETED) else name

    def _config(self, pid: int, path: str) -> Optional[str]:
        """Return the text of a configuration file of a process, None if it cannot be read.

        The path is one in the process's own mount namespace and root directory.
        """
        top = self._proc / str(pid) / ("root" if path.startswith("/") else "cwd")
        raw = self._files_of_vmms.read(top, path, _MAX_CONFIG + 1)
        if raw is None or len(raw) > _MAX_CONFIG:
            return None
        return raw.decode("utf-8", "backslashreplace")

    def _comm(self, pid: int) -> str:
        try:
            raw = (self._proc / f"{pid}/comm").read_bytes()
        except OSError:
            return ""
        return raw.decode("utf-8", "backslashreplace").rstrip("\n")

    def _pids(self, pid: int) -> list[str]:
        """Return the pid of a process in each of its pid namespaces, the outermost first."""
        status = read_text(self._proc / f"{pid}/status")
        lines = (line.split() for line in status.splitlines())
        return next((words[1:] for words in lines if words[:1] == ["NSpid:"]), [])

    def _files(self, pid: int) -> Iterator[tuple[int, str]]:
        """Yield the file descriptors of a process and what they link to, as far as readable."""
        try:
            for link in (self._proc / f"{pid}/fd").iterdir():
                yield int(link.name), str(link.readlink())
        except OSError:
            return


def _inode(path: Path) -> int:
    """Return a file's inode number, 0 if it is gone."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


_Key = TypeVar("_Key")


def _pid_files(directory: Path) -> list[Path]:
    """Return the files of a VM in debugfs that have the threads of its vCPUs' last KVM_RUN."""
    vcpus = (directory / name for name in entries(directory) if name.startswith("vcpu"))
    return [file for vcpu in vcpus if (file := vcpu / "pid").exists()]


def _runners(directory: Path) -> Iterator[tuple[int, int]]:
    """Yield the vCPUs of a VM that have run, and the thread of each one's last KVM_RUN."""
    for file in _pid_files(directory):
        try:
            thread = int(file.read_text())
        except (OSError, ValueError):
            continue
        if thread:
            yield int(file.parent.name[len("vcpu") :]), thread


def _discard(index: dict[_Key, set[str]], at: _Key, key: str) -> None:
    index[at].discard(key)
    if not index[at]:
        del index[at]


def _needs_ran(event: Event) -> bool:
    """Return whether :attr:`Event.ran` matters for an event and its source did not set it."""
    return event.ran is None and event.op in ("vcpu_create", "get", "set")


def _needs_check(vm: TrackedVm, ts: int) -> bool:
    """Return whether the checks so far do not show whether a VM had run at a time."""
    return vm.ran_since is None and ts > vm.idle_until


def _ran_at(vm: TrackedVm, start: Optional[int], ts: int) -> Optional[bool]:
    """Return whether a VM had run at a time, None if not known.

    :param start: the first start that was seen; if the VM's creation was not seen, it may have run
        before.
    """
    if start is not None and (ts >= start or vm.seen_created):
        return ts >= start
    if vm.ran_since is not None and ts >= vm.ran_since:
        return True
    return False if ts <= vm.idle_until else None
