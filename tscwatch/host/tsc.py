"""What the kernel says of this host's own TSC."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Optional

from tscwatch.linux import kvm
from tscwatch.model import KVM_TOLERANCE_PPM, Host

_TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")
_CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


def read(before: Host) -> Host:
    """The host as it is now.

    :param before: as it was when last read, else ``Host()``.

    The frequency is the default that KVM gives a fresh VM (``kvm_arch_init_vm`` copies the
    kernel's ``tsc_khz``), so it is asked for once, not again while KVM stays.  Nothing in sysfs
    or procfs shows that number.
    """
    now = Host(kvm_tolerance_ppm=_tolerance_ppm(), clocksource=_text(_CLOCKSOURCE))
    if not kvm.DEV_KVM.exists():
        return now
    if before.tsc_khz is not None:
        return now._replace(tsc_khz=before.tsc_khz, scaling=before.scaling)
    tsc_khz, scaling = _ask_kvm()
    return now._replace(tsc_khz=tsc_khz, scaling=scaling)


def _ask_kvm() -> tuple[Optional[int], Optional[bool]]:
    try:
        with kvm.DEV_KVM.open("r+b", buffering=0) as dev:
            scaling = fcntl.ioctl(dev, kvm.CHECK_EXTENSION, kvm.CAP_TSC_CONTROL) > 0
            with open(fcntl.ioctl(dev, kvm.CREATE_VM, 0), "rb", buffering=0) as vm:  # noqa: PTH123
                return fcntl.ioctl(vm, kvm.GET_TSC_KHZ, 0), scaling
    except OSError:  # not root, or another hypervisor holds the processor
        return None, None


def _tolerance_ppm() -> int:
    """The module parameter ``kvm.tsc_tolerance_ppm``; its default where KVM is not loaded."""
    text = _text(_TOLERANCE)
    return int(text) if text.isdigit() else KVM_TOLERANCE_PPM


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
