"""eBPF through bcc: kprobes on KVM, or syscall tracepoints where a kernel has no kprobes."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Optional

from tscwatch.capture import Health, SourceInfo, btf, headers, kvm_module, tracefs
from tscwatch.capture.hold_up import hold_up
from tscwatch.clock import now_ns, unix_ns
from tscwatch.errors import BccMissing, KernelUnfit
from tscwatch.model import After, Event, Op

log = logging.getLogger(__name__)

_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
_RING_PAGES = 64

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
)
_AFTERS: tuple[Optional[After], ...] = (None, "create", "cpuid", "sregs", "regs")
_SENT, _RING_FULL, _NO_RETURN, _NO_SLOT = range(4)

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
    """One of the programs in ``bpf/``, attached."""

    def __init__(self, info: SourceInfo, bpf: Any, probes: dict[str, bool]) -> None:
        self.info = info
        self._bpf = bpf
        self._batch: list[Event] = []
        self._health = Health(probes, lost={("kernel", "ring_full"): 0})
        bpf["events"].open_ring_buffer(self._receive)

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        if timeout:
            self._bpf.ring_buffer_poll(int(timeout * 1000))
        else:  # also what the kernel has not woken anybody for yet
            self._bpf.ring_buffer_consume()
        batch, self._batch = self._batch, []
        self._health.received += len(batch)
        ring_full = self._count(_RING_FULL)
        lost = ring_full - self._health.lost["kernel", "ring_full"]
        if lost:
            self._health.lost["kernel", "ring_full"] = ring_full
            batch.insert(0, Event(now_ns(), "lost", "", 0, 0, "", arg=lost))
        return batch

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.show`."""
        hold_up(files)

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        self._health.sent = self._count(_SENT)
        self._health.lost["kernel", "no_return"] = self._count(_NO_RETURN)
        self._health.lost["kernel", "no_slot"] = self._count(_NO_SLOT)
        return self._health

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._bpf.cleanup()

    def _count(self, which: int) -> int:
        counts = self._bpf["counts"]
        return int(counts.sum(counts.Key(which)).value)

    def _receive(self, _context: object, data: int, size: int) -> int:
        self._batch.append(_event(ctypes.string_at(data, size)))
        return 0


class KprobeSource:
    """Kprobes on KVM that follow the kvm module: it may come late, go, and come again."""

    def __init__(self) -> None:
        self.info = SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl")
        self._source: Optional[BpfSource] = None
        self._bpf: Any = None
        self._module: Optional[int] = None
        self._attached: list[tuple[str, bool]] = []
        self._probes = {function: False for function, _ in (*_KPROBES, (_RETURN, ""))}
        self._follow_module()

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`."""
        self._follow_module()
        if self._source is None:
            time.sleep(timeout)
            return []
        return self._source.poll(timeout)

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.show`."""
        if self._source is not None:
            self._source.show(files)

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        return self._source.health() if self._source else Health(self._probes)

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        if self._source is not None:
            self._detach()
            self._source.close()

    def _follow_module(self) -> None:
        module = kvm_module.load_number()
        if module == self._module:
            return
        if self._module is not None:
            log.warning("the kvm module was unloaded")
            self._detach()
        self._module = module
        if module is not None:
            if self._source is None:
                self._load()
            self._attach()

    def _load(self) -> None:
        self._bpf = _compile("kprobe.c", btf.offsets(btf.kernel_btf("kvm"), btf.VCPU_MEMBERS))
        self._source = BpfSource(self.info, self._bpf, self._probes)

    def _attach(self) -> None:
        for function, handler in _KPROBES:
            self._probes[function] = self._try(function, handler, is_return=False)
        if not self._probes[_KPROBES[0][0]]:
            raise KernelUnfit("the kernel refused a kprobe on kvm_vcpu_ioctl: see dmesg")
        self._probes[_RETURN] = self._try(_RETURN, "leave_ioctl", is_return=True)
        if not self._probes[_RETURN]:
            # Then every KVM_RUN pays for a return probe; there is no other place left.
            self.info = self.info._replace(attach="kprobe (return probe on the hot path)")
            self._try("kvm_vcpu_ioctl", "leave_ioctl", is_return=True)
        self._try(_VM_RETURN, "leave_ioctl", is_return=True)

    def _try(self, function: str, handler: str, is_return: bool) -> bool:
        attach = self._bpf.attach_kretprobe if is_return else self._bpf.attach_kprobe
        try:
            with _explained(f"attach to {function}"):
                attach(event=function, fn_name=handler)
        except KernelUnfit as error:
            log.warning("%s", error)
            return False
        self._attached.append((function, is_return))
        return True

    def _detach(self) -> None:
        for function, is_return in self._attached:
            detach = self._bpf.detach_kretprobe if is_return else self._bpf.detach_kprobe
            with _explained(f"detach from {function}"):
                detach(event=function)
        self._attached.clear()
        self._probes.update(dict.fromkeys(self._probes, False))


def open_kprobe() -> KprobeSource:
    """Kprobes on ``kvm_vcpu_ioctl`` and its neighbours.

    :raises KernelUnfit: no kprobes, no BTF, or the kernel refused the program.
    :raises BccMissing: no bcc in this interpreter.
    :raises HeadersMissing: nothing for bcc to compile with.
    """
    if not _KPROBE_PMU.exists():
        raise KernelUnfit(
            "this kernel has no kprobes: use one built with CONFIG_KPROBES, or --source ftrace"
        )
    return KprobeSource()


def open_tracepoint() -> BpfSource:
    """Syscall tracepoints; a file is known for KVM's by what the kernel says of it.

    :raises TracefsMissing: bcc reads the tracepoints' formats there.
    :raises KernelUnfit: no BTF, or the kernel refused the program.
    :raises BccMissing: no bcc in this interpreter.
    :raises HeadersMissing: nothing for bcc to compile with.
    """
    tracefs.require()
    found = btf.offsets(btf.kernel_btf("kvm"), (*btf.VCPU_MEMBERS, *_FILE_MEMBERS))
    info = SourceInfo("bcc", "tracepoint", "sys_enter_ioctl")
    probes = {"sys_enter_ioctl": True, "sys_exit_ioctl": True}
    return BpfSource(info, _compile("tracepoint.c", found), probes)


def _compile(program: str, offsets: Mapping[str, int]) -> Any:
    bcc = _import_bcc()
    directory = resources.files("tscwatch") / "bpf"
    text = (directory / "tscwatch.h").read_text() + (directory / program).read_text()
    macros = {name.upper().replace(".", "_") + "_OFFSET": at for name, at in offsets.items()}
    macros |= {"RING_PAGES": _RING_PAGES, "OBSERVER_PID": os.getpid()}
    flags = [f"-D{macro}={value}" for macro, value in macros.items()]
    with headers.for_bcc(), _explained(f"load bpf/{program}"):
        return bcc.BPF(text=text, cflags=flags)


def _import_bcc() -> Any:
    try:
        return import_module("bcc")
    except ImportError as error:
        raise BccMissing(
            f"{sys.executable} has no bcc: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
            "(Fedora, EL), and run tscwatch with the distribution's python3"
        ) from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what bcc throws (a bare Exception) and prints (on descriptor 2) into our error."""
    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except Exception as error:  # bcc raises no narrower class
            printed.seek(0)
            lines = printed.read().decode("utf-8", "replace").strip().splitlines()
            detail = "; ".join([str(error).splitlines()[0], *lines[:3]])
            raise KernelUnfit(f"the kernel did not let bcc {what}: {detail}") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _event(raw: bytes) -> Event:
    ts, vm, arg, result, pid, tid, op, vcpu, sync, runner, fd, after, ran, comm = _EVENT.unpack(raw)
    if _OPS[op - 1] == "vcpu_found":  # the call was our own, about this process
        pid, tid, arg, comm = arg, arg, 0, b""
    return Event(
        ts=unix_ns(ts),
        op=_OPS[op - 1],
        vm=f"kvm:{vm:x}",
        pid=pid,
        tid=tid,
        comm=comm.split(b"\0")[0].decode("utf-8", "backslashreplace"),
        vcpu=None if vcpu < 0 else vcpu,
        arg=arg,
        result=result,
        after=_AFTERS[after],
        sync=sync,
        runner=runner,
        ran=None if ran < 0 else bool(ran),
        fd=None if fd < 0 else fd,
    )
