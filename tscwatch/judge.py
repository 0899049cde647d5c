"""Whether the frequencies of a VM's vCPUs are what they should be.

Pure.  Work per call does not grow with the VM's size, except while it has a skew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from tscwatch.model import (
    KINDS,
    Call,
    Guest,
    Kind,
    Mismatch,
    Phase,
    Severity,
    State,
    VmEnded,
    errno_name,
)

KVM_TOLERANCE_PPM = 250
"""Default of the module parameter ``kvm.tsc_tolerance_ppm``."""
SECONDS_A_DAY = 86_400


class Finding(NamedTuple):
    """What is wrong with a VM, of one kind."""

    vcpus: tuple[int, ...]
    ppm: Optional[float]
    detail: str


@dataclass
class _Vcpu:
    requested: Optional[int] = None
    """The last SET that succeeded, kHz."""
    reported: Optional[int] = None
    """The last GET, kHz."""
    initial: Optional[int] = None
    """The last GET that does not echo a refused SET (kvm_set_tsc_khz stores before it checks)."""
    refused: Optional[tuple[int, int]] = None
    """kHz and errno of a SET that failed, until one succeeds."""
    withheld: bool = False
    block: int = -1
    gets: int = 0
    sets: int = 0
    counted: Optional[tuple[int, int]] = None
    """Wave and kHz under which this vCPU stands in the VM's rates."""

    @property
    def khz(self) -> Optional[int]:
        return self.initial if self.requested is None else self.requested


@dataclass
class _Vm:
    name: str
    guest: Guest
    vcpus: dict[int, _Vcpu] = field(default_factory=dict)
    wave: int = 0
    rates: Counter[int] = field(default_factory=Counter)
    """How many vCPUs, of those already written in this wave, have which kHz."""
    suspects: dict[Kind, set[int]] = field(default_factory=lambda: {kind: set() for kind in KINDS})
    active: dict[Kind, tuple[Finding, Phase]] = field(default_factory=dict)


class Judge:
    """The mismatches of all VMs on a host.

    :param tolerance_ppm: per kind, the largest difference that is no mismatch.
    :param kvm_tolerance_ppm: KVM's own; inside it a mismatch is a warning, outside critical.
    """

    def __init__(
        self,
        tolerance_ppm: Optional[Mapping[Kind, float]] = None,
        kvm_tolerance_ppm: float = KVM_TOLERANCE_PPM,
    ) -> None:
        self._tolerance_ppm = dict(tolerance_ppm or {})
        self._kvm_tolerance_ppm = kvm_tolerance_ppm
        self._vms: dict[str, _Vm] = {}

    def feed(self, call: Call) -> list[Mismatch]:
        """The mismatches that a call raises, changes or clears."""
        if not call.tracked or call.phase == "probe" or call.event.vcpu is None:
            return []
        vm = self._vms.get(call.vm)
        if vm is None:
            vm = self._vms[call.vm] = _Vm(call.vm, call.guest)
        vcpu = vm.vcpus.setdefault(call.event.vcpu, _Vcpu())
        _note(vcpu, call)
        _count_rate(vm, vcpu, call)
        self._suspect(vm, vcpu, call)
        return list(self._changes(vm, call))

    def end(self, ended: VmEnded) -> list[Mismatch]:
        """The VM is gone, and its mismatches with it."""
        vm = self._vms.pop(ended.vm, None)
        if vm is None:
            return []
        return [
            self._mismatch(ended.ts, vm, kind, "cleared", vm.active[kind]) for kind in vm.active
        ]

    def _suspect(self, vm: _Vm, vcpu: _Vcpu, call: Call) -> None:
        """Keep, per kind, the vCPUs that are off by themselves."""
        configured = call.guest.tsc_khz
        off: dict[Kind, bool] = {
            "refused": vcpu.refused is not None,
            "withheld": vcpu.withheld,
            "readback": self._differs("readback", vcpu.reported, vcpu.requested),
        }
        if call.settled:
            off["configured"] = self._differs("configured", vcpu.khz, configured)
        for kind, is_off in off.items():
            suspects = vm.suspects[kind]
            (suspects.add if is_off else suspects.discard)(call.event.vcpu or 0)

    def _differs(self, kind: Kind, khz: Optional[int], wanted: Optional[int]) -> bool:
        size = _ppm(khz, wanted)
        return size is not None and size > self._tolerance_ppm.get(kind, 0)

    def _changes(self, vm: _Vm, call: Call) -> Iterable[Mismatch]:
        ts = call.event.ts
        for kind in KINDS:
            before = vm.active.get(kind)
            now = self._find(kind, vm, before, call.whole)
            if before is not None and now is None:
                del vm.active[kind]
                yield self._mismatch(ts, vm, kind, "cleared", before)
            elif now is not None and (before is None or now != before[0]):
                vm.active[kind] = now, call.phase
                yield self._mismatch(ts, vm, kind, "raised", vm.active[kind])

    def _find(
        self, kind: Kind, vm: _Vm, before: Optional[tuple[Finding, Phase]], whole: bool
    ) -> Optional[Finding]:
        if kind != "vcpu_skew":
            suspects = vm.suspects[kind]
            return _DESCRIBE[kind](vm, tuple(sorted(suspects))) if suspects else None
        found = _skew(vm) if len(vm.rates) > 1 else None
        if found is not None and (found.ppm or 0) > self._tolerance_ppm.get(kind, 0):
            return found
        # In the middle of a wave the vCPUs that are still to be written prove nothing.
        return before[0] if before is not None and not whole else None

    def _mismatch(
        self, ts: int, vm: _Vm, kind: Kind, state: State, found: tuple[Finding, Phase]
    ) -> Mismatch:
        finding, phase = found
        return Mismatch(
            ts=ts,
            state=state,
            kind=kind,
            vm=vm.name,
            guest=vm.guest,
            vcpus=finding.vcpus,
            ppm=finding.ppm,
            severity=self._severity(finding.ppm),
            phase=phase,
            detail=finding.detail,
        )

    def _severity(self, ppm: Optional[float]) -> Severity:
        inside = ppm is not None and ppm <= self._kvm_tolerance_ppm
        return "warning" if inside else "critical"


def _note(vcpu: _Vcpu, call: Call) -> None:
    """What one call says of its vCPU."""
    if call.block != vcpu.block:
        vcpu.block, vcpu.gets, vcpu.sets = call.block, 0, 0
    if call.event.op == "set":
        vcpu.sets += 1
        if call.status == 0:
            vcpu.requested = vcpu.reported = call.khz
            vcpu.refused, vcpu.withheld = None, False
        else:
            vcpu.refused = call.event.arg, call.status
    else:
        vcpu.gets += 1
        if call.khz is not None:
            vcpu.reported = call.khz
            if vcpu.refused is None:
                vcpu.initial = call.khz
        # GET, GET where QEMU's kvm_arch_set_tsc_khz would have made it GET, SET.
        if call.step != "unknown" and vcpu.gets > 1 and not vcpu.sets:
            vcpu.withheld = True


def _count_rate(vm: _Vm, vcpu: _Vcpu, call: Call) -> None:
    if call.wave != vm.wave:
        vm.wave, vm.rates = call.wave, Counter()
    if not call.settled or vcpu.khz is None:
        return
    if vcpu.counted is not None and vcpu.counted[0] == vm.wave:
        vm.rates[vcpu.counted[1]] -= 1
        vm.rates += Counter()  # drops what fell to zero
    vm.rates[vcpu.khz] += 1
    vcpu.counted = vm.wave, vcpu.khz


def _ppm(khz: Optional[int], wanted: Optional[int]) -> Optional[float]:
    return abs(khz - wanted) / wanted * 1e6 if khz is not None and wanted else None


def _largest(sizes: Iterable[Optional[float]]) -> Optional[float]:
    return max((size for size in sizes if size is not None), default=None)


def _skew(vm: _Vm) -> Finding:
    """Against the frequency of most vCPUs; of the one with the lowest id where none leads."""
    rates = {
        index: vcpu.counted[1]
        for index, vcpu in sorted(vm.vcpus.items())
        if vcpu.counted is not None and vcpu.counted[0] == vm.wave
    }
    most = max(rates.values(), key=lambda khz: vm.rates[khz])
    off = tuple(index for index, khz in rates.items() if khz != most)
    size = _largest(_ppm(khz, most) for khz in vm.rates)
    shown = ", ".join(f"vCPU {index} {rates[index]} kHz" for index in off[:4])
    more = f" and {len(off) - 4} more" if len(off) > 4 else ""
    drift = (size or 0) * SECONDS_A_DAY / 1e6
    return Finding(off, size, f"{shown}{more}, the others {most} kHz: {drift:.1f} s a day apart")


def _refused(vm: _Vm, vcpus: tuple[int, ...]) -> Finding:
    refusals = [(index, vm.vcpus[index]) for index in vcpus]
    size = _largest(_ppm(v.refused[0], v.khz) for _, v in refusals if v.refused)
    index, vcpu = refusals[-1]
    khz, status = vcpu.refused or (0, 0)
    return Finding(
        vcpus,
        size,
        f"KVM refused {khz} kHz on vCPU {index} with {errno_name(status)}; it stays at "
        f"{vcpu.khz} kHz, whatever it reports",
    )


def _withheld(vm: _Vm, vcpus: tuple[int, ...]) -> Finding:
    size = _largest(_ppm(vm.vcpus[index].reported, vm.guest.tsc_khz) for index in vcpus)
    kept = vm.vcpus[vcpus[-1]].reported
    return Finding(
        vcpus,
        size,
        f"QEMU wanted a frequency that it could not set; vCPU {vcpus[-1]} stays at {kept} kHz",
    )


def _configured(vm: _Vm, vcpus: tuple[int, ...]) -> Finding:
    wanted = vm.guest.tsc_khz
    size = _largest(_ppm(vm.vcpus[index].khz, wanted) for index in vcpus)
    has = vm.vcpus[vcpus[-1]].khz
    return Finding(
        vcpus, size, f"vCPU {vcpus[-1]} has {has} kHz, tsc-frequency asks for {wanted} kHz"
    )


def _readback(vm: _Vm, vcpus: tuple[int, ...]) -> Finding:
    vcpu = vm.vcpus[vcpus[-1]]
    size = _largest(_ppm(vm.vcpus[i].reported, vm.vcpus[i].requested) for i in vcpus)
    return Finding(
        vcpus,
        size,
        f"KVM reports {vcpu.reported} kHz for vCPU {vcpus[-1]}, the last SET was "
        f"{vcpu.requested} kHz",
    )


_DESCRIBE = {
    "refused": _refused,
    "withheld": _withheld,
    "configured": _configured,
    "readback": _readback,
}
