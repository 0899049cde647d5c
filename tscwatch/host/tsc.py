"""Read what decides at which frequency this host's guests tick.

That is the host's TSC frequency, whether the hardware scales a guest's TSC, KVM's tolerance, and
the kernel's clocksource.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from tscwatch.linux import kvm
from tscwatch.model import KVM_TOLERANCE_PPM, TSC_CLOCKSOURCES, Host

_TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")
_CLOCKSOURCES = Path("/sys/devices/system/clocksource/clocksource0")
_LINES = Path("/sys/kernel/debug/kvm")


def read(before: Host) -> Host:
    """Return the host's present TSC parameters.

    Neither sysfs nor procfs has the frequency.  But it is the default of a new VM's vCPUs
    (``kvm_arch_init_vm``), so create a VM, read it and close the VM.  Do so only once, because the
    frequency and scaling do not change as long as KVM is loaded.  If that fails, both are None.

    :param before: the result of the previous call, ``Host()`` for the first.
    """
    now = Host(
        kvm_tolerance_ppm=_tolerance_ppm(),
        clocksource=_text(_CLOCKSOURCES / "current_clocksource"),
        stable=_is_stable(_text(_CLOCKSOURCES / "available_clocksource").split()),
        shows_lines=_can_list(_LINES),
    )
    if not kvm.DEV_KVM.exists():
        return now
    if before.tsc_khz is not None:
        return now._replace(tsc_khz=before.tsc_khz, scaling=before.scaling)
    tsc_khz, scaling = _read_from_kvm()
    return now._replace(tsc_khz=tsc_khz, scaling=scaling)


def _read_from_kvm() -> tuple[Optional[int], Optional[bool]]:
    """Return the host's frequency in kHz and whether it scales; None and None if KVM refuses."""
    try:
        with kvm.DEV_KVM.open("r+b", buffering=0) as dev:
            scaling = fcntl.ioctl(dev, kvm.CHECK_EXTENSION, kvm.CAP_TSC_CONTROL) > 0
            with open(fcntl.ioctl(dev, kvm.CREATE_VM, 0), "rb", buffering=0) as vm:  # noqa: PTH123
                return fcntl.ioctl(vm, kvm.GET_TSC_KHZ, 0), scaling
    except OSError:  # not root, or another hypervisor uses the virtualization extensions
        return None, None


def _tolerance_ppm() -> int:
    """Return the module parameter ``kvm.tsc_tolerance_ppm``, its default if KVM is not loaded."""
    text = _text(_TOLERANCE)
    return int(text) if text.isdigit() else KVM_TOLERANCE_PPM


def _is_stable(available: Sequence[str]) -> bool:
    """Return whether the kernel considers its TSC stable.

    It takes an unstable clocksource off its list (``available_clocksource_show``).  On Hyper-V, one
    that rests on the TSC replaces it there.
    """
    return not available or any(name in available for name in TSC_CLOCKSOURCES)


def _can_list(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError:
        return False


def _text(path: Path) -> str:
    """Return the contents of a file without white space around them, "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
