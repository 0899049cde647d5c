"""eBPF through bcc: kprobes on KVM, or syscall tracepoints if the kernel has no kprobes.

The programs are in ``bpf/``; the constants here that mirror them are checked by a test.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Optional

from tscwatch.capture.existing import poke_existing
from tscwatch.clock import now_ns, unix_ns
from tscwatch.errors import KernelUnfit, TscwatchError
from tscwatch.linux import bpf, btf, compiler, kvm, syscall, tracefs
from tscwatch.model import After, Event, Health, Op, SourceInfo

log = logging.getLogger(__name__)

_RING_PAGES = 256
_MAPS = ("events", "counts", "observer", "in_flight", "calls", "marks", "first_vcpus", "spent")

# struct event in bpf/tscwatch.h
_EVENT = struct.Struct("=QQQqIIIiIiiBb16s2x")
_OPS: tuple[Op, ...] = (
    "vm_create",
    "vm_end",
    "vcpu_create",
    "vcpu_found",
    "vcpu_setup",
    "get",
    "set",
    "lost",
)
_AFTERS: tuple[Optional[After], ...] = (None, "create", "cpuid", "sregs", "regs")
_SENT, _RING_FULL, _NO_RETURN, _NO_SLOT, _THROTTLED = range(5)

# deploy/systemd/tscwatch.service has the reason for CAP_SYS_ADMIN.
_BPF = (syscall.CAP_BPF, syscall.CAP_PERFMON, syscall.CAP_SYS_ADMIN)

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

_KPROBES = (
    ("kvm_vcpu_ioctl", "enter_vcpu_ioctl"),
    ("kvm_arch_vm_ioctl", "enter_vm_ioctl"),
    ("kvm_arch_init_vm", "enter_init_vm"),
    ("kvm_arch_vcpu_postcreate", "enter_vcpu_postcreate"),
    ("kvm_arch_destroy_vm", "enter_destroy_vm"),
)
_RETURN = "kvm_arch_vcpu_ioctl"
_VM_RETURN = "kvm_arch_vm_ioctl"


class BpfSource:
    """A loaded program and the reader of its ring buffer."""

    capabilities = _BPF
    """See :meth:`tscwatch.capture.Source.capabilities`: before Linux 5.19, to read maps."""

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
        if timeout:  # without one, also read records that have not caused a wake-up yet
            self._ring.wait(timeout)
        batch = [_event(record) for record in self._ring.records()]
        self._health.received += len(batch)
        ring_full = self._counters.sum(_RING_FULL)
        lost = ring_full - self._health.lost["kernel", "ring_full"]
        if lost:
            self._health.lost["kernel", "ring_full"] = ring_full
            batch.insert(0, Event.lost(now_ns(), lost))
        return batch

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        poke_existing(files)

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        self._health.sent = self._counters.sum(_SENT)
        self._health.lost["kernel", "no_return"] = self._counters.sum(_NO_RETURN)
        self._health.lost["kernel", "no_slot"] = self._counters.sum(_NO_SLOT)
        self._health.lost["kernel", "throttled"] = self._counters.sum(_THROTTLED)
        return self._health

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._ring.close()
        self._loaded.close()


class KprobeSource:
    """Kprobes on KVM, attached again whenever the kvm module is loaded."""

    capabilities = _BPF
    """See :meth:`tscwatch.capture.Source.capabilities`: attaching again takes them."""

    def __init__(self) -> None:
        self.info = SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl")
        self._source: Optional[BpfSource] = None
        self._module: Optional[int] = None
        self._attached: list[int] = []
        self._probes = {function: False for function, _ in (*_KPROBES, (_RETURN, ""))}
        try:
            self._follow_module()
        except TscwatchError:
            self.close()
            raise

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        self._follow_module()
        if self._source is None:
            time.sleep(timeout)
            return []
        return self._source.poll(timeout)

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        if self._source is not None:
            self._source.report_existing(files)

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        return self._source.health() if self._source else Health(self._probes)

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        if self._source is not None:
            self._detach()
            self._source.close()

    def _follow_module(self) -> None:
        module = kvm.module_generation()
        if module == self._module:
            return
        if self._module is not None:
            log.warning("the kvm module was unloaded")
            self._detach()
        self._module = module
        if module is not None:
            if self._source is None:
                offsets = btf.offsets(btf.kernel_btf("kvm"), kvm.VCPU_MEMBERS)
                loaded = _load("kprobe.c", offsets, bpf.KPROBE)
                self._source = BpfSource(self.info, loaded, self._probes)
            self._attach(self._source.functions)

    def _attach(self, functions: Mapping[str, int]) -> None:
        leave = functions["leave_ioctl"]
        for function, handler in _KPROBES:
            self._probes[function] = self._try_attach(functions[handler], function, is_return=False)
        if not self._probes[_KPROBES[0][0]]:
            raise KernelUnfit("the kernel refused a kprobe on kvm_vcpu_ioctl: see dmesg")
        self._probes[_RETURN] = self._try_attach(leave, _RETURN, is_return=True)
        if not self._probes[_RETURN]:
            # A return probe here costs every KVM_RUN, but the kernel offers no other place.
            self.info = self.info._replace(attach="kprobe (return probe on the hot path)")
            self._try_attach(leave, "kvm_vcpu_ioctl", is_return=True)
        self._try_attach(leave, _VM_RETURN, is_return=True)

    def _try_attach(self, handler: int, function: str, is_return: bool) -> bool:
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
    """Open syscall tracepoints; KVM's files are recognised by the kernel's own name for them.

    :raises TracefsMissing: the tracepoints' ids are read from tracefs.
    :raises KernelUnfit: the kernel has no BTF, or refused the program.
    :raises BccMissing: this interpreter has no bcc.
    :raises HeadersMissing: bcc has no kernel headers to compile with.
    """
    tracefs.find_tracefs()
    offsets = btf.offsets(btf.kernel_btf("kvm"), (*kvm.VCPU_MEMBERS, *_FILE_MEMBERS))
    loaded = _load("tracepoint.c", offsets, bpf.TRACEPOINT)
    source = BpfSource(
        SourceInfo("bcc", "tracepoint", "sys_enter_ioctl"),
        loaded,
        {"sys_enter_ioctl": True, "sys_exit_ioctl": True},
    )
    try:
        for name, function in loaded.functions.items():
            loaded.take_ownership(bpf.attach_tracepoint(function, f"syscalls/{name}"))
    except TscwatchError:
        source.close()
        raise
    return source


def _load(program: str, offsets: Mapping[str, int], kind: int) -> bpf.LoadedProgram:
    macros = {name.upper().replace(".", "_") + "_OFFSET": at for name, at in offsets.items()}
    macros["RING_PAGES"] = _RING_PAGES
    loaded = bpf.LoadedProgram(compiler.compile_program(program, macros, _MAPS), kind)
    bpf.set_first_element(loaded.maps["observer"], os.getpid())
    return loaded


def _event(raw: bytes) -> Event:
    ts, vm, arg, result, pid, tid, op_number, vcpu, sync, runner, fd, after, ran, comm = (
        _EVENT.unpack(raw)
    )
    op = _OPS[op_number - 1]
    if op == "vcpu_found":  # tscwatch's own call; its argument is the VMM's pid
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
    if op == "set":
        return arg
    return result if op in ("get", "vcpu_found") and result >= 0 else None
