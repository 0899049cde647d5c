"""Read what decides at which frequency this host's guests tick.

That is the host's TSC frequency, whether the hardware scales a guest's TSC, KVM's tolerance, and
the kernel's clocksource.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Optional

from tscwatch.linux import kvm
from tscwatch.linux.files import entries, read_text
from tscwatch.model import KVM_TOLERANCE_PPM, TSC_CLOCKSOURCES, Host

log = logging.getLogger(__name__)

_TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")
_CLOCKSOURCES = Path("/sys/devices/system/clocksource/clocksource0")
_LINES = Path("/sys/kernel/debug/kvm")


def read() -> Host:
    """Return the host's present TSC parameters."""
    tsc_khz, scaling = _read_from_kvm()
    return Host(
        tsc_khz,
        scaling,
        kvm_tolerance_ppm=_tolerance_ppm(),
        clocksource=read_text(_CLOCKSOURCES / "current_clocksource"),
        stable=_is_stable(read_text(_CLOCKSOURCES / "available_clocksource").split()),
        shows_lines=bool(entries(_LINES)),
    )


def _read_from_kvm() -> tuple[Optional[int], Optional[bool]]:
    """Return the host's frequency in kHz, and whether it scales; None for what is not known."""
    try:
        # The modules for Intel and AMD create the device, also if only they are loaded again.
        return _read_once((kvm.module_generation(), kvm.DEV_KVM.stat().st_ino))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        _warn_once(kvm.why_unusable(error))
        return None, None


@lru_cache(maxsize=1)
def _read_once(_load: tuple[Optional[int], int]) -> tuple[Optional[int], Optional[bool]]:
    """Create a VM and return its frequency in kHz, and whether the host scales.

    Neither sysfs nor procfs has the frequency, but it is the default of a new VM's vCPUs.  The
    result is kept as long as KVM is loaded: neither value changes, and each of these VMs is an
    event for everyone who observes KVM.  So a frequency that such a VM does not show is kept too.

    :param _load: identifies a load of KVM's modules.
    :raises OSError: KVM cannot be used; that is not kept.
    """
    with kvm.DEV_KVM.open("r+b", buffering=0) as dev:
        scaling = fcntl.ioctl(dev, kvm.CHECK_EXTENSION, kvm.CAP_TSC_CONTROL) > 0
        with open(fcntl.ioctl(dev, kvm.CREATE_VM, 0), "rb", buffering=0) as vm:  # noqa: PTH123
            try:
                return _default_khz(vm.fileno()), scaling
            except OSError as error:
                _warn_once(f"KVM_GET_TSC_KHZ failed ({error.strerror}): see dmesg")
                return None, scaling


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    log.warning("the host's TSC frequency is not known: %s", reason)


def _default_khz(vm: int) -> int:
    """Return the frequency that a VM gives to a new vCPU (``kvm_arch_init_vm``).

    Linux before 5.18 does not report it of a VM, but of a vCPU.
    """
    with suppress(OSError):
        return fcntl.ioctl(vm, kvm.GET_TSC_KHZ, 0)
    return _khz_of_a_new_vcpu(vm)


def _khz_of_a_new_vcpu(vm: int) -> int:
    with open(fcntl.ioctl(vm, kvm.CREATE_VCPU, 0), "rb", buffering=0) as vcpu:  # noqa: PTH123
        return fcntl.ioctl(vcpu, kvm.GET_TSC_KHZ, 0)


def _tolerance_ppm() -> int:
    """Return the module parameter ``kvm.tsc_tolerance_ppm``, its default if KVM is not loaded."""
    text = read_text(_TOLERANCE)
    return int(text) if text.isdigit() else KVM_TOLERANCE_PPM


def _is_stable(available: Sequence[str]) -> bool:
    """Return whether the kernel considers its TSC stable.

    It takes an unstable clocksource off its list (``available_clocksource_show``).  On Hyper-V, one
    that rests on the TSC replaces it there.
    """
    return not available or any(name in available for name in TSC_CLOCKSOURCES)
