"""Checks of this host: whether tscwatch can observe it, how completely, and what to change."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from tscwatch.capture.choice import NAMESPACE_REMEDY, open_source
from tscwatch.errors import TscwatchError
from tscwatch.host import tsc
from tscwatch.linux import compiler, kvm, syscall
from tscwatch.linux.process import sees_the_host
from tscwatch.model import KVM_TOLERANCE_PPM, Host

State = Literal["ok", "warning", "failure"]
STATUS: dict[State, int] = {"ok": 0, "warning": 1, "failure": 2}
"""The exit status for the worst state, with the numbers of monitoring plugins (Nagios)."""

_CAPABILITIES = {
    "CAP_SYS_PTRACE": syscall.CAP_SYS_PTRACE,
    "CAP_SYS_ADMIN": syscall.CAP_SYS_ADMIN,
    "CAP_PERFMON": syscall.CAP_PERFMON,
    "CAP_BPF": syscall.CAP_BPF,
}
_RING_BUFFER_RELEASE = (5, 8)
"""The first Linux with BPF's ring buffer, which the bcc sources use."""


class Check(NamedTuple):
    """One line of the report."""

    what: str
    state: State
    found: str
    remedy: str = ""
    """What to change; empty if the state is ``ok``."""


def checks(root: Path = Path("/")) -> Iterator[Check]:
    """Check what tscwatch needs on this host, except the source itself; the most basic first.

    :param root: the directory that has ``proc``, ``sys`` and ``dev``.  The checks of the kernel's
        release, the compiler and the TSC frequency are always those of this host.
    """
    yield _machine()
    yield _privileges(root)
    yield _namespace(root)
    yield _kvm(root)
    yield from _kernel(root)
    yield from _compiler()
    yield from _file_systems(root)
    yield from _clock(root)


def source() -> Check:
    """Check which source ``source: auto`` selects, by opening it."""
    try:
        with closing(open_source("auto")) as opened:
            info = opened.info
    except TscwatchError as error:
        return Check("source", "failure", str(error), "fix what the message names")
    found = f"auto selects {info.source}, {info.attach} on {info.function}"
    if (info.source, info.attach) == ("bcc", "kprobe"):
        return Check("source", "ok", found)
    remedy = (
        "the most exact source is bcc with kprobes: it needs kprobes, BTF, bcc and kernel headers"
    )
    return Check("source", "warning", found, remedy)


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
        return Check("kernel", "warning", found, remedy)
    return Check("kernel", "ok", found)


def _privileges(root: Path) -> Check:
    match = re.search(r"(?m)^CapEff:\s*(\w+)", _text(root / "proc/self/status"))
    held = int(match[1], 16) if match else 0
    missing = {name for name, bit in _CAPABILITIES.items() if not held >> bit & 1}
    # CAP_SYS_ADMIN includes CAP_PERFMON and CAP_BPF (capabilities(7)).
    if "CAP_SYS_ADMIN" not in missing:
        missing -= {"CAP_PERFMON", "CAP_BPF"}
    elif not missing & {"CAP_PERFMON", "CAP_BPF"}:
        missing.discard("CAP_SYS_ADMIN")
    if os.geteuid() != 0 or missing:
        found = f"uid {os.geteuid()}, missing capabilities: {', '.join(sorted(missing)) or 'none'}"
        remedy = "run tscwatch with sudo, or with the capabilities of its systemd unit"
        return Check("privileges", "failure", found, remedy)
    return Check("privileges", "ok", "root with the required capabilities")


def _namespace(root: Path) -> Check:
    if sees_the_host(root / "proc"):
        return Check("process namespace", "ok", "the host's")
    found = "not the host's: /proc does not show the VMs"
    return Check("process namespace", "failure", found, NAMESPACE_REMEDY)


def _kvm(root: Path) -> Check:
    modules = [name for name in ("kvm_intel", "kvm_amd") if _exists(root / "sys/module" / name)]
    if _exists(root / kvm.DEV_KVM.relative_to("/")):
        module = modules[0] if modules else "neither kvm_intel nor kvm_amd"
        return Check("KVM", "ok", f"{kvm.DEV_KVM}, {module}")
    if _exists(root / "sys/module/kvm"):
        remedy = "modprobe kvm_intel or kvm_amd; in a container, pass /dev/kvm in"
        return Check("KVM", "warning", f"no {kvm.DEV_KVM}", remedy)
    remedy = "enable virtualization in the firmware, then modprobe kvm_intel or kvm_amd"
    return Check("KVM", "failure", "not loaded", remedy)


def _kernel(root: Path) -> Iterator[Check]:
    if _exists(root / "sys/bus/event_source/devices/kprobe/type"):
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
    mode = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/security/lockdown"))
    if mode is not None and mode[1] == "confidentiality":
        found = "confidentiality: BPF programs may not read kernel memory"
        remedy = "set lockdown=integrity on the kernel command line"
        yield Check("lockdown", "failure", found, remedy)
    else:
        yield Check("lockdown", "ok", mode[1] if mode else "none")


def _compiler() -> Iterator[Check]:
    try:
        bcc = import_module("bcc")
        yield Check("bcc", "ok", str(getattr(bcc, "__version__", "installed")))
    except ImportError as error:
        remedy = (
            "apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora, "
            "EL), and run tscwatch with the distribution's python3"
        )
        yield Check("bcc", "warning", f"not available ({error}): ftrace is used", remedy)
    try:
        yield Check("headers", "ok", " and ".join(map(str, compiler.find_headers())))
    except TscwatchError:
        yield Check("headers", "warning", "not found: bcc cannot compile", compiler.HEADERS_REMEDY)


def _file_systems(root: Path) -> Iterator[Check]:
    tracing = root / "sys/kernel/tracing"
    if not _exists(tracing / "events"):
        found = "not mounted or not accessible: neither ftrace nor KVM's tracepoints can be used"
        remedy = "systemctl enable --now sys-kernel-tracing.mount"
        yield Check("tracefs", "failure", found, remedy)
    elif not _exists(tracing / "events/kvm/kvm_track_tsc"):
        yield Check("tracefs", "warning", "mounted, without KVM's tracepoints", "modprobe kvm")
    else:
        yield Check("tracefs", "ok", "mounted, with KVM's tracepoints")
    if _exists(root / "sys/kernel/debug/kvm"):
        yield Check("debugfs", "ok", "mounted, with KVM's directory")
    else:
        found = (
            "no directory of KVM: whether a guest has run, and its scaling ratio, may be unknown"
        )
        remedy = "systemctl enable --now sys-kernel-debug.mount"
        yield Check("debugfs", "warning", found, remedy)


def _clock(root: Path) -> Iterator[Check]:
    host = tsc.read(Host())
    if host.tsc_khz is None:
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
    flags = set(_text(root / "proc/cpuinfo").partition("flags")[2].partition("\n")[0].split())
    missing = [flag for flag in ("constant_tsc", "nonstop_tsc") if flag not in flags]
    if missing:
        found = f"without {' and '.join(missing)}"
        remedy = "if this host is a VM, make its hypervisor pass invtsc through"
        yield Check("TSC", "warning", found, remedy)
    else:
        yield Check("TSC", "ok", "constant and nonstop")
    if host.clocksource == "tsc":
        yield Check("clocksource", "ok", "tsc")
    else:
        found = f"{host.clocksource or 'not known'}: KVM cannot use its master clock"
        remedy = "look in dmesg for the reason why the kernel does not use the TSC"
        yield Check("clocksource", "warning", found, remedy)


def _exists(path: Path) -> bool:
    """Return whether a path exists; False if this user may not look it up."""
    try:
        return path.exists()
    except OSError:
        return False


def _text(path: Path) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
