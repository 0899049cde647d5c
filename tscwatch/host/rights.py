"""Find which rights this process lacks without which tscwatch works, but sees less.

In a container, each of them is one that its configuration did not grant.  What tscwatch cannot work
without is an error with an exit status of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tscwatch.linux.files import entries
from tscwatch.linux.process import effective_capabilities
from tscwatch.linux.syscall import (
    CAP_BPF,
    CAP_DAC_READ_SEARCH,
    CAP_PERFMON,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
)

_CAPABILITIES = {
    "CAP_SYS_PTRACE": (
        CAP_SYS_PTRACE,
        "guests that are older than tscwatch are not found",
    ),
    "CAP_DAC_READ_SEARCH": (
        CAP_DAC_READ_SEARCH,
        "other users' guests that are older than tscwatch are not found",
    ),
    "CAP_SYS_ADMIN": (
        CAP_SYS_ADMIN,
        "BPF cannot be used, only ftrace",
    ),
}
"""By name: the bit, and what does not work without it."""
_REMEDY = "add it to the container's capabilities, or to CapabilityBoundingSet= of the unit"


def missing_capabilities(proc: Path) -> list[str]:
    """Return the names of the capabilities that this process needs and does not have.

    CAP_SYS_ADMIN is needed only for what CAP_BPF and CAP_PERFMON permit too (capabilities(7)), so
    these two together replace it.

    :param proc: the directory of procfs.
    """
    held = effective_capabilities(proc)
    if held >> CAP_BPF & 1 and held >> CAP_PERFMON & 1:
        held |= 1 << CAP_SYS_ADMIN
    return [name for name, (bit, _) in _CAPABILITIES.items() if not held >> bit & 1]


def missing(root: Path = Path("/")) -> Iterator[str]:
    """Yield a sentence for each right that is missing; it also names the effect and the fix.

    :param root: the directory that has ``proc`` and ``sys``.
    """
    for name in missing_capabilities(root / "proc"):
        _, effect = _CAPABILITIES[name]
        yield f"{name} is missing: {effect}: {_REMEDY}"
    if not entries(root / "sys/kernel/debug"):
        yield (
            "debugfs is not mounted, or cannot be read: it is not known how far the TSCs of a "
            "guest's vCPUs are apart: run 'mount -t debugfs none /sys/kernel/debug', or in a "
            "container mount the host's /sys/kernel/debug"
        )
