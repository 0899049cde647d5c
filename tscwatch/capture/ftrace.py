"""ftrace through tracefs: no compiler, no headers, no bcc.

Where the kernel has kprobes, kprobe events on KVM's cold functions; where not, syscall events.
Both live in a trace instance of our own and are filtered in the kernel.

An ftrace filter runs only after the record is made, so an event on ``kvm_vcpu_ioctl`` would
tax each KVM_RUN.  The kprobe events sit on ``kvm_arch_vcpu_ioctl`` and its neighbours instead,
which KVM_RUN never reaches.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional, Union

from tscwatch import kvm
from tscwatch.capture import Health, SourceInfo, btf, kvm_module, tracefs
from tscwatch.capture.hold_up import hold_up
from tscwatch.capture.trace import Instance, Record
from tscwatch.clock import now_ns
from tscwatch.errors import KernelUnfit
from tscwatch.model import After, Event, Op

_COLD: dict[int, After] = {
    kvm.SET_CPUID2: "cpuid",
    kvm.SET_SREGS: "sregs",
    kvm.SET_SREGS2: "sregs",
    kvm.SET_REGS: "regs",
}
_ENOTTY, _EBADF = -25, -9
_SET_FAILS_WITH = (-22, -5)  # EINVAL, EIO
_BUFFERS_KB = 16384  # of all CPUs, but for each within these bounds; a record is about 100 bytes
_BUFFER_KB = (128, 1024)
_SURELY_OVER_NS = 1_000_000_000

# KVM_RUN ends with 0, EINTR or EAGAIN. So does a SET that succeeded: see _Syscalls.settle.
_EXIT_FILTER = "ret != 0 && ret != -4 && ret != -11"


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
        return self._event(record, pending.op, pending.vm, pending.vcpu)._replace(
            arg=record.values["arg"] & 0xFFFFFFFF, result=result, runner=_runner(record)
        )


def _runner(record: Record) -> Optional[int]:
    return record.values.get("runner", 0 if record.values.get("ran") == 0 else None)


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
        if cmd not in _COLD:
            self._begin(record, "set" if cmd == kvm.SET_TSC_KHZ else "get", vm, vcpu)
        elif vcpu is not None:
            yield from self._cold(record, vm, vcpu, _COLD[cmd])

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
            if cmd in _COLD:
                yield from self._cold(record, vm, vcpu, _COLD[cmd])
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
        return event._replace(result=record.values["khz"], runner=_runner(record))

    def settle(self) -> Iterator[Event]:
        """Nothing waits here: each function's end is a record."""
        return iter(())


def kprobe_events(offset: dict[str, int], module: str) -> list[tuple[str, str, str, str]]:
    """``(name, kind, place and arguments, filter)`` of each kprobe event.

    :param offset: byte offsets, by the names in :data:`btf.VCPU_MEMBERS`.
    :param module: ``"kvm:"``, or empty where KVM is built in.
    """
    file_object = f"+{offset['file.private_data']}(%di)"
    tsc = f"cmd=={kvm.SET_TSC_KHZ:#x} || cmd=={kvm.GET_TSC_KHZ:#x}"
    commands = " || ".join((tsc, *(f"cmd=={cmd:#x}" for cmd in _COLD)))
    of_vm = f"kvm={file_object}:x64 cmd=%si:x32 arg=%dx:x64"
    probes = [
        (
            "enter",
            "p",
            "kvm_arch_vcpu_ioctl",
            f"{_of_vcpu(offset, file_object)} cmd=%si:x32 arg=%dx:x64",
            commands,
        ),
        ("leave", "r64", "kvm_arch_vcpu_ioctl", "ret=$retval:s64", ""),
        ("sregs", "p", "kvm_arch_vcpu_ioctl_set_sregs", _of_vcpu(offset, "%di"), ""),
        ("regs", "p", "kvm_arch_vcpu_ioctl_set_regs", _of_vcpu(offset, "%di"), ""),
        ("vm", "p", "kvm_arch_init_vm", "kvm=%di:x64", ""),
        ("vcpu", "p", "kvm_arch_vcpu_postcreate", _of_vcpu(offset, "%di"), ""),
        ("clock", "p", "kvm_arch_vm_ioctl", of_vm, f"cmd=={kvm.SET_CLOCK:#x}"),
        ("vmenter", "p", "kvm_arch_vm_ioctl", of_vm, tsc),
        ("vmleave", "r", "kvm_arch_vm_ioctl", "ret=$retval:s64", ""),
        ("end", "p", "kvm_arch_destroy_vm", "kvm=%di:x64", ""),
    ]
    return [
        (name, kind, f"{module}{function} {arguments}", filter_)
        for name, kind, function, arguments, filter_ in probes
    ]


def held_up_event(offset: dict[str, int], module: str) -> tuple[str, str, str, str]:
    """The event, as above, that sees the vCPUs we hold up ourselves."""
    file_object = f"+{offset['file.private_data']}(%di)"
    arguments = (
        f"{_of_vcpu(offset, file_object)} khz=+{offset['vcpu.khz']}({file_object}):u32 "
        "cmd=%si:x32 arg=%dx:u64"
    )
    ours = f"cmd=={kvm.GET_TSC_KHZ:#x} && common_pid=={os.getpid()}"
    return "heldup", "p", f"{module}kvm_vcpu_ioctl {arguments}", ours


def _of_vcpu(offset: dict[str, int], vcpu: str) -> str:
    """Fetch arguments; ran is a pointer: runner is a fault where it is null."""
    return (
        f"kvm=+{offset['vcpu.kvm']}({vcpu}):x64 id=+{offset['vcpu.id']}({vcpu}):s32 "
        f"ran=+{offset['vcpu.pid']}({vcpu}):x64 "
        f"runner=+{offset['pid.nr']}(+{offset['vcpu.pid']}({vcpu})):s32"
    )


class FtraceSource:
    """A trace instance and what it says of the calls."""

    capabilities: tuple[int, ...] = ()
    """See :meth:`tscwatch.capture.Source.capabilities`: tracefs is root's."""

    def __init__(self, root: Path) -> None:
        self._kprobes = (root / "kprobe_events").exists()
        self._assembler: Union[Kprobes, Syscalls] = (
            Kprobes() if self._kprobes else Syscalls(_link, _alive)
        )
        attach, function = (
            ("kprobe", "kvm_arch_vcpu_ioctl") if self._kprobes else ("syscall", "sys_enter_ioctl")
        )
        self.info = SourceInfo("ftrace", attach, function)
        self._health = Health({function: False})
        self._backlog: list[Event] = []
        self._offset: dict[str, int] = {}
        """Where a vCPU's members are, once the kprobe events are in place."""
        self._trace = Instance(root, "calls", _buffer_kb(os.cpu_count() or 1))
        try:
            if self._kprobes:
                self._follow_module()
            else:
                self._enable_syscalls()
        except (OSError, KernelUnfit):
            self.close()
            raise

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        if self._kprobes:
            self._follow_module()
        self._trace.wait(0 if self._backlog else timeout)
        events, self._backlog = [*self._backlog, *self._read()], []
        self._health.received += len(events)
        return events

    def _read(self, until: int = 0) -> list[Event]:
        events: list[Event] = []
        for record in self._trace.read(until):
            if isinstance(record, int):
                events.append(Event(now_ns(), "lost", "", 0, 0, "", arg=record))
                continue
            self._health.sent += 1
            events += self._assembler.feed(record)
        return [*events, *self._assembler.settle()]

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.show`.

        The probe that sees them sits on a function that each KVM_RUN passes, so it is there for
        this moment only; what it wrote must be read before it goes.
        """
        if not self._offset or not files:
            return
        event = held_up_event(self._offset, self._module())
        self._trace.define("kprobe_events", *event)
        try:
            hold_up(files)
            self._backlog += self._read(until=now_ns())
        finally:
            self._trace.drop(event[0])

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        self._health.lost = {
            ("kernel", "ring_full"): self._trace.lost,
            ("kernel", "no_return"): self._assembler.no_return + self._trace.missed(),
            ("capture", "unreadable"): self._trace.unreadable,
        }
        return self._health

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._trace.close()

    def _enable_syscalls(self) -> None:
        if not self._trace.has("syscalls"):
            raise KernelUnfit(
                "this kernel has neither kprobe events nor syscall events: use one built with "
                "CONFIG_KPROBE_EVENTS"
            )
        # KVM_ENABLE_CAP is what QEMU may call next after a SET, and it may fail as a SET may.
        commands = (
            *(
                kvm.SET_TSC_KHZ,
                kvm.GET_TSC_KHZ,
                kvm.CREATE_VM,
                kvm.CREATE_VCPU,
                kvm.SET_CLOCK,
                kvm.ENABLE_CAP,
            ),
            *_COLD,
        )
        self._trace.enable("syscalls/sys_exit_ioctl", _EXIT_FILTER)
        self._trace.enable(
            "syscalls/sys_enter_ioctl", " || ".join(f"cmd=={cmd:#x}" for cmd in commands)
        )
        self._health.probes["sys_enter_ioctl"] = True

    def _follow_module(self) -> None:
        """Kprobe events can be defined once KVM is there; the kernel arms them anew by itself
        when the module comes again (trace_kprobe_module_callback)."""
        live = kvm_module.load_number() is not None
        if live and not self._trace.has_defined("enter"):
            self._offset = btf.offsets(btf.kernel_btf("kvm"), btf.VCPU_MEMBERS)
            for event in kprobe_events(self._offset, self._module()):
                self._trace.define("kprobe_events", *event)
        self._health.probes["kvm_arch_vcpu_ioctl"] = live

    @staticmethod
    def _module() -> str:
        return "kvm:" if kvm_module.is_loadable() else ""


def _buffer_kb(cpus: int) -> int:
    least, most = _BUFFER_KB
    return max(least, min(most, _BUFFERS_KB // cpus))


def open_ftrace() -> FtraceSource:
    """ftrace, with kprobe events or syscall events.

    :raises TracefsMissing: tracefs is not mounted.
    :raises KernelUnfit: no events, or the kernel refused them.
    """
    root = tracefs.require()
    try:
        return FtraceSource(root)
    except OSError as error:
        raise KernelUnfit(
            f"the kernel refused a trace instance ({error}): see "
            f"{root}/error_log and whether lockdown is on"
        ) from error


def _alive(tid: int) -> bool:
    return Path(f"/proc/{tid}").exists()


def _link(pid: int, fd: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/fd/{fd}").readlink())
    except OSError:
        return ""
