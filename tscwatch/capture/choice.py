"""Choose the source: the first that works on this host.

eBPF is tried before ftrace.  It needs packaged bytecode, or bcc and kernel headers; ftrace needs
neither.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Callable

from tscwatch.capture import Source, crosscheck, ebpf, ftrace
from tscwatch.errors import (
    KernelUnfit,
    KvmMissing,
    NamespaceUnfit,
    NoSource,
    NotRoot,
    TracefsMissing,
    TscwatchError,
)
from tscwatch.linux import kvm, lockdown, tracefs
from tscwatch.linux.process import sees_the_host
from tscwatch.linux.tracefs import clear_stale
from tscwatch.model import SourceName

log = logging.getLogger(__name__)

_MODULES = Path("/lib/modules")
NAMESPACE_REMEDY = "use the host's: hostPID: true in Kubernetes, --pid=host in docker and podman"

_Openers = Sequence[tuple[str, Callable[[], Source]]]
_BCC: _Openers = (
    ("bcc with kprobes", ebpf.open_kprobe),
    ("bcc with tracepoints", ebpf.open_tracepoint),
)
_FTRACE: _Openers = (("ftrace", ftrace.open_ftrace),)
_OPENERS: Mapping[SourceName, _Openers] = {
    "auto": (*_BCC, *_FTRACE),
    "bcc": _BCC,
    "ftrace": _FTRACE,
}


def open_source(name: SourceName, reject: Callable[[str], None] = log.info) -> Source:
    """Open the named source, or with ``auto`` the first that works, and cross-check its events.

    First remove from tracefs what a tscwatch process that was killed left there.

    :param reject: called with a sentence for each source that does not work.
    :raises NotRoot: the caller is not root, who alone may use BPF and tracefs.
    :raises NamespaceUnfit: the process namespace is not the host's.
    :raises KernelUnfit: the kernel's lockdown forbids tracing.
    :raises KvmMissing: this host has no KVM.
    :raises NoSource: with ``auto``, no source works; the message has the reason of each.
    :raises TscwatchError: the named source does not work; the message has the reason.
    """
    if os.geteuid() != 0:
        raise NotRoot("tscwatch must be root to use BPF and tracefs: run it with sudo")
    if not sees_the_host():
        raise NamespaceUnfit(
            "tscwatch runs in a process namespace of its own, in which it cannot find the VMs: "
            + NAMESPACE_REMEDY
        )
    if lockdown.forbids_tracing():
        raise KernelUnfit(
            f"the kernel's lockdown (confidentiality) closes BPF and tracefs: {lockdown.REMEDY}"
        )
    _require_kvm()
    with suppress(TracefsMissing):
        clear_stale(tracefs.find_tracefs())
    reasons = []
    for label, opener in _OPENERS[name]:
        try:
            source = opener()
        except TscwatchError as error:
            reject(f"{label} does not work here: {error}")
            reasons.append((label, error))
            continue
        log.info("source: %s", source.info.text)
        return crosscheck.with_crosscheck(source)
    if name == "auto":
        raise NoSource(
            "no source works on this host: "
            + "; ".join(f"{label}: {reason}" for label, reason in reasons)
        )
    raise reasons[-1][1]


def _require_kvm(dev: Path = kvm.DEV_KVM, modules: Path = _MODULES) -> None:
    """Raise KvmMissing if there is neither /dev/kvm nor a kvm module that can still be loaded."""
    if dev.exists():
        return
    tree = modules / os.uname().release
    if any(tree.glob("kernel/arch/x86/kvm/kvm.ko*")):
        log.warning("/dev/kvm does not exist: waiting until the kvm module is loaded")
        return
    raise KvmMissing(
        "/dev/kvm does not exist and this kernel has no kvm module: enable virtualization in the "
        "firmware, install the kernel's kvm modules, or in a container pass /dev/kvm in"
    )
