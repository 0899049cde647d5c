"""Checks of this host: whether tscwatch can observe it, how completely, and what to change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tscwatch import __version__
from tscwatch.capture import ebpf
from tscwatch.capture.choice import NAMESPACE_REMEDY, open_source
from tscwatch.errors import TscwatchError
from tscwatch.host import rights, tsc
from tscwatch.linux import compiler, kvm, lockdown
from tscwatch.linux.files import entries, read_text
from tscwatch.linux.process import sees_the_host
from tscwatch.model import KVM_TOLERANCE_PPM, TSC_CLOCKSOURCES, Host

State = Literal["ok", "warning", "failure"]
STATUS: dict[State, int] = {"ok": 0, "warning": 1, "failure": 2}
"""The exit status for the worst state, with the numbers of monitoring plugins (Nagios)."""

_GUEST_CLOCKSOURCES = ("kvm-clock", "hyperv_clocksource", "xen")
_RING_BUFFER_RELEASE = (5, 8)
"""The first Linux with BPF's ring buffer, which the bcc sources use."""


class Check(NamedTuple):
    """One line of the report."""

    what: str
    state: State
    found: str
    remedy: str = ""
    """What to change; empty if the state is ``ok``."""
    details: Mapping[str, Any] = {}
    """Parts of ``found`` for programs, as JSON values."""


def checks(root: Path = Path("/")) -> Iterator[Check]:
    """Check what tscwatch needs on this host, except the source itself; the most basic first.

    :param root: the directory that has ``proc``, ``sys`` and ``dev``.  The checks of the kernel's
        release, the compiler and the TSC frequency are always those of this host.
    """
    yield _machine()
    yield _versions()
    yield _privileges(root)
    yield _namespace(root)
    device = _kvm(root)
    yield device
    yield from _kernel(root)
    yield from _compiler()
    yield from _file_systems(root)
    yield from _clock(root, device.state == "ok")


def source() -> Check:
    """Check which source ``source: auto`` selects, and why, by opening it."""
    rejected: list[str] = []
    try:
        with closing(open_source("auto", rejected.append)) as opened:
            info = opened.info
    except TscwatchError as error:
        remedy = "fix what the message names"
        return Check("source", "failure", str(error), remedy, {"source": None, "why": rejected})
    why = rejected or ["it is the first that auto tries"]
    details = {**info._asdict(), "why": why}
    found = "; ".join([f"auto selects {info.text}", *why])
    if (info.source, info.attach) == ("bcc", "kprobe"):
        return Check("source", "ok", found, details=details)
    remedy = (
        "the most exact source is bcc with kprobes: it needs kprobes, BTF, and packaged bytecode "
        "or bcc with kernel headers"
    )
    return Check("source", "warning", found, remedy, details)


def worst(found: list[Check]) -> State:
    """Return the worst state among the checks."""
    return max((check.state for check in found), key=lambda state: STATUS[state], default="ok")


def _machine() -> Check:
    kernel, machine = platform.release(), platform.machine()
    release = tuple(int(number) for number in re.findall(r"\d+", kernel)[:2])
    found = f"Linux {kernel}, {machine}"
    if machine != "x86_64":
        remedy = "run tscwatch on an x86-64 host: only x86 has a TSC"
        return Check("kernel", "failure", found, remedy)
    if release < _RING_BUFFER_RELEASE:
        remedy = "boot Linux 5.8 or newer, which bcc needs here; until then, ftrace is used"
        return Check("kernel", "warning", found, remedy, {"version": kernel})
    return Check("kernel", "ok", found, details={"version": kernel})


def _versions() -> Check:
    """Return the versions of what tscwatch consists of, except bcc's, which has its own check."""
    versions = {
        "tscwatch": __version__,
        "Python": platform.python_version(),
        **{name: _version_of(name) for name in ("prometheus_client", "PyYAML")},
    }
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check("versions", "ok", found, details=versions)


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # it was installed without metadata
        return "unknown"


def _privileges(root: Path) -> Check:
    missing = rights.missing_capabilities(root / "proc")
    if os.geteuid() != 0 or missing:
        found = f"uid {os.geteuid()}, missing capabilities: {', '.join(missing) or 'none'}"
        remedy = "run tscwatch with sudo, or with the capabilities of its systemd unit or DaemonSet"
        return Check("privileges", "failure", found, remedy)
    return Check("privileges", "ok", "root with the required capabilities")


def _namespace(root: Path) -> Check:
    if sees_the_host(root / "proc"):
        return Check("process namespace", "ok", "the host's")
    found = "not the host's: /proc does not show the VMs"
    return Check("process namespace", "failure", found, NAMESPACE_REMEDY)


def _kvm(root: Path) -> Check:
    device = root / kvm.DEV_KVM.relative_to("/")
    if _exists(device):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            found, _, remedy = kvm.why_unusable(error).partition(": ")
            return Check("KVM", "warning", found, remedy)
        modules = sorted(path.name for path in (root / "sys/module").glob("kvm_*"))
        return Check("KVM", "ok", ", ".join([str(kvm.DEV_KVM), *modules]))
    if _exists(root / "sys/module/kvm"):
        remedy = "modprobe kvm_intel or kvm_amd; in a container, pass /dev/kvm in"
        return Check("KVM", "warning", f"no {kvm.DEV_KVM}", remedy)
    remedy = "enable virtualization in the firmware, then modprobe kvm_intel or kvm_amd"
    return Check("KVM", "failure", "not loaded", remedy)


def _kernel(root: Path) -> Iterator[Check]:
    if _is_locked(root):
        yield Check("kprobes", "failure", "lockdown refuses them", lockdown.REMEDY)
    elif _exists(root / "sys/bus/event_source/devices/kprobe/type"):
        yield Check("kprobes", "ok", "available")
    else:
        found = "not available: syscalls are traced instead"
        remedy = "boot a kernel built with CONFIG_KPROBES; the distributions' kernels are"
        yield Check("kprobes", "warning", found, remedy)
    if _exists(root / "sys/kernel/btf/vmlinux"):
        yield Check("BTF", "ok", "available")
    else:
        found = "not available: the layout of struct kvm_vcpu is not known"
        remedy = (
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF: Debian 11, Ubuntu 20.10, EL 8.2 or "
            "newer"
        )
        yield Check("BTF", "failure", found, remedy)
    yield _lockdown(root)


def _lockdown(root: Path) -> Check:
    """See kernel_lockdown(7); the file is absent if the kernel was built without lockdown."""
    file = root / lockdown.FILE.relative_to("/")
    mode = lockdown.mode(file)
    if lockdown.forbids_tracing(file):
        found = "confidentiality: BPF programs may not read kernel memory, and tracefs is closed"
        return Check("lockdown", "failure", found, lockdown.REMEDY)
    if mode:
        return Check("lockdown", "ok", mode)
    if entries(file.parent):
        return Check("lockdown", "ok", "not part of this kernel")
    remedy = "mount -t securityfs none /sys/kernel/security"
    return Check("lockdown", "warning", "not known: securityfs is not mounted", remedy)


def _is_locked(root: Path) -> bool:
    return lockdown.forbids_tracing(root / lockdown.FILE.relative_to("/"))


def _compiler() -> Iterator[Check]:
    """Check what compiles the BPF programs, if the package does not have their bytecode.

    bcc is imported in another process: it takes 70 MiB, and an unfit one may print or crash.
    """
    if ebpf.is_packaged():
        yield Check("bytecode", "ok", "packaged: neither bcc nor kernel headers are needed")
        return
    program = "import bcc; print(getattr(bcc, '__version__', 'installed'))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        version = result.stdout.strip()
        yield Check("bcc", "ok", version, details={"version": version})
    else:
        error = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        found = f"not available ({error}): without stored bytecode, ftrace is used"
        remedy = (
            "apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora, "
            "EL), and run tscwatch with the distribution's python3"
        )
        yield Check("bcc", "warning", found, remedy)
    try:
        yield Check("headers", "ok", " and ".join(map(str, compiler.find_headers())))
    except TscwatchError:
        found = "not found: bcc cannot compile, and without stored bytecode, ftrace is used"
        yield Check("headers", "warning", found, compiler.HEADERS_REMEDY)


def _file_systems(root: Path) -> Iterator[Check]:
    tracing = root / "sys/kernel/tracing"
    if _is_locked(root):
        yield Check("tracefs", "failure", "lockdown refuses access", lockdown.REMEDY)
    elif not _exists(tracing / "events"):
        found = "not mounted or not accessible: neither ftrace nor KVM's tracepoints can be used"
        remedy = "systemctl enable --now sys-kernel-tracing.mount"
        yield Check("tracefs", "failure", found, remedy)
    elif not _exists(tracing / "events/kvm/kvm_track_tsc"):
        yield Check("tracefs", "warning", "mounted, without KVM's tracepoints", "modprobe kvm")
    else:
        yield Check("tracefs", "ok", "mounted, with KVM's tracepoints")
    if _is_locked(root):
        found = "lockdown hides whether a guest has run"
        yield Check("debugfs", "warning", found, lockdown.REMEDY)
    elif _exists(root / "sys/kernel/debug/kvm"):
        yield Check("debugfs", "ok", "mounted, with KVM's directory")
    else:
        found = (
            "no directory of KVM: whether a guest has run, and its scaling ratio, may be unknown"
        )
        remedy = "systemctl enable --now sys-kernel-debug.mount"
        yield Check("debugfs", "warning", found, remedy)


def _clock(root: Path, kvm_opens: bool) -> Iterator[Check]:
    host = tsc.read()
    if host.tsc_khz is None and kvm_opens:
        # tsc.read() returns whether the host scales only if it could create a VM.
        failed = "KVM_CREATE_VM" if host.scaling is None else "KVM_GET_TSC_KHZ"
        remedy = "look in dmesg for the reason"
        yield Check("TSC frequency", "warning", f"not known: {failed} failed", remedy)
    elif host.tsc_khz is None:
        remedy = f"make {kvm.DEV_KVM} usable: only KVM reports the frequency"
        yield Check("TSC frequency", "warning", "not known", remedy)
    else:
        yield Check("TSC frequency", "ok", f"{host.tsc_khz} kHz")
        if host.scaling:
            yield Check("TSC scaling", "ok", "supported by the hardware")
        else:
            found = "not supported: guests tick at this host's frequency"
            remedy = "migrate guests only between hosts of one TSC frequency"
            yield Check("TSC scaling", "warning", found, remedy)
    found = f"{host.kvm_tolerance_ppm} ppm"
    if host.kvm_tolerance_ppm == KVM_TOLERANCE_PPM:
        yield Check("TSC tolerance", "ok", found)
    else:
        remedy = f"set kvm.tsc_tolerance_ppm to {KVM_TOLERANCE_PPM}, its default: QEMU assumes it"
        yield Check("TSC tolerance", "warning", found, remedy)
    flags = set(read_text(root / "proc/cpuinfo").partition("flags")[2].partition("\n")[0].split())
    missing = [flag for flag in ("constant_tsc", "nonstop_tsc") if flag not in flags]
    if missing:
        found = f"without {' and '.join(missing)}"
        remedy = "if this host is a VM, make its hypervisor pass invtsc through"
        yield Check("TSC", "warning", found, remedy)
    else:
        yield Check("TSC", "ok", "constant and nonstop")
    yield _clocksource(host)


def _clocksource(host: Host) -> Check:
    name = host.clocksource or "not known"
    if name in TSC_CLOCKSOURCES:
        return Check("clocksource", "ok", name)
    if name.startswith(_GUEST_CLOCKSOURCES):
        found = f"{name}: this host is a guest itself, and KVM cannot use its master clock here"
        remedy = (
            "give this host an invariant TSC (QEMU: -cpu host,+invtsc; libvirt: the feature "
            "invtsc): its kernel then selects the TSC by itself"
        )
        return Check("clocksource", "warning", found, remedy)
    found = f"{name}: KVM cannot use its master clock"
    remedy = "look in dmesg for the reason why the kernel does not use the TSC"
    return Check("clocksource", "warning", found, remedy)


def _exists(path: Path) -> bool:
    """Return whether a path exists; False if this user may not look it up."""
    try:
        return path.exists()
    except OSError:
        return False
