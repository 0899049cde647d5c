"""Joins the records of ftrace into events.  Pure.

A TSC call has two records, its entry and its end, on one thread.  The cold commands between calls
are no events of their own: the last one on a vCPU is carried by the next event (``Event.after``).

There are two kinds of records.  Kprobe events report KVM's objects by address, and each call's end.
Syscall events report file descriptors, and the end of an ioctl only if it failed or returned
something: the exits of ``KVM_RUN``, which look like that of a SET that succeeded, are filtered out
in the kernel.  So a SET without a recorded end has succeeded once its thread has gone on.
"""

from __future__ import annotations

import re
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
_ENOTTY, _EBADF = -25, -9
_SET_ERRORS = (-22, -5)  # EINVAL, EIO
_SET_TIMEOUT_NS = 1_000_000_000


@dataclass
class _Pending:
    """A TSC call, or the creation of a VM or vCPU, that has not ended yet."""

    record: Record
    op: Op
    vm: str
    vcpu: Optional[int]
    thread_gone: bool = False


class _Assembler:
    """What both kinds of records share."""

    def __init__(self) -> None:
        self.no_return = 0
        """Calls whose end is missing."""
        self._pending: dict[int, _Pending] = {}
        self._marks: dict[tuple[str, int], tuple[After, int]] = {}
        """The last cold command on each vCPU, and its number of full-state writes."""

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

    def _cold(self, record: Record, vm: str, vcpu: int, after: After) -> Iterator[Event]:
        last, sync = self._marks.get((vm, vcpu), (None, 0))
        if last == "create":
            yield self._event(record, "vcpu_setup", vm, vcpu)
        self._marks[vm, vcpu] = after, sync + (after == "sregs")

    def _begin(self, record: Record, op: Op, vm: str, vcpu: Optional[int]) -> None:
        if record.tid in self._pending:
            self.no_return += 1
        self._pending[record.tid] = _Pending(record, op, vm, vcpu)

    def _finish(self, pending: _Pending, result: int) -> Event:
        record = pending.record
        khz = record.values["arg"] & 0xFFFFFFFF if pending.op == "set" else result
        return self._event(record, pending.op, pending.vm, pending.vcpu)._replace(
            khz=khz if khz >= 0 else None, status=min(result, 0), runner=runner_of(record)
        )


def runner_of(record: Record) -> Optional[int]:
    """Return the thread of the vCPU's last KVM_RUN, 0 if it never ran, None if not known."""
    # Fetching through a null vcpu->pid yields garbage on some kernels, so the pointer decides.
    if record.values.get("ran") == 0:
        return 0
    return record.values.get("runner")


class SyscallAssembler(_Assembler):
    """Joins the entries and exits of the ioctl syscall.

    A VM is identified by its process and file descriptor.  Which file a descriptor refers to
    follows from the call that created it, else from ``link``.

    :param link: returns what ``/proc/PID/fd/FD`` links to, or "".
    :param alive: returns whether a process or thread exists.
    """

    def __init__(self, link: Callable[[int, int], str], alive: Callable[[int], bool]) -> None:
        super().__init__()
        self._link = link
        self._alive = alive
        self._files: dict[tuple[int, int], tuple[str, Optional[int]]] = {}
        """VM and vCPU of each (pid, descriptor); vCPU None is the VM's own file."""

    def feed(self, record: Record) -> Iterator[Event]:
        """Yield the events that a record completes."""
        if record.name == "exit":
            yield from self._exit(record)
            return
        yield from self._succeeded(record.tid)
        pid, fd, cmd = record.pid, record.values["fd"], record.values["cmd"]
        if cmd in _CREATIONS:
            self._begin(record, _CREATIONS[cmd], f"{pid}:{fd}", None)
        elif cmd == kvm.SET_CLOCK:
            yield self._event(record, "vm_started", f"{pid}:{fd}")
        elif cmd in _CALLS or cmd in COLD_COMMANDS:
            yield from self._on_file(record, pid, fd, cmd)

    def settle(self, now: int) -> Iterator[Event]:
        """Yield the SETs that have ended although no exit was recorded: they succeeded.

        A SET has ended when its thread makes another call (see :meth:`feed`), when the thread was
        gone before the last reading, or after a second.

        :param now: Unix time in nanoseconds.
        """
        for tid, pending in list(self._pending.items()):
            old = now - pending.record.ts > _SET_TIMEOUT_NS
            if pending.thread_gone or (old and pending.op == "set"):
                yield from self._succeeded(tid)
            pending.thread_gone = not self._alive(tid)

    def _exit(self, record: Record) -> Iterator[Event]:
        pending = self._pending.pop(record.tid, None)
        if pending is None:
            return
        result = record.values["ret"]
        if pending.op == "set" and result not in _SET_ERRORS:
            result = 0  # the exit of a later ioctl, whose entry was filtered out
        yield from self._ended(pending, result)

    def _succeeded(self, tid: int) -> Iterator[Event]:
        """The thread has gone on without a recorded failure, so its SET has succeeded."""
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
                self._forget_dead_processes()
                self._files[pid, result] = f"{pid}:{result}", None
                yield self._vm_created(record, f"{pid}:{result}", result)
        elif pending.op == "vcpu_create":
            if result >= 0:
                vcpu = record.values["arg"]
                self._files[pid, result] = pending.vm, vcpu
                yield self._vcpu_created(record, pending.vm, vcpu)
        elif result not in (_ENOTTY, _EBADF):
            yield self._finish(pending, result)

    def _on_file(self, record: Record, pid: int, fd: int, cmd: int) -> Iterator[Event]:
        file = self._files.get((pid, fd)) or self._look_up(pid, fd)
        if file is None:
            return
        vm, vcpu = file
        if cmd in _CALLS:
            self._begin(record, _CALLS[cmd], vm, vcpu)
        elif vcpu is not None:
            yield from self._cold(record, vm, vcpu, COLD_COMMANDS[cmd])

    def _look_up(self, pid: int, fd: int) -> Optional[tuple[str, Optional[int]]]:
        link = self._link(pid, fd)
        if link == "anon_inode:kvm-vm":
            return f"{pid}:{fd}", None
        match = re.fullmatch(r"anon_inode:kvm-vcpu:(\d+)", link)
        if match is None:
            return None
        # /proc does not show to which of the process's VMs the vCPU belongs.
        self._files[pid, fd] = f"{pid}:?", int(match[1])
        return self._files[pid, fd]

    def _forget_dead_processes(self) -> None:
        dead = {pid for pid in {pid for pid, _ in self._files} if not self._alive(pid)}
        for key in [key for key in self._files if key[0] in dead]:
            vm, vcpu = self._files.pop(key)
            if vcpu is not None:
                self._marks.pop((vm, vcpu), None)


class KprobeAssembler(_Assembler):
    """Joins the records of the kprobe events that :func:`ftrace.kprobe_events` defines."""

    def __init__(self) -> None:
        super().__init__()
        self._handlers: dict[str, Callable[[Record], Iterator[Event]]] = {
            "enter": self._enter,
            "vmenter": self._enter_vm,
            "leave": self._leave,
            "vmleave": self._leave,
            "sregs": lambda record: self._cold(record, *_vcpu_of(record), "sregs"),
            "regs": lambda record: self._cold(record, *_vcpu_of(record), "regs"),
            "existing": self._existing,
            "vm": lambda record: iter([self._vm_created(record, _vm_of(record), None)]),
            "vcpu": lambda record: iter([self._vcpu_created(record, *_vcpu_of(record))]),
            "clock": lambda record: iter([self._event(record, "vm_started", _vm_of(record))]),
            "end": self._end,
        }

    def feed(self, record: Record) -> Iterator[Event]:
        """Yield the events that a record completes; none for a record of another event."""
        handler = self._handlers.get(record.name)
        return iter(()) if handler is None else handler(record)

    def settle(self, _now: int) -> Iterator[Event]:
        """Yield nothing: the end of each function is a record."""
        return iter(())

    def _enter(self, record: Record) -> Iterator[Event]:
        cmd = record.values["cmd"]
        if cmd in COLD_COMMANDS:
            yield from self._cold(record, *_vcpu_of(record), COLD_COMMANDS[cmd])
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
        """tscwatch made this call; its argument is the pid of the vCPU's process."""
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
