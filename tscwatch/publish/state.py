"""What is known now: the state that ``/metrics``, ``/vms`` and systemd's status line show.

The daemon's loop writes it and HTTP threads read it, so everything here holds one lock.  It stores
what the pipeline yields and derives nothing from it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional

from tscwatch.model import (
    Call,
    Contradiction,
    Dropped,
    Guest,
    Health,
    Host,
    Item,
    Kind,
    KvmTscState,
    Mismatch,
    Op,
    PerVcpu,
    Phase,
    Risk,
    Scope,
    SourceInfo,
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
    errno_name,
)

SCRAPES_AFTER_END = 2

CallLabels = tuple[Op, Scope, Phase, Step]


@dataclass
class VmState:
    """What is known of one VM."""

    guest: Guest
    vcpus: dict[int, VcpuState] = field(default_factory=dict)
    mismatches: dict[Kind, Mismatch] = field(default_factory=dict)
    started: dict[Kind, int] = field(default_factory=dict)
    """Unix time in nanoseconds at which each active mismatch was first raised."""
    at_risk: bool = False
    kvm_state: Optional[KvmTscState] = None
    spread: Optional[TscSpread] = None
    scrapes_left: Optional[int] = None
    """None while it lives."""


class State:
    """The state of one daemon.

    :param max_ended: how many VMs are kept that have ended and were not scraped since.
    :param per_vcpu: of which VMs the metrics show single vCPUs; may be replaced at any time.
    """

    def __init__(self, max_ended: int = 1024, per_vcpu: PerVcpu = "differing") -> None:
        self.per_vcpu = per_vcpu
        self.vms: dict[str, VmState] = {}
        self.host = Host()
        self.calls: Counter[CallLabels] = Counter()
        self.errors: Counter[str] = Counter()
        self.last_call_ts: Optional[int] = None
        self.mismatches: Counter[Kind] = Counter()
        self.dropped: Counter[str] = Counter()
        self.contradictions: Counter[str] = Counter()
        self.source: Optional[SourceInfo] = None
        self.health = Health()
        self.last_reload_successful = True
        self._lock = threading.Lock()
        self._max_ended = max_ended
        self._handlers: dict[type, Callable[[Any], None]] = {
            Host: self._host_changed,
            Call: self._count_call,
            VmSeen: self._vm_seen,
            VmEnded: self._vm_ended,
            VcpuState: self._vcpu_changed,
            VcpuUnplugged: self._vcpu_unplugged,
            KvmTscState: self._kvm_state_changed,
            TscSpread: self._spread_changed,
            Mismatch: self._mismatch_changed,
            Risk: self._risk_changed,
            Contradiction: self._count_contradiction,
            Dropped: self._count_dropped,
            VcpuFound: _ignore,  # a VcpuState follows it
            VmStarted: _ignore,
            VcpuPlugged: _ignore,
            TscLines: _ignore,
        }

    def update(self, item: Item) -> None:
        """Apply an item of the pipeline."""
        with self._lock:
            self._handlers[type(item)](item)

    def update_health(self, source: SourceInfo, health: Health) -> None:
        """Apply the source's own state."""
        copy = replace(health, probes=dict(health.probes), lost=dict(health.lost))
        with self._lock:
            self.source, self.health = source, copy

    def update_reload(self, successful: bool) -> None:
        """Apply whether the configuration that was last read could be used."""
        with self._lock:
            self.last_reload_successful = successful

    @contextmanager
    def scrape(self) -> Iterator[None]:
        """Keep the state as it is while this holds, and count it as one scrape."""
        with self._lock:
            yield
            for name, vm in list(self.vms.items()):
                if vm.scrapes_left is not None:
                    vm.scrapes_left -= 1
                    if vm.scrapes_left <= 0:
                        del self.vms[name]

    def summary(self) -> str:
        """Return systemd's status line."""
        with self._lock:
            vms = [vm for vm in self.vms.values() if vm.scrapes_left is None]
            mismatches = sum(len(vm.mismatches) for vm in vms)
        return f"watching {len(vms)} VMs, {mismatches} mismatches"

    def rows(self) -> list[dict[str, Any]]:
        """Return the VMs that live, as JSON objects for ``tscwatch top``; this is no scrape."""
        with self._lock:
            return [_row(name, vm) for name, vm in self.vms.items() if vm.scrapes_left is None]

    def _host_changed(self, host: Host) -> None:
        self.host = host

    def _count_call(self, call: Call) -> None:
        self.calls[call.event.op, call.scope, call.phase, call.step] += 1
        if call.status < 0:
            self.errors[errno_name(call.status)] += 1
        self.last_call_ts = max(call.event.ts, self.last_call_ts or 0)

    def _vm_seen(self, seen: VmSeen) -> None:
        # It replaces one of the same name that has ended and awaits its last scrapes.
        self.vms[seen.vm] = VmState(seen.guest)

    def _vm_ended(self, ended: VmEnded) -> None:
        vm = self.vms.get(ended.vm)
        if vm is None:
            return
        vm.scrapes_left = SCRAPES_AFTER_END
        awaiting = [name for name, vm in self.vms.items() if vm.scrapes_left is not None]
        for name in awaiting[: max(0, len(awaiting) - self._max_ended)]:
            del self.vms[name]

    def _vcpu_changed(self, vcpu: VcpuState) -> None:
        if vcpu.vm in self.vms:
            self.vms[vcpu.vm].vcpus[vcpu.vcpu] = vcpu

    def _vcpu_unplugged(self, unplugged: VcpuUnplugged) -> None:
        if unplugged.vm in self.vms:
            self.vms[unplugged.vm].vcpus.pop(unplugged.vcpu, None)

    def _kvm_state_changed(self, state: KvmTscState) -> None:
        if state.vm in self.vms:
            self.vms[state.vm].kvm_state = state

    def _spread_changed(self, spread: TscSpread) -> None:
        if spread.vm in self.vms:
            self.vms[spread.vm].spread = spread

    def _mismatch_changed(self, mismatch: Mismatch) -> None:
        if mismatch.state == "raised":
            self.mismatches[mismatch.kind] += 1
        vm = self.vms.get(mismatch.vm)
        if vm is None:
            return
        if mismatch.state != "cleared":
            vm.mismatches[mismatch.kind] = mismatch
            vm.started.setdefault(mismatch.kind, mismatch.ts)
        elif vm.scrapes_left is None:
            vm.mismatches.pop(mismatch.kind, None)
            vm.started.pop(mismatch.kind, None)

    def _risk_changed(self, risk: Risk) -> None:
        if risk.vm in self.vms:
            self.vms[risk.vm].at_risk = risk.at_risk

    def _count_contradiction(self, contradiction: Contradiction) -> None:
        self.contradictions[contradiction.claim] += 1

    def _count_dropped(self, dropped: Dropped) -> None:
        self.dropped[dropped.what] += 1


def _ignore(_item: object) -> None:
    """For items that change nothing here."""


def _row(name: str, vm: VmState) -> dict[str, Any]:
    kvm = vm.kvm_state
    return {
        "vm": name,
        "owner": vm.guest.owner and vm.guest.owner.facts(),
        "vcpus": {index: _vcpu_row(vcpu) for index, vcpu in sorted(vm.vcpus.items())},
        "mismatches": [
            {
                "kind": m.kind,
                "ppm": m.ppm,
                "apart_seconds": m.apart_seconds,
                "severity": m.severity,
                "phase": m.phase,
            }
            for m in vm.mismatches.values()
        ],
        "hotplug_risk": vm.at_risk,
        "synchronised": kvm and kvm.synchronised,
        "master_clock": kvm and kvm.master_clock,
    }


def _vcpu_row(vcpu: VcpuState) -> dict[str, Any]:
    columns = {
        "requested": vcpu.requested,
        "reported": vcpu.reported,
        "effective": vcpu.effective,
        "place": vcpu.phase and f"{vcpu.phase}/{vcpu.step}",
    }
    return {title: value for title, value in columns.items() if value is not None}
