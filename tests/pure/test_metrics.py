"""What a scrape returns, and for how long."""

from __future__ import annotations

import errno
import platform
import re
from pathlib import Path
from typing import Optional

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.support.histories import HOST_KHZ, History
from tests.support.hosts import a_host
from tscwatch import __version__, recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import (
    LIMITED,
    PHASES,
    Call,
    Contradiction,
    Dropped,
    Event,
    Guest,
    Health,
    Host,
    Item,
    KvmTscState,
    Line,
    Mismatch,
    Owner,
    PerVcpu,
    Risk,
    SourceInfo,
    TscSpread,
    VcpuState,
    VmSeen,
)
from tscwatch.publish.metrics import _STEPS_BY_PHASE, FAMILIES, Metrics
from tscwatch.publish.state import SCRAPES_AFTER_END, State

RECORDINGS = Path(__file__).parents[1] / "recordings"
EXACT = Host(HOST_KHZ, True, kvm_tolerance_ppm=0, shows_lines=True)
"""Each vCPU gets exactly what was requested."""
OWNER = Owner("openstack", name="db", project="shop", flavor="m1.small")


def skewed() -> History:
    history = History("kvm:1", 100, owner=OWNER)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    history.write_all("boot")
    history.start()
    history.new_vcpu(1, "hotplug")
    history.full_write(1, "hotplug", HOST_KHZ + 260)
    return history


RAISED_NS = skewed().events[-2].ts
"""The SET is followed by KVM's comparison of the TSCs."""


def series(state: State) -> int:
    """Count the series of a scrape over HTTP."""
    registry = Metrics(state).registry_with_process()
    return sum(len(family.samples) for family in registry.collect())


def feed(state: State, history: History, pipeline: Pipeline | None = None) -> None:
    if pipeline is None:
        pipeline = Pipeline()
        list(pipeline.feed(EXACT))
    for event in history.events:
        for item in pipeline.feed(event):
            state.update(item)


def vm_series(registry: CollectorRegistry) -> int:
    return sum("vm" in sample.labels for family in registry.collect() for sample in family.samples)


def test_a_skewed_vm() -> None:
    state = State()
    feed(state, skewed())
    value = Metrics(state).registry().get_sample_value
    vm = {"vm": "guest-100"}
    assert value("tscwatch_vcpu_tsc_requested_hertz", {**vm, "vcpu": "1"}) == 2_600_260_000
    assert value("tscwatch_vcpu_tsc_reported_hertz", {**vm, "vcpu": "0"}) == 2_600_000_000
    assert value("tscwatch_vcpu_tsc_reported_hertz", {**vm, "vcpu": "1"}) == 2_600_260_000
    labels = {**vm, "kind": "vcpu_skew", "severity": "critical"}
    assert value("tscwatch_mismatch_active", labels) == 1
    assert round(value("tscwatch_mismatch_deviation_ratio", labels) or 0, 9) == 1e-4
    assert value("tscwatch_mismatches_total", {"kind": "vcpu_skew"}) == 1
    started = {**vm, "kind": "vcpu_skew", "phase": "hotplug"}
    assert value("tscwatch_mismatch_started_timestamp_seconds", started) == RAISED_NS / 1e9
    call = {"op": "set", "scope": "vcpu", "phase": "hotplug", "step": "post_init"}
    assert value("tscwatch_tsc_ioctls_total", call) == 1


def test_a_mismatch_that_changes_started_when_it_was_first_raised() -> None:
    state = State()
    history = skewed()
    history.new_vcpu(2, "hotplug")
    history.full_write(2, "hotplug", HOST_KHZ + 520)
    feed(state, history)
    labels = {"vm": "guest-100", "kind": "vcpu_skew", "phase": "hotplug"}
    value = Metrics(state).registry().get_sample_value
    assert value("tscwatch_mismatches_total", {"kind": "vcpu_skew"}) == 2
    assert value("tscwatch_mismatch_started_timestamp_seconds", labels) == RAISED_NS / 1e9


def test_a_call_that_fails_is_also_an_error() -> None:
    state = State()
    history = skewed()
    history.emit("set", 0, "regs", HOST_KHZ, -errno.EINVAL)
    feed(state, history)
    value = Metrics(state).registry().get_sample_value
    assert value("tscwatch_tsc_ioctl_errors_total", {"errno": "EINVAL"}) == 1
    assert value("tscwatch_tsc_ioctl_errors_total", {"errno": "EIO"}) == 0
    assert value("tscwatch_last_event_timestamp_seconds") == history.events[-1].ts / 1e9
    calls = [
        sample.value
        for family in Metrics(state).registry().collect()
        for sample in family.samples
        if sample.name == "tscwatch_tsc_ioctls_total"
    ]
    assert sum(calls) == sum(event.op in ("get", "set") for event in history.events)


def test_the_identity_of_a_vm() -> None:
    state, history = State(), skewed()
    guest = history.guest._replace(uuid="00-11", machine="q35")
    history.events = [event._replace(guest=guest) for event in history.events]
    feed(state, history)
    text = generate_latest(Metrics(state).registry()).decode()
    (series,) = re.findall(r"(?m)^tscwatch_vm_info(\{.*)$", text)
    assert series == '{machine="q35",pid="100",uuid="00-11",vm="guest-100",vmm="qemu"} 1.0'


def test_the_owner_of_a_vm() -> None:
    state = State()
    feed(state, skewed())
    feed(state, History("kvm:2", 200, events=[]))
    text = generate_latest(Metrics(state).registry()).decode()
    (series,) = re.findall(r"(?m)^tscwatch_vm_owner_info(\{.*)$", text)
    assert series == (
        '{name="db",namespace="",platform="openstack",project="shop",vm="guest-100",vmid=""} 1.0'
    )


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.name.endswith("_info")])
def test_the_value_of_an_info_is_one(name: str) -> None:
    """A rule multiplies by it, to add its labels to another series."""
    (family,) = (each for each in Metrics(a_host(2)).collect() if each.name == name)
    assert family.samples
    assert {sample.value for sample in family.samples} == {1}


def test_counters_start_at_zero() -> None:
    value = Metrics(State()).registry().get_sample_value
    assert value("tscwatch_mismatches_total", {"kind": "vcpu_skew"}) == 0
    assert value("tscwatch_tracking_dropped_total", {"what": "vm"}) == 0


def test_series_of_a_vm_outlive_it_by_two_scrapes_and_its_counts_stay() -> None:
    state = State()
    registry = Metrics(state).registry()
    history = skewed()
    history.emit("vm_end")
    feed(state, history)
    labels = {"vm": "guest-100", "kind": "vcpu_skew", "severity": "critical"}
    assert registry.get_sample_value("tscwatch_mismatch_active", labels) == 1  # one scrape
    alive = [True, *(vm_series(registry) for _ in range(SCRAPES_AFTER_END))]
    assert all(alive[:SCRAPES_AFTER_END])
    assert alive[SCRAPES_AFTER_END] == 0
    value = registry.get_sample_value
    assert value("tscwatch_mismatches_total", {"kind": "vcpu_skew"}) == 1


def test_a_guest_that_restarts_takes_over_its_series() -> None:
    state = State()
    pipeline = Pipeline()
    first = skewed()
    first.emit("vm_end")
    feed(state, first, pipeline)
    second = History("kvm:2", 100)
    second.emit("vm_create")
    second.new_vcpu(0, "boot")
    feed(state, second, pipeline)
    text = generate_latest(Metrics(state).registry()).decode()
    assert text.count("tscwatch_vm_info{") == 1
    assert "tscwatch_mismatch_active{" not in text


def test_ended_vms_that_nobody_scrapes_are_bounded() -> None:
    state = State(max_ended=3)
    pipeline = Pipeline()
    for serial in range(10):
        history = History(f"kvm:{serial}", 100 + serial)
        history.emit("vm_create")
        history.new_vcpu(0, "boot")
        history.emit("vm_end")
        feed(state, history, pipeline)
    assert generate_latest(Metrics(state).registry()).decode().count("tscwatch_vm_info{") == 3


def test_each_vm_and_vcpu_that_is_not_tracked_is_counted_once() -> None:
    """Of one process's VMs those beyond the limit, whatever they do; then those that make room."""
    state, pipeline = State(), Pipeline(max_vms=10, max_vcpus=20)
    registry = Metrics(state).registry()

    def dropped() -> dict[str, Optional[float]]:
        return {
            what: registry.get_sample_value("tscwatch_tracking_dropped_total", {"what": what})
            for what in LIMITED
        }

    crowd = [History(f"kvm:{serial}", 100) for serial in range(100)]
    for history in crowd:
        history.emit("vm_create")
        for vcpu in range(2):
            history.new_vcpu(vcpu, "boot")
        history.events = [e._replace(guest=Guest(100, "storm")) for e in history.events]
        feed(state, history, pipeline)
    assert dropped() == {"vm": 90, "vcpu": 0}
    late = History("kvm:late", 200)
    late.emit("vm_create")
    for vcpu in range(2):
        late.new_vcpu(vcpu, "boot")
    feed(state, late, pipeline)
    assert dropped() == {"vm": 91, "vcpu": 0}
    late.events.clear()
    late.start()
    late.new_vcpu(2, "hotplug")
    late.full_write(2, "hotplug")
    feed(state, late, pipeline)
    assert dropped() == {"vm": 91, "vcpu": 1}


def test_health_is_shown() -> None:
    state = State()
    health = Health({"kvm_vcpu_ioctl": False}, 5, 4, {("kernel", "ring_full"): 1})
    state.update_health(SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl"), health)
    value = Metrics(state).registry().get_sample_value
    assert value("tscwatch_probe_attached", {"probe": "kvm_vcpu_ioctl"}) == 0
    assert value("tscwatch_events_total", {"stage": "kernel"}) == 5
    lost = {"stage": "kernel", "reason": "ring_full"}
    assert value("tscwatch_events_lost_total", lost) == 1


def test_kvms_view_of_a_vm() -> None:
    state = State()
    feed(state, skewed())
    value = Metrics(state).registry().get_sample_value
    assert value("tscwatch_vm_tsc_matched_vcpus", {"vm": "guest-100"}) == 1
    assert value("tscwatch_vm_master_clock", {"vm": "guest-100"}) == 1
    assert value("tscwatch_mismatches_total", {"kind": "vcpu_skew"}) == 1
    assert value("tscwatch_contradictions_total", {"claim": "desync"}) == 0


def test_how_far_the_tscs_are_apart() -> None:
    state = State()
    history = skewed()
    lines = (Line(0, 0), Line(1, -2_600_000, 1.0001))
    history.events.append(Event(9, "tsc_lines", "kvm:1", 100, 0, "", lines=lines, host_tsc=13_000))
    feed(state, history)
    value = Metrics(state).registry().get_sample_value
    apart = 1e-3 - 1.3 / 2.6e9
    spread = value("tscwatch_vm_tsc_spread_seconds", {"vm": "guest-100"})
    assert spread == pytest.approx(apart)
    assert value("tscwatch_vcpu_tsc_lag_seconds", {"vm": "guest-100", "vcpu": "0"}) is None
    lag = value("tscwatch_vcpu_tsc_lag_seconds", {"vm": "guest-100", "vcpu": "1"})
    assert lag == pytest.approx(apart)
    rates = value("tscwatch_vm_tsc_rate_spread_ratio", {"vm": "guest-100"})
    assert rates == pytest.approx(1e-4)
    state.per_vcpu = "none"
    assert value("tscwatch_vcpu_tsc_lag_seconds", {"vm": "guest-100", "vcpu": "1"}) is None


def test_an_unplugged_vcpu_has_no_series() -> None:
    state = State(per_vcpu="all")
    history = skewed()
    history.unplug(1, noticed=True)
    feed(state, history)
    value = Metrics(state).registry().get_sample_value
    assert value("tscwatch_vcpu_tsc_reported_hertz", {"vm": "guest-100", "vcpu": "0"}) is not None
    assert value("tscwatch_vcpu_tsc_reported_hertz", {"vm": "guest-100", "vcpu": "1"}) is None


@pytest.mark.parametrize(
    ("per_vcpu", "vms", "at_most"),
    [("differing", 0, 90), ("differing", 100, 1000), ("none", 100, 1000), ("all", 100, 3400)],
)
def test_the_budget_of_series(per_vcpu: PerVcpu, vms: int, at_most: int) -> None:
    assert at_most - 100 < series(a_host(vms, per_vcpu=per_vcpu)) <= at_most


def test_vcpus_have_series_while_they_differ() -> None:
    state, pipeline = State(), Pipeline()
    list(pipeline.feed(EXACT))
    history = skewed()
    feed(state, history, pipeline)
    value = Metrics(state).registry().get_sample_value
    vm = {"vm": "guest-100"}
    single = "tscwatch_vcpu_tsc_effective_hertz"
    assert value(single, {**vm, "vcpu": "1"}) == 2_600_260_000
    assert value("tscwatch_vm_tsc_effective_min_hertz", vm) == 2_600_000_000
    assert value("tscwatch_vm_tsc_effective_max_hertz", vm) == 2_600_260_000
    state.per_vcpu = "none"
    assert value(single, {**vm, "vcpu": "1"}) is None
    assert value("tscwatch_vm_tsc_effective_max_hertz", vm) == 2_600_260_000
    state.per_vcpu = "differing"
    history.events.clear()
    history.write_all("loadvm")
    feed(state, history, pipeline)
    assert value(single, {**vm, "vcpu": "1"}) is None
    assert value("tscwatch_vm_tsc_effective_max_hertz", vm) == 2_600_000_000


def test_the_value_of_each_family() -> None:
    state = State(per_vcpu="all")
    guest = Guest(7, "qemu", "db", "u-u-i-d", "q35", owner=OWNER)
    failed = Event(3 * 10**9, "set", "kvm:1", 7, 8, "qemu", 0, 9, -errno.EIO)
    items: list[Item] = [
        Host(2000, True, 250, "hpet"),
        *(Dropped("vm"), Dropped("vcpu"), Dropped("vcpu")),
        VmSeen("db", guest),
        Call(failed, "db", guest, "hotplug", "init", ()),
        VcpuState("db", 0, 1, 2, 3),
        VcpuState("db", 1, None, 5, 6),
        Risk(1, "db", guest, True, "another frequency"),
        KvmTscState(1, "db", guest, None, 4, 5, True),
        TscSpread(1, "db", 0.5, 3.0, ((1, -0.25),)),
        Mismatch(2 * 10**9, "raised", "desync", "db", guest, (1,), 4.0, "info", "loadvm", "apart"),
        Mismatch(10**9, "raised", "readback", "db", guest, (0,), None, "warning", "reset", "off"),
        Contradiction(1, "db", guest, "phase", "two sides"),
    ]
    for item in items:
        state.update(item)
    lost = {("kernel", "ring_full"): 8, ("capture", "no_slot"): 9}
    probes = {"one": True, "other": False}
    state.update_health(
        SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl", "stored"), Health(probes, 5, 4, lost, 6, 7)
    )
    state.update_reload(False)
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in Metrics(state).collect():
        for sample in family.samples:
            if sample.value or not sample.name.endswith("_total"):
                values = found.setdefault(sample.name.removeprefix("tscwatch_"), {})
                values[tuple(sample.labels.values())] = sample.value
    ppm = pytest.approx
    assert found == {
        "build_info": {(__version__, platform.python_version()): 1},
        "config_last_reload_successful": {(): 0},
        "source_info": {("bcc", "kprobe", "kvm_vcpu_ioctl", "stored"): 1},
        "probe_attached": {("one",): 1, ("other",): 0},
        "events_total": {("kernel",): 5, ("capture",): 4, ("attribute",): 1},
        "events_lost_total": lost,
        "foreign_ioctls_total": {(): 6},
        "bpf_runs_skipped_total": {(): 7},
        "tracking_dropped_total": {("vm",): 1, ("vcpu",): 2},
        "contradictions_total": {("phase",): 1},
        "tsc_ioctls_total": {("set", "vcpu", "hotplug", "init"): 1},
        "tsc_ioctl_errors_total": {("EIO",): 1},
        "last_event_timestamp_seconds": {(): 3},
        "mismatches_total": {("desync",): 1, ("readback",): 1},
        "host_tsc_hertz": {(): 2_000_000},
        "host_tsc_scaling_supported": {(): 1},
        "host_tsc_tolerance_ratio": {(): ppm(250e-6)},
        "host_clocksource_info": {("hpet",): 1},
        "vm_info": {("db", "u-u-i-d", "7", "qemu", "q35"): 1},
        "vm_owner_info": {("db", "openstack", "", "db", "shop", ""): 1},
        "vcpu_tsc_requested_hertz": {("db", "0"): 1000},
        "vcpu_tsc_reported_hertz": {("db", "0"): 2000, ("db", "1"): 5000},
        "vcpu_tsc_effective_hertz": {("db", "0"): 3000, ("db", "1"): 6000},
        "vm_tsc_effective_min_hertz": {("db",): 3000},
        "vm_tsc_effective_max_hertz": {("db",): 6000},
        "vm_tsc_spread_seconds": {("db",): 0.5},
        "vm_tsc_rate_spread_ratio": {("db",): ppm(3e-6)},
        "vcpu_tsc_lag_seconds": {("db", "1"): -0.25},
        "vm_hotplug_risk": {("db",): 1},
        "vm_tsc_matched_vcpus": {("db",): 4},
        "vm_master_clock": {("db",): 1},
        "mismatch_active": {("db", "desync", "info"): 1, ("db", "readback", "warning"): 1},
        "mismatch_deviation_ratio": {("db", "desync", "info"): ppm(4e-6)},
        "mismatch_started_timestamp_seconds": {
            ("db", "desync", "loadvm"): 2,
            ("db", "readback", "reset"): 1,
        },
    }
    assert [f"tscwatch_{name}" for name in found] == [family.name for family in FAMILIES]


def test_nothing_is_shown_that_is_not_known() -> None:
    state = State(per_vcpu="all")
    state.update(VmSeen("db", Guest(7, "qemu")))
    state.update(VcpuState("db", 0))
    found = {
        sample.name.removeprefix("tscwatch_")
        for family in Metrics(state).collect()
        for sample in family.samples
        if not family.samples[0].name.endswith("_total")
    }
    assert found == {
        "build_info",
        "config_last_reload_successful",
        "host_tsc_tolerance_ratio",
        "vm_info",
        "vm_hotplug_risk",
    }


def test_each_phase_has_steps() -> None:
    assert {phase for _, phase in _STEPS_BY_PHASE} == set(PHASES)


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_each_call_has_a_series_that_was_there_before(file: Path) -> None:
    (family,) = [f for f in Metrics(State()).collect() if f.name == "tscwatch_tsc_ioctls"]
    before = {tuple(sample.labels.values()) for sample in family.samples}
    pipeline = Pipeline()
    for event in recording.read(file):
        for item in pipeline.feed(event):
            if isinstance(item, Call):
                assert (item.event.op, item.scope, item.phase, item.step) in before
