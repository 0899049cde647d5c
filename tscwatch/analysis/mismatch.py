"""The kinds of mismatch, one :class:`MismatchKind` for each.  Pure.

A kind decides whether a vCPU is off, by how much, how severe that is and how to describe it.
:mod:`tscwatch.analysis.judge` decides when: it keeps the facts and calls :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple, Optional

from tscwatch.analysis.frequency import is_within_tolerance, ppm_between
from tscwatch.model import (
    SEVERITIES,
    VM_SCOPE,
    Guest,
    Host,
    Kind,
    Phase,
    Severity,
    duration,
    errno_name,
)

_MAX_VCPUS_IN_A_SENTENCE = 4
_LEAST_AGE_S = 1e-3
"""Of a guest into which a vCPU is plugged."""
_STEERABLE_PPM = 50
"""A clock daemon in the guest corrects a rate that is off by this much without trouble."""


@dataclass
class VcpuFacts:
    """What a vCPU's calls have established; frequencies in kHz, None while not known."""

    requested: Optional[int] = None
    """The last SET that succeeded."""
    reported: Optional[int] = None
    """What a GET would return now."""
    initial: Optional[int] = None
    """The last GET that does not echo a refused SET."""
    effective: Optional[int] = None
    """What its TSC ticks at."""
    phase: Optional[Phase] = None
    """Of its last call."""
    lag: Optional[float] = None
    """How many seconds its TSC is behind most others of its VM; negative if it is ahead."""
    apart_by_kvm: bool = False
    """KVM does not count its TSC among those that match, while its lag is not known."""
    refused: Optional[tuple[int, int]] = None
    """kHz and -errno of a SET that failed, until one succeeds."""
    withheld: bool = False
    """QEMU issued GET, GET instead of GET, SET."""
    changed_from: Optional[int] = None
    """What it ran at before its frequency was changed outside a load."""
    catching_up: bool = False
    """In KVM's catch-up mode, which it never leaves."""
    written: Optional[tuple[int, int]] = None
    """Write round and kHz of its last complete write."""

    @property
    def khz(self) -> Optional[int]:
        """The frequency that KVM holds for it, whatever it has refused since."""
        return self.initial if self.requested is None else self.requested

    def written_in(self, write_round: int) -> Optional[int]:
        """Return the kHz it was written with in this round; None if it has not been yet."""
        if self.written is None or self.written[0] != write_round:
            return None
        return self.written[1]


class Context(NamedTuple):
    """What a rule compares a vCPU's facts with."""

    host: Host
    guest: Guest
    write_round: int = 0
    common_khz: Optional[int] = None
    """The frequency that most vCPUs of the VM were given; None unless they differ."""
    common_effective: Optional[int] = None
    """What most vCPUs of the VM tick at; None if not known."""
    default_khz: Optional[int] = None
    """What was set for the VM; None if that is the host's frequency."""


class Deviation(NamedTuple):
    """What is wrong with a VM, of one kind."""

    vcpus: tuple[int, ...]
    ppm: Optional[float]
    severity: Severity
    detail: str
    requested_ppm: Optional[float] = None
    """See :class:`tscwatch.model.Mismatch`."""
    apart_seconds: Optional[float] = None
    """Likewise."""


class Explanation(NamedTuple):
    """What something means, where it comes from, and what to do about it."""

    meaning: str
    origin: str
    advice: str


class MismatchKind(NamedTuple):
    """The rules of one kind of mismatch."""

    is_off: Callable[[VcpuFacts, Context, float], bool]
    """Whether a vCPU has this mismatch, given its tolerance."""
    size: Callable[[VcpuFacts, Context], Optional[float]]
    """How far a vCPU's rate is off in ppm; None if it is not known."""
    severity: Callable[[VcpuFacts, Context], Severity]
    """What the mismatch of one vCPU means for the guest."""
    sentence: Callable[[Sequence[tuple[int, VcpuFacts]], Context], str]
    """Describes the vCPUs that are off, given with their ids in ascending order."""
    explanation: Explanation
    tolerance: Optional[float] = None
    """The default of its tolerance in the configuration; None if it has no such setting."""
    unit: Literal["ppm", "seconds"] = "ppm"
    """Of the tolerance."""
    requested_size: Optional[Callable[[VcpuFacts, Context], Optional[float]]] = None
    """How far the frequencies that were requested differ, if that is another size, in ppm."""
    apart: Optional[Callable[[VcpuFacts], Optional[float]]] = None
    """How far a vCPU's TSC is from the others', in seconds; None if the kind has no such size."""
    compares_vcpus: bool = False
    """Whether a vCPU can come to be off without a call of its own, because others change."""
    needs_write: bool = False
    """Whether it can be judged only once QEMU has finished writing the vCPU's frequency."""


def evaluate(
    kind: Kind, vcpus: Sequence[tuple[int, VcpuFacts]], context: Context
) -> Optional[Deviation]:
    """Size and describe a mismatch.

    :param vcpus: those that are off, with their ids in ascending order.
    :returns: None if there are none.
    """
    if not vcpus:
        return None
    rule = MISMATCHES[kind]
    facts = [vcpu for _, vcpu in vcpus]
    return Deviation(
        vcpus=tuple(index for index, _ in vcpus if index != VM_SCOPE),
        ppm=_largest(rule.size(vcpu, context) for vcpu in facts),
        severity=max((rule.severity(vcpu, context) for vcpu in facts), key=SEVERITIES.index),
        detail=rule.sentence(vcpus, context),
        requested_ppm=rule.requested_size
        and _largest(rule.requested_size(vcpu, context) for vcpu in facts),
        apart_seconds=rule.apart and _largest(rule.apart(vcpu) for vcpu in facts),
    )


def _largest(sizes: Iterable[Optional[float]]) -> Optional[float]:
    return max((size for size in sizes if size is not None), default=None)


def _by_size(
    size: Callable[[VcpuFacts, Context], Optional[float]],
) -> Callable[[VcpuFacts, Context], Severity]:
    """How severe it is that the guest's rate is off: KVM's tolerance is the limit of a warning."""

    def severity(vcpu: VcpuFacts, context: Context) -> Severity:
        ppm = size(vcpu, context)
        if ppm is None or ppm > context.host.kvm_tolerance_ppm:
            return "critical"
        return "warning" if ppm > _STEERABLE_PPM else "info"

    return severity


def _beyond_tolerance(
    size: Callable[[VcpuFacts, Context], Optional[float]],
) -> Callable[[VcpuFacts, Context, float], bool]:
    def is_off(vcpu: VcpuFacts, context: Context, tolerance_ppm: float) -> bool:
        ppm = size(vcpu, context)
        return ppm is not None and ppm > tolerance_ppm

    return is_off


def _name(index: int) -> str:
    return "the VM's default" if index == VM_SCOPE else f"vCPU {index}"


# desync


def _is_apart(vcpu: VcpuFacts, _context: Context, tolerance_s: float) -> bool:
    return vcpu.apart_by_kvm if vcpu.lag is None else abs(vcpu.lag) > tolerance_s


def _critical(_vcpu: VcpuFacts, _context: Context) -> Severity:
    return "critical"


def _rate_from_others(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    """Return how far a vCPU's rate is from that of most others, in ppm."""
    return ppm_between(vcpu.effective, context.common_effective)


def _desync_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    named = "; ".join(
        _apart_clause(index, vcpu, context) for index, vcpu in vcpus[:_MAX_VCPUS_IN_A_SENTENCE]
    )
    more = len(vcpus) - _MAX_VCPUS_IN_A_SENTENCE
    return f"{named}; likewise {more} more" if more > 0 else named


def _apart_clause(index: int, vcpu: VcpuFacts, context: Context) -> str:
    if vcpu.lag is None:
        return (
            f"the TSC of vCPU {index} does not match the others'; by how much they are apart is "
            "not known"
        )
    plugged = vcpu.phase == "hotplug" and vcpu.lag > _LEAST_AGE_S
    origin = " (started at 0 when plugged)" if plugged else ""
    direction = "behind" if vcpu.lag > 0 else "ahead of"
    return (
        f"vCPU {index}'s TSC is {duration(abs(vcpu.lag))} {direction} the others{origin}"
        f"{_rate_clause(vcpu, context)}"
    )


def _rate_clause(vcpu: VcpuFacts, context: Context) -> str:
    ppm = _rate_from_others(vcpu, context)
    if ppm is None:
        return ""
    if ppm == 0:
        return "; it ticks at the same rate"
    faster = (vcpu.effective or 0) > (context.common_effective or 0)
    return f"; it ticks {ppm:.1f} ppm {'faster' if faster else 'slower'}"


_DESYNC = MismatchKind(
    _is_apart,
    _rate_from_others,
    _critical,
    _desync_sentence,
    Explanation(
        "The TSCs of one guest's vCPUs show different times now. A Linux guest that sees it marks "
        "its TSC unstable and falls back to another clocksource; its kvmclock loses the stable "
        "bit. Windows loses its reference TSC page. Whatever reads the TSC by itself gets a time "
        "that depends on the vCPU.",
        "mostly a vCPU plugged into a guest whose frequency is not exactly its VM's default (the "
        "host's own): kvm_synchronize_tsc then starts the new vCPU's TSC at 0, also if the guest "
        "is pinned by tsc-frequency. Else a restore that set the TSCs one after another.",
        "unplug that vCPU, or stop the guest and start it again on this host. A reset of the guest "
        "helps if all vCPUs have one frequency (no vcpu_skew). To prevent it, plug no vCPU while "
        "there is a hotplug risk; the runbook lists what else prevents it.",
    ),
    tolerance=1e-6,
    unit="seconds",
    apart=lambda vcpu: None if vcpu.lag is None else abs(vcpu.lag),
)


# refused


def _is_refused(vcpu: VcpuFacts, _context: Context, _tolerance_ppm: float) -> bool:
    return vcpu.refused is not None


def _refused_size(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    return ppm_between(vcpu.refused[0], _kept(vcpu, context)) if vcpu.refused else None


def _kept(vcpu: VcpuFacts, context: Context) -> Optional[int]:
    """Return what a vCPU keeps whose SET was refused: before its first call, the VM's default."""
    return vcpu.khz or context.default_khz or context.host.tsc_khz


def _refused_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    index, vcpu = vcpus[-1]
    khz, status = vcpu.refused or (0, 0)
    despite = "" if context.host.scaling else ", whatever KVM reports"
    return (
        f"KVM refused {khz} kHz on {_name(index)} with {errno_name(status)}; it stays at "
        f"{_kept(vcpu, context)} kHz{despite}"
    )


_REFUSED = MismatchKind(
    _is_refused,
    _refused_size,
    _by_size(_refused_size),
    _refused_sentence,
    Explanation(
        "KVM refused a frequency: the guest does not get it. On a host that does not scale, KVM "
        "reports that frequency all the same from then on.",
        "KVM_SET_TSC_KHZ fails: on a host that does not scale, with a frequency below the host's "
        "(kvm_set_tsc_khz stores it before it refuses it); on one that scales, with one above what "
        "the hardware can reach (max_guest_tsc_khz).",
        "choose a frequency that this host can give: its own, or on a host that scales a lower "
        "one.",
    ),
)


# withheld


def _is_withheld(vcpu: VcpuFacts, _context: Context, _tolerance_ppm: float) -> bool:
    return vcpu.withheld


def _withheld_size(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    return ppm_between(vcpu.reported, context.guest.tsc_khz)


def _withheld_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], _context: Context) -> str:
    index, vcpu = vcpus[-1]
    return (
        f"QEMU wanted a frequency that it could not set; {_name(index)} stays at "
        f"{vcpu.reported} kHz"
    )


_WITHHELD = MismatchKind(
    _is_withheld,
    _withheld_size,
    _by_size(_withheld_size),
    _withheld_sentence,
    Explanation(
        "QEMU wanted a frequency and did not even request it from KVM. After a migration it only "
        "warns, in its own log.",
        "kvm_arch_set_tsc_khz in QEMU: GET, GET instead of GET, SET, when the hardware does not "
        "scale and the frequency is more than 250 ppm off.",
        "migrate the guest to a host of its frequency, or to one that scales.",
    ),
)


# vcpu_skew


def _skew_requested(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    return ppm_between(vcpu.written_in(context.write_round), context.common_khz)


def _skew_severity(vcpu: VcpuFacts, context: Context) -> Severity:
    """Different rates are critical; equal ones still cost the guest KVM's master clock."""
    return "warning" if _rate_from_others(vcpu, context) == 0 else "critical"


def _skew_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    named = ", ".join(
        f"vCPU {index} {vcpu.written_in(context.write_round)} kHz"
        for index, vcpu in vcpus[:_MAX_VCPUS_IN_A_SENTENCE]
    )
    more = len(vcpus) - _MAX_VCPUS_IN_A_SENTENCE
    rest = f" and {more} more" if more > 0 else ""
    alike = all(_rate_from_others(vcpu, context) == 0 for _, vcpu in vcpus)
    rates = "; all tick alike" if alike else ""
    return f"{named}{rest}, the others {context.common_khz} kHz{rates}"


_VCPU_SKEW = MismatchKind(
    _beyond_tolerance(_skew_requested),
    _rate_from_others,
    _skew_severity,
    _skew_sentence,
    Explanation(
        "vCPUs of one guest were given different frequencies. If KVM scales to them, the vCPUs' "
        "TSCs drift apart. If they are within KVM's tolerance, all tick at the host's rate, but "
        "KVM still gives up the guest's master clock, and the TSC of a vCPU that was plugged "
        "starts at 0 (desync).",
        "mostly a vCPU plugged after a migration: kvm_arch_vcpu_create starts it at the VM's "
        "default, the new host's frequency, and QEMU's kvm_arch_init_vcpu adopts that.",
        "unplug the vCPU that differs, or stop the guest and start it again on this host. A reset "
        "does not help: the frequencies stay. Until then, plug no vCPU after a migration between "
        "hosts whose frequencies differ, even by 1 kHz.",
    ),
    tolerance=0,
    compares_vcpus=True,
    requested_size=_skew_requested,
)


# configured


def _configured_size(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    return ppm_between(vcpu.khz, context.guest.tsc_khz)


def _configured_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    index, vcpu = vcpus[-1]
    return (
        f"{_name(index)} has {vcpu.khz} kHz, but the command line's tsc-frequency is "
        f"{context.guest.tsc_khz} kHz"
    )


_CONFIGURED = MismatchKind(
    _beyond_tolerance(_configured_size),
    _configured_size,
    _by_size(_configured_size),
    _configured_sentence,
    Explanation(
        "The guest does not have the frequency of its command line.",
        "-cpu MODEL,tsc-frequency=HZ differs from the last SET on the vCPU.",
        "correct the command line or the frequency; a migration brings its source's frequency.",
    ),
    tolerance=0,
    needs_write=True,
)


# readback


def _readback_size(vcpu: VcpuFacts, _context: Context) -> Optional[float]:
    return ppm_between(vcpu.reported, vcpu.requested)


def _readback_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], _context: Context) -> str:
    index, vcpu = vcpus[-1]
    return (
        f"KVM reports {vcpu.reported} kHz for {_name(index)}, but the last SET was "
        f"{vcpu.requested} kHz"
    )


_READBACK = MismatchKind(
    _beyond_tolerance(_readback_size),
    _readback_size,
    _by_size(_readback_size),
    _readback_sentence,
    Explanation(
        "KVM reports another frequency than was set last.",
        "KVM_GET_TSC_KHZ returns vcpu->arch.virtual_tsc_khz.",
        "find the other process that calls KVM on this vCPU; if there is none, report it: it is a "
        "bug in KVM or in tscwatch.",
    ),
    tolerance=0,
)


# unscaled


def _unscaled_size(vcpu: VcpuFacts, _context: Context) -> Optional[float]:
    return ppm_between(vcpu.effective, vcpu.khz)


_ticks_otherwise = _beyond_tolerance(_unscaled_size)


def _is_unscaled(vcpu: VcpuFacts, context: Context, tolerance_ppm: float) -> bool:
    return vcpu.catching_up or _ticks_otherwise(vcpu, context, tolerance_ppm)


def _unscaled_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    index, vcpu = vcpus[-1]
    host = context.host
    if vcpu.catching_up:
        reason = (
            f"this host cannot scale its {host.tsc_khz} kHz, so KVM only catches up at each entry"
        )
    elif vcpu.effective != host.tsc_khz:
        reason = f"it ticks at {vcpu.effective} kHz: its last call was not seen"
    else:
        reason = (
            f"KVM does not scale within its tolerance of {host.kvm_tolerance_ppm} ppm, so it ticks "
            f"at the host's {host.tsc_khz} kHz"
        )
    return f"{_name(index)} was given {vcpu.khz} kHz, but {reason}"


def _unscaled_severity(vcpu: VcpuFacts, context: Context) -> Severity:
    """Within KVM's tolerance, a vCPU keeps the host's frequency by design: that is not critical.

    KVM's tolerance is in ppm of the host's frequency; the size is in ppm of the guest's.
    """
    host = context.host
    within_tolerance = vcpu.khz is not None and is_within_tolerance(vcpu.khz, host)
    if within_tolerance and vcpu.effective == host.tsc_khz:
        return "warning" if (_unscaled_size(vcpu, context) or 0) > _STEERABLE_PPM else "info"
    return _by_size(_unscaled_size)(vcpu, context)


_UNSCALED = MismatchKind(
    _is_unscaled,
    _unscaled_size,
    _unscaled_severity,
    _unscaled_sentence,
    Explanation(
        "The guest was given a frequency that it does not get: it ticks at the host's, or at one "
        "whose SET was not seen. Two hosts of one model are calibrated some kHz apart at each "
        "boot, so a small difference is normal and harmless by itself: a clock daemon in the "
        "guest, or kvmclock, corrects it.",
        "kvm_set_tsc_khz does not scale within kvm.tsc_tolerance_ppm; above the host's frequency, "
        "without scaling, it only catches up at each entry.",
        "nothing up to 50 ppm. Above that, keep the guest on hosts of its frequency, or lower "
        "kvm.tsc_tolerance_ppm on a host that scales.",
    ),
    tolerance=0,
)


# changed


def _changed_size(vcpu: VcpuFacts, _context: Context) -> Optional[float]:
    return ppm_between(vcpu.khz, vcpu.changed_from)


def _changed_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], _context: Context) -> str:
    index, vcpu = vcpus[-1]
    return f"{_name(index)} ran at {vcpu.changed_from} kHz and was given {vcpu.khz} kHz"


_CHANGED = MismatchKind(
    _beyond_tolerance(_changed_size),
    _changed_size,
    _by_size(_changed_size),
    _changed_sentence,
    Explanation(
        "A running vCPU was given another frequency outside a load.",
        "KVM_SET_TSC_KHZ on a vCPU that has run, outside QEMU's full-state write.",
        "find the process that did it in the log: QEMU never does.",
    ),
    tolerance=0,
)


MISMATCHES: Mapping[Kind, MismatchKind] = {
    "desync": _DESYNC,
    "vcpu_skew": _VCPU_SKEW,
    "refused": _REFUSED,
    "withheld": _WITHHELD,
    "configured": _CONFIGURED,
    "readback": _READBACK,
    "unscaled": _UNSCALED,
    "changed": _CHANGED,
}
"""Every kind, in the order in which their changes are yielded."""

DEFAULT_TOLERANCE: Mapping[Kind, float] = {
    kind: rule.tolerance for kind, rule in MISMATCHES.items() if rule.tolerance is not None
}
"""By kind, in its unit."""
