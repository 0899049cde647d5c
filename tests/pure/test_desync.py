"""What the lines of a VM's vCPUs mean: how far they are apart, since when, and until when."""

from __future__ import annotations

from typing import Any, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bench import EXACT, running
from tests.support.histories import HOST_KHZ, History
from tscwatch.analysis.lines import compare
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import (
    Contradiction,
    Event,
    Host,
    Item,
    Line,
    Mismatch,
    TscSpread,
    VcpuState,
)

HERTZ = HOST_KHZ * 1000
HOST = EXACT
AGE = -30 * 86_400 * HERTZ
"""The offset of a guest that booted when the host did, 30 days ago in its own cycles."""


def desyncs(items: list[Item]) -> list[Any]:
    """Return each change with its vCPUs, phase and seconds."""
    return [
        (m.state, m.vcpus, m.phase, m.apart_seconds)
        for m in items
        if isinstance(m, Mismatch) and m.kind == "desync"
    ]


def spreads(items: list[Item]) -> list[Any]:
    return [item.seconds for item in items if isinstance(item, TscSpread)]


def test_a_plugged_vcpu_that_starts_at_0_is_apart_until_a_reset() -> None:
    bench = running()
    assert desyncs(bench.plug()) == []  # not before its line was read
    items = bench.read(-9 * HERTZ, -9 * HERTZ, 0)
    assert desyncs(items) == [("raised", (100,), "hotplug", pytest.approx(9))]
    assert spreads(items) == [pytest.approx(9)]
    bench.vm.reset()
    assert desyncs(bench.items()) == []
    assert desyncs(bench.read(0, -9 * HERTZ, 0)) == []  # half of them are written
    bench.vm.emit("vm_started")
    items = bench.items() + bench.read(0, 0, 0)
    assert desyncs(items) == [("cleared", (100,), "hotplug", pytest.approx(9))]
    assert spreads(items) == [0]


def test_lines_that_nothing_followed_are_final() -> None:
    """A guest is reset while it is stopped, and nobody starts it again."""
    bench = running()
    bench.vm.reset()
    bench.items()
    assert spreads(bench.read(-HERTZ, 0)) == []
    assert spreads(bench.read(-HERTZ, 0)) == [pytest.approx(1)]


def test_a_growing_distance_is_logged_once_for_each_tenth() -> None:
    bench = running()
    bench.plug()
    items = []
    for seconds in range(10, 21):
        items += bench.read(0, 0, -seconds * HERTZ)
    assert [(state, apart) for state, _, _, apart in desyncs(items)] == [
        ("raised", pytest.approx(10)),
        ("updated", pytest.approx(12)),
        ("updated", pytest.approx(14)),
        ("updated", pytest.approx(16)),
        ("updated", pytest.approx(18)),
        ("updated", pytest.approx(20)),
    ]
    assert spreads(items) == [pytest.approx(seconds) for seconds in range(10, 21)]


def test_an_unplugged_vcpu_is_no_longer_apart() -> None:
    bench = running()
    bench.plug()
    bench.read(0, 0, -HERTZ)
    bench.vm.unplug(100, noticed=True)
    assert [state for state, *_ in desyncs(bench.items())] == ["cleared"]


def test_a_vcpu_whose_line_cannot_be_read_leaves_the_spread_unknown() -> None:
    bench = running()
    bench.plug()
    items = bench.read(0, 0, None)
    assert (desyncs(items), spreads(items)) == ([], [None])
    # Of those that are known, two are apart, which is enough to be sure.
    items = bench.read(0, HERTZ, None)
    assert desyncs(items) == [("raised", (1,), "boot", pytest.approx(1))]
    assert spreads(items) == []


@pytest.mark.parametrize(
    "host", [HOST._replace(stable=False), HOST._replace(tsc_khz=None), HOST._replace(scaling=None)]
)
def test_lines_that_mean_nothing_are_not_judged(host: Host) -> None:
    bench = running(host)
    bench.plug()
    expected = [("raised", (100,), "hotplug", pytest.approx(9))]
    believed = host.stable and host.tsc_khz is not None
    assert desyncs(bench.read(-9 * HERTZ, -9 * HERTZ, 0)) == (expected if believed else [])


def test_a_protected_tsc_is_not_judged() -> None:
    bench = running()
    bench.vm = History("kvm:2", 200)
    bench.vm.emit("vm_create")
    guest = bench.vm.guest._replace(protected=True)
    bench.vm.events[-1] = bench.vm.events[-1]._replace(guest=guest)
    for vcpu in range(2):
        bench.vm.new_vcpu(vcpu, "boot")
    bench.vm.write_all("boot")
    bench.vm.start()
    items = bench.read(-9 * HERTZ, 0)
    assert (desyncs(items), spreads(items)) == ([], [])


def test_different_ratios_need_the_hosts_tsc() -> None:
    bench = running()
    bench.plug()
    lines = (AGE, AGE, 0)
    ratios = (0.96, 0.96, 1.0)
    assert spreads(bench.read(*lines, ratios=ratios)) == [None]
    items = bench.read(*lines, ratios=ratios, host_tsc=60 * 86_400 * HERTZ)
    (_, _, _, apart), *_ = desyncs(items)
    # In seconds of a guest that counts 0.96 times the host's cycles.
    assert apart == pytest.approx((60 * 0.04 + 30) * 86_400 / 0.96)
    rates = [item.rate_ppm for item in items if isinstance(item, TscSpread)]
    assert rates == [pytest.approx(41_667, abs=1)]
    effective = {item.vcpu: item.effective for item in items if isinstance(item, VcpuState)}
    assert effective == {}  # they were published with the lines before


def test_the_ratio_of_a_vcpu_decides_and_not_the_request() -> None:
    """KVM's tolerance was another when the frequency was set."""
    bench = running()
    bench.vm.write_all("loadvm", 2_400_000)
    bench.vm.start()
    bench.items()
    items = bench.read(0, 0, ratios=(0.75, 0.75, 1.0))
    effective = {item.vcpu: item.effective for item in items if isinstance(item, VcpuState)}
    assert effective == {0: 1_950_000, 1: 1_950_000}
    (unscaled,) = [m for m in items if isinstance(m, Mismatch) and m.kind == "unscaled"]
    assert unscaled.severity == "critical"


def test_the_line_of_an_adopted_vcpu_decides_too() -> None:
    pipeline = Pipeline()
    events: list[Union[Event, Host]] = [
        HOST,
        Event(1, "vm_found", "kvm:1", 7, 7, "", guest=History("", 7).guest),
        Event(2, "vcpu_found", "kvm:1", 7, 7, "", 0, khz=2_400_000),
    ]
    items = [item for event in events for item in pipeline.feed(event)]
    lines = (Line(0, 0),)
    items += pipeline.feed(Event(3, "tsc_lines", "kvm:1", 7, 0, "", lines=lines))
    states = [item.effective for item in items if isinstance(item, VcpuState)]
    assert states == [None, HOST_KHZ]
    assert [m.kind for m in items if isinstance(m, Mismatch)] == ["unscaled"]


def contradictions(items: list[Item]) -> list[str]:
    return [item.claim for item in items if isinstance(item, Contradiction)]


def test_a_settled_disagreement_with_kvm_is_one_contradiction() -> None:
    bench = running()
    bench.plug()  # KVM counts 3 of 3
    apart = (-9 * HERTZ, -9 * HERTZ, 1)
    assert contradictions(bench.read(*apart)) == []
    assert contradictions(bench.read(*apart)) == ["desync"]
    assert contradictions(bench.read(*apart)) == []


def test_what_a_guest_does_to_its_own_tsc_is_no_contradiction() -> None:
    bench = running()
    bench.read(-HERTZ, -HERTZ)
    bench.read(-HERTZ, -HERTZ)
    assert contradictions(bench.read(-HERTZ, -2 * HERTZ)) == []
    assert contradictions(bench.read(-HERTZ, -3 * HERTZ)) == []


def test_a_kvm_that_applies_no_offsets_is_not_contradicted() -> None:
    bench = running()
    bench.vm.new_vcpu(100, "hotplug")
    bench.vm.full_write(100, "hotplug", HOST_KHZ + 1)  # KVM counts 1 of 3
    bench.items()
    for _ in range(3):
        items = bench.read(0, 0, 0)
        assert (contradictions(items), desyncs(items)) == ([], [])


def test_a_guest_whose_vcpus_all_run_nested_guests_keeps_what_is_known() -> None:
    """KVM's count, which does not see what a guest corrects by itself, is no substitute then."""
    bench = running()
    bench.vm.new_vcpu(100, "hotplug")
    bench.vm.full_write(100, "hotplug", HOST_KHZ + 1)  # KVM counts 1 of 3
    bench.items()
    assert [state for state, *_ in desyncs(bench.read(-HERTZ, -HERTZ, 0))] == ["raised"]
    assert [state for state, *_ in desyncs(bench.read(-HERTZ, -HERTZ, -HERTZ))] == ["cleared"]
    assert desyncs(bench.read(None, None, None)) == []


def test_a_line_of_an_earlier_reading_is_not_compared_with_later_ones() -> None:
    """All offsets move when the host resumes."""
    bench = running()
    bench.read(-HERTZ, -HERTZ)
    items = bench.read(-5 * HERTZ, None)
    assert (desyncs(items), spreads(items)) == ([], [None])


def test_a_desync_ends_when_nothing_can_be_known_any_more() -> None:
    bench = running()
    bench.read(-HERTZ, 0)
    items = list(bench.pipeline.feed(HOST._replace(stable=False, clocksource="hpet")))
    assert [state for state, *_ in desyncs(items)] == ["cleared"]
    assert spreads(items) == [None]


def test_a_desync_ends_for_vcpus_that_only_catch_up() -> None:
    bench = running(Host(HOST_KHZ, False, clocksource="tsc", shows_lines=True))
    bench.read(-HERTZ, 0)
    bench.vm.write_all("loadvm", HOST_KHZ + 200_000)
    bench.vm.start()
    items = bench.items() + bench.read(0, 0)
    assert [state for state, *_ in desyncs(items)] == ["cleared"]


def test_another_tolerance_changes_what_is_off() -> None:
    bench = running()
    items = bench.read(0, HERTZ // 1000)
    assert [item.lags for item in items if isinstance(item, TscSpread)] == [((1, -0.001),)]
    changed = bench.pipeline.configure(5, 9, 9, {"desync": 0.01})
    assert [state for state, *_ in desyncs([*changed])] == ["cleared"]
    assert [item.lags for item in changed if isinstance(item, TscSpread)] == [()]


def test_a_call_whose_write_was_missed_does_not_hide_a_later_desync() -> None:
    """Without lines, KVM's count decides."""
    bench = running(HOST._replace(shows_lines=False))
    bench.vm.emit("set", 0, "sregs", khz=HOST_KHZ)
    bench.vm.emit("vm_started")
    bench.vm.new_vcpu(100, "hotplug")
    bench.vm.full_write(100, "hotplug", HOST_KHZ + 1)
    assert desyncs(bench.items()) == [("raised", (100,), "hotplug", None)]


def test_a_desync_that_begins_to_drift_is_raised_again() -> None:
    bench = running()
    bench.plug()
    bench.read(0, 0, -9 * HERTZ)
    items = bench.read(0, 0, -9 * HERTZ, ratios=(1.0, 1.0, 0.96), host_tsc=HERTZ)
    (raised,) = [m for m in items if isinstance(m, Mismatch) and m.kind == "desync"]
    assert raised.ppm == pytest.approx(40_000)
    assert "slower" in raised.detail


def test_a_vcpu_that_is_being_plugged_is_not_judged_yet() -> None:
    bench = running()
    bench.vm.new_vcpu(100, "hotplug")
    create = bench.vm.events[0]
    bench.vm.events = [create, create._replace(op="clock_updated", vcpu=None, master_clock=True)]
    assert desyncs(bench.items() + bench.read(-9 * HERTZ, -9 * HERTZ, 0)) == []


@given(
    st.lists(st.integers(-(2**50), 2**50), min_size=1, max_size=6),
    st.sampled_from([0.96, 1.0]),
)
def test_equal_ratios_compare_by_their_offsets_alone(offsets: list[int], ratio: float) -> None:
    lines = [Line(vcpu, offset, ratio) for vcpu, offset in enumerate(offsets)]
    spread = compare(lines, HOST_KHZ, None, 1e-6)
    assert spread is not None
    assert spread.seconds == pytest.approx((max(offsets) - min(offsets)) / (HERTZ * ratio))
    assert spread.rate_ppm == 0
    origin = offsets[spread.reference]
    for vcpu, lag in spread.lags.items():
        assert lag == pytest.approx((origin - offsets[vcpu]) / (HERTZ * ratio), abs=1e-6)


def test_most_vcpus_are_right_and_in_a_tie_the_first() -> None:
    def reference(*offsets: int) -> int:
        lines = [Line(vcpu, offset * HERTZ) for vcpu, offset in enumerate(offsets)]
        spread = compare(lines, HOST_KHZ, None, 1e-6)
        assert spread is not None
        return spread.reference

    assert reference(5, 7, 7) == 1
    assert reference(5, 7) == 0
    assert reference(7, 5) == 0


@pytest.mark.parametrize("reported", [True, False])
def test_a_lost_call_of_a_plug_hides_no_desync(reported: bool) -> None:
    """It is not seen that QEMU has finished writing, but nothing happens between two readings."""
    bench = running()
    bench.vm.new_vcpu(100, "hotplug")
    bench.vm.full_write(100, "hotplug", HOST_KHZ + 1)
    events = bench.vm.events
    at = [event.op for event in events].index("set")
    events[at : at + 1] = [Event.lost(events[at].ts, 1)] if reported else []
    bench.items()
    apart = -9 * HERTZ, -9 * HERTZ, 0
    assert desyncs(bench.read(*apart)) == []
    assert [(state, vcpus) for state, vcpus, *_ in desyncs(bench.read(*apart))] == [
        ("raised", (100,))
    ]


def test_a_lag_ends_with_a_write_although_the_line_cannot_be_read() -> None:
    """The vCPU runs a nested guest whenever the lines are read."""
    bench = running()
    bench.plug()
    assert len(desyncs(bench.read(-9 * HERTZ, -9 * HERTZ, 0))) == 1
    assert desyncs(bench.read(-9 * HERTZ, -9 * HERTZ, None)) == []
    bench.vm.write_all("loadvm")
    bench.vm.start()
    bench.items()
    ((state, vcpus, *_),) = desyncs(bench.read(0, 0, None))
    assert (state, vcpus) == ("cleared", (100,))


def test_without_lines_parked_vcpus_count_as_kvm_counts_them() -> None:
    bench = running(HOST._replace(shows_lines=False))
    bench.vm.new_vcpu(100, "hotplug")
    bench.vm.full_write(100, "hotplug", HOST_KHZ + 1)
    assert desyncs(bench.items()) == [("raised", (100,), "hotplug", None)]
    bench.vm.unplug(1, noticed=True)
    assert desyncs(bench.items()) == []
    bench.vm.new_vcpu(101, "hotplug")
    bench.vm.full_write(101, "hotplug", HOST_KHZ + 2)
    changes = [(state, vcpus) for state, vcpus, *_ in desyncs(bench.items())]
    assert changes[-1][0] == "raised"
    assert 101 in changes[-1][1]


def test_a_host_that_becomes_known_after_its_guests() -> None:
    """KVM was loaded, and a guest booted, before tscwatch looked at the host again."""
    pipeline, vm = Pipeline(), History("kvm:1", 100)
    vm.emit("vm_create")
    for vcpu in range(2):
        vm.new_vcpu(vcpu, "boot")
    vm.write_all("boot", HOST_KHZ + 200_000)
    before = [item for event in vm.events for item in pipeline.feed(event)]
    assert not [item for item in before if isinstance(item, Mismatch)]
    host = HOST._replace(scaling=False, kvm_tolerance_ppm=250)
    items = list(pipeline.feed(host))
    vm.emit("vm_started")
    items += pipeline.feed(vm.events[-1])
    lines = (Line(0, HERTZ), Line(1, HERTZ + 10_000))  # KVM moves them at each entry
    items += pipeline.feed(Event(99, "tsc_lines", "kvm:1", 100, 0, "", lines=lines))
    raised = [(m.kind, m.vcpus, m.severity) for m in items if isinstance(m, Mismatch)]
    assert raised == [("unscaled", (0, 1), "critical")]


def test_a_vcpu_that_is_plugged_again_still_catches_up() -> None:
    """KVM never leaves that mode (tsc_always_catchup), whatever is set later."""
    bench = running(HOST._replace(scaling=False, kvm_tolerance_ppm=250))
    bench.vm.write_all("loadvm", HOST_KHZ + 200_000)
    bench.vm.start()
    bench.items()
    bench.vm.unplug(1, noticed=True)
    bench.items()
    bench.vm.replug(1, HOST_KHZ)
    states = [item for item in bench.items() if isinstance(item, VcpuState) and item.vcpu == 1]
    assert {state.effective for state in states} == {None}


def test_a_vcpu_that_was_parked_before_tscwatch_started_is_plugged_again() -> None:
    """Its full-state write belongs to the plug, and is not the beginning of a load."""
    pipeline, slower = Pipeline(), HOST_KHZ - 100_000
    age, now = 30 * 86_400 * HERTZ, 60 * 86_400 * HERTZ
    ratio = slower / HOST_KHZ

    def feed(*events: Event) -> list[Item]:
        return [item for event in events for item in pipeline.feed(event)]

    def read(offset: int) -> list[Item]:
        lines = (Line(0, -age, ratio), Line(1, -age, ratio), Line(2, offset))
        return feed(Event(9, "tsc_lines", "100:9", 100, 0, "", lines=lines, host_tsc=now))

    list(pipeline.feed(HOST))
    guest = History("kvm:1", 100).guest
    feed(Event(1, "vm_found", "100:9", 100, 100, "qemu", ran=True, fd=9, guest=guest))
    found = Event(2, "vcpu_found", "100:9", 100, 100, "")
    items = feed(*(found._replace(vcpu=vcpu) for vcpu in range(3)))
    items += feed(Event(3, "vcpu_unplugged", "100:9", 100, 103, "", 2))
    for vcpu, khz in ((0, slower), (1, slower), (2, HOST_KHZ)):
        items += feed(found._replace(vm="kvm:1", vcpu=vcpu, khz=khz, runner=101 + vcpu))
    items += read(0) + read(0)
    assert not [item for item in items if isinstance(item, Mismatch)]
    get = Event(4, "get", "kvm:1", 100, 203, "qemu", 2, khz=HOST_KHZ, runner=103, ran=True)
    written = get._replace(after="sregs", sync=1)
    items = feed(get, written, written._replace(op="set"))
    items += feed(Event(5, "tsc_tracked", "", 100, 203, "qemu", 2, online_vcpus=3))
    items += read(-now) + read(-now)
    items += feed(Event(6, "vm_started", "kvm:1", 100, 100, "qemu")) + read(-now)
    changes = [(m.state, m.kind, m.vcpus) for m in items if isinstance(m, Mismatch)]
    assert changes == [("raised", "vcpu_skew", (2,)), ("raised", "desync", (2,))]


def test_a_vcpu_that_is_plugged_again_without_a_call_is_judged_again() -> None:
    """Cloud Hypervisor's: KVM keeps the vCPU and its frequency."""
    bench = running()
    bench.vm.unplug(1, noticed=True)
    bench.items()
    assert desyncs(bench.read(0, -9 * HERTZ)) == []
    bench.vm.emit("vcpu_found", 1)
    bench.items()
    assert [change[:2] for change in desyncs(bench.read(0, -9 * HERTZ))] == [("raised", (1,))]
