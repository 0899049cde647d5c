"""At which frequency a vCPU ticks for which KVM accepted a frequency.  Pure.

The rules are those of ``kvm_set_tsc_khz`` (``arch/x86/kvm/x86.c``).  It stores the requested
frequency (``virtual_tsc_khz``) before it checks anything, so what KVM reports is not what the
guest gets.
"""

from __future__ import annotations

from typing import Optional

from tscwatch.model import TSC_CLOCKSOURCES, Host


def effective(khz: Optional[int], host: Host, ratio: Optional[float] = None) -> Optional[int]:
    """Return the kHz at which a vCPU ticks for which KVM accepted ``khz``.

    :param ratio: the vCPU's scaling ratio, if it was read since.
    :returns: None if it is not known: the host's frequency is missing, or KVM is in its catch-up
        mode, in which the vCPU ticks at the host's rate and is pushed forward at each entry.
    """
    if khz is None or host.tsc_khz is None:
        return None
    if ratio is not None:
        return round(host.tsc_khz * ratio)
    if is_within_tolerance(khz, host):
        return host.tsc_khz
    return khz if host.scaling else None


def is_within_tolerance(khz: int, host: Host) -> bool:
    """Return whether KVM would not scale to ``khz``, because it is close enough to the host's."""
    return _bound(host, -1) <= khz <= _bound(host, 1)


def catches_up(khz: int, host: Host) -> bool:
    """Return whether KVM accepts ``khz`` but only catches up with it (``tsc_always_catchup``)."""
    return host.tsc_khz is not None and host.scaling is False and khz > _bound(host, 1)


def is_accepted(khz: int, host: Host) -> bool:
    """Return whether KVM accepts ``khz``: without scaling it cannot slow a vCPU down."""
    return host.tsc_khz is None or host.scaling is not False or khz >= _bound(host, -1)


def rests_on_tsc(host: Host) -> bool:
    """Return whether the kernel's clock is the TSC to KVM, also if it is not known."""
    return host.clocksource in ("", *TSC_CLOCKSOURCES)


def ppm_between(khz: Optional[int], wanted: Optional[int]) -> Optional[float]:
    """Return the distance of ``khz`` from ``wanted`` in ppm; None if one of them is not known."""
    return abs(khz - wanted) / wanted * 1e6 if khz is not None and wanted else None


def _bound(host: Host, sign: int) -> int:
    """Return a bound of KVM's tolerance, rounded as ``adjust_tsc_khz`` does."""
    return (host.tsc_khz or 0) * (1_000_000 + sign * host.kvm_tolerance_ppm) // 1_000_000
