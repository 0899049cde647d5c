"""Capture TSC calls with ftrace, which needs neither a compiler nor kernel headers nor bcc.

If the kernel has kprobes, use kprobe events on KVM's functions, else the events of the ioctl
syscall.  Record them in a trace instance of tscwatch's own, and filter them in the kernel.

ftrace applies an event's filter only to a complete record, so an event on ``kvm_vcpu_ioctl`` would
make each KVM_RUN write a record and discard it.  Therefore the kprobe events are on
``kvm_arch_vcpu_ioctl`` and other functions that KVM_RUN never reaches: ``kvm_vcpu_ioctl`` handles
KVM_RUN, SET_REGS and SET_SREGS itself, and passes the TSC calls on to ``kvm_arch_vcpu_ioctl``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Union

from tscwatch.capture.assembler import COLD_COMMANDS, KprobeAssembler, SyscallAssembler
from tscwatch.capture.existing import poke_existing
from tscwatch.clock import now_ns
from tscwatch.errors import KernelUnfit
from tscwatch.linux import btf, kvm, tracefs
from tscwatch.linux.kprobes import KprobesSwitch
from tscwatch.linux.tracefs import TraceInstance
from tscwatch.model import Event, Health, SourceInfo

log = logging.getLogger(__name__)

_BUFFERS_KB = 16384  # of all CPUs together; a record has about 100 bytes
_BUFFER_KB = (128, 1024)  # least and most per CPU

# These are the results of KVM_RUN: 0, EINTR and EAGAIN. A SET that succeeds returns 0 as well, so
# it has no exit record; SyscallAssembler.settle() ends it.
_EXIT_FILTER = "ret != 0 && ret != -4 && ret != -11"


def kprobe_events(offset: dict[str, int], module: str) -> list[tuple[str, str, str, str]]:
    """Return ``(name, kind, function and fetch arguments, filter)`` of each kprobe event.

    The first three are as in :meth:`TraceInstance.define`.  On x86-64, ``%di``, ``%si`` and ``%dx``
    are a function's first three arguments: ``file``, ``cmd`` and ``arg`` of an ioctl.

    :param offset: byte offsets, by the labels in :data:`tscwatch.linux.kvm.VCPU_MEMBERS`.
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
    """Return the kprobe event for the calls of :func:`poke_existing`, as :func:`kprobe_events`.

    It has to be on ``kvm_vcpu_ioctl``, which refuses those calls itself.
    """
    file_object = f"+{offset['file.private_data']}(%di)"
    arguments = (
        f"{_of_vcpu(offset, file_object)} khz=+{offset['vcpu.khz']}({file_object}):u32 "
        "cmd=%si:x32 arg=%dx:u64"
    )
    own_calls = f"cmd=={kvm.GET_TSC_KHZ:#x} && common_pid=={os.getpid()}"
    return "existing", "p", f"{module}kvm_vcpu_ioctl {arguments}", own_calls


def _of_vcpu(offset: dict[str, int], vcpu: str) -> str:
    """Return the fetch arguments that read a vCPU.

    ``ran`` is the pointer ``vcpu->pid``, and ``runner`` the thread id behind it: see
    :func:`tscwatch.capture.assembler.runner_of`.

    :param vcpu: the fetch argument whose value is the address of the ``struct kvm_vcpu``.
    """
    return (
        f"kvm=+{offset['vcpu.kvm']}({vcpu}):x64 id=+{offset['vcpu.id']}({vcpu}):s32 "
        f"ran=+{offset['vcpu.pid']}({vcpu}):x64 "
        f"runner=+{offset['pid.nr']}(+{offset['vcpu.pid']}({vcpu})):s32"
    )


class FtraceSource:
    """A trace instance, and the assembler of its records.

    :param root: where tracefs is mounted.
    :raises OSError: the kernel refused the trace instance or an event.
    :raises KernelUnfit: the kernel has neither kind of event, or no BTF.
    """

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
        """Events that :meth:`report_existing` has read; the next poll returns them."""
        self._offset: dict[str, int] = {}
        """Byte offsets as in :func:`kprobe_events`; empty until these events are defined."""
        self._missed = 0
        """Hits of kprobes that the kernel could not record, as of the last :meth:`restore`."""
        self._switch = KprobesSwitch()
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
        if self._trace.is_behind:  # what a call's later records show is still unread
            return events
        return [*events, *self._assembler.settle(now_ns())]

    @property
    def is_behind(self) -> bool:
        """See :meth:`tscwatch.capture.Source.is_behind`."""
        return self._trace.is_behind

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`.

        The event for them is on ``kvm_vcpu_ioctl``, where it costs each KVM_RUN, so remove it at
        once.  Read its records before that, because trace_pipe cannot format the records of an
        event that no longer exists.
        """
        if not self._offset or not files:
            return
        event = existing_vcpus_event(self._offset, self._module())
        try:
            self._define([event])
        except OSError as error:
            log.warning(
                "the kernel refused a probe on kvm_vcpu_ioctl (%s): each vCPU that is older than "
                "tscwatch is tracked from its next TSC call on",
                error,
            )
            return
        try:
            poke_existing(files)
            self._backlog += self._read(until=now_ns())
        finally:
            self._trace.drop(event[0])

    def restore(self) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.restore`.

        :raises KernelUnfit: KVM was loaded for the first time, and the kernel refused an event.
        """
        if self._kprobes:
            try:
                self._follow_module()
            except OSError as error:
                if kvm.module_generation() is not None:
                    raise KernelUnfit(
                        f"the kernel refused a kprobe event ({error}): see error_log in tracefs "
                        "and whether lockdown is on"
                    ) from error
            self._missed = self._trace.missed()
        switched_on = self._kprobes and self._switch.read()
        return [Event.lost(now_ns(), 1)] if self._trace.restore() or switched_on else []

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        self._health.lost = {
            ("kernel", "disabled"): self._trace.gaps + self._switch.gaps,
            ("kernel", "ring_full"): self._trace.lost,
            ("kernel", "no_return"): self._assembler.no_return + self._missed,
            ("capture", "unidentified"): self._assembler.unidentified,
            ("capture", "unreadable"): self._trace.unreadable,
        }
        self._health.foreign = self._assembler.foreign
        is_complete = self._trace.is_complete and self._switch.is_on
        probes = {name: on and is_complete for name, on in self._health.probes.items()}
        return replace(self._health, probes=probes)

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._trace.close()

    def _enable_syscalls(self) -> None:
        if not self._trace.has("syscalls"):
            raise KernelUnfit(
                "this kernel has neither kprobe events nor syscall events: use one built with "
                "CONFIG_KPROBE_EVENTS"
            )
        # KVM_ENABLE_CAP: QEMU may call it right after a SET, and it can fail with a SET's errno.
        # Its entry record shows that the exit which follows is not that of the SET.
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
        """Define the kprobe events when KVM is loaded for the first time.

        When the module is unloaded and loaded again, the kernel itself puts them back on its
        functions (``trace_kprobe_module_callback``).
        """
        live = kvm.module_generation() is not None
        if live and not self._offset:
            offset = btf.offsets(btf.kernel_btf("kvm"), kvm.VCPU_MEMBERS)
            self._define(kprobe_events(offset, self._module()))
            self._offset = offset
        self._health.probes["kvm_arch_vcpu_ioctl"] = live

    def _define(self, events: Sequence[tuple[str, str, str, str]]) -> None:
        """Define all of these events, or none if the kernel refuses one."""
        try:
            for event in events:
                self._trace.define("kprobe_events", *event)
        except OSError:
            for name, *_ in events:
                if self._trace.has_defined(name):
                    self._trace.drop(name)
            raise

    @staticmethod
    def _module() -> str:
        return "kvm:" if kvm.is_module() else ""


def _buffer_kb(cpus: int) -> int:
    """Return the size of each CPU's buffer in KiB."""
    least, most = _BUFFER_KB
    return max(least, min(most, _BUFFERS_KB // cpus))


def open_ftrace() -> FtraceSource:
    """Open ftrace with kprobe events or syscall events.

    :raises TracefsMissing: tracefs is not mounted.
    :raises KernelUnfit: the kernel has neither kind of event, has no BTF, or refused an event.
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
