"""Sources of events: what happens in the kernel, as :class:`tscwatch.model.Event`.

A source is opened by a function that raises a :class:`tscwatch.errors.TscwatchError` where
this host cannot carry it; :func:`open_source` tries them in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Protocol

from tscwatch import kvm
from tscwatch.errors import KvmMissing, NoSource, NotRoot, TscwatchError
from tscwatch.model import Event

log = logging.getLogger(__name__)

SourceName = Literal["auto", "bcc", "ftrace"]

_MODULES = Path("/lib/modules")


class SourceInfo(NamedTuple):
    """How a source sees the calls."""

    source: str
    attach: str
    function: str


@dataclass
class Health:
    """What a source knows of itself; counts only rise."""

    probes: dict[str, bool] = field(default_factory=dict)
    """Attached or not, by the probe's name."""
    sent: int = 0
    """Events that left the kernel."""
    received: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (stage, reason)."""


class Source(Protocol):
    """A way of seeing KVM's TSC calls."""

    @property
    def info(self) -> SourceInfo:
        """For the log and for ``tscwatch_source_info``."""

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What it needs of :mod:`tscwatch.privileges` once it is open."""

    def poll(self, timeout: float) -> list[Event]:
        """The events since the last poll, in order; waits up to ``timeout`` seconds for one."""

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """Make the source tell, as ``vcpu_found``, of vCPUs that were there before it.

        A source that cannot read a vCPU tells nothing.

        :param files: process and file descriptor of each.
        """

    def health(self) -> Health:
        """Probes and losses as of the last poll."""

    def close(self) -> None:
        """Leave no probe behind."""


def open_source(name: SourceName) -> Source:
    """The named source, or with ``auto`` the first that works.

    :raises NotRoot: BPF and tracefs are root's.
    :raises KvmMissing: there is nothing to see on this host.
    :raises NoSource: with ``auto``, nothing works.
    :raises TscwatchError: the named source does not work, and why.
    """
    if os.geteuid() != 0:
        raise NotRoot("tscwatch must be root to see what the kernel does: run it with sudo")
    _require_kvm()
    reasons = []
    from tscwatch.capture import witness  # noqa: PLC0415 - it imports this module

    openers = _openers()
    for label, opener in openers[name]:
        try:
            source = opener()
        except TscwatchError as error:
            log.info("%s does not work here: %s", label, error)
            reasons.append((label, error))
            continue
        log.info("source: %s, %s on %s", *source.info)
        return witness.beside(source)
    if name == "auto":
        raise NoSource(
            "no source works on this host: "
            + "; ".join(f"{label}: {reason}" for label, reason in reasons)
        )
    raise reasons[-1][1]


_Openers = Sequence[tuple[str, Callable[[], "Source"]]]


def _openers() -> Mapping[SourceName, _Openers]:
    from tscwatch.capture import ebpf, ftrace  # noqa: PLC0415 - they import this module

    bcc: _Openers = [
        ("bcc with kprobes", ebpf.open_kprobe),
        ("bcc with tracepoints", ebpf.open_tracepoint),
    ]
    ftrace_: _Openers = [("ftrace", ftrace.open_ftrace)]
    return {"auto": [*bcc, *ftrace_], "bcc": bcc, "ftrace": ftrace_}


def _require_kvm(dev: Path = kvm.DEV_KVM, modules: Path = _MODULES) -> None:
    """A missing /dev/kvm is no error where the kvm module can still be loaded: we wait for it."""
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
