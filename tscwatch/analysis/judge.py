"""Whether the TSCs of a VM's vCPUs are what they should be: raise, update, clear.

Pure.  The rules of each kind of mismatch are in :mod:`tscwatch.analysis.mismatch`; this keeps the
facts that they need.  Work per call does not grow with the VM's size, except while its vCPUs
differ.

The lines of the vCPUs decide, not KVM's count of synchronised vCPUs.  The count stands in for lines
that cannot be read, and is compared with those that can.  Neither means anything while the
TSCs are being written (:mod:`tscwatch.analysis.writes`).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Optional, Union

from tscwatch import vmm
from tscwatch.analysis import frequency
from tscwatch.analysis.lines import Spread, compare
from tscwatch.analysis.mismatch import (
    DEFAULT_TOLERANCE,
    MISMATCHES,
    Context,
    Deviation,
    VcpuFacts,
    evaluate,
)
from tscwatch.analysis.writes import TscWrites
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
    Line,
    Mismatch,
    Phase,
    Risk,
    Step,
    TscLines,
    TscSpread,
    VcpuFound,
    VcpuPlugged,
    VcpuState,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
    VmStarted,
    duration,
)

_OF_ONE_VCPU = [(kind, rule) for kind, rule in MISMATCHES.items() if not rule.compares_vcpus]
_WORTH_AN_UPDATE = 0.1
"""A desync that grows or shrinks by less is not logged again."""


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
    ratio: Optional[float] = None
    """Its scaling ratio, if it was read since the last SET."""
    step: Optional[Step] = None
    last_call: int = 0
    """Unix time in ns."""
    published: Optional[VcpuState] = None

    @property
    def was_just_plugged(self) -> bool:
        """Its last call was that of a plug, after which QEMU writes its TSC alone."""
        return self.phase in ("prelaunch", "hotplug") and self.step == "post_init"


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
    was_plugged: bool = False
    """A vCPU was added to it, so it has room for more than it began with."""
    present: int = 0
    """How many vCPUs it is known to have."""
    parked: dict[int, _Vcpu] = field(default_factory=dict)
    """The vCPUs that were unplugged.  KVM keeps them, and counts them as online."""
    all_written: bool = True
    writes: TscWrites = field(default_factory=TscWrites)
    kvm_state: Optional[KvmTscState] = None
    last_published: Optional[KvmTscState] = None
    """What the active mismatch was last published with."""
    lines: dict[int, Line] = field(default_factory=dict)
    """The lines of the last reading, by vCPU; without those of vCPUs that were written since."""
    rewritten: set[int] = field(default_factory=set)
    """vCPUs whose TSCs were written since lines were compared last."""
    host_tsc: Optional[int] = None
    """The host's TSC at the last reading, if it was needed."""
    lines_come: Optional[bool] = None
    """Whether its lines can be read; None if that was not tried yet."""
    reference: Optional[int] = None
    """A vCPU whose TSC most others agree with."""
    spread: Optional[TscSpread] = None
    disputed: Optional[dict[int, Line]] = None
    """The lines that KVM's count disagreed with at the last reading."""
    contradicted: bool = False

    @property
    def vcpu_count(self) -> int:
        """How many vCPUs are tracked, without :data:`VM_SCOPE`."""
        return len(self.vcpus) - (VM_SCOPE in self.vcpus)

    @property
    def is_counted(self) -> bool:
        """Whether KVM's count is about the vCPUs that are tracked, and no others."""
        state = self.kvm_state
        return state is not None and state.online == self.vcpu_count + len(self.parked)

    def written(self, vcpu: int) -> None:
        """Note that a vCPU's line is no longer what it was."""
        self.lines.pop(vcpu, None)
        self.rewritten.add(vcpu)


class Judge:
    """The mismatches of all VMs on a host.

    :param tolerance: per kind, the largest difference that is no mismatch, in the kind's unit; the
        default if not given.
    """

    def __init__(self, tolerance: Optional[Mapping[Kind, float]] = None) -> None:
        self._tolerance = {**DEFAULT_TOLERANCE, **(tolerance or {})}
        self._host = Host()
        self._ts = 0
        """Unix time in ns of the last fact."""
        self._vms: dict[str, _Vm] = {}
        self._handlers: dict[type, Callable[[Any], list[Finding]]] = {
            Host: self._host_changed,
            Call: self._call,
            VcpuFound: self._vcpu_found,
            VcpuPlugged: self._vcpu_plugged,
            VcpuUnplugged: self._vcpu_unplugged,
            VmStarted: self._vm_started,
            KvmTscState: self._kvm_counted,
            TscLines: self._lines_read,
            VmEnded: self._vm_ended,
            VmSeen: _nothing_follows,
            Contradiction: _nothing_follows,
            Dropped: _nothing_follows,
        }

    def feed(self, fact: Union[Host, Fact]) -> list[Finding]:
        """Return what a fact raises, updates or clears."""
        self._ts = fact.event.ts if isinstance(fact, Call) else getattr(fact, "ts", self._ts)
        return self._handlers[type(fact)](fact)

    def set_tolerance(self, tolerance: Mapping[Kind, float], ts: int) -> list[Finding]:
        """Apply other tolerances; return what becomes a mismatch or no longer is one."""
        self._tolerance = {**DEFAULT_TOLERANCE, **tolerance}
        findings: list[Finding] = []
        for vm in self._vms.values():
            for index in vm.vcpus:
                self._review(vm, index, vm.all_written)
            findings += self._without_call(vm, ts, compare_lines=True)
        return findings

    def _host_changed(self, host: Host) -> list[Finding]:
        was_known, self._host = self._host.tsc_khz is not None, host
        findings: list[Finding] = []
        for vm in self._vms.values():
            if not was_known:
                findings += self._host_found(vm)
            findings += self._judge_values(vm, self._ts)
        return findings

    def _host_found(self, vm: _Vm) -> list[Finding]:
        """Judge what a VM's vCPUs were given before the host's frequency was known."""
        for index, vcpu in vm.vcpus.items():
            _apply_frequency(vcpu, vm.guest, self._host)
            self._review(vm, index, vm.all_written)
        return self._findings(vm, _Moment(self._ts), _vcpu_states(vm))

    def _call(self, call: Call) -> list[Finding]:
        if not call.tracked or call.phase == "probe":
            return []
        index = call.target
        vm, vcpu = self._track(call.vm, call.guest, index)
        vm.present = max(vm.present, vm.vcpu_count)
        _take_call(vcpu, call, self._host)
        if call.write_round != vm.write_round:
            vm.write_round, vm.rates = call.write_round, Counter()
        vm.all_written = call.all_written
        if not vm.all_written:
            vm.writes.goes_on()
        if call.vcpu_written and index != VM_SCOPE:
            _count_rate(vm, vcpu)
            if call.event.op == "set" and call.status == 0:
                vm.writes.frequency_given(index)
                vm.written(index)
        return self._conclude(vm, index, _Moment(call.event.ts, call.phase), call.vcpu_written)

    def _vcpu_found(self, found: VcpuFound) -> list[Finding]:
        vm, vcpu = self._track(found.vm, found.guest, found.vcpu)
        vm.present = max(vm.present, found.present)
        if vcpu.khz is not None:
            return []
        vcpu.reported = found.khz
        if frequency.is_accepted(found.khz, self._host):  # else KVM echoes what it refused
            vcpu.initial = found.khz
            vcpu.catching_up = frequency.catches_up(found.khz, self._host)
        # KVM's tolerance may have been another at the SET; the vCPU's line shows the truth.
        if vcpu.ratio is not None or not (self._host.scaling and self._host.shows_lines):
            vcpu.effective = _effective(vcpu, vm.guest, self._host)
        _count_rate(vm, vcpu)
        return self._conclude(vm, found.vcpu, _Moment(found.ts), vcpu_written=True)

    def _vcpu_plugged(self, plugged: VcpuPlugged) -> list[Finding]:
        """A machine whose size is not known has room for a vCPU, as one is being added."""
        vm = self._vms.get(plugged.vm)
        if vm is None:
            return []
        vm.was_plugged = True
        vm.all_written = plugged.all_written
        vm.writes.goes_on()
        return [*self._risk(vm, plugged.ts)]

    def _vcpu_unplugged(self, unplugged: VcpuUnplugged) -> list[Finding]:
        vm = self._vm(unplugged.vm, unplugged.guest)
        vcpu = vm.vcpus.pop(unplugged.vcpu, None)
        vm.parked[unplugged.vcpu] = vcpu or _Vcpu()
        if vcpu is None:
            return []
        _discount_rate(vm, vcpu)
        vm.present -= 1
        vm.writes.removed(unplugged.vcpu)
        vm.lines.pop(unplugged.vcpu, None)
        for off in vm.off.values():
            off.discard(unplugged.vcpu)
        vm.all_written = unplugged.all_written
        return self._without_call(vm, unplugged.ts)

    def _vm_started(self, started: VmStarted) -> list[Finding]:
        vm = self._vms.get(started.vm)
        if vm is None:
            return []
        vm.all_written = True
        vm.writes.vm_resumes()
        return self._without_call(vm, started.ts)

    def _vm_ended(self, ended: VmEnded) -> list[Finding]:
        vm = self._vms.pop(ended.vm, None)
        if vm is None:
            return []
        return [
            self._mismatch(ended.ts, vm, kind, "cleared", found)
            for kind, found in vm.active.items()
        ]

    def _vm(self, name: str, guest: Guest) -> _Vm:
        if name not in self._vms:
            self._vms[name] = _Vm(name, guest)
        return self._vms[name]

    def _track(self, name: str, guest: Guest, index: int) -> tuple[_Vm, _Vcpu]:
        vm = self._vm(name, guest)
        vcpu = vm.vcpus.get(index)
        if vcpu is None:
            vcpu = vm.vcpus[index] = _Vcpu()
            parked = vm.parked.pop(index, None)
            vcpu.catching_up = parked is not None and parked.catching_up  # KVM never leaves it
        return vm, vcpu

    def _conclude(self, vm: _Vm, index: int, now: _Moment, vcpu_written: bool) -> list[Finding]:
        self._review(vm, index, vcpu_written)
        return self._findings(vm, now, _vcpu_state(vm, index))

    def _without_call(self, vm: _Vm, ts: int, compare_lines: bool = False) -> list[Finding]:
        """Return what follows from a change that no call made."""
        values = self._judge_values(vm, ts, compare_lines)
        return [*values, *self._findings(vm, _Moment(ts))]

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
                is_off = rule.is_off(vcpu, context, self._tolerance.get(kind, 0))
                if is_off != (index in vm.off[kind]):
                    vm.off[kind] ^= {index}

    def _changes(self, vm: _Vm, now: _Moment) -> Iterable[Mismatch]:
        if vmm.of_guest(vm.guest).is_sandbox:
            return
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
                if before is not None and _only_drifts(deviation, before[0]):
                    if _is_worth_an_update(deviation, before[0]):
                        vm.active[kind] = deviation, before[1]
                        yield self._mismatch(now.ts, vm, kind, "updated", vm.active[kind])
                    continue
                since = _since(vm, deviation) if kind == "desync" else now.phase
                vm.active[kind] = deviation, since
                vm.last_published = _view(vm.kvm_state) if self._is_settled(vm) else None
                yield self._mismatch(now.ts, vm, kind, "raised", vm.active[kind])

    def _deviation(
        self, kind: Kind, vm: _Vm, before: Optional[tuple[Deviation, Phase]]
    ) -> Optional[Deviation]:
        rule = MISMATCHES[kind]
        if not rule.compares_vcpus:
            off = [(index, vm.vcpus[index]) for index in sorted(vm.off[kind])]
            context = Context(
                self._host,
                vm.guest,
                common_effective=_reference_effective(vm),
                default_khz=_default_khz(vm),
            )
            return evaluate(kind, off, context)
        if len(vm.rates) > 1:
            khz = _most_common(vm)
            context = Context(self._host, vm.guest, vm.write_round, khz, _effective_at(vm, khz))
            tolerance = self._tolerance.get(kind, 0)
            off = [
                (index, vcpu)
                for index, vcpu in sorted(vm.vcpus.items())
                if rule.is_off(vcpu, context, tolerance)
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
            requested_ppm=deviation.requested_ppm,
            apart_seconds=deviation.apart_seconds,
            kvm_state=vm.kvm_state if self._is_settled(vm) else None,
        )

    # The risk of a hotplug

    def _risk(self, vm: _Vm, ts: int) -> Iterable[Risk]:
        """KVM starts a new vCPU at the VM's default (``kvm_arch_vcpu_create``).

        Its TSC joins those of the others only if that is exactly their frequency
        (``kvm_synchronize_tsc``), whatever QEMU sets afterwards.
        """
        if not vm.rates:
            return
        new = _default_khz(vm) or self._host.tsc_khz
        common = _most_common(vm)
        at_risk = new is not None and new != common and _has_free_slot(vm)
        if at_risk != vm.at_risk:
            vm.at_risk = at_risk
            yield Risk(ts, vm.name, vm.guest, at_risk, self._risk_sentence(vm, common, new))

    def _risk_sentence(self, vm: _Vm, common: int, new: Optional[int]) -> str:
        if new == common:
            return f"a vCPU plugged now would start at {new} kHz, like the others"
        if not _has_free_slot(vm):
            return "no slot is free for a vCPU"
        sentence = (
            f"it runs at {common} kHz, but KVM starts a new vCPU at {new} kHz: the TSC of a vCPU "
            "plugged now would start at 0, behind the others by the guest's whole age"
        )
        # QEMU sets a pinned frequency on the new vCPU too, else the one that KVM gave it.
        pinned = vm.guest.tsc_khz is not None
        if not pinned and frequency.effective(new, self._host) != _effective_at(vm, common):
            sentence += ", and would tick at another rate"
        return sentence

    # The values of the TSCs

    def _kvm_counted(self, state: KvmTscState) -> list[Finding]:
        vm = self._vms.get(state.vm)
        if vm is None:
            return []
        if state.vcpu is None:
            vm.writes.vm_runs()
        elif state.synchronised is not None:
            vcpu = vm.vcpus.get(state.vcpu)
            of_plug = vcpu is not None and vcpu.was_just_plugged
            vm.writes.written(state.vcpu, state.synchronised, of_plug)
            vm.written(state.vcpu)
        if state.synchronised is None:
            return []
        vm.kvm_state = state
        findings = self._judge_values(vm, state.ts)
        return [*findings, *(self._updates(vm, state) if self._is_settled(vm) else ())]

    def _lines_read(self, read: TscLines) -> list[Finding]:
        vm = self._vm(read.vm, read.guest)
        vm.all_written = vm.writes.read() or vm.all_written
        vm.lines_come = vm.lines_come or bool(read.lines)  # all its vCPUs may run nested guests
        vm.lines, vm.host_tsc = {}, read.host_tsc
        for line in read.lines:
            self._take_line(vm, line)
        findings = self._judge_values(vm, read.ts, compare_lines=True)
        return [*findings, *self._contradictions(vm, read.ts)]

    def _take_line(self, vm: _Vm, line: Line) -> None:
        vm.lines[line.vcpu] = line
        vcpu = vm.vcpus.get(line.vcpu)
        if vcpu is None:
            vcpu = vm.vcpus[line.vcpu] = vm.parked.pop(line.vcpu, _Vcpu())
            vm.present = max(vm.present, vm.vcpu_count)
        if vcpu.ratio != line.ratio and self._host.scaling:
            vcpu.ratio = line.ratio
            vcpu.effective = _effective(vcpu, vm.guest, self._host)

    def _judge_values(self, vm: _Vm, ts: int, compare_lines: bool = False) -> list[Finding]:
        """Judge how far the TSCs of a VM's vCPUs are apart, unless they are being written."""
        if not vm.all_written or not vm.writes.are_over:
            return []
        spread = None
        believed = self._host.stable and not vm.guest.protected
        if not believed or vmm.of_guest(vm.guest).is_sandbox:
            _forget_lags(vm)
        elif self._host.shows_lines and vm.lines_come is not False:
            if not compare_lines:
                return []  # the lines will be read
            spread = self._compare_lines(vm)
        elif _all_match(vm):
            return []
        else:
            _count_for_lines(vm, self._host)
        for index in vm.vcpus:
            self._review(vm, index, vcpu_written=True)
        return [
            *self._findings(vm, _Moment(ts), _vcpu_states(vm)),
            *_spread_changes(vm, ts, spread),
        ]

    def _compare_lines(self, vm: _Vm) -> Optional[Spread]:
        """Compare the lines that are known; return None if some are not, or cannot be compared.

        A vCPU whose line is not known keeps its lag, unless its TSC was written since.
        """
        for vcpu in vm.vcpus.values():
            if vcpu.catching_up:  # KVM moves its offset at each entry
                vcpu.lag, vcpu.apart_by_kvm = None, False
        comparable = [line for line in vm.lines.values() if not vm.vcpus[line.vcpu].catching_up]
        if not comparable or self._host.tsc_khz is None:
            return None
        tolerance_s = self._tolerance["desync"]
        spread = compare(comparable, self._host.tsc_khz, vm.host_tsc, tolerance_s)
        if spread is None:
            return None
        vm.reference = spread.reference
        for index in vm.rewritten & vm.vcpus.keys():
            vm.vcpus[index].lag = None
        vm.rewritten.clear()
        for index, lag in spread.lags.items():
            vm.vcpus[index].lag, vm.vcpus[index].apart_by_kvm = lag, False
        return spread if len(comparable) == vm.vcpu_count else None

    def _is_settled(self, vm: _Vm) -> bool:
        """Return whether KVM's count is final, and about all vCPUs of the VM."""
        all_known = vm.kvm_state is None or vm.is_counted
        return vm.all_written and vm.writes.are_over and all_known

    # KVM's own view

    def _contradictions(self, vm: _Vm, ts: int) -> Iterable[Contradiction]:
        """The lines and KVM's count disagree, at two readings between which nothing has changed.

        KVM does not count what a guest does to its own TSCs.  Nor does its count mean anything if
        it applies no offsets, so that all are 0.
        """
        state, before = vm.kvm_state, vm.disputed
        vm.disputed = None
        apart_s = vm.spread and vm.spread.seconds
        if apart_s is None or state is None or state.synchronised is None:
            return
        offsets = any(line.offset for line in vm.lines.values())
        if not (offsets and self._is_settled(vm) and len(vm.lines) == state.online):
            return
        apart = bool(vm.off["desync"])
        if apart == (state.synchronised != state.online):
            vm.contradicted = False
            return
        vm.disputed = dict(vm.lines)
        if before == vm.disputed and not vm.contradicted:
            vm.contradicted = True
            claim: Claim = "desync" if apart else "no_desync"
            detail = f"by their lines, the TSCs are {duration(apart_s)} apart; but {state.text}"
            yield Contradiction(ts, vm.name, vm.guest, claim, detail)

    def _updates(self, vm: _Vm, state: KvmTscState) -> Iterable[Mismatch]:
        """An active mismatch between vCPUs is published again when KVM's view of it changes."""
        kind = next((kind for kind in ("desync", "vcpu_skew") if kind in vm.active), None)
        view = _view(state)
        if kind is not None and view != vm.last_published:
            vm.last_published = view
            yield self._mismatch(state.ts, vm, kind, "updated", vm.active[kind])


def _view(state: Optional[KvmTscState]) -> Optional[KvmTscState]:
    """Return KVM's view without what identifies one report of it."""
    return state and state._replace(ts=0, vcpu=None)


def _nothing_follows(_fact: Fact) -> list[Finding]:
    return []


def _has_free_slot(vm: _Vm) -> bool:
    if not vmm.of_guest(vm.guest).can_hotplug:
        return False
    if vm.guest.max_vcpus is None:
        return vm.was_plugged
    return vm.present < vm.guest.max_vcpus


def _count_for_lines(vm: _Vm, host: Host) -> None:
    """Without lines, take from KVM's count which vCPUs are apart: the fewer ones, as it seems.

    KVM itself relies on its count only if the kernel's clock is the TSC (``gtod_is_based_on_tsc``).
    """
    state = vm.kvm_state
    if state is None or not vm.is_counted or not frequency.rests_on_tsc(host):
        _forget_lags(vm)
        return
    vcpus = vm.vcpus.keys() - {VM_SCOPE}
    matching = vm.writes.generation & vcpus
    others = vcpus - matching
    known = matching and len(vm.writes.generation) == state.synchronised
    off: set[int] = set()
    if known and others:
        off = min(matching, others, key=lambda group: (len(group), -min(group)))
    for index in vcpus:
        vm.vcpus[index].lag, vm.vcpus[index].apart_by_kvm = None, index in off


def _all_match(vm: _Vm) -> bool:
    """Whether KVM counts all vCPUs as synchronised, and nothing else was known before."""
    state = vm.kvm_state
    matches = state is not None and state.synchronised == state.online
    known = vm.spread is not None and vm.spread.seconds is not None
    return matches and not known and not vm.off["desync"]


def _forget_lags(vm: _Vm) -> None:
    for vcpu in vm.vcpus.values():
        vcpu.lag, vcpu.apart_by_kvm = None, False


def _spread_changes(vm: _Vm, ts: int, spread: Optional[Spread]) -> Iterable[TscSpread]:
    found = TscSpread(ts, vm.name, None, None)
    if spread is not None:
        off = vm.off["desync"]
        lags = tuple((index, lag) for index, lag in sorted(spread.lags.items()) if index in off)
        found = TscSpread(ts, vm.name, spread.seconds, spread.rate_ppm, lags)
    if found[2:] != (vm.spread or TscSpread(ts, vm.name, None, None))[2:]:
        vm.spread = found
        yield found


def _only_drifts(now: Deviation, before: Deviation) -> bool:
    """Whether the TSCs of the same vCPUs are apart as before, only by another time."""
    known = now.apart_seconds is not None and before.apart_seconds is not None
    return known and now.vcpus == before.vcpus and now.ppm in (None, before.ppm)


def _is_worth_an_update(now: Deviation, before: Deviation) -> bool:
    old = before.apart_seconds or 0
    return abs((now.apart_seconds or 0) - old) > _WORTH_AN_UPDATE * old


def _default_khz(vm: _Vm) -> Optional[int]:
    """Return what was set for the VM, None if that is the host's frequency."""
    return vm.vcpus[VM_SCOPE].khz if VM_SCOPE in vm.vcpus else None


def _reference_effective(vm: _Vm) -> Optional[int]:
    """Return what a vCPU ticks at with whose TSC most others agree."""
    vcpu = None if vm.reference is None else vm.vcpus.get(vm.reference)
    return None if vcpu is None else vcpu.effective


def _effective_at(vm: _Vm, khz: int) -> Optional[int]:
    """Return what the vCPUs tick at that were given ``khz`` in this round."""
    given = (v for v in vm.vcpus.values() if v.written_in(vm.write_round) == khz)
    return next((vcpu.effective for vcpu in given), None)


def _since(vm: _Vm, deviation: Deviation) -> Phase:
    """Return the phase of the last call on the vCPUs that are off."""
    latest = max((vm.vcpus[index] for index in deviation.vcpus), key=lambda vcpu: vcpu.last_call)
    return latest.phase or "unknown"


def _take_call(vcpu: _Vcpu, call: Call, host: Host) -> None:
    """Record what one call establishes about its vCPU."""
    vcpu.phase, vcpu.step, vcpu.last_call = call.phase, call.step, call.event.ts
    if call.block != vcpu.block:
        vcpu.block, vcpu.gets, vcpu.sets = call.block, 0, 0
    if call.event.op == "set":
        vcpu.sets += 1
        _take_set(vcpu, call, host)
    else:
        vcpu.gets += 1
        if call.khz is not None:
            vcpu.reported = call.khz
            if vcpu.refused is None and frequency.is_accepted(call.khz, host):
                vcpu.initial = call.khz
        # GET, GET instead of the GET, SET of QEMU's kvm_arch_set_tsc_khz.
        if call.step != "unknown" and vcpu.gets > 1 and not vcpu.sets:
            vcpu.withheld = True
        vcpu.effective = _effective(vcpu, call.guest, host)


def _take_set(vcpu: _Vcpu, call: Call, host: Host) -> None:
    if call.status != 0:
        refused = call.khz or 0
        vcpu.refused = refused, call.status
        slower = call.status == -errno.EINVAL and not frequency.is_accepted(refused, host)
        if slower and call.target != VM_SCOPE:
            vcpu.reported = refused  # kvm_set_tsc_khz stores it before it refuses to slow down
        return
    khz = call.khz or host.tsc_khz  # kvm_arch_vcpu_ioctl: 0 stands for the host's frequency
    vcpu.changed_from = _changed_from(vcpu, khz, call)
    vcpu.requested = vcpu.reported = khz
    vcpu.refused, vcpu.withheld = None, False
    vcpu.ratio = None
    _apply_frequency(vcpu, call.guest, host)


def _apply_frequency(vcpu: _Vcpu, guest: Guest, host: Host) -> None:
    """Set what follows from the frequency that KVM holds: catch-up mode and the effective one."""
    if vcpu.khz is not None and not guest.protected:
        vcpu.catching_up |= frequency.catches_up(vcpu.khz, host)
    vcpu.effective = _effective(vcpu, guest, host)


def _effective(vcpu: _Vcpu, guest: Guest, host: Host) -> Optional[int]:
    """Return what a vCPU ticks at; a protected TSC has the frequency that it got at the launch."""
    if guest.protected:
        return vcpu.khz
    return None if vcpu.catching_up else frequency.effective(vcpu.khz, host, vcpu.ratio)


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
    # The guest that a VM waits for ticks elsewhere until it has come.
    waits = vm.guest.incoming and vcpu.phase in ("boot", "prelaunch")
    effective = None if waits else vcpu.effective
    state = VcpuState(
        vm.name, index, vcpu.requested, vcpu.reported, effective, vcpu.phase, vcpu.step
    )
    if index != VM_SCOPE and state != vcpu.published:
        vcpu.published = state
        yield state


def _vcpu_states(vm: _Vm) -> Iterable[VcpuState]:
    for index in vm.vcpus:
        yield from _vcpu_state(vm, index)


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
