"""Processes: when one was started, and whether this one sees those of the whole host."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

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


def sees_the_host(proc: Path = PROC) -> bool:
    """Return whether this process is in the host's process namespace (pid_namespaces(7)).

    In another one, ``/proc`` and the kernel's probes have different numbers for the same process.
    """
    try:
        return str((proc / "self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return True  # a kernel without process namespaces
