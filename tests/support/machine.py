"""What this machine lacks for the tests that run on its own kernel."""

from __future__ import annotations

import os
from pathlib import Path


def missing_for_live() -> str:
    """Return why live tests cannot run here; an empty string if they can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs /dev/kvm ({error.strerror})"
    if not Path("/sys/kernel/tracing/events").is_dir():
        return "needs tracefs: mount -t tracefs none /sys/kernel/tracing"
    return ""
