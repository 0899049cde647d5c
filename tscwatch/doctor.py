"""Whether this host can be observed, how well, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from tscwatch.capture.choice import open_source
from tscwatch.errors import TscwatchError
from tscwatch.host import tsc
from tscwatch.linux import compiler, kvm, syscall
from tscwatch.model import KVM_TOLERANCE_PPM, Host

State = Literal["ok", "warning", "failure"]
STATUS: dict[State, int] = {"ok": 0, "warning": 1, "failure": 2}
"""Exit status by the worst, as monitoring plugins have it."""

_CAPABILITIES = {
    "SYS_PTRACE": syscall.CAP_SYS_PTRACE,
    "SYS_ADMIN": syscall.CAP_SYS_ADMIN,
    "PERFMON": syscall.CAP_PERFMON,
    "BPF": syscall.CAP_BPF,
}
_OLDEST_RING_BUFFER = (5, 8)


class Check(NamedTuple):
    """One line of the report."""

    what: str
    state: State
    found: str
    remedy: str = ""


def checks(root: Path = Path("/")) -> Iterator[Check]:
    """All that decides what tscwatch sees here, the most basic first.

    :param root: where the files are looked for.
    """
    yield _machine()
    yield _privileges(root)
    yield from _kvm(root)
    yield from _kernel(root)
    yield from _compiler()
    yield from _file_systems(root)
    yield from _clock(root)


def source() -> Check:
    """What ``source: auto`` takes here, by trying."""
    try:
        with closing(open_source("auto")) as opened:
            info = opened.info
    except TscwatchError as error:
        return Check("source", "failure", str(error), "mend what is named above")
    found = f"auto takes {info.source}, {info.attach} on {info.function}"
    if (info.source, info.attach) == ("bcc", "kprobe"):
        return Check("source", "ok", found)
    remedy = "for the most exact view, mend what bcc's kprobes need: kprobes, BTF, bcc, headers"
    return Check("source", "warning", found, remedy)


def worst(found: list[Check]) -> State:
    """Of all lines."""
    return max((check.state for check in found), key=lambda state: STATUS[state], default="ok")


def _machine() -> Check:
    kernel, machine = platform.release(), platform.machine()
    numbers = tuple(int(number) for number in re.findall(r"\d+", kernel)[:2])
    found = f"Linux {kernel}, {machine}"
    if machine != "x86_64":
        return Check("kernel", "failure", found, "only x86 has a TSC: nothing to see here")
    if numbers < _OLDEST_RING_BUFFER:
        return Check("kernel", "warning", found, "bcc needs Linux 5.8: ftrace is used before that")
    return Check("kernel", "ok", found)


def _privileges(root: Path) -> Check:
    match = re.search(r"(?m)^CapEff:\s*(\w+)", _text(root / "proc/self/status"))
    held = int(match[1], 16) if match else 0
    missing = {name for name, bit in _CAPABILITIES.items() if not held >> bit & 1}
    if "SYS_ADMIN" not in missing:
        missing -= {"PERFMON", "BPF"}
    elif not missing & {"PERFMON", "BPF"}:
        missing.discard("SYS_ADMIN")
    if os.geteuid() != 0 or missing:
        found = f"user {os.geteuid()}, without {', '.join(sorted(missing)) or 'nothing'}"
        return Check("privileges", "failure", found, "run it with sudo, or as the service does")
    return Check("privileges", "ok", "root with the capabilities that are needed")


def _kvm(root: Path) -> Iterator[Check]:
    modules = [name for name in ("kvm_intel", "kvm_amd") if _is_there(root / "sys/module" / name)]
    device = root / kvm.DEV_KVM.relative_to("/")
    if _is_there(device):
        yield Check("KVM", "ok", f"{kvm.DEV_KVM}, {modules[0] if modules else 'no vendor module'}")
    elif _is_there(root / "sys/module/kvm"):
        remedy = "modprobe kvm_intel or kvm_amd; in a container pass /dev/kvm in"
        yield Check("KVM", "warning", f"no {kvm.DEV_KVM}", remedy)
    else:
        remedy = "enable virtualization in the firmware, then modprobe kvm_intel or kvm_amd"
        yield Check("KVM", "failure", "not loaded", remedy)


def _kernel(root: Path) -> Iterator[Check]:
    if _is_there(root / "sys/bus/event_source/devices/kprobe/type"):
        yield Check("kprobes", "ok", "there")
    else:
        remedy = "a kernel with CONFIG_KPROBES: every distribution's is one"
        yield Check("kprobes", "warning", "none: system calls are traced instead", remedy)
    if _is_there(root / "sys/kernel/btf/vmlinux"):
        yield Check("BTF", "ok", "there")
    else:
        remedy = "a kernel with CONFIG_DEBUG_INFO_BTF: Debian 11, Ubuntu 20.10, EL 8.2 or newer"
        yield Check("BTF", "failure", "none: vCPUs cannot be read", remedy)
    mode = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/security/lockdown"))
    if mode is not None and mode[1] == "confidentiality":
        remedy = "lockdown=integrity on the kernel's command line"
        yield Check("lockdown", "failure", "confidentiality: BPF may not read the kernel", remedy)
    else:
        yield Check("lockdown", "ok", mode[1] if mode else "none")


def _compiler() -> Iterator[Check]:
    try:
        bcc = import_module("bcc")
        yield Check("bcc", "ok", str(getattr(bcc, "__version__", "there")))
    except ImportError as error:
        remedy = (
            "apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora, "
            "EL), and run tscwatch with the distribution's python3"
        )
        yield Check("bcc", "warning", f"none ({error}): ftrace is used", remedy)
    try:
        found = " and ".join(map(str, compiler.find()))
        yield Check("headers", "ok", found)
    except TscwatchError:
        yield Check("headers", "warning", "none: bcc cannot compile", compiler.REMEDY)


def _file_systems(root: Path) -> Iterator[Check]:
    tracing = root / "sys/kernel/tracing"
    if not _is_there(tracing / "events"):
        remedy = "systemctl enable --now sys-kernel-tracing.mount"
        yield Check(
            "tracefs",
            "failure",
            "not mounted, or not ours to see: neither ftrace nor KVM's verdict",
            remedy,
        )
    elif not _is_there(tracing / "events/kvm/kvm_track_tsc"):
        yield Check("tracefs", "warning", "without KVM's tracepoints", "modprobe kvm")
    else:
        yield Check("tracefs", "ok", "mounted, with KVM's tracepoints")
    if _is_there(root / "sys/kernel/debug/kvm"):
        yield Check("debugfs", "ok", "mounted, with KVM's VMs")
    else:
        remedy = "systemctl enable --now sys-kernel-debug.mount"
        found = "no KVM in it: which guests have run, and how they scale, is not known"
        yield Check("debugfs", "warning", found, remedy)


def _clock(root: Path) -> Iterator[Check]:
    here = tsc.read(Host())
    if here.tsc_khz is None:
        yield Check("TSC frequency", "warning", "not known", "KVM must be there to say it")
    else:
        yield Check("TSC frequency", "ok", f"{here.tsc_khz} kHz")
        remedy = "let guests migrate only among hosts of one frequency, or pin theirs"
        if here.scaling:
            yield Check("TSC scaling", "ok", "the hardware scales")
        else:
            yield Check("TSC scaling", "warning", "none: a guest gets this host's rate", remedy)
    state: State = "ok" if here.kvm_tolerance_ppm == KVM_TOLERANCE_PPM else "warning"
    remedy = f"KVM's default is {KVM_TOLERANCE_PPM}; QEMU takes that for granted"
    found = f"{here.kvm_tolerance_ppm} ppm"
    yield Check("TSC tolerance", state, found, "" if state == "ok" else remedy)
    flags = set(_text(root / "proc/cpuinfo").partition("flags")[2].partition("\n")[0].split())
    missing = [flag for flag in ("constant_tsc", "nonstop_tsc") if flag not in flags]
    if missing:
        remedy = "under another hypervisor: let it pass invtsc through"
        yield Check("TSC", "warning", f"without {' and '.join(missing)}", remedy)
    else:
        yield Check("TSC", "ok", "constant and nonstop")
    if here.clocksource == "tsc":
        yield Check("clocksource", "ok", "tsc")
    else:
        remedy = "find in dmesg why the kernel gave the TSC up"
        found = f"{here.clocksource or 'not known'}: KVM cannot use its master clock"
        yield Check("clocksource", "warning", found, remedy)


def _is_there(path: Path) -> bool:
    """Not where another user's eyes are kept out, either."""
    try:
        return path.exists()
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
