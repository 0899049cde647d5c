"""Whether the frequencies of a VM's vCPUs are what they should be: raise, update, clear.

Pure.  The rules of each kind of mismatch are in :mod:`tscwatch.analysis.mismatch`; this keeps the
facts that they need.  Work per call does not grow with the VM's size, except while its vCPUs
differ.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Optional, Union

from tscwatch import vmm
from tscwatch.analysis import frequency
from tscwatch.analysis.mismatch import (
    MISMATCHES,
    Context,
    Deviation,
    VcpuFacts,
    evaluate,
)
from tscwatch.model import (
    VM_SCOPE,
    Call,
    Change,
    Claim,
    Contradiction,
    Dropped,
    Fact,
    Finding,
    Guest,
    Host,
    Kind,
    KvmTscState,
    Mismatch,
    Phase,
    Risk,
    Step,
    VcpuFound,
    VcpuState,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
    VmStarted,
)

_OF_ONE_VCPU = [(kind, rule) for kind, rule in MISMATCHES.items() if not rule.compares_vcpus]


class _Moment(NamedTuple):
    ts: int
    phase: Phase = "unknown"


@dataclass
class _Vcpu(VcpuFacts):
    """A vCPU's facts, and where it stands in QEMU's sequence of calls."""

    block: int = -1
    gets: int = 0
    sets: int = 0
    """Of the present block."""
    scale: Optional[float] = None
    """Its scaling ratio at the last SET that succeeded."""
    phase: Optional[Phase] = None
    step: Optional[Step] = None
    published: Optional[VcpuState] = None


@dataclass
class _Vm:
    name: str
    guest: Guest
    vcpus: dict[int, _Vcpu] = field(default_factory=dict)
    write_round: int = 0
    rates: Counter[int] = field(default_factory=Counter)
    """How many vCPUs were written with which kHz in this round."""
    off: dict[Kind, set[int]] = field(default_factory=lambda: {kind: set() for kind in MISMATCHES})
    """The vCPUs that are off by themselves, by kind."""
    active: dict[Kind, tuple[Deviation, Phase]] = field(default_factory=dict)
    at_risk: bool = False
    all_written: bool = True
    awaiting_kvm: set[int] = field(default_factory=set)
    """vCPUs that were given a frequency and whose TSC is still to be written."""
    kvm_state: Optional[KvmTscState] = None
    last_published: Optional[KvmTscState] = None
    """What the active skew was last published with."""
    contradicted: bool = False


class Judge:
    """The mismatches of all VMs on a host.

    :param tolerance_ppm: per kind, the largest difference that is no mismatch; 0 if not given.
    """

    def __init__(self, tolerance_ppm: Optional[Mapping[Kind, float]] = None) -> None:
        self._tolerance_ppm = dict(tolerance_ppm or {})
        self._host = Host()
        self._vms: dict[str, _Vm] = {}
        self._handlers: dict[type, Callable[[Any], list[Finding]]] = {
            Host: self._host_changed,
            Call: self._call,
            VcpuFound: self._vcpu_found,
            VcpuUnplugged: self._vcpu_unplugged,
            VmStarted: self._vm_started,
            KvmTscState: self._compare_with_kvm,
            VmEnded: self._vm_ended,
            VmSeen: _nothing_follows,
            Contradiction: _nothing_follows,
            Dropped: _nothing_follows,
        }

    def feed(self, fact: Union[Host, Fact]) -> list[Finding]:
        """Return what a fact raises, updates or clears."""
        return self._handlers[type(fact)](fact)

    def set_tolerance(self, tolerance_ppm: Mapping[Kind, float], ts: int) -> list[Finding]:
        """Apply other tolerances; return what becomes a mismatch or no longer is one."""
        self._tolerance_ppm = dict(tolerance_ppm)
        findings: list[Finding] = []
        for vm in self._vms.values():
            for index in vm.vcpus:
                self._review(vm, index, vm.all_written)
            findings += self._findings(vm, _Moment(ts))
        return findings

    def _host_changed(self, host: Host) -> list[Finding]:
        self._host = host
        return []

    def _call(self, call: Call) -> list[Finding]:
        if not call.tracked or call.phase == "probe":
            return []
        index = call.target
        vm, vcpu = self._track(call.vm, call.guest, index)
        _take_call(vcpu, call, self._host)
        if call.write_round != vm.write_round:
            vm.write_round, vm.rates = call.write_round, Counter()
        vm.all_written = call.all_written
        if call.vcpu_written and index != VM_SCOPE:
            _count_rate(vm, vcpu)
            if call.event.op == "set" and call.status == 0:
                vm.awaiting_kvm.add(index)
        return self._conclude(vm, index, _Moment(call.event.ts, call.phase), call.vcpu_written)

    def _vcpu_found(self, found: VcpuFound) -> list[Finding]:
        vm, vcpu = self._track(found.vm, found.guest, found.vcpu)
        if vcpu.khz is not None:
            return []
        vcpu.reported = found.khz
        if frequency.is_accepted(found.khz, self._host):  # else KVM echoes what it refused
            vcpu.initial = found.khz
            vcpu.catching_up = frequency.catches_up(found.khz, self._host)
        vcpu.effective = _effective(vcpu, self._host)
        _count_rate(vm, vcpu)
        return self._conclude(vm, found.vcpu, _Moment(found.ts), vcpu_written=True)

    def _vcpu_unplugged(self, unplugged: VcpuUnplugged) -> list[Finding]:
        vm = self._vms.get(unplugged.vm)
        if vm is None or unplugged.vcpu not in vm.vcpus:
            return []
        _discount_rate(vm, vm.vcpus.pop(unplugged.vcpu))
        vm.awaiting_kvm.discard(unplugged.vcpu)
        for off in vm.off.values():
            off.discard(unplugged.vcpu)
        vm.all_written = unplugged.all_written
        return self._findings(vm, _Moment(unplugged.ts))

    def _vm_started(self, started: VmStarted) -> list[Finding]:
        vm = self._vms.get(started.vm)
        if vm is None:
            return []
        vm.all_written = True
        return self._findings(vm, _Moment(started.ts))

    def _vm_ended(self, ended: VmEnded) -> list[Finding]:
        vm = self._vms.pop(ended.vm, None)
        if vm is None:
            return []
        return [
            self._mismatch(ended.ts, vm, kind, "cleared", found)
            for kind, found in vm.active.items()
        ]

    def _track(self, name: str, guest: Guest, index: int) -> tuple[_Vm, _Vcpu]:
        vm = self._vms.get(name)
        if vm is None:
            vm = self._vms[name] = _Vm(name, guest)
        vcpu = vm.vcpus.get(index)
        if vcpu is None:
            vcpu = vm.vcpus[index] = _Vcpu()
        return vm, vcpu

    def _conclude(self, vm: _Vm, index: int, now: _Moment, vcpu_written: bool) -> list[Finding]:
        self._review(vm, index, vcpu_written)
        return self._findings(vm, now, _vcpu_state(vm, index))

    def _findings(self, vm: _Vm, now: _Moment, states: Iterable[VcpuState] = ()) -> list[Finding]:
        return [
            *self._changes(vm, now),
            *states,
            *(self._risk(vm, now.ts) if vm.all_written else ()),
        ]

    # Mismatches

    def _review(self, vm: _Vm, index: int, vcpu_written: bool) -> None:
        """Note in ``vm.off`` of which kinds one vCPU is off by itself."""
        vcpu, context = vm.vcpus[index], Context(self._host, vm.guest)
        for kind, rule in _OF_ONE_VCPU:
            if vcpu_written or not rule.needs_write:
                is_off = rule.is_off(vcpu, context, self._tolerance_ppm.get(kind, 0))
                if is_off != (index in vm.off[kind]):
                    vm.off[kind] ^= {index}

    def _changes(self, vm: _Vm, now: _Moment) -> Iterable[Mismatch]:
        for kind, rule in MISMATCHES.items():
            before = vm.active.get(kind)
            may_be_off = len(vm.rates) > 1 if rule.compares_vcpus else bool(vm.off[kind])
            if before is None and not may_be_off:
                continue
            deviation = self._deviation(kind, vm, before)
            if before is not None and deviation is None:
                del vm.active[kind]
                yield self._mismatch(now.ts, vm, kind, "cleared", before)
            elif deviation is not None and (before is None or deviation != before[0]):
                vm.active[kind] = deviation, now.phase
                vm.last_published = None
                yield self._mismatch(now.ts, vm, kind, "raised", vm.active[kind])

    def _deviation(
        self, kind: Kind, vm: _Vm, before: Optional[tuple[Deviation, Phase]]
    ) -> Optional[Deviation]:
        rule = MISMATCHES[kind]
        if not rule.compares_vcpus:
            off = [(index, vm.vcpus[index]) for index in sorted(vm.off[kind])]
            return evaluate(kind, off, Context(self._host, vm.guest))
        if len(vm.rates) > 1:
            context = Context(self._host, vm.guest, vm.write_round, _most_common(vm))
            tolerance_ppm = self._tolerance_ppm.get(kind, 0)
            off = [
                (index, vcpu)
                for index, vcpu in sorted(vm.vcpus.items())
                if rule.is_off(vcpu, context, tolerance_ppm)
            ]
            deviation = evaluate(kind, off, context)
            if deviation is not None:
                return deviation
        # During a round, the vCPUs that are still to be written prove nothing.
        return before[0] if before is not None and not vm.all_written else None

    def _mismatch(
        self, ts: int, vm: _Vm, kind: Kind, change: Change, found: tuple[Deviation, Phase]
    ) -> Mismatch:
        deviation, phase = found
        return Mismatch(
            ts=ts,
            state=change,
            kind=kind,
            vm=vm.name,
            guest=vm.guest,
            vcpus=deviation.vcpus,
            ppm=deviation.ppm,
            severity=deviation.severity,
            phase=phase,
            detail=deviation.detail,
            kvm_state=None if vm.awaiting_kvm else vm.kvm_state,
        )

    # The risk of a hotplug

    def _risk(self, vm: _Vm, ts: int) -> Iterable[Risk]:
        """A new vCPU starts at the VM's default, which QEMU reads and sets again."""
        if not vm.rates:
            return
        default = vm.vcpus[VM_SCOPE].khz if VM_SCOPE in vm.vcpus else None
        new = default or self._host.tsc_khz
        common = _most_common(vm)
        size = frequency.ppm_between(new, common)
        at_risk = (
            vmm.of_guest(vm.guest).can_hotplug
            and vm.guest.tsc_khz is None
            and size is not None
            and size > self._tolerance_ppm.get("vcpu_skew", 0)
        )
        if at_risk != vm.at_risk:
            vm.at_risk = at_risk
            detail = f"it runs at {common} kHz, a vCPU plugged now would get {new} kHz"
            yield Risk(ts, vm.name, vm.guest, at_risk, detail)

    # KVM's own view

    def _compare_with_kvm(self, state: KvmTscState) -> list[Finding]:
        vm = self._vms.get(state.vm)
        if vm is None:
            return []
        if state.vcpu is not None:
            vm.awaiting_kvm.discard(state.vcpu)
        if state.synchronised is None:
            return []
        vm.kvm_state = state
        # vCPUs that are still to be written prove nothing; nor do vCPUs that were not seen.
        all_known = sum(vm.rates.values()) == state.online
        if vm.awaiting_kvm or not vm.all_written or not all_known:
            return []
        return [*self._contradictions(vm, state), *self._updates(vm, state)]

    def _contradictions(self, vm: _Vm, state: KvmTscState) -> Iterable[Contradiction]:
        """A skew whose vCPUs KVM considers synchronised, or the reverse."""
        skewed = len(vm.rates) > 1
        apart = state.synchronised != state.online
        if apart and not skewed and self._host.clocksource not in ("", "tsc"):
            return  # if the host's TSC is unstable, vCPUs of one frequency drift apart
        before, vm.contradicted = vm.contradicted, skewed != apart
        if vm.contradicted and not before:
            rates = ", ".join(f"{count} at {khz} kHz" for khz, count in sorted(vm.rates.items()))
            detail = f"by their calls, the vCPUs tick: {rates}; but {state.text}"
            claim: Claim = "vcpu_skew" if skewed else "no_vcpu_skew"
            yield Contradiction(state.ts, vm.name, vm.guest, claim, detail)

    def _updates(self, vm: _Vm, state: KvmTscState) -> Iterable[Mismatch]:
        """An active skew is published again when KVM's view of it changes."""
        found = vm.active.get("vcpu_skew")
        view = state._replace(ts=0, vcpu=None)
        if found is not None and view != vm.last_published:
            vm.last_published = view
            yield self._mismatch(state.ts, vm, "vcpu_skew", "updated", found)


def _nothing_follows(_fact: Fact) -> list[Finding]:
    return []


def _take_call(vcpu: _Vcpu, call: Call, host: Host) -> None:
    """Record what one call establishes about its vCPU."""
    vcpu.phase, vcpu.step = call.phase, call.step
    if call.block != vcpu.block:
        vcpu.block, vcpu.gets, vcpu.sets = call.block, 0, 0
    if call.event.op == "set":
        vcpu.sets += 1
        _take_set(vcpu, call, host)
    else:
        vcpu.gets += 1
        if call.khz is not None:
            vcpu.reported = call.khz
            if vcpu.refused is None:
                vcpu.initial = call.khz
        # GET, GET instead of the GET, SET of QEMU's kvm_arch_set_tsc_khz.
        if call.step != "unknown" and vcpu.gets > 1 and not vcpu.sets:
            vcpu.withheld = True
    vcpu.effective = _effective(vcpu, host)


def _take_set(vcpu: _Vcpu, call: Call, host: Host) -> None:
    if call.status != 0:
        refused = call.khz or 0
        vcpu.refused = refused, call.status
        if call.status == -errno.EINVAL and not frequency.is_accepted(refused, host):
            vcpu.reported = refused  # kvm_set_tsc_khz stores it before it refuses to slow down
        return
    khz = call.khz or host.tsc_khz  # kvm_arch_vcpu_ioctl: 0 stands for the host's frequency
    vcpu.changed_from = _changed_from(vcpu, khz, call)
    vcpu.requested = vcpu.reported = khz
    vcpu.refused, vcpu.withheld = None, False
    vcpu.scale = call.event.scale
    vcpu.catching_up |= khz is not None and frequency.catches_up(khz, host)


def _effective(vcpu: _Vcpu, host: Host) -> Optional[int]:
    return None if vcpu.catching_up else frequency.effective(vcpu.khz, host, vcpu.scale)


def _changed_from(vcpu: _Vcpu, khz: Optional[int], call: Call) -> Optional[int]:
    """Return the frequency before a SET that no load can explain; None for any other SET.

    The neighbouring calls must have been seen: a call whose neighbours are unknown may be a load.
    """
    outside_load = call.phase == "unknown" and call.event.after not in (None, "sregs")
    if not (outside_load and call.event.runner):
        return None
    before = vcpu.changed_from or vcpu.khz
    return before if khz != before else None


def _vcpu_state(vm: _Vm, index: int) -> Iterable[VcpuState]:
    vcpu = vm.vcpus[index]
    state = VcpuState(
        vm.name, index, vcpu.requested, vcpu.reported, vcpu.effective, vcpu.phase, vcpu.step
    )
    if index != VM_SCOPE and state != vcpu.published:
        vcpu.published = state
        yield state


def _most_common(vm: _Vm) -> int:
    """Return the frequency of most vCPUs; in a tie, that of the tied vCPU with the lowest id."""
    if len(vm.rates) == 1:
        return next(iter(vm.rates))
    written = (vcpu.written_in(vm.write_round) for _, vcpu in sorted(vm.vcpus.items()))
    return max((khz for khz in written if khz is not None), key=lambda khz: vm.rates[khz])


def _count_rate(vm: _Vm, vcpu: _Vcpu) -> None:
    if vcpu.khz is None:
        return
    _discount_rate(vm, vcpu)
    vm.rates[vcpu.khz] += 1
    vcpu.written = vm.write_round, vcpu.khz


def _discount_rate(vm: _Vm, vcpu: _Vcpu) -> None:
    khz = vcpu.written_in(vm.write_round)
    if khz is not None:
        vm.rates[khz] -= 1
        vm.rates += Counter()  # removes what fell to zero
