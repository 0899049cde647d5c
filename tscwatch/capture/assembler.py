"""Join the records of ftrace into events.  Pure: no I/O and no clock.

A TSC call makes two records on one thread, one at its entry and one at its end.  The commands with
which a VMM sets up a vCPU (:data:`COLD_COMMANDS`) are not events.  The last one on each vCPU is
remembered, and the vCPU's next event carries it (:attr:`tscwatch.model.Event.after`).

The two kinds of records differ in what they contain:

* Kprobe events (:func:`tscwatch.capture.ftrace.kprobe_events`) have the addresses of ``struct kvm``
  and fields of ``struct kvm_vcpu``.  Each call's return is recorded.
* Syscall events have only a process and a file descriptor.  ``/proc/PID/fd`` shows a vCPU's id, but
  not to which of the process's VMs it belongs.
* An exit of the ioctl syscall is recorded only if it returned neither 0 nor an error that
  ``KVM_RUN`` returns, because the exits of ``KVM_RUN`` are too many to record.  So a SET that
  succeeds has no exit record.  It has ended once its thread makes another recorded call.
* The recorded exit may be that of a later ioctl, whose entry was filtered out.  A SET itself fails
  only with EINVAL (``kvm_arch_vcpu_ioctl``) or EIO (``kvm_vcpu_ioctl``).
* A call that fails with EIO has not reached its VM (``kvm_vcpu_ioctl``).  If the process has not
  created the vCPU while it was observed, the reason is taken to be that its memory is not the VM's.
  The call is no event then, because only the VM's own process can give the vCPU a frequency.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Optional

from tscwatch.linux import kvm
from tscwatch.linux.trace_pipe import Record
from tscwatch.model import After, Event, Op

COLD_COMMANDS: dict[int, After] = {
    kvm.SET_CPUID2: "cpuid",
    kvm.SET_SREGS: "sregs",
    kvm.SET_SREGS2: "sregs",
    kvm.SET_REGS: "regs",
}
_CREATIONS: dict[int, Op] = {kvm.CREATE_VM: "vm_create", kvm.CREATE_VCPU: "vcpu_create"}
_CALLS: dict[int, Op] = {kvm.SET_TSC_KHZ: "set", kvm.GET_TSC_KHZ: "get"}
_NOT_KVM = (-25, -9)  # ENOTTY, EBADF: not KVM's file, or one that has no such command
_REFUSED_AT_ENTRY = -5  # EIO
_SET_ERRORS = (-22, _REFUSED_AT_ENTRY)  # -22 is EINVAL
_SET_TIMEOUT_NS = 1_000_000_000
_CHECK_NS = 10_000_000_000
_MAX_PENDING = 1 << 16  # each is a thread inside a call
_UNKNOWN_VM = ""  # of a file that was gone when it was looked up

_Handler = Callable[[Record], Iterator[Event]]


@dataclass
class _Pending:
    """A TSC call, or the creation of a VM or vCPU, whose end has not been read yet."""

    record: Record
    op: Op
    vm: str
    vcpu: Optional[int]
    thread_gone: bool = False
    """Its thread did not exist any more at the last :meth:`SyscallAssembler.settle`."""


class _Assembler:
    """What the assemblers of both kinds of records share."""

    def __init__(self) -> None:
        self.no_return = 0
        """TSC calls whose end was not recorded."""
        self.foreign = 0
        """See :attr:`tscwatch.model.Health.foreign`."""
        self.unidentified = 0
        """TSC calls on a file that was not known, and was gone when it was looked up."""
        self._handlers: dict[str, _Handler] = {}
        """By the record's name."""
        self._pending: dict[int, _Pending] = {}
        """By thread id."""
        self._marks: dict[tuple[str, int], tuple[After, int]] = {}
        """By VM and vCPU: the last cold command, and how many writes of special registers."""

    def feed(self, record: Record) -> Iterator[Event]:
        """Yield the events that a record completes; none for a record of another event."""
        handler = self._handlers.get(record.name)
        return iter(()) if handler is None else handler(record)

    def _event(self, record: Record, op: Op, vm: str, vcpu: Optional[int] = None) -> Event:
        after: Optional[After] = None
        sync = 0
        if vcpu is not None and (vm, vcpu) in self._marks:
            after, sync = self._marks[vm, vcpu]
        thread = record.pid, record.tid, record.comm
        return Event(record.ts, op, vm, *thread, vcpu, after=after, sync=sync)

    def _forget(self, vm: str) -> None:
        self._marks = {key: mark for key, mark in self._marks.items() if key[0] != vm}

    def _vm_created(self, record: Record, vm: str, fd: Optional[int]) -> Event:
        self._forget(vm)
        return self._event(record, "vm_create", vm)._replace(fd=fd)

    def _vcpu_created(self, record: Record, vm: str, vcpu: int) -> Event:
        self._marks[vm, vcpu] = "create", 0
        return self._event(record, "vcpu_create", vm, vcpu)

    def _cold_command(self, record: Record, vm: str, vcpu: int, after: After) -> Iterator[Event]:
        last, sync = self._marks.get((vm, vcpu), (None, 0))
        if last == "create":
            yield self._event(record, "vcpu_setup", vm, vcpu)
        self._marks[vm, vcpu] = after, sync + (after == "sregs")

    def _begin(self, record: Record, op: Op, vm: str, vcpu: Optional[int]) -> None:
        self.no_return += self._pending.pop(record.tid, None) is not None
        if len(self._pending) >= _MAX_PENDING:  # its end was lost, or its thread has ended
            del self._pending[next(iter(self._pending))]
            self.no_return += 1
        self._pending[record.tid] = _Pending(record, op, vm, vcpu)

    def _finish(self, pending: _Pending, result: int) -> Event:
        record = pending.record
        khz = record.values["arg"] & 0xFFFFFFFF if pending.op == "set" else result
        return self._event(record, pending.op, pending.vm, pending.vcpu)._replace(
            khz=khz if khz >= 0 else None, status=min(result, 0), runner=runner_of(record)
        )


def runner_of(record: Record) -> Optional[int]:
    """Return the thread of the vCPU's last KVM_RUN, 0 if it has never run, None if not known.

    ``ran`` is the pointer ``vcpu->pid``, which is null until the first KVM_RUN
    (``kvm_vcpu_ioctl``), and ``runner`` is fetched through it.  If a fetch faults, the kernel can
    leave the record's field as it was (``store_trace_args``), so ``runner`` is then not 0 but
    whatever the ring buffer contained before.  Therefore a null ``ran`` decides first.
    """
    if record.values.get("ran") == 0:
        return 0
    return record.values.get("runner")


class SyscallAssembler(_Assembler):
    """Joins the entries and exits of the ioctl syscall.

    A VM is identified by its process and file descriptor.  To which file a descriptor refers
    follows from the call that created it, or else from ``link``.

    :param link: returns the target of ``/proc/PID/fd/FD`` for a pid and a descriptor, "" if it
        cannot be read.
    :param alive: returns whether a process or thread exists.
    """

    def __init__(self, link: Callable[[int, int], str], alive: Callable[[int], bool]) -> None:
        super().__init__()
        self._link = link
        self._alive = alive
        self._files: dict[tuple[int, int], tuple[str, Optional[int]]] = {}
        """By pid and descriptor: the VM and the vCPU, None for the VM's own file."""
        self._vm_was_created = False
        """Since the last :meth:`settle`."""
        self._next_check = 0
        """Unix time in nanoseconds at which ended processes are forgotten in any case."""
        self._ended_processes: set[int] = set()
        """Those that a :meth:`settle` found to have ended; their last records may be unread."""
        self._handlers = {"enter": self._enter, "exit": self._exit}

    def _enter(self, record: Record) -> Iterator[Event]:
        yield from self._end_without_exit(record.tid)
        pid, fd, cmd = record.pid, record.values["fd"], record.values["cmd"]
        if cmd in _CREATIONS:
            self._begin(record, _CREATIONS[cmd], f"{pid}:{fd}", None)
        elif cmd in _CALLS or cmd in COLD_COMMANDS or cmd == kvm.SET_CLOCK:
            yield from self._enter_on_file(record, pid, fd, cmd)

    def _exit(self, record: Record) -> Iterator[Event]:
        pending = self._pending.pop(record.tid, None)
        if pending is None:
            return
        result = record.values["ret"]
        maybe_not_kvm = pending.vm == _UNKNOWN_VM and result in _NOT_KVM
        if pending.op == "set" and result not in _SET_ERRORS and not maybe_not_kvm:
            result = 0  # the exit is a later ioctl's; the SET has succeeded
        yield from self._ended(pending, result)

    def settle(self, now: int) -> Iterator[Event]:
        """Yield the SETs that succeeded, as far as no later record of their threads shows it.

        Such a SET has ended if its thread was already gone at the previous call, which preceded
        the reading of the last records, or if it began more than a second ago.

        :param now: Unix time in nanoseconds.
        """
        for tid, pending in list(self._pending.items()):
            old = now - pending.record.ts > _SET_TIMEOUT_NS
            if pending.thread_gone or (old and pending.op == "set"):
                yield from self._end_without_exit(tid)
            pending.thread_gone = not self._alive(tid)
        if self._vm_was_created or self._ended_processes or now >= self._next_check:
            self._vm_was_created = False
            self._next_check = now + _CHECK_NS
            self._forget_ended_processes()

    def _end_without_exit(self, tid: int) -> Iterator[Event]:
        """End a thread's pending call that has no exit record: if it is a SET, it succeeded."""
        pending = self._pending.pop(tid, None)
        if pending is None:
            return
        if pending.op == "set":
            yield from self._ended(pending, 0)
        elif pending.op == "get":
            self.no_return += 1

    def _ended(self, pending: _Pending, result: int) -> Iterator[Event]:
        record = pending.record
        pid = record.pid
        if pending.op == "vm_create":
            if result >= 0:
                self._vm_was_created = True
                self._files[pid, result] = f"{pid}:{result}", None
                yield self._vm_created(record, f"{pid}:{result}", result)
        elif pending.op == "vcpu_create":
            if result >= 0:
                vcpu = record.values["arg"]
                self._files[pid, result] = pending.vm, vcpu
                yield self._vcpu_created(record, pending.vm, vcpu)
        elif result in _NOT_KVM:
            return
        elif result == _REFUSED_AT_ENTRY and pending.vm in (_vm_unseen(pid), _UNKNOWN_VM):
            self.foreign += 1
        elif pending.vm == _UNKNOWN_VM:
            self.unidentified += 1
        else:
            yield self._finish(pending, result)

    def _enter_on_file(self, record: Record, pid: int, fd: int, cmd: int) -> Iterator[Event]:
        file = self._files.get((pid, fd)) or self._look_up(pid, fd)
        if file is None:
            return
        vm, vcpu = file
        if cmd in _CALLS:
            self._begin(record, _CALLS[cmd], vm, vcpu)
        elif cmd == kvm.SET_CLOCK:
            if vcpu is None and vm != _UNKNOWN_VM:
                yield self._event(record, "vm_started", vm)
        elif vcpu is not None:
            yield from self._cold_command(record, vm, vcpu, COLD_COMMANDS[cmd])

    def _look_up(self, pid: int, fd: int) -> Optional[tuple[str, Optional[int]]]:
        """Return the VM and vCPU of a descriptor from ``link``, None if it is not KVM's.

        If it or its process is gone, the call's result will show whether it was KVM's.
        """
        link = self._link(pid, fd)
        if not link:
            return _UNKNOWN_VM, None
        if link == kvm.VM_FILE:
            return f"{pid}:{fd}", None
        match = kvm.VCPU_FILE.fullmatch(link)
        if match is None:
            return None
        # The link does not show to which of the process's VMs the vCPU belongs.
        self._files[pid, fd] = _vm_unseen(pid), int(match[1])
        return self._files[pid, fd]

    def _forget_ended_processes(self) -> None:
        """Forget those that had ended at an earlier call: all their records have been read."""
        ended = {pid for pid in {pid for pid, _ in self._files} if not self._alive(pid)}
        forgotten = ended & self._ended_processes
        self._ended_processes = ended - forgotten
        for key in [key for key in self._files if key[0] in forgotten]:
            vm, vcpu = self._files.pop(key)
            if vcpu is not None:
                self._marks.pop((vm, vcpu), None)


def _vm_unseen(pid: int) -> str:
    """Identify the VM of a vCPU whose creation was not seen."""
    return f"{pid}:?"


class KprobeAssembler(_Assembler):
    """Joins the records of the kprobe events that :mod:`tscwatch.capture.ftrace` defines."""

    def __init__(self) -> None:
        super().__init__()
        self._handlers = {
            "enter": self._enter,
            "vmenter": self._enter_vm,
            "leave": self._leave,
            "vmleave": self._leave,
            "sregs": lambda record: self._cold_command(record, *_vcpu_of(record), "sregs"),
            "regs": lambda record: self._cold_command(record, *_vcpu_of(record), "regs"),
            "existing": self._existing,
            "vm": lambda record: iter([self._vm_created(record, _vm_of(record), None)]),
            "vcpu": lambda record: iter([self._vcpu_created(record, *_vcpu_of(record))]),
            "clock": lambda record: iter([self._event(record, "vm_started", _vm_of(record))]),
            "end": self._end,
        }

    def settle(self, _now: int) -> Iterator[Event]:
        """Yield nothing: each call's end is recorded."""
        return iter(())

    def _enter(self, record: Record) -> Iterator[Event]:
        cmd = record.values["cmd"]
        if cmd in COLD_COMMANDS:
            yield from self._cold_command(record, *_vcpu_of(record), COLD_COMMANDS[cmd])
        else:
            self._begin(record, _CALLS[cmd], *_vcpu_of(record))

    def _enter_vm(self, record: Record) -> Iterator[Event]:
        self._begin(record, _CALLS[record.values["cmd"]], _vm_of(record), None)
        return iter(())

    def _leave(self, record: Record) -> Iterator[Event]:
        pending = self._pending.pop(record.tid, None)
        if pending is not None:
            yield self._finish(pending, record.values["ret"])

    def _existing(self, record: Record) -> Iterator[Event]:
        """Yield the event for a call of :func:`tscwatch.capture.existing.poke_existing`.

        tscwatch made the call; its argument is the pid of the vCPU's process.
        """
        pid = record.values["arg"]
        event = self._event(record, "vcpu_found", *_vcpu_of(record))
        event = event._replace(pid=pid, tid=pid, comm="")
        yield event._replace(khz=record.values["khz"], runner=runner_of(record))

    def _end(self, record: Record) -> Iterator[Event]:
        vm = _vm_of(record)
        yield self._event(record, "vm_end", vm)
        self._forget(vm)


def _vm_of(record: Record) -> str:
    return f"kvm:{record.values.get('kvm', 0):x}"


def _vcpu_of(record: Record) -> tuple[str, int]:
    return _vm_of(record), record.values.get("id", 0)
