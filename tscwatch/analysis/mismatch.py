"""What is known of a VM's vCPUs, and what is wrong with them, in words.

Pure.  :mod:`tscwatch.judge` decides when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from tscwatch.analysis import frequency
from tscwatch.model import KINDS, Guest, Host, Kind, KvmTscState, Phase, errno_name

VM_SCOPE = -1
"""Stands among a VM's vCPUs for the VM itself: the default of the vCPUs to come."""


class Deviation(NamedTuple):
    """What is wrong with a VM, of one kind."""

    vcpus: tuple[int, ...]
    ppm: Optional[float]
    detail: str


@dataclass
class Vcpu:
    """What its calls have said of a vCPU."""

    requested: Optional[int] = None
    """The last SET that succeeded, kHz."""
    reported: Optional[int] = None
    """The last GET, kHz."""
    initial: Optional[int] = None
    """The last GET that does not echo a refused SET (kvm_set_tsc_khz stores before it checks)."""
    refused: Optional[tuple[int, int]] = None
    """kHz and errno of a SET that failed, until one succeeds."""
    withheld: bool = False
    changed_from: Optional[int] = None
    """kHz that it ran at before somebody changed it outside a load."""
    catching_up: bool = False
    """KVM never takes a vCPU out of its catch-up mode again."""
    scale: Optional[float] = None
    effective: Optional[int] = None
    """As last told."""
    block: int = -1
    gets: int = 0
    sets: int = 0
    counted: Optional[tuple[int, int]] = None
    """Wave and kHz under which this vCPU stands in the VM's rates."""

    @property
    def khz(self) -> Optional[int]:
        """What KVM holds for its frequency, whatever it was refused since."""
        return self.initial if self.requested is None else self.requested


@dataclass
class Vm:
    """A VM with its vCPUs, and what is wrong with it now."""

    name: str
    guest: Guest
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    wave: int = 0
    rates: Counter[int] = field(default_factory=Counter)
    """How many vCPUs, of those already written in this wave, have which kHz."""
    suspects: dict[Kind, set[int]] = field(default_factory=lambda: {kind: set() for kind in KINDS})
    active: dict[Kind, tuple[Deviation, Phase]] = field(default_factory=dict)
    at_risk: bool = False
    whole: bool = True
    awaiting_kvm: set[int] = field(default_factory=set)
    """vCPUs that were given a frequency, and whose TSC is still to be written."""
    verdict: Optional[KvmTscState] = None
    told: Optional[KvmTscState] = None
    """What the active skew was last told with."""
    contradicted: bool = False


def effective_khz(vcpu: Vcpu, host: Host) -> Optional[int]:
    """What its TSC really ticks at; None where that is not known."""
    return None if vcpu.catching_up else frequency.effective(vcpu.khz, host, vcpu.scale)


def ppm_between(khz: Optional[int], wanted: Optional[int]) -> Optional[float]:
    """None where one of them is not known."""
    return abs(khz - wanted) / wanted * 1e6 if khz is not None and wanted else None


def _largest(sizes: Iterable[Optional[float]]) -> Optional[float]:
    return max((size for size in sizes if size is not None), default=None)


def _counted(vm: Vm) -> dict[int, int]:
    """The kHz of each vCPU that was written in this wave, by id."""
    return {
        index: vcpu.counted[1]
        for index, vcpu in sorted(vm.vcpus.items())
        if vcpu.counted is not None and vcpu.counted[0] == vm.wave
    }


def most_common(vm: Vm) -> int:
    """The frequency of most vCPUs; of the one with the lowest id where none leads."""
    if len(vm.rates) == 1:
        return next(iter(vm.rates))
    return max(_counted(vm).values(), key=lambda khz: vm.rates[khz])


def skew(vm: Vm) -> Deviation:
    """Against the frequency of most vCPUs."""
    rates, most = _counted(vm), most_common(vm)
    off = tuple(index for index, khz in rates.items() if khz != most)
    size = _largest(ppm_between(khz, most) for khz in vm.rates)
    shown = ", ".join(f"vCPU {index} {rates[index]} kHz" for index in off[:4])
    more = f" and {len(off) - 4} more" if len(off) > 4 else ""
    return Deviation(off, size, f"{shown}{more}, the others {most} kHz")


def _who(index: int) -> str:
    return "the VM's default" if index == VM_SCOPE else f"vCPU {index}"


def _refused(vm: Vm, vcpus: tuple[int, ...], _host: Host) -> Deviation:
    refusals = [(index, vm.vcpus[index]) for index in vcpus]
    size = _largest(ppm_between(v.refused[0], v.khz) for _, v in refusals if v.refused)
    index, vcpu = refusals[-1]
    khz, status = vcpu.refused or (0, 0)
    return Deviation(
        vcpus,
        size,
        f"KVM refused {khz} kHz on {_who(index)} with {errno_name(status)}; it stays at "
        f"{vcpu.khz} kHz, whatever it reports",
    )


def _withheld(vm: Vm, vcpus: tuple[int, ...], _host: Host) -> Deviation:
    size = _largest(ppm_between(vm.vcpus[index].reported, vm.guest.tsc_khz) for index in vcpus)
    kept = vm.vcpus[vcpus[-1]].reported
    return Deviation(
        vcpus,
        size,
        f"QEMU wanted a frequency that it could not set; {_who(vcpus[-1])} stays at {kept} kHz",
    )


def _configured(vm: Vm, vcpus: tuple[int, ...], _host: Host) -> Deviation:
    wanted = vm.guest.tsc_khz
    size = _largest(ppm_between(vm.vcpus[index].khz, wanted) for index in vcpus)
    has = vm.vcpus[vcpus[-1]].khz
    return Deviation(
        vcpus, size, f"{_who(vcpus[-1])} has {has} kHz, tsc-frequency asks for {wanted} kHz"
    )


def _readback(vm: Vm, vcpus: tuple[int, ...], _host: Host) -> Deviation:
    vcpu = vm.vcpus[vcpus[-1]]
    size = _largest(ppm_between(vm.vcpus[i].reported, vm.vcpus[i].requested) for i in vcpus)
    return Deviation(
        vcpus,
        size,
        f"KVM reports {vcpu.reported} kHz for {_who(vcpus[-1])}, the last SET was "
        f"{vcpu.requested} kHz",
    )


def _unscaled(vm: Vm, vcpus: tuple[int, ...], host: Host) -> Deviation:
    states = [vm.vcpus[index] for index in vcpus]
    size = _largest(ppm_between(effective_khz(v, host), v.khz) for v in states)
    what = f"{_who(vcpus[-1])} was given {states[-1].khz} kHz"
    if states[-1].catching_up:
        why = f"this host cannot scale its {host.tsc_khz} kHz; KVM only catches up at each entry"
    else:
        why = (
            f"inside KVM's tolerance of {host.kvm_tolerance_ppm} ppm nothing is scaled: it ticks "
            f"at the host's {host.tsc_khz} kHz"
        )
    return Deviation(vcpus, size, f"{what}, but {why}")


def _changed(vm: Vm, vcpus: tuple[int, ...], _host: Host) -> Deviation:
    states = [vm.vcpus[index] for index in vcpus]
    size = _largest(ppm_between(v.khz, v.changed_from) for v in states)
    return Deviation(
        vcpus,
        size,
        f"{_who(vcpus[-1])} ran with {states[-1].changed_from} kHz and was given "
        f"{states[-1].khz} kHz",
    )


_DESCRIBE = {
    "refused": _refused,
    "withheld": _withheld,
    "configured": _configured,
    "readback": _readback,
    "unscaled": _unscaled,
    "changed": _changed,
}


def describe(kind: Kind, vm: Vm, vcpus: tuple[int, ...], host: Host) -> Deviation:
    """What is wrong with vCPUs that are off by themselves."""
    return _DESCRIBE[kind](vm, vcpus, host)
