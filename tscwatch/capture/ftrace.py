"""ftrace through tracefs: no compiler, no headers, no bcc.

If the kernel has kprobes, the events are kprobe events on KVM's cold functions, else syscall
events.  Both live in tscwatch's own trace instance and are filtered in the kernel.

A filter of ftrace runs only after the record is made, so an event on ``kvm_vcpu_ioctl`` would cost
each KVM_RUN a record.  Therefore the kprobe events sit on ``kvm_arch_vcpu_ioctl`` and its
neighbours, which KVM_RUN never reaches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from tscwatch.capture.assembler import COLD_COMMANDS, KprobeAssembler, SyscallAssembler
from tscwatch.capture.existing import poke_existing
from tscwatch.clock import now_ns
from tscwatch.errors import KernelUnfit
from tscwatch.linux import btf, kvm, tracefs
from tscwatch.linux.tracefs import TraceInstance
from tscwatch.model import Event, Health, SourceInfo

_BUFFERS_KB = 16384  # for all CPUs, but per CPU within these bounds; a record has about 100 bytes
_BUFFER_KB = (128, 1024)

# KVM_RUN returns 0, EINTR or EAGAIN. A SET that succeeds returns 0: SyscallAssembler.settle().
_EXIT_FILTER = "ret != 0 && ret != -4 && ret != -11"


def kprobe_events(offset: dict[str, int], module: str) -> list[tuple[str, str, str, str]]:
    """Return ``(name, kind, place and arguments, filter)`` of each kprobe event.

    :param offset: byte offsets, by the names in :data:`kvm.VCPU_MEMBERS`.
    :param module: ``"kvm:"``, or empty if KVM is built in.
    """
    file_object = f"+{offset['file.private_data']}(%di)"
    tsc = f"cmd=={kvm.SET_TSC_KHZ:#x} || cmd=={kvm.GET_TSC_KHZ:#x}"
    commands = " || ".join((tsc, *(f"cmd=={cmd:#x}" for cmd in COLD_COMMANDS)))
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


def existing_vcpus_event(offset: dict[str, int], module: str) -> tuple[str, str, str, str]:
    """Return the event, in the same form, that sees the calls of :func:`poke_existing`."""
    file_object = f"+{offset['file.private_data']}(%di)"
    arguments = (
        f"{_of_vcpu(offset, file_object)} khz=+{offset['vcpu.khz']}({file_object}):u32 "
        "cmd=%si:x32 arg=%dx:u64"
    )
    own_calls = f"cmd=={kvm.GET_TSC_KHZ:#x} && common_pid=={os.getpid()}"
    return "existing", "p", f"{module}kvm_vcpu_ioctl {arguments}", own_calls


def _of_vcpu(offset: dict[str, int], vcpu: str) -> str:
    """Return fetch arguments; ``ran`` is vcpu->pid, without which ``runner`` is not valid."""
    return (
        f"kvm=+{offset['vcpu.kvm']}({vcpu}):x64 id=+{offset['vcpu.id']}({vcpu}):s32 "
        f"ran=+{offset['vcpu.pid']}({vcpu}):x64 "
        f"runner=+{offset['pid.nr']}(+{offset['vcpu.pid']}({vcpu})):s32"
    )


class FtraceSource:
    """A trace instance, and the assembler for its records."""

    capabilities: tuple[int, ...] = ()
    """See :meth:`tscwatch.capture.Source.capabilities`: root may use tracefs without any."""

    def __init__(self, root: Path) -> None:
        self._kprobes = (root / "kprobe_events").exists()
        self._assembler: Union[KprobeAssembler, SyscallAssembler] = (
            KprobeAssembler() if self._kprobes else SyscallAssembler(_link, _alive)
        )
        attach, function = (
            ("kprobe", "kvm_arch_vcpu_ioctl") if self._kprobes else ("syscall", "sys_enter_ioctl")
        )
        self.info = SourceInfo("ftrace", attach, function)
        self._health = Health({function: False})
        self._backlog: list[Event] = []
        self._offset: dict[str, int] = {}
        """Byte offsets of a vCPU's members, once the kprobe events are defined."""
        self._trace = TraceInstance(root, "calls", _buffer_kb(os.cpu_count() or 1))
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
                events.append(Event.lost(now_ns(), record))
                continue
            self._health.sent += 1
            events += self._assembler.feed(record)
        return [*events, *self._assembler.settle(now_ns())]

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`.

        The probe for them sits on ``kvm_vcpu_ioctl``, through which each KVM_RUN goes, so it is
        removed at once; its records must be read before that.
        """
        if not self._offset or not files:
            return
        event = existing_vcpus_event(self._offset, self._module())
        self._trace.define("kprobe_events", *event)
        try:
            poke_existing(files)
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
        # QEMU may call KVM_ENABLE_CAP right after a SET, and it can fail with the same errno.
        commands = (
            *(
                kvm.SET_TSC_KHZ,
                kvm.GET_TSC_KHZ,
                kvm.CREATE_VM,
                kvm.CREATE_VCPU,
                kvm.SET_CLOCK,
                kvm.ENABLE_CAP,
            ),
            *COLD_COMMANDS,
        )
        self._trace.enable("syscalls/sys_exit_ioctl", _EXIT_FILTER)
        self._trace.enable(
            "syscalls/sys_enter_ioctl", " || ".join(f"cmd=={cmd:#x}" for cmd in commands)
        )
        self._health.probes["sys_enter_ioctl"] = True

    def _follow_module(self) -> None:
        """Define the kprobe events once KVM is loaded.

        If the module is loaded again later, the kernel itself enables them again
        (``trace_kprobe_module_callback``).
        """
        live = kvm.module_generation() is not None
        if live and not self._trace.has_defined("enter"):
            self._offset = btf.offsets(btf.kernel_btf("kvm"), kvm.VCPU_MEMBERS)
            for event in kprobe_events(self._offset, self._module()):
                self._trace.define("kprobe_events", *event)
        self._health.probes["kvm_arch_vcpu_ioctl"] = live

    @staticmethod
    def _module() -> str:
        return "kvm:" if kvm.is_module() else ""


def _buffer_kb(cpus: int) -> int:
    least, most = _BUFFER_KB
    return max(least, min(most, _BUFFERS_KB // cpus))


def open_ftrace() -> FtraceSource:
    """Open ftrace with kprobe events or syscall events.

    :raises TracefsMissing: tracefs is not mounted.
    :raises KernelUnfit: the kernel has no such events, or refused them.
    """
    root = tracefs.find_tracefs()
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
