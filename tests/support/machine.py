"""What this machine lacks for the tests that run on its own kernel."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tscwatch.linux.kvm import CHECK_EXTENSION, DEV_KVM


def why_no_kvm() -> str:
    """Return why this machine's KVM cannot be used; an empty string if it can.

    In a container, the device can exist and be refused.
    """
    try:
        with DEV_KVM.open("r+b", buffering=0) as device:
            fcntl.ioctl(device, CHECK_EXTENSION, 0)
    except OSError as error:
        return f"{DEV_KVM}: {error.strerror}"
    return ""


def missing_for_live() -> str:
    """Return why live tests cannot run here; an empty string if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if reason := why_no_kvm():
        return f"needs KVM ({reason})"
    if not Path("/sys/kernel/tracing/events").is_dir():
        return "needs tracefs: mount -t tracefs none /sys/kernel/tracing"
    return ""
