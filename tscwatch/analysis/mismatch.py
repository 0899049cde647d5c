"""The kinds of mismatch, one :class:`MismatchKind` for each.  Pure.

A kind decides whether a vCPU is off, by how much, how severe that is and how to describe it.
:mod:`tscwatch.analysis.judge` decides when: it keeps the facts and calls :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

from tscwatch.analysis.frequency import ppm_between
from tscwatch.model import VM_SCOPE, Guest, Host, Kind, Severity, errno_name

_MAX_VCPUS_IN_A_SENTENCE = 4


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
    """The frequency of most vCPUs of the VM; None unless they differ."""


class Deviation(NamedTuple):
    """What is wrong with a VM, of one kind."""

    vcpus: tuple[int, ...]
    ppm: Optional[float]
    severity: Severity
    detail: str


class Explanation(NamedTuple):
    """What something means, where it comes from, and what to do about it."""

    meaning: str
    origin: str
    advice: str


class MismatchKind(NamedTuple):
    """The rules of one kind of mismatch."""

    is_off: Callable[[VcpuFacts, Context, float], bool]
    """Whether a vCPU has this mismatch, given a tolerance in ppm."""
    size: Callable[[VcpuFacts, Context], Optional[float]]
    """How far a vCPU is off in ppm; None if it is not known."""
    severity: Callable[[Optional[float], Context], Severity]
    """How severe a mismatch of this size is."""
    sentence: Callable[[Sequence[tuple[int, VcpuFacts]], Context], str]
    """Describes the vCPUs that are off, given with their ids in ascending order."""
    explanation: Explanation
    tolerance_ppm: Optional[float] = None
    """The default of its ``tolerance_ppm`` in the configuration; None if it has no such setting."""
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
    sizes = [rule.size(vcpu, context) for _, vcpu in vcpus]
    ppm = max((size for size in sizes if size is not None), default=None)
    ids = tuple(index for index, _ in vcpus if index != VM_SCOPE)
    return Deviation(ids, ppm, rule.severity(ppm, context), rule.sentence(vcpus, context))


def _by_kvm_tolerance(ppm: Optional[float], context: Context) -> Severity:
    """A difference within KVM's tolerance is a warning, any other is critical."""
    within = ppm is not None and ppm <= context.host.kvm_tolerance_ppm
    return "warning" if within else "critical"


def _beyond_tolerance(
    size: Callable[[VcpuFacts, Context], Optional[float]],
) -> Callable[[VcpuFacts, Context, float], bool]:
    def is_off(vcpu: VcpuFacts, context: Context, tolerance_ppm: float) -> bool:
        ppm = size(vcpu, context)
        return ppm is not None and ppm > tolerance_ppm

    return is_off


def _name(index: int) -> str:
    return "the VM's default" if index == VM_SCOPE else f"vCPU {index}"


_PIN = "pin the guest's frequency (QEMU's tsc-frequency, libvirt's <timer name='tsc'>)"


# refused


def _is_refused(vcpu: VcpuFacts, _context: Context, _tolerance_ppm: float) -> bool:
    return vcpu.refused is not None


def _refused_size(vcpu: VcpuFacts, _context: Context) -> Optional[float]:
    return ppm_between(vcpu.refused[0], vcpu.khz) if vcpu.refused else None


def _refused_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], _context: Context) -> str:
    index, vcpu = vcpus[-1]
    khz, status = vcpu.refused or (0, 0)
    return (
        f"KVM refused {khz} kHz on {_name(index)} with {errno_name(status)}; it stays at "
        f"{vcpu.khz} kHz, whatever KVM reports"
    )


_REFUSED = MismatchKind(
    _is_refused,
    _refused_size,
    _by_kvm_tolerance,
    _refused_sentence,
    Explanation(
        "KVM refused a frequency: the guest does not get it. On a host that does not scale, KVM "
        "reports that frequency all the same from then on.",
        "KVM_SET_TSC_KHZ fails. Without scaling, kvm_set_tsc_khz stores the frequency before it "
        "refuses to tick slower than the hardware.",
        "choose a frequency that this host has, or a host that scales.",
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
    _by_kvm_tolerance,
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


def _skew_size(vcpu: VcpuFacts, context: Context) -> Optional[float]:
    return ppm_between(vcpu.written_in(context.write_round), context.common_khz)


def _skew_sentence(vcpus: Sequence[tuple[int, VcpuFacts]], context: Context) -> str:
    named = ", ".join(
        f"vCPU {index} {vcpu.written_in(context.write_round)} kHz"
        for index, vcpu in vcpus[:_MAX_VCPUS_IN_A_SENTENCE]
    )
    more = len(vcpus) - _MAX_VCPUS_IN_A_SENTENCE
    rest = f" and {more} more" if more > 0 else ""
    return f"{named}{rest}, the others {context.common_khz} kHz"


_VCPU_SKEW = MismatchKind(
    _beyond_tolerance(_skew_size),
    _skew_size,
    _by_kvm_tolerance,
    _skew_sentence,
    Explanation(
        "vCPUs of one guest were given different frequencies: they disagree about time, and KVM "
        "gives up the guest's master clock.",
        "mostly a vCPU plugged after a migration: kvm_arch_vcpu_create starts it at the new "
        "host's frequency, and QEMU's kvm_arch_init_vcpu adopts that.",
        f"unplug the vCPU that differs, or restart the guest; then {_PIN}.",
    ),
    tolerance_ppm=0,
    compares_vcpus=True,
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
    _by_kvm_tolerance,
    _configured_sentence,
    Explanation(
        "The guest does not have the frequency of its command line.",
        "-cpu MODEL,tsc-frequency=HZ differs from the last SET on the vCPU.",
        "correct the command line or the frequency; a migration brings its source's frequency.",
    ),
    tolerance_ppm=0,
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
    _by_kvm_tolerance,
    _readback_sentence,
    Explanation(
        "KVM reports another frequency than was set last.",
        "KVM_GET_TSC_KHZ returns vcpu->arch.virtual_tsc_khz.",
        "find the other process that calls KVM on this vCPU; if there is none, report it: it is a "
        "bug in KVM or in tscwatch.",
    ),
    tolerance_ppm=0,
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
    else:
        reason = (
            f"KVM does not scale within its tolerance of {host.kvm_tolerance_ppm} ppm, so it ticks "
            f"at the host's {host.tsc_khz} kHz"
        )
    return f"{_name(index)} was given {vcpu.khz} kHz, but {reason}"


_UNSCALED = MismatchKind(
    _is_unscaled,
    _unscaled_size,
    _by_kvm_tolerance,
    _unscaled_sentence,
    Explanation(
        "The guest was given a frequency that it does not get: it ticks at the host's.",
        "kvm_set_tsc_khz does not scale within kvm.tsc_tolerance_ppm; above the host's frequency, "
        "without scaling, it only catches up at each entry.",
        f"keep the guest on hosts of its frequency, or on hosts that scale; else {_PIN}.",
    ),
    tolerance_ppm=0,
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
    _by_kvm_tolerance,
    _changed_sentence,
    Explanation(
        "A running vCPU was given another frequency outside a load.",
        "KVM_SET_TSC_KHZ on a vCPU that has run, outside QEMU's full-state write.",
        "find the process that did it in the log: QEMU never does.",
    ),
    tolerance_ppm=0,
)


MISMATCHES: Mapping[Kind, MismatchKind] = {
    "refused": _REFUSED,
    "withheld": _WITHHELD,
    "vcpu_skew": _VCPU_SKEW,
    "configured": _CONFIGURED,
    "readback": _READBACK,
    "unscaled": _UNSCALED,
    "changed": _CHANGED,
}
"""Every kind, in the order in which their changes are yielded."""

DEFAULT_TOLERANCE_PPM: Mapping[Kind, float] = {
    kind: rule.tolerance_ppm for kind, rule in MISMATCHES.items() if rule.tolerance_ppm is not None
}
