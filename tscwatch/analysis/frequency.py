"""What KVM makes of a frequency: ``kvm_set_tsc_khz`` (arch/x86/kvm/x86.c), told again.

Pure.  What the kernel reports (``virtual_tsc_khz``) is stored before anything is checked, so it
is not what the guest gets; this is.
"""

from __future__ import annotations

from typing import Optional

from tscwatch.model import Host


def effective(khz: Optional[int], host: Host, scale: Optional[float] = None) -> Optional[int]:
    """The kHz at which a vCPU ticks for which KVM took ``khz``.

    :param scale: the vCPU's scaling ratio where debugfs shows it.
    :returns: None where it is not known: no host frequency, or KVM's catch-up mode, in which
        the vCPU ticks at the host's rate between entries and is pushed forward at each.
    """
    if khz is None or host.tsc_khz is None:
        return None
    if scale is not None:
        return round(host.tsc_khz * scale)
    if _bound(host, -1) <= khz <= _bound(host, 1):
        return host.tsc_khz
    return khz if host.scaling else None


def catches_up(khz: int, host: Host) -> bool:
    """KVM takes it, but cannot scale and only catches up (``tsc_always_catchup``)."""
    return host.tsc_khz is not None and host.scaling is False and khz > _bound(host, 1)


def is_taken(khz: int, host: Host) -> bool:
    """KVM does not refuse it."""
    return host.tsc_khz is None or host.scaling is not False or khz >= _bound(host, -1)


def _bound(host: Host, sign: int) -> int:
    """In the kernel's own integers (``adjust_tsc_khz``)."""
    return (host.tsc_khz or 0) * (1_000_000 + sign * host.kvm_tolerance_ppm) // 1_000_000
