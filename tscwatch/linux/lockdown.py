"""The kernel's lockdown, which can close BPF and tracefs even to root (kernel_lockdown(7))."""

from __future__ import annotations

from pathlib import Path

from tscwatch.linux.files import read_text, selected

FILE = Path("/sys/kernel/security/lockdown")
REMEDY = "set lockdown=integrity on the kernel command line"


def mode(file: Path = FILE) -> str:
    """Return ``none``, ``integrity`` or ``confidentiality``; empty if it cannot be read.

    The file is missing if the kernel was built without lockdown, or if securityfs is not mounted.
    """
    return selected(read_text(file))


def forbids_tracing(file: Path = FILE) -> bool:
    """Return whether it closes tracefs and kprobes, and the kernel memory to BPF programs."""
    return mode(file) == "confidentiality"
