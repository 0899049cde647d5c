"""Capture TSC calls with eBPF programs: kprobes on KVM, or tracepoints of the ioctl syscall.

The programs are in ``bpf/``; their bytecode is the package's, or bcc compiles them
(:mod:`tscwatch.linux.compiler`).  They write their events to a BPF ring buffer.
A test compares the constants here that mirror the C sources with those sources.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

from tscwatch.capture.existing import poke_existing
from tscwatch.clock import now_ns, unix_ns
from tscwatch.errors import KernelUnfit, TscwatchError
from tscwatch.linux import bpf, btf, compiler, kvm, syscall, tracefs
from tscwatch.linux.kprobes import KprobesSwitch
from tscwatch.model import After, Event, Health, Op, SourceInfo

log = logging.getLogger(__name__)

_RING_PAGES = 256
_MAPS = (
    "events",
    "counts",
    "own_pid",
    "in_flight",
    "calls",
    "marks",
    "first_vcpus",
    "spent",
    "rest",
)

# struct event, enum op (which begins at 1), enum after, enum count and enum rest in bpf/tscwatch.h
_EVENT = struct.Struct("=QQQqIIIiIiiBb16s2x")
_OPS: tuple[Op, ...] = (
    "vm_create",
    "vm_started",
    "vm_end",
    "vcpu_create",
    "vcpu_found",
    "vcpu_setup",
    "get",
    "set",
    "lost",
)
_AFTERS: tuple[Optional[After], ...] = (None, "create", "cpuid", "sregs", "regs")
_SENT, _RING_FULL, _NO_RETURN, _NO_SLOT, _THROTTLED, _FOREIGN = range(6)
_REST = ("rest_of_enter", "rest_of_exit")

# deploy/systemd/tscwatch.service has the reason for CAP_SYS_ADMIN.
_CAPABILITIES = (syscall.CAP_BPF, syscall.CAP_PERFMON, syscall.CAP_SYS_ADMIN)

# What bpf/tracepoint.c follows to find a descriptor's file, as in kvm.VCPU_MEMBERS.
_FILE_MEMBERS = (
    ("task.files", "task_struct", "files"),
    ("files.fdt", "files_struct", "fdt"),
    ("fdtable.max_fds", "fdtable", "max_fds"),
    ("fdtable.fd", "fdtable", "fd"),
    ("file.inode", "file", "f_inode"),
    ("file.dentry", "file", "f_path.dentry"),
    ("inode.sb", "inode", "i_sb"),
    ("super_block.magic", "super_block", "s_magic"),
    ("dentry.name", "dentry", "d_name.name"),
)

_TRACEPOINT_MEMBERS = (*kvm.VCPU_MEMBERS, *_FILE_MEMBERS)
_KPROBE, _TRACEPOINT = (
    compiler.Source(file, tuple(label for label, *_ in members), {"RING_PAGES": _RING_PAGES}, _MAPS)
    for file, members in (("kprobe.c", kvm.VCPU_MEMBERS), ("tracepoint.c", _TRACEPOINT_MEMBERS))
)

# Each kernel function, and the function in bpf/kprobe.c that runs at its entry.
_KPROBES = (
    ("kvm_vcpu_ioctl", "enter_vcpu_ioctl"),
    ("kvm_arch_vm_ioctl", "enter_vm_ioctl"),
    ("kvm_arch_init_vm", "enter_init_vm"),
    ("kvm_arch_vcpu_postcreate", "enter_vcpu_postcreate"),
    ("kvm_arch_destroy_vm", "enter_destroy_vm"),
)
_VCPU_RETURN = "kvm_arch_vcpu_ioctl"
_VM_RETURN = "kvm_arch_vm_ioctl"

# The exit comes first: a call of which only the entry was seen would count as in flight for ever.
_TRACEPOINTS = ("sys_exit_ioctl", "sys_enter_ioctl")


class BpfSource:
    """A loaded program and the reader of its ring buffer.

    :param probes: the state of each probe, as in :attr:`tscwatch.model.Health.probes`.
    """

    capabilities: tuple[int, ...] = ()
    """See :meth:`tscwatch.capture.Source.capabilities`: the ring and the counters are mapped."""
    is_behind = False
    """See :meth:`tscwatch.capture.Source.is_behind`: a poll reads the whole ring."""

    def __init__(
        self, info: SourceInfo, loaded: bpf.LoadedProgram, probes: dict[str, bool]
    ) -> None:
        self.info = info
        self.functions = loaded.functions
        self._loaded = loaded
        self._counters = bpf.Counters(loaded.maps["counts"])
        self._ring = bpf.Ring(loaded.maps["events"], _RING_PAGES * mmap.PAGESIZE)
        self._health = Health(probes, lost={("kernel", "ring_full"): 0})

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        if timeout:
            self._ring.wait(timeout)
        batch = [_event(record) for record in self._ring.records()]
        self._health.received += len(batch)
        ring_full = self._counters[_RING_FULL]
        lost = ring_full - self._health.lost["kernel", "ring_full"]
        if lost:
            self._health.lost["kernel", "ring_full"] = ring_full
            # The loss may have preceded any event of this batch, which must stay in order.
            batch.insert(0, Event.lost(batch[0].ts if batch else now_ns(), lost))
        return batch

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        poke_existing(files)

    def restore(self) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.restore`.

        Nobody else can detach the programs: they belong to file descriptors of this process.
        """
        self._health.skipped = sum(map(bpf.skipped_runs, self.functions.values()))
        return []

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        self._health.sent = self._counters[_SENT]
        self._health.lost["kernel", "no_return"] = self._counters[_NO_RETURN]
        self._health.lost["kernel", "no_slot"] = self._counters[_NO_SLOT]
        self._health.lost["kernel", "throttled"] = self._counters[_THROTTLED]
        self._health.foreign = self._counters[_FOREIGN]
        return self._health

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._ring.close()
        self._counters.close()
        self._loaded.close()


class KprobeSource:
    """Kprobes on KVM, attached each time the kvm module is loaded.

    :raises TscwatchError: see :func:`open_kprobe`.
    """

    capabilities = _CAPABILITIES
    """See :meth:`tscwatch.capture.Source.capabilities`: the kernel requires them for attaching."""
    is_behind = False
    """See :meth:`tscwatch.capture.Source.is_behind`: a poll reads the whole ring."""

    def __init__(self) -> None:
        self.info = SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl")
        self._source: Optional[BpfSource] = None
        self._module: Optional[int] = None
        self._attached: list[int] = []
        self._switch = KprobesSwitch()
        self._probes = {function: False for function, _ in (*_KPROBES, (_VCPU_RETURN, ""))}
        try:
            self._follow_module()
            if self._source is None:  # if bcc is missing, fail while another source can be chosen
                compiler.get_program(_KPROBE)
        except TscwatchError:
            self.close()
            raise

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        if self._source is None:
            time.sleep(timeout)
            return []
        return self._source.poll(timeout)

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        if self._source is not None:
            self._source.report_existing(files)

    def restore(self) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.restore`."""
        self._follow_module()
        if self._source is not None:
            self._source.restore()
        return [Event.lost(now_ns(), 1)] if self._switch.read() else []

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        health = self._source.health() if self._source else Health(self._probes)
        probes = {name: on and self._switch.is_on for name, on in health.probes.items()}
        lost = {**health.lost, ("kernel", "disabled"): self._switch.gaps}
        return replace(health, probes=probes, lost=lost)

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        if self._source is not None:
            self._detach()
            self._source.close()

    def _follow_module(self) -> None:
        """Attach the kprobes after each load of the kvm module, and detach them after it is gone.

        The program is loaded once and kept.
        """
        module = kvm.module_generation()
        if module == self._module:
            return
        if self._module is not None:
            log.warning("the kvm module was unloaded")
            self._detach()
        self._module = module
        if module is not None:
            if self._source is None:
                loaded = _load(_KPROBE, kvm.VCPU_MEMBERS, bpf.KPROBE)
                self.info = self.info._replace(program=loaded.origin)
                self._source = BpfSource(self.info, loaded, self._probes)
            self._attach(self._source.functions)

    def _attach(self, functions: Mapping[str, int]) -> None:
        leave = functions["leave_ioctl"]
        for function, handler in _KPROBES:
            self._probes[function] = self._try_attach(functions[handler], function, is_return=False)
        if not self._probes[_KPROBES[0][0]]:
            raise KernelUnfit("the kernel refused a kprobe on kvm_vcpu_ioctl: see dmesg")
        self._probes[_VCPU_RETURN] = self._try_attach(leave, _VCPU_RETURN, is_return=True)
        if not self._probes[_VCPU_RETURN]:
            # This return probe costs each KVM_RUN, but no other function sees the call's result.
            self.info = self.info._replace(attach="kprobe (return probe on the hot path)")
            self._try_attach(leave, "kvm_vcpu_ioctl", is_return=True)
        self._try_attach(leave, _VM_RETURN, is_return=True)

    def _try_attach(self, handler: int, function: str, is_return: bool) -> bool:
        """Attach a kprobe and return True; if the kernel refuses it, log that and return False."""
        try:
            self._attached.append(bpf.attach_kprobe(handler, function, is_return))
        except KernelUnfit as error:
            log.warning("%s", error)
            return False
        return True

    def _detach(self) -> None:
        for probe in self._attached:
            os.close(probe)
        self._attached.clear()
        self._probes.update(dict.fromkeys(self._probes, False))


def open_kprobe() -> KprobeSource:
    """Open kprobes on ``kvm_vcpu_ioctl`` and its neighbours.

    :raises KernelUnfit: the kernel has no kprobes or no BTF, or refused the program.
    :raises BccMissing: this interpreter has no bcc.
    :raises HeadersMissing: bcc has no kernel headers to compile with.
    """
    if not bpf.KPROBE_PMU.exists():
        raise KernelUnfit(
            "this kernel has no kprobes: use one built with CONFIG_KPROBES, or --source ftrace"
        )
    return KprobeSource()


def open_tracepoint() -> BpfSource:
    """Open the tracepoints of the ioctl syscall.

    The program recognises KVM's files by the names that the kernel gave them.

    :raises TracefsMissing: the tracepoints' ids are read from tracefs.
    :raises KernelUnfit: the kernel has no BTF, or refused the program.
    :raises BccMissing: this interpreter has no bcc.
    :raises HeadersMissing: bcc has no kernel headers to compile with.
    """
    tracefs.find_tracefs()
    loaded = _load(_TRACEPOINT, _TRACEPOINT_MEMBERS, bpf.TRACEPOINT)
    source = BpfSource(
        SourceInfo("bcc", "tracepoint", "sys_enter_ioctl", loaded.origin),
        loaded,
        dict.fromkeys(_TRACEPOINTS, True),
    )
    try:
        for name in _TRACEPOINTS:
            function = loaded.functions[name]
            loaded.take_ownership(bpf.attach_tracepoint(function, f"syscalls/{name}"))
    except TscwatchError:
        source.close()
        raise
    return source


def is_packaged() -> bool:
    """Return whether the package has the bytecode, so that neither bcc nor headers are needed."""
    return all(map(compiler.is_packaged, (_KPROBE, _TRACEPOINT)))


def precompile(directory: str) -> None:
    """Compile the programs for a package, which must have them in its ``tscwatch/bpf``.

    :raises TscwatchError: see :func:`compiler.precompile`.
    """
    compiler.precompile((_KPROBE, _TRACEPOINT), Path(directory))


def _load(
    source: compiler.Source, members: Sequence[tuple[str, str, str]], program_type: int
) -> bpf.LoadedProgram:
    """Load a program with the running kernel's offsets.

    :param members: those of ``source.offsets``.
    :param program_type: :data:`bpf.KPROBE` or :data:`bpf.TRACEPOINT`.
    """
    offsets = btf.offsets(btf.kernel_btf("kvm"), members)
    in_order = [offsets[label] for label in source.offsets]
    loaded = bpf.LoadedProgram(compiler.get_program(source), in_order, program_type)
    bpf.set_element(loaded.maps["own_pid"], 0, os.getpid())
    for index, name in enumerate(_REST):
        if name in loaded.functions:
            bpf.set_element(loaded.maps["rest"], index, loaded.functions[name])
    return loaded


def _event(raw: bytes) -> Event:
    """Return the event for a ``struct event``."""
    ts, vm, arg, result, pid, tid, op_number, vcpu, sync, runner, fd, after, ran, comm = (
        _EVENT.unpack(raw)
    )
    op = _OPS[op_number - 1]
    if op == "vcpu_found":  # a call of poke_existing(): its argument is the pid of the VMM
        pid, tid, comm = arg, arg, b""
    return Event(
        ts=unix_ns(ts),
        op=op,
        vm=f"kvm:{vm:x}" if vm else "",
        pid=pid,
        tid=tid,
        comm=comm.split(b"\0")[0].decode("utf-8", "backslashreplace"),
        vcpu=None if vcpu < 0 else vcpu,
        khz=_khz(op, arg, result),
        status=min(result, 0),
        lost_events=arg if op == "lost" else 0,
        after=_AFTERS[after],
        sync=sync,
        runner=runner,
        ran=None if ran < 0 else bool(ran),
        fd=None if fd < 0 else fd,
    )


def _khz(op: Op, arg: int, result: int) -> Optional[int]:
    """Return :attr:`Event.khz` from the argument and the result of a call."""
    if op == "set":
        return arg
    return result if op in ("get", "vcpu_found") and result >= 0 else None
