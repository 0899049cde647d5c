"""The Prometheus metrics, each declared once in :data:`FAMILIES`.

A scrape shows the state as the daemon's loop left it and does no other work.  Numeric series carry
``vm`` and ``vcpu`` only, so that their number is bounded by ``limits`` in the configuration; who a
VM is stands in ``tscwatch_vm_info``, and whose guest it is in ``tscwatch_vm_owner_info``.  A
counter whose labels have closed sets of values exists at 0 for every combination that can occur
from the start, so that its first event is an increase.  Series of a VM go when it has ended and
been scraped twice more; counters stay.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, Callable, NamedTuple, Optional, Union, cast

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tscwatch import __version__
from tscwatch.clock import wall_ns
from tscwatch.model import (
    CLAIMS,
    ERRORS,
    KINDS,
    LIMITED,
    PHASES,
    PLATFORMS,
    SCOPES,
    SEVERITIES,
    STEPS,
    Mismatch,
    VcpuState,
)
from tscwatch.publish.state import State, VmState

Values = tuple[str, ...]
Sample = tuple[Values, float]


class Label(NamedTuple):
    """A label; its values are a closed set, or any if there are none here."""

    name: str
    values: Values = ()


class Family(NamedTuple):
    """One metric: its name as it is scraped, and where its samples come from."""

    name: str
    help: str
    labels: tuple[Label, ...]
    samples: Callable[[State], Iterable[Sample]]
    """Label values in the order of ``labels``, and the sample's value."""
    occurs: Callable[[Values], bool] = lambda _values: True
    """Of a counter with closed labels: whether a combination can occur, and so starts at 0."""

    @property
    def is_counter(self) -> bool:
        """Counters have names that end in ``_total``."""
        return self.name.endswith("_total")

    def collect(self, state: State) -> Metric:
        """Return the family with its samples."""
        names = [label.name for label in self.labels]
        family: Union[CounterMetricFamily, GaugeMetricFamily]
        if self.is_counter:
            family = CounterMetricFamily(self.name, self.help, labels=names)
        else:
            family = GaugeMetricFamily(self.name, self.help, labels=names)
        samples = dict.fromkeys(self._zeros(), 0.0)
        samples.update(self.samples(state))
        for values, value in samples.items():
            family.add_metric(values, value)
        return family

    def _zeros(self) -> Iterator[Values]:
        if self.is_counter and all(label.values for label in self.labels):
            yield from filter(self.occurs, product(*(label.values for label in self.labels)))


class Metrics:
    """The collector of a state's metrics, for ``prometheus_client``."""

    def __init__(self, state: State) -> None:
        self._state = state

    def registry(self) -> CollectorRegistry:
        """Return a registry with these metrics alone."""
        registry = CollectorRegistry()
        registry.register(cast(Any, self))  # Collector is a class only in newer releases
        return registry

    def registry_with_process(self) -> CollectorRegistry:
        """Return a registry that also has the ``process_*`` metrics of this process.

        It is for HTTP only: node_exporter has metrics of the same names, and refuses a text file
        that repeats them.
        """
        registry = self.registry()
        ProcessCollector(registry=registry)
        return registry

    def describe(self) -> list[Metric]:
        """Return nothing: a registration must not count as a scrape."""
        return []

    def collect(self) -> list[Metric]:
        """Return the state of this moment; one scrape."""
        with self._state.scrape():
            return [family.collect(self._state) for family in FAMILIES]


_VM, _VCPU = Label("vm"), Label("vcpu")
_KIND, _SEVERITY, _PHASE = (
    Label("kind", KINDS),
    Label("severity", SEVERITIES),
    Label("phase", PHASES),
)
_STEPS_BY_PHASE = {
    ("vcpu", "boot"): ("init", "post_init"),
    ("vcpu", "prelaunch"): ("init", "post_init"),
    ("vcpu", "hotplug"): ("init", "post_init"),
    ("vcpu", "reset"): ("init", "post_init"),
    ("vcpu", "incoming"): ("post_init",),
    ("vcpu", "loadvm"): ("post_init", "unknown"),
    ("vcpu", "probe"): ("init",),
    ("vcpu", "unknown"): ("init", "post_init", "unknown"),
    ("vm", "boot"): ("unknown",),
    ("vm", "probe"): ("init",),
    ("vm", "unknown"): ("unknown",),
}
"""The steps that :mod:`tscwatch.analysis.attribute` gives a call, by its scope and phase."""


def _call_occurs(values: Values) -> bool:
    """A probe only reads, and a phase has few steps."""
    op, scope, phase, step = values
    if (op, phase) == ("set", "probe"):
        return False
    return step in _STEPS_BY_PHASE.get((scope, phase), ())


def _single(value: Callable[[State], Optional[float]]) -> Callable[[State], Iterator[Sample]]:
    """A metric without labels; absent while its value is not known."""

    def samples(state: State) -> Iterator[Sample]:
        found = value(state)
        if found is not None:
            yield (), found

    return samples


def _per_vm(value: Callable[[VmState], Optional[float]]) -> Callable[[State], Iterator[Sample]]:
    def samples(state: State) -> Iterator[Sample]:
        for name, vm in state.vms.items():
            found = value(vm)
            if found is not None:
                yield (name,), found

    return samples


def _per_vcpu(khz: Callable[[VcpuState], Optional[int]]) -> Callable[[State], Iterator[Sample]]:
    """A frequency in hertz; absent while it is not known or ``metrics.per_vcpu`` leaves it out."""

    def samples(state: State) -> Iterator[Sample]:
        for name, vm in state.vms.items():
            if not _shows_vcpus(state, vm):
                continue
            for index, vcpu in vm.vcpus.items():
                found = khz(vcpu)
                if found is not None:
                    yield (name, str(index)), found * 1000

    return samples


def _shows_vcpus(state: State, vm: VmState) -> bool:
    return state.per_vcpu == "all" or (state.per_vcpu == "differing" and _differ(vm))


def _differ(vm: VmState) -> bool:
    """Return whether a frequency of one vCPU differs from another's, as far as both are known."""
    vcpus = vm.vcpus.values()
    return any(
        len(khz - {None}) > 1
        for khz in (
            {vcpu.effective for vcpu in vcpus},
            {vcpu.requested for vcpu in vcpus},
            {vcpu.reported for vcpu in vcpus},
        )
    )


def _effective(choose: Callable[[Iterable[int]], int]) -> Callable[[VmState], Optional[float]]:
    """The lowest or highest effective frequency in hertz, of the vCPUs for which it is known."""

    def value(vm: VmState) -> Optional[float]:
        khz = [vcpu.effective for vcpu in vm.vcpus.values() if vcpu.effective is not None]
        return choose(khz) * 1000 if khz else None

    return value


def _per_mismatch(
    value: Callable[[Mismatch], Optional[float]],
) -> Callable[[State], Iterator[Sample]]:
    def samples(state: State) -> Iterator[Sample]:
        for name, vm in state.vms.items():
            for mismatch in vm.mismatches.values():
                found = value(mismatch)
                if found is not None:
                    yield (name, mismatch.kind, mismatch.severity), found

    return samples


def _rate_spread(vm: VmState) -> Optional[float]:
    ppm = vm.spread and vm.spread.rate_ppm
    return None if ppm is None else ppm * 1e-6


def _lags(state: State) -> Iterator[Sample]:
    if state.per_vcpu == "none":
        return
    for name, vm in state.vms.items():
        for index, seconds in vm.spread.lags if vm.spread else ():
            yield (name, str(index)), seconds


def _started(state: State) -> Iterator[Sample]:
    for name, vm in state.vms.items():
        for kind, mismatch in vm.mismatches.items():
            yield (name, kind, mismatch.phase), wall_ns(vm.started[kind]) / 1e9


def _last_event(state: State) -> Optional[float]:
    return None if state.last_call_ts is None else wall_ns(state.last_call_ts) / 1e9


def _build_info(_state: State) -> Iterator[Sample]:
    yield (__version__, platform.python_version()), 1


def _source_info(state: State) -> Iterator[Sample]:
    if state.source is not None:
        yield tuple(state.source), 1


def _clocksource_info(state: State) -> Iterator[Sample]:
    if state.host.clocksource:
        yield (state.host.clocksource,), 1


def _vm_info(state: State) -> Iterator[Sample]:
    for name, vm in state.vms.items():
        guest = vm.guest
        yield (name, guest.uuid or "", str(guest.pid), guest.vmm, guest.machine or ""), 1


def _vm_owner_info(state: State) -> Iterator[Sample]:
    for name, vm in state.vms.items():
        owner = vm.guest.owner
        if owner is not None:
            labels = owner.platform, owner.namespace, owner.name, owner.project, owner.vmid
            yield (name, *labels), 1


def _events(state: State) -> Iterator[Sample]:
    yield ("kernel",), state.health.sent
    yield ("capture",), state.health.received
    yield ("attribute",), sum(state.calls.values())


FAMILIES = (
    Family(
        "tscwatch_build_info",
        "The running tscwatch.",
        (Label("version"), Label("python")),
        _build_info,
    ),
    Family(
        "tscwatch_config_last_reload_successful",
        "Whether the configuration that was last read is in force.",
        (),
        _single(lambda state: state.last_reload_successful),
    ),
    Family(
        "tscwatch_source_info",
        "The source of the events.",
        (Label("source"), Label("attach"), Label("function"), Label("program")),
        _source_info,
    ),
    Family(
        "tscwatch_probe_attached",
        "Whether a probe is attached.",
        (Label("probe"),),
        lambda state: (((probe,), on) for probe, on in sorted(state.health.probes.items())),
    ),
    Family(
        "tscwatch_events_total",
        "Events that passed a stage: sent by the kernel, captured, attributed as calls.",
        (Label("stage", ("kernel", "capture", "attribute")),),
        _events,
    ),
    Family(
        "tscwatch_events_lost_total",
        "Events that were lost, by the stage that lost them.",
        (Label("stage"), Label("reason")),
        lambda state: sorted(state.health.lost.items()),
    ),
    Family(
        "tscwatch_foreign_ioctls_total",
        "Calls on a VM or vCPU by a process other than the VM's; KVM refuses them.",
        (),
        _single(lambda state: state.health.foreign),
    ),
    Family(
        "tscwatch_bpf_runs_skipped_total",
        "Runs of the BPF programs that the kernel skipped, nearly all of them at a KVM_RUN.",
        (),
        _single(lambda state: state.health.skipped),
    ),
    Family(
        "tscwatch_tracking_dropped_total",
        "VMs and vCPUs that are not tracked because a limit was reached.",
        (Label("what", LIMITED),),
        lambda state: (((what,), count) for what, count in state.dropped.items()),
    ),
    Family(
        "tscwatch_contradictions_total",
        "Contradictions between tscwatch and KVM or QEMU's own functions; the log has both sides.",
        (Label("claim", CLAIMS),),
        lambda state: (((claim,), count) for claim, count in state.contradictions.items()),
    ),
    Family(
        "tscwatch_tsc_ioctls_total",
        "KVM_GET_TSC_KHZ and KVM_SET_TSC_KHZ calls.",
        (
            Label("op", ("get", "set")),
            Label("scope", SCOPES),
            _PHASE,
            Label("step", STEPS),
        ),
        lambda state: state.calls.items(),
        _call_occurs,
    ),
    Family(
        "tscwatch_tsc_ioctl_errors_total",
        "KVM_GET_TSC_KHZ and KVM_SET_TSC_KHZ calls that failed.",
        (Label("errno", ERRORS),),
        lambda state: (((name,), count) for name, count in state.errors.items()),
    ),
    Family(
        "tscwatch_last_event_timestamp_seconds",
        "When the last GET or SET was made, in Unix time; absent before the first.",
        (),
        _single(_last_event),
    ),
    Family(
        "tscwatch_mismatches_total",
        "Mismatches that were raised.",
        (_KIND,),
        lambda state: (((kind,), count) for kind, count in state.mismatches.items()),
    ),
    Family(
        "tscwatch_host_tsc_hertz",
        "The frequency that this host's KVM gives a new VM.",
        (),
        _single(lambda state: state.host.tsc_khz and state.host.tsc_khz * 1000),
    ),
    Family(
        "tscwatch_host_tsc_scaling_supported",
        "Whether the hardware scales a guest's TSC.",
        (),
        _single(lambda state: state.host.scaling),
    ),
    Family(
        "tscwatch_host_tsc_tolerance_ratio",
        "KVM does not scale to a frequency within this distance of the host's; 1e-6 is 1 ppm.",
        (),
        _single(lambda state: state.host.kvm_tolerance_ppm * 1e-6),
    ),
    Family(
        "tscwatch_host_clocksource_info",
        "The kernel's clocksource.",
        (Label("clocksource"),),
        _clocksource_info,
    ),
    Family(
        "tscwatch_vm_info",
        "The identity of a VM; join on vm.",
        (_VM, Label("uuid"), Label("pid"), Label("vmm"), Label("machine")),
        _vm_info,
    ),
    Family(
        "tscwatch_vm_owner_info",
        "Whose guest a VM is, as its platform names it; absent if that is not known; join on vm.",
        (
            _VM,
            Label("platform", PLATFORMS),
            Label("namespace"),
            Label("name"),
            Label("project"),
            Label("vmid"),
        ),
        _vm_owner_info,
    ),
    Family(
        "tscwatch_vcpu_tsc_requested_hertz",
        "Argument of the last KVM_SET_TSC_KHZ that succeeded.",
        (_VM, _VCPU),
        _per_vcpu(lambda vcpu: vcpu.requested),
    ),
    Family(
        "tscwatch_vcpu_tsc_reported_hertz",
        "What KVM_GET_TSC_KHZ would return now; not always what the guest gets.",
        (_VM, _VCPU),
        _per_vcpu(lambda vcpu: vcpu.reported),
    ),
    Family(
        "tscwatch_vcpu_tsc_effective_hertz",
        "What the vCPU's TSC really ticks at; absent while it is not known.",
        (_VM, _VCPU),
        _per_vcpu(lambda vcpu: vcpu.effective),
    ),
    Family(
        "tscwatch_vm_tsc_effective_min_hertz",
        "The lowest effective frequency among a VM's vCPUs; absent while none is known.",
        (_VM,),
        _per_vm(_effective(min)),
    ),
    Family(
        "tscwatch_vm_tsc_effective_max_hertz",
        "The highest effective frequency among a VM's vCPUs; absent while none is known.",
        (_VM,),
        _per_vm(_effective(max)),
    ),
    Family(
        "tscwatch_vm_tsc_spread_seconds",
        "How far the TSCs of a VM's vCPUs are apart now; absent while it is not known.",
        (_VM,),
        _per_vm(lambda vm: vm.spread and vm.spread.seconds),
    ),
    Family(
        "tscwatch_vm_tsc_rate_spread_ratio",
        "How far the rates of a VM's vCPUs are apart; 1e-6 is 1 ppm.",
        (_VM,),
        _per_vm(_rate_spread),
    ),
    Family(
        "tscwatch_vcpu_tsc_lag_seconds",
        "How far a vCPU's TSC is behind most others of its VM, if it is off; negative: ahead.",
        (_VM, _VCPU),
        _lags,
    ),
    Family(
        "tscwatch_vm_hotplug_risk",
        "1 while the TSC of a vCPU plugged into the VM would start apart from the others'.",
        (_VM,),
        _per_vm(lambda vm: vm.at_risk),
    ),
    Family(
        "tscwatch_vm_tsc_matched_vcpus",
        "vCPUs that KVM considers synchronised; absent until KVM has compared them.",
        (_VM,),
        _per_vm(lambda vm: vm.kvm_state and vm.kvm_state.synchronised),
    ),
    Family(
        "tscwatch_vm_master_clock",
        "Whether KVM uses its master clock for the VM; absent until KVM has reported it.",
        (_VM,),
        _per_vm(lambda vm: vm.kvm_state and vm.kvm_state.master_clock),
    ),
    Family(
        "tscwatch_mismatch_active",
        "1 while a VM has a mismatch of this kind.",
        (_VM, _KIND, _SEVERITY),
        _per_mismatch(lambda _mismatch: 1),
    ),
    Family(
        "tscwatch_mismatch_deviation_ratio",
        "By how much rates are off because of an active mismatch; 1e-6 is 1 ppm.",
        (_VM, _KIND, _SEVERITY),
        _per_mismatch(lambda mismatch: None if mismatch.ppm is None else mismatch.ppm * 1e-6),
    ),
    Family(
        "tscwatch_mismatch_started_timestamp_seconds",
        "Since when a mismatch has been active, in Unix time, and the phase that caused it.",
        (_VM, _KIND, _PHASE),
        _started,
    ),
)
