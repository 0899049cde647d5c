"""Joins the records of ftrace into events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from tscwatch.clock import now_ns
from tscwatch.linux import kvm
from tscwatch.linux.trace_pipe import Record
from tscwatch.model import After, Event, Op

COLD_COMMANDS: dict[int, After] = {
    kvm.SET_CPUID2: "cpuid",
    kvm.SET_SREGS: "sregs",
    kvm.SET_SREGS2: "sregs",
    kvm.SET_REGS: "regs",
}
_ENOTTY, _EBADF = -25, -9
_SET_FAILS_WITH = (-22, -5)  # EINVAL, EIO
_SURELY_OVER_NS = 1_000_000_000


@dataclass
class _Pending:
    """A TSC call, or the making of a VM or vCPU, whose end has not come yet."""

    record: Record
    op: Op
    vm: str
    vcpu: Optional[int]
    thread_gone: bool = False


class _Assembler:
    """Joins records into events; what both kinds of records share."""

    def __init__(self) -> None:
        self.no_return = 0
        self._pending: dict[int, _Pending] = {}
        self._marks: dict[tuple[str, int], tuple[After, int]] = {}

    def _event(self, record: Record, op: Op, vm: str, vcpu: Optional[int] = None) -> Event:
        after: Optional[After] = None
        sync = 0
        if vcpu is not None and (vm, vcpu) in self._marks:
            after, sync = self._marks[vm, vcpu]
        who = record.pid, record.tid, record.comm
        return Event(record.ts, op, vm, *who, vcpu, after=after, sync=sync)

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


class Syscalls(_Assembler):
    """Records of the ioctl syscall's entry and exit.

    A VM is known by its process and file descriptor.  What file a descriptor is, is known from
    the call that made it, else from /proc.
    """

    def __init__(self, link: Callable[[int, int], str], alive: Callable[[int], bool]) -> None:
        super().__init__()
        self._link = link
        self._alive = alive
        self._files: dict[tuple[int, int], tuple[str, Optional[int]]] = {}
        """VM and vCPU (None: the VM's own file) of a process's descriptor."""

    def feed(self, record: Record) -> Iterator[Event]:
        """The events that a record completes."""
        if record.name == "exit":
            pending = self._pending.pop(record.tid, None)
            if pending is not None:
                result = record.values["ret"]
                if pending.op == "set" and result not in _SET_FAILS_WITH:
                    result = 0  # the end of a later ioctl, whose entry is not recorded
                yield from self._ended(pending, result)
            return
        yield from self._succeeded(record.tid)
        pid = record.pid
        fd, cmd = record.values["fd"], record.values["cmd"]
        if cmd in (kvm.CREATE_VM, kvm.CREATE_VCPU):
            op: Op = "vm_create" if cmd == kvm.CREATE_VM else "vcpu_create"
            self._begin(record, op, f"{pid}:{fd}", None)
        elif cmd == kvm.SET_CLOCK:
            yield self._event(record, "vm_started", f"{pid}:{fd}")
        elif cmd != kvm.ENABLE_CAP:
            yield from self._cold_ioctl(record, pid, fd, cmd)

    def settle(self) -> Iterator[Event]:
        """SETs that are over though no exit came: they succeeded.

        The exit of a SET that failed is a record; that of one that succeeded looks like
        KVM_RUN's and stays in the kernel.  A SET is over when its thread does something else
        (see :meth:`feed`), was gone before the last reading, or has had a whole second.
        """
        for tid, pending in list(self._pending.items()):
            old = now_ns() - pending.record.ts > _SURELY_OVER_NS
            if pending.thread_gone or (old and pending.op == "set"):
                yield from self._succeeded(tid)
            pending.thread_gone = not self._alive(tid)

    def _succeeded(self, tid: int) -> Iterator[Event]:
        """The thread went on without a failure, so its SET had succeeded."""
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
                self._forget_the_dead()
                self._files[pid, result] = f"{pid}:{result}", None
                yield self._vm_created(record, f"{pid}:{result}", result)
        elif pending.op == "vcpu_create":
            if result >= 0:
                vcpu = record.values["arg"]
                self._files[pid, result] = pending.vm, vcpu
                yield self._vcpu_created(record, pending.vm, vcpu)
        elif result not in (_ENOTTY, _EBADF):
            yield self._finish(pending, result)

    def _cold_ioctl(self, record: Record, pid: int, fd: int, cmd: int) -> Iterator[Event]:
        known = self._files.get((pid, fd)) or self._look_up(pid, fd)
        if known is None:
            return
        vm, vcpu = known
        if cmd not in COLD_COMMANDS:
            self._begin(record, "set" if cmd == kvm.SET_TSC_KHZ else "get", vm, vcpu)
        elif vcpu is not None:
            yield from self._cold(record, vm, vcpu, COLD_COMMANDS[cmd])

    def _look_up(self, pid: int, fd: int) -> Optional[tuple[str, Optional[int]]]:
        link = self._link(pid, fd)
        if link == "anon_inode:kvm-vm":
            return f"{pid}:{fd}", None
        match = re.fullmatch(r"anon_inode:kvm-vcpu:(\d+)", link)
        if match is None:
            return None
        # Which of its process's VMs it belongs to, /proc does not say.
        self._files[pid, fd] = f"{pid}:?", int(match[1])
        return self._files[pid, fd]

    def _forget_the_dead(self) -> None:
        """Descriptors of processes that are gone mean nothing any more."""
        pids = {pid for pid, _ in self._files}
        dead = {pid for pid in pids if not Path(f"/proc/{pid}").exists()}
        for key in [key for key in self._files if key[0] in dead]:
            vm, vcpu = self._files.pop(key)
            if vcpu is not None:
                self._marks.pop((vm, vcpu), None)


class Kprobes(_Assembler):
    """Records of the kprobe events that :func:`kprobe_events` defines."""

    def feed(self, record: Record) -> Iterator[Event]:
        """The events that a record completes."""
        name, values = record.name, record.values
        vm = f"kvm:{values.get('kvm', 0):x}"
        vcpu = values.get("id", 0)
        if name in ("leave", "vmleave"):
            pending = self._pending.pop(record.tid, None)
            if pending is not None:
                yield self._finish(pending, values["ret"])
        elif name == "enter":
            cmd = values["cmd"]
            if cmd in COLD_COMMANDS:
                yield from self._cold(record, vm, vcpu, COLD_COMMANDS[cmd])
            else:
                self._begin(record, "set" if cmd == kvm.SET_TSC_KHZ else "get", vm, vcpu)
        elif name == "vmenter":
            self._begin(record, "set" if values["cmd"] == kvm.SET_TSC_KHZ else "get", vm, None)
        elif name in ("sregs", "regs"):
            after: After = "sregs" if name == "sregs" else "regs"
            yield from self._cold(record, vm, vcpu, after)
        elif name == "heldup":
            yield self._found(record, vm, vcpu)
        elif name == "vm":
            yield self._vm_created(record, vm, None)
        elif name == "vcpu":
            yield self._vcpu_created(record, vm, vcpu)
        elif name == "clock":
            yield self._event(record, "vm_started", vm)
        elif name == "end":
            yield self._event(record, "vm_end", vm)
            self._forget(vm)

    def _found(self, record: Record, vm: str, vcpu: int) -> Event:
        """Of another process than that of the thread that made the call, which is ours."""
        pid = record.values["arg"]
        event = self._event(record, "vcpu_found", vm, vcpu)._replace(pid=pid, tid=pid, comm="")
        return event._replace(khz=record.values["khz"], runner=runner_of(record))

    def settle(self) -> Iterator[Event]:
        """Nothing waits here: each function's end is a record."""
        return iter(())
