"""Whether the frequencies of a VM's vCPUs are what they should be.

Pure.  Work per call does not grow with the VM's size, except while it has a skew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Optional

from tscwatch.analysis import frequency
from tscwatch.analysis.mismatch import (
    VM_SCOPE,
    Deviation,
    Vcpu,
    Vm,
    describe,
    effective_khz,
    most_common,
    ppm_between,
    skew,
)
from tscwatch.model import (
    KINDS,
    Call,
    Claim,
    Contradiction,
    Effective,
    Finding,
    Guest,
    Host,
    Kind,
    KvmTscState,
    Mismatch,
    Phase,
    Risk,
    Severity,
    State,
    VcpuFound,
    VcpuUnplugged,
    VmEnded,
    VmStarted,
)

_PLUGGABLE = ("qemu", "cloud-hypervisor")


class _Moment(NamedTuple):
    ts: int
    phase: Phase


class Judge:
    """The mismatches of all VMs on a host.

    :param tolerance_ppm: per kind, the largest difference that is no mismatch.
    """

    def __init__(self, tolerance_ppm: Optional[Mapping[Kind, float]] = None) -> None:
        self._tolerance_ppm = dict(tolerance_ppm or {})
        self.host = Host()
        """Whoever learns more of the host says it here."""
        self._vms: dict[str, Vm] = {}

    def feed(self, call: Call) -> list[Finding]:
        """What a call raises, changes or clears, and what the guest gets by it."""
        if not call.tracked or call.phase == "probe":
            return []
        index = VM_SCOPE if call.event.vcpu is None else call.event.vcpu
        vm, vcpu = self._track(call.vm, call.guest, index)
        _note(vcpu, call, self.host)
        if call.wave != vm.wave:
            vm.wave, vm.rates = call.wave, Counter()
        vm.whole = call.whole
        if call.vcpu_written and index != VM_SCOPE:
            _count_rate(vm, vcpu)
            if call.event.op == "set" and call.status == 0:
                vm.awaiting_kvm.add(index)
        return self._conclude(vm, index, _Moment(call.event.ts, call.phase), call.vcpu_written)

    def adopt(self, adopted: VcpuFound) -> list[Finding]:
        """What the present state of a vCPU says that was there before us."""
        vm, vcpu = self._track(adopted.vm, adopted.guest, adopted.vcpu)
        if vcpu.khz is not None:
            return []
        vcpu.reported = adopted.khz
        if frequency.is_taken(adopted.khz, self.host):  # else KVM echoes what it refused
            vcpu.initial = adopted.khz
            vcpu.catching_up = frequency.catches_up(adopted.khz, self.host)
        _count_rate(vm, vcpu)
        return self._conclude(vm, adopted.vcpu, _Moment(adopted.ts, "unknown"), vcpu_written=True)

    def unplug(self, unplugged: VcpuUnplugged) -> list[Finding]:
        """The VM without one of its vCPUs."""
        vm = self._vms.get(unplugged.vm)
        if vm is None or unplugged.vcpu not in vm.vcpus:
            return []
        _discount_rate(vm, vm.vcpus.pop(unplugged.vcpu))
        vm.awaiting_kvm.discard(unplugged.vcpu)
        for suspects in vm.suspects.values():
            suspects.discard(unplugged.vcpu)
        vm.whole = unplugged.whole
        return self._without_call(vm, unplugged.ts)

    def start(self, started: VmStarted) -> list[Finding]:
        """No vCPU of the VM is still to be written."""
        vm = self._vms.get(started.vm)
        if vm is None:
            return []
        vm.whole = True
        return self._without_call(vm, started.ts)

    def _without_call(self, vm: Vm, ts: int) -> list[Finding]:
        changes = self._changes(vm, _Moment(ts, "unknown"))
        return [*changes, *(self._tell_risk(vm, ts) if vm.whole else ())]

    def compare_with_kvm(self, verdict: KvmTscState) -> list[Finding]:
        """What KVM holds of a VM, beside what we hold of it."""
        vm = self._vms.get(verdict.vm)
        if vm is None:
            return []
        if verdict.vcpu is None:  # only the clock changed
            if vm.verdict is None:
                return []
            verdict = vm.verdict._replace(ts=verdict.ts, master_clock=verdict.master_clock)
        else:
            vm.awaiting_kvm.discard(verdict.vcpu)
        vm.verdict = verdict
        # What is about to be written proves nothing; nor does what we have not seen.
        all_known = sum(vm.rates.values()) == verdict.online
        if vm.awaiting_kvm or not vm.whole or not all_known:
            return []
        return [*self._contradictions(vm, verdict), *self._updates(vm, verdict)]

    def _contradictions(self, vm: Vm, verdict: KvmTscState) -> Iterable[Contradiction]:
        """A skew whose vCPUs KVM takes for synchronised, or the reverse."""
        skewed = len(vm.rates) > 1
        apart = verdict.synchronised != verdict.online
        if apart and not skewed and self.host.clocksource not in ("", "tsc"):
            return  # with a TSC that is unstable, vCPUs of one frequency drift apart
        before, vm.contradicted = vm.contradicted, skewed != apart
        if vm.contradicted and not before:
            rates = ", ".join(f"{count} at {khz} kHz" for khz, count in sorted(vm.rates.items()))
            detail = f"by their calls, vCPUs tick: {rates}; but {verdict.text}"
            claim: Claim = "vcpu_skew" if skewed else "no_vcpu_skew"
            yield Contradiction(verdict.ts, vm.name, vm.guest, claim, detail)

    def _updates(self, vm: Vm, verdict: KvmTscState) -> Iterable[Mismatch]:
        """A skew is told again with what KVM made of it."""
        found = vm.active.get("vcpu_skew")
        now = verdict._replace(ts=0, vcpu=None)
        if found is not None and now != vm.told:
            vm.told = now
            yield self._mismatch(verdict.ts, vm, "vcpu_skew", "updated", found)

    def set_tolerance(self, tolerance_ppm: Mapping[Kind, float], ts: int) -> list[Finding]:
        """Take other tolerances from now on; gives what becomes or is no longer a mismatch."""
        self._tolerance_ppm = dict(tolerance_ppm)
        found: list[Finding] = []
        for vm in self._vms.values():
            for index in vm.vcpus:
                self._suspect(vm, index, vm.whole)
            found += self._without_call(vm, ts)
        return found

    def _track(self, name: str, guest: Guest, index: int) -> tuple[Vm, Vcpu]:
        vm = self._vms.get(name)
        if vm is None:
            vm = self._vms[name] = Vm(name, guest)
        return vm, vm.vcpus.setdefault(index, Vcpu())

    def _conclude(self, vm: Vm, index: int, now: _Moment, vcpu_written: bool) -> list[Finding]:
        self._suspect(vm, index, vcpu_written)
        return [
            *self._changes(vm, now),
            *self._tell_effective(vm, index),
            *(self._tell_risk(vm, now.ts) if vm.whole else ()),
        ]

    def end(self, ended: VmEnded) -> list[Mismatch]:
        """The VM is gone, and its mismatches with it."""
        vm = self._vms.pop(ended.vm, None)
        if vm is None:
            return []
        return [
            self._mismatch(ended.ts, vm, kind, "cleared", vm.active[kind]) for kind in vm.active
        ]

    def _suspect(self, vm: Vm, index: int, vcpu_written: bool) -> None:
        """Keep, per kind, the vCPUs that are off by themselves."""
        vcpu = vm.vcpus[index]
        configured = vm.guest.tsc_khz
        effective = effective_khz(vcpu, self.host)
        off: dict[Kind, bool] = {
            "refused": vcpu.refused is not None,
            "withheld": vcpu.withheld,
            "readback": self._differs("readback", vcpu.reported, vcpu.requested),
            "unscaled": vcpu.catching_up or self._differs("unscaled", effective, vcpu.khz),
            "changed": self._differs("changed", vcpu.khz, vcpu.changed_from),
        }
        if vcpu_written:
            off["configured"] = self._differs("configured", vcpu.khz, configured)
        for kind, is_off in off.items():
            suspects = vm.suspects[kind]
            (suspects.add if is_off else suspects.discard)(index)

    def _differs(self, kind: Kind, khz: Optional[int], wanted: Optional[int]) -> bool:
        size = ppm_between(khz, wanted)
        return size is not None and size > self._tolerance_ppm.get(kind, 0)

    def _changes(self, vm: Vm, now: _Moment) -> Iterable[Mismatch]:
        for kind in KINDS:
            before = vm.active.get(kind)
            fault = self._find(kind, vm, before)
            if before is not None and fault is None:
                del vm.active[kind]
                yield self._mismatch(now.ts, vm, kind, "cleared", before)
            elif fault is not None and (before is None or fault != before[0]):
                vm.active[kind] = fault, now.phase
                vm.told = None
                yield self._mismatch(now.ts, vm, kind, "raised", vm.active[kind])

    def _find(
        self, kind: Kind, vm: Vm, before: Optional[tuple[Deviation, Phase]]
    ) -> Optional[Deviation]:
        if kind != "vcpu_skew":
            suspects = vm.suspects[kind]
            return describe(kind, vm, tuple(sorted(suspects)), self.host) if suspects else None
        found = skew(vm) if len(vm.rates) > 1 else None
        if found is not None and (found.ppm or 0) > self._tolerance_ppm.get(kind, 0):
            return found
        # In the middle of a wave the vCPUs that are still to be written prove nothing.
        return before[0] if before is not None and not vm.whole else None

    def _tell_effective(self, vm: Vm, index: int) -> Iterable[Effective]:
        vcpu = vm.vcpus[index]
        now = effective_khz(vcpu, self.host)
        if index != VM_SCOPE and now != vcpu.effective:
            vcpu.effective = now
            yield Effective(vm.name, index, now)

    def _tell_risk(self, vm: Vm, ts: int) -> Iterable[Risk]:
        """A new vCPU starts at the VM's default; QEMU reads that and sets it again."""
        if not vm.rates:
            return
        default = vm.vcpus[VM_SCOPE].khz if VM_SCOPE in vm.vcpus else None
        newcomer = default or self.host.tsc_khz
        most = most_common(vm)
        at_risk = (
            vm.guest.vmm in _PLUGGABLE
            and vm.guest.tsc_khz is None
            and self._differs("vcpu_skew", newcomer, most)
        )
        if at_risk != vm.at_risk:
            vm.at_risk = at_risk
            reason = f"it runs with {most} kHz, a vCPU plugged now would get {newcomer} kHz"
            yield Risk(ts, vm.name, vm.guest, at_risk, reason)

    def _mismatch(
        self, ts: int, vm: Vm, kind: Kind, state: State, found: tuple[Deviation, Phase]
    ) -> Mismatch:
        fault, phase = found
        return Mismatch(
            ts=ts,
            state=state,
            kind=kind,
            vm=vm.name,
            guest=vm.guest,
            vcpus=tuple(index for index in fault.vcpus if index != VM_SCOPE),
            ppm=fault.ppm,
            severity=self._severity(fault.ppm),
            phase=phase,
            detail=fault.detail,
            verdict=None if vm.awaiting_kvm else vm.verdict,
        )

    def _severity(self, ppm: Optional[float]) -> Severity:
        inside = ppm is not None and ppm <= self.host.kvm_tolerance_ppm
        return "warning" if inside else "critical"


def _note(vcpu: Vcpu, call: Call, host: Host) -> None:
    """What one call says of its vCPU."""
    if call.block != vcpu.block:
        vcpu.block, vcpu.gets, vcpu.sets = call.block, 0, 0
    if call.event.op == "set":
        vcpu.sets += 1
        if call.status == 0:
            khz = call.khz or host.tsc_khz  # 0 stands for the host's
            vcpu.changed_from = _changed_from(vcpu, khz, call)
            vcpu.requested = vcpu.reported = khz
            vcpu.refused, vcpu.withheld = None, False
            vcpu.scale = call.event.scale
            vcpu.catching_up |= khz is not None and frequency.catches_up(khz, host)
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


def _changed_from(vcpu: Vcpu, khz: Optional[int], call: Call) -> Optional[int]:
    """The frequency of before, where a running vCPU is given another one by no load.

    Only where the neighbouring calls were seen: what is not known may be a load.
    """
    by_no_load = call.phase == "unknown" and call.event.after not in (None, "sregs")
    if not (by_no_load and call.event.runner):
        return None
    before = vcpu.changed_from or vcpu.khz
    return before if khz != before else None


def _count_rate(vm: Vm, vcpu: Vcpu) -> None:
    if vcpu.khz is None:
        return
    _discount_rate(vm, vcpu)
    vm.rates[vcpu.khz] += 1
    vcpu.counted = vm.wave, vcpu.khz


def _discount_rate(vm: Vm, vcpu: Vcpu) -> None:
    if vcpu.counted is not None and vcpu.counted[0] == vm.wave:
        vm.rates[vcpu.counted[1]] -= 1
        vm.rates += Counter()  # drops what fell to zero
