"""Processes: when one was started, what this one may do, and whether it sees the whole host's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

from tscwatch.linux.files import read_text

PROC = Path("/proc")

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, a fixed number


def start_time(pid: int, proc: Path = PROC) -> Optional[int]:
    """Return the start time of a process in clock ticks, None if it does not exist.

    That is field 22 of ``/proc/PID/stat``.  The name in field 2 can contain any character, so
    count from its closing parenthesis.
    """
    try:
        stat = (proc / f"{pid}/stat").read_bytes()
        return int(stat[stat.rindex(b")") :].split()[20])
    except (OSError, ValueError, IndexError):
        return None


def effective_capabilities(proc: Path = PROC) -> int:
    """Return the capabilities of this process as bits, 0 if they cannot be read."""
    match = re.search(r"(?m)^CapEff:\s*(\w+)", read_text(proc / "self/status"))
    return int(match[1], 16) if match else 0


def sees_the_host(proc: Path = PROC) -> bool:
    """Return whether this process is in the host's process namespace (pid_namespaces(7)).

    In another one, ``/proc`` and the kernel's probes have different numbers for the same process.
    """
    try:
        return str((proc / "self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return True  # a kernel without process namespaces
