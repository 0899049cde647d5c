"""The Prometheus face: what :mod:`tscwatch.model` says, as metric families.

Nothing here reads the kernel; a scrape shows what the daemon's loop put in.  Series of a VM
go when it has ended and been scraped twice more; counters of the host stay.
"""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Optional, Union, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tscwatch import __version__
from tscwatch.model import (
    CLAIMS,
    KINDS,
    PHASES,
    RESULTS,
    STEPS,
    Call,
    Contradiction,
    Dropped,
    Effective,
    Guest,
    Health,
    Host,
    Item,
    Kind,
    KvmTscState,
    Mismatch,
    Op,
    Phase,
    Risk,
    Scope,
    SourceInfo,
    Step,
    VcpuFound,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
    VmStarted,
    errno_name,
)

SCRAPES_AFTER_END = 2

_CallLabels = tuple[Op, Scope, Phase, Step, str]
_CALLS: tuple[Op, ...] = ("get", "set")
_VM_PHASES: tuple[Phase, ...] = ("boot", "probe", "unknown")
_CALL_LABELS: tuple[_CallLabels, ...] = (
    *(
        (op, "vcpu", phase, step, result)
        for op, phase, step, result in product(_CALLS, PHASES, STEPS, RESULTS)
    ),
    *(
        (op, "vm", phase, "unknown", result)
        for op, phase, result in product(_CALLS, _VM_PHASES, RESULTS)
    ),
)


@dataclass
class _Vm:
    guest: Guest
    requested: dict[int, int] = field(default_factory=dict)
    reported: dict[int, int] = field(default_factory=dict)
    effective: dict[int, int] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    """Phase and step of each vCPU's last call."""
    at_risk: bool = False
    synchronised: Optional[int] = None
    master_clock: Optional[bool] = None
    mismatches: dict[Kind, Mismatch] = field(default_factory=dict)
    scrapes_left: Optional[int] = None
    """None while it lives."""

    @property
    def columns(self) -> dict[str, dict[int, Any]]:
        """What is known of each vCPU, by title."""
        return {
            "requested": self.requested,
            "reported": self.reported,
            "effective": self.effective,
            "place": self.places,
        }


def _row(name: str, vm: _Vm) -> dict[str, Any]:
    columns = vm.columns
    vcpus = sorted({vcpu for column in columns.values() for vcpu in column})
    return {
        "vm": name,
        "vcpus": {
            vcpu: {title: column[vcpu] for title, column in columns.items() if vcpu in column}
            for vcpu in vcpus
        },
        "mismatches": [
            {"kind": m.kind, "ppm": m.ppm, "severity": m.severity} for m in vm.mismatches.values()
        ],
        "hotplug_risk": vm.at_risk,
        "synchronised": vm.synchronised,
        "master_clock": vm.master_clock,
    }


class Metrics:
    """All metrics of one daemon, as a collector for ``prometheus_client``.

    :param max_ended: how many VMs that ended and were not scraped since are kept.
    """

    def __init__(self, max_ended: int = 1024) -> None:
        self._lock = threading.Lock()
        self._max_ended = max_ended
        self._vms: dict[str, _Vm] = {}
        self._host = Host()
        self._calls: Counter[_CallLabels] = Counter()
        self._raised: Counter[tuple[str, str]] = Counter()
        self._dropped: Counter[str] = Counter()
        self._contradicted: Counter[str] = Counter()
        self._source: Optional[SourceInfo] = None
        self._health = Health()
        self._attributed = 0
        self._reloaded = True

    def tell(self, item: Item) -> None:
        """Take in what the pipeline found."""
        with self._lock:
            if isinstance(item, Call):
                self._call(item)
            elif isinstance(item, Mismatch):
                self._mismatch(item)
            elif isinstance(item, VmSeen):
                self._vm_seen(item)
            elif isinstance(item, VmEnded):
                self._vm_ended(item)
            elif isinstance(item, Dropped):
                self._dropped[item.what] += 1
            elif isinstance(item, Contradiction):
                self._contradicted[item.claim] += 1
            elif isinstance(item, Host):
                self._host = item
            elif isinstance(item, VcpuFound):
                if item.vm in self._vms:
                    self._vms[item.vm].reported[item.vcpu] = item.khz
            elif isinstance(item, VcpuUnplugged):
                self._unplugged(item)
            elif not isinstance(item, VmStarted) and item.vm in self._vms:
                self._state(self._vms[item.vm], item)

    def tell_health(self, source: SourceInfo, health: Health) -> None:
        """Take in what the source knows of itself."""
        with self._lock:
            self._source = source
            self._health = Health(
                dict(health.probes), health.sent, health.received, dict(health.lost)
            )

    def tell_reload(self, well: bool) -> None:
        """Whether the configuration that was last read could be used."""
        with self._lock:
            self._reloaded = well

    def summary(self) -> str:
        """For systemd's status line."""
        with self._lock:
            vms = [vm for vm in self._vms.values() if vm.scrapes_left is None]
            mismatches = sum(len(vm.mismatches) for vm in vms)
        return f"watching {len(vms)} VMs, {mismatches} mismatches"

    def vms(self) -> list[dict[str, Any]]:
        """The VMs that live, for ``tscwatch top``; no scrape."""
        with self._lock:
            return [_row(name, vm) for name, vm in self._vms.items() if vm.scrapes_left is None]

    def registry(self) -> CollectorRegistry:
        """A registry of its own: nothing of the process's default one is exported."""
        registry = CollectorRegistry()
        registry.register(cast(Any, self))  # Collector is a class only in newer releases
        return registry

    def describe(self) -> list[Metric]:
        """Nothing: a registration is no scrape, and must not use up a VM's last ones."""
        return []

    def collect(self) -> list[Metric]:
        """The state of this moment; one scrape."""
        with self._lock:
            families = [*self._host_families(), *self._vm_families()]
            self._count_last_scrapes()
        return families

    def _count_last_scrapes(self) -> None:
        for name, vm in list(self._vms.items()):
            if vm.scrapes_left is not None:
                vm.scrapes_left -= 1
                if vm.scrapes_left <= 0:
                    del self._vms[name]

    # Taking in

    def _call(self, call: Call) -> None:
        self._attributed += 1
        op = call.event.op
        self._calls[op, call.scope, call.phase, call.step, errno_name(call.status)] += 1
        vm = self._vms.get(call.vm)
        vcpu, khz = call.event.vcpu, call.khz
        if vm is None or not call.tracked or vcpu is None:
            return
        vm.places[vcpu] = f"{call.phase}/{call.step}"
        if khz is None:
            return
        if op == "get":
            vm.reported[vcpu] = khz
        elif call.status == 0:
            vm.requested[vcpu] = khz

    def _unplugged(self, unplugged: VcpuUnplugged) -> None:
        vm = self._vms.get(unplugged.vm)
        if vm is not None:
            for column in vm.columns.values():
                column.pop(unplugged.vcpu, None)

    def _mismatch(self, mismatch: Mismatch) -> None:
        if mismatch.state == "raised":
            self._raised[mismatch.kind, mismatch.phase] += 1
        vm = self._vms.get(mismatch.vm)
        if vm is None:
            return
        if mismatch.state != "cleared":
            vm.mismatches[mismatch.kind] = mismatch
        elif vm.scrapes_left is None:
            vm.mismatches.pop(mismatch.kind, None)

    @staticmethod
    def _state(vm: _Vm, item: Union[Effective, Risk, KvmTscState]) -> None:
        if isinstance(item, Risk):
            vm.at_risk = item.at_risk
        elif isinstance(item, KvmTscState):
            vm.master_clock = item.master_clock
            if item.synchronised is not None:
                vm.synchronised = item.synchronised
        elif item.khz is None:
            vm.effective.pop(item.vcpu, None)
        else:
            vm.effective[item.vcpu] = item.khz

    def _vm_seen(self, seen: VmSeen) -> None:
        # In place of one of the same name that ended and awaits its last scrapes.
        self._vms[seen.vm] = _Vm(seen.guest)

    def _vm_ended(self, ended: VmEnded) -> None:
        vm = self._vms.get(ended.vm)
        if vm is None:
            return
        vm.scrapes_left = SCRAPES_AFTER_END
        awaiting = [name for name, vm in self._vms.items() if vm.scrapes_left is not None]
        for name in awaiting[: max(0, len(awaiting) - self._max_ended)]:
            del self._vms[name]

    # Giving out

    def _host_families(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "tscwatch_build_info", "The running tscwatch.", labels=["version", "python"]
        )
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
        reloaded = GaugeMetricFamily(
            "tscwatch_config_last_reload_successful",
            "Whether the configuration that was last read is in force.",
        )
        reloaded.add_metric([], self._reloaded)
        yield reloaded
        yield from self._source_families()
        yield from self._own_tsc_families()
        calls = CounterMetricFamily(
            "tscwatch_tsc_ioctls",
            "KVM_GET_TSC_KHZ and KVM_SET_TSC_KHZ calls.",
            labels=["op", "scope", "phase", "step", "result"],
        )
        for labels in _CALL_LABELS:
            calls.add_metric(list(labels), self._calls[labels])
        yield calls
        raised = CounterMetricFamily(
            "tscwatch_mismatches",
            "Mismatches that were raised, by the phase that brought them in.",
            labels=["kind", "phase"],
        )
        for kind, phase in product(KINDS, PHASES):
            raised.add_metric([kind, phase], self._raised[kind, phase])
        yield raised
        dropped = CounterMetricFamily(
            "tscwatch_tracking_dropped",
            "VMs and vCPUs left out because a limit was reached.",
            labels=["what"],
        )
        for what in ("vm", "vcpu"):
            dropped.add_metric([what], self._dropped[what])
        yield dropped
        contradicted = CounterMetricFamily(
            "tscwatch_contradictions",
            "What tscwatch said of a VM, and KVM or QEMU's functions do not: see the log.",
            labels=["claim"],
        )
        for claim in CLAIMS:
            contradicted.add_metric([claim], self._contradicted[claim])
        yield contradicted

    def _own_tsc_families(self) -> Iterator[Metric]:
        host = self._host
        tolerance = GaugeMetricFamily(
            "tscwatch_host_tsc_tolerance_ratio",
            "Inside it KVM takes a frequency and does not scale; 1e-6 is 1 ppm.",
        )
        tolerance.add_metric([], host.kvm_tolerance_ppm * 1e-6)
        yield tolerance
        clocksource = GaugeMetricFamily(
            "tscwatch_host_clocksource_info", "The kernel's own clock.", labels=["clocksource"]
        )
        if host.clocksource:
            clocksource.add_metric([host.clocksource], 1)
        yield clocksource
        frequency = GaugeMetricFamily(
            "tscwatch_host_tsc_hertz", "The frequency that this host's KVM gives a new VM."
        )
        if host.tsc_khz is not None:
            frequency.add_metric([], host.tsc_khz * 1000)
        yield frequency
        scaling = GaugeMetricFamily(
            "tscwatch_host_tsc_scaling_supported", "Whether the hardware scales a guest's TSC."
        )
        if host.scaling is not None:
            scaling.add_metric([], host.scaling)
        yield scaling

    def _source_families(self) -> Iterator[Metric]:
        if self._source is not None:
            info = GaugeMetricFamily(
                "tscwatch_source_info",
                "Where events come from.",
                labels=["source", "attach", "function"],
            )
            info.add_metric(list(self._source), 1)
            yield info
        probes = GaugeMetricFamily(
            "tscwatch_probe_attached", "Whether a probe is in place.", labels=["probe"]
        )
        for probe, attached in sorted(self._health.probes.items()):
            probes.add_metric([probe], attached)
        yield probes
        events = CounterMetricFamily(
            "tscwatch_events",
            "Events that passed a stage: sent by the kernel, captured here, attributed as calls.",
            labels=["stage"],
        )
        events.add_metric(["kernel"], self._health.sent)
        events.add_metric(["capture"], self._health.received)
        events.add_metric(["attribute"], self._attributed)
        yield events
        lost = CounterMetricFamily(
            "tscwatch_events_lost",
            "Events that were lost, by the stage that lost them.",
            labels=["stage", "reason"],
        )
        for (stage, reason), count in sorted(self._health.lost.items()):
            lost.add_metric([stage, reason], count)
        yield lost

    def _vm_families(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "tscwatch_vm_info",
            "Who a VM is; join on vm.",
            labels=["vm", "uuid", "pid", "vmm", "machine"],
        )
        requested = GaugeMetricFamily(
            "tscwatch_vcpu_tsc_requested_hertz",
            "Argument of the last KVM_SET_TSC_KHZ that succeeded.",
            labels=["vm", "vcpu"],
        )
        reported = GaugeMetricFamily(
            "tscwatch_vcpu_tsc_reported_hertz",
            "What the last KVM_GET_TSC_KHZ returned; not always what the guest gets.",
            labels=["vm", "vcpu"],
        )
        effective = GaugeMetricFamily(
            "tscwatch_vcpu_tsc_effective_hertz",
            "What the vCPU's TSC really ticks at; absent where that is not known.",
            labels=["vm", "vcpu"],
        )
        risk = GaugeMetricFamily(
            "tscwatch_vm_hotplug_risk",
            "1 while a vCPU plugged into the VM would tick differently from its others.",
            labels=["vm"],
        )
        synchronised = GaugeMetricFamily(
            "tscwatch_vm_tsc_matched_vcpus",
            "vCPUs whose TSCs KVM takes for synchronised; absent until it has compared them.",
            labels=["vm"],
        )
        master_clock = GaugeMetricFamily(
            "tscwatch_vm_master_clock",
            "Whether KVM uses its master clock for the VM; absent until it has said so.",
            labels=["vm"],
        )
        active = GaugeMetricFamily(
            "tscwatch_mismatch_active",
            "1 while a VM has a mismatch of this kind.",
            labels=["vm", "kind", "severity"],
        )
        deviation = GaugeMetricFamily(
            "tscwatch_mismatch_deviation_ratio",
            "Size of an active mismatch; 1e-6 is 1 ppm.",
            labels=["vm", "kind", "severity"],
        )
        for name, vm in self._vms.items():
            guest = vm.guest
            info.add_metric(
                [name, guest.uuid or "", str(guest.pid), guest.vmm, guest.machine or ""], 1
            )
            risk.add_metric([name], vm.at_risk)
            if vm.synchronised is not None:
                synchronised.add_metric([name], vm.synchronised)
            if vm.master_clock is not None:
                master_clock.add_metric([name], vm.master_clock)
            for family, rates in (
                (requested, vm.requested),
                (reported, vm.reported),
                (effective, vm.effective),
            ):
                for vcpu, khz in rates.items():
                    family.add_metric([name, str(vcpu)], khz * 1000)
            for mismatch in vm.mismatches.values():
                labels = [name, mismatch.kind, mismatch.severity]
                active.add_metric(labels, 1)
                if mismatch.ppm is not None:
                    deviation.add_metric(labels, mismatch.ppm * 1e-6)
        yield from (info, requested, reported, effective, risk, synchronised, master_clock)
        yield from (active, deviation)
