"""Mismatches: each kind raised, changed and cleared."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bench import EXACT, Bench
from tests.support.histories import HOST_KHZ, History, histories
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import (
    Call,
    Contradiction,
    Host,
    Item,
    Line,
    Mismatch,
    Risk,
    VcpuState,
)

EINVAL = -22
NO_HOST = Host(shows_lines=True)
PLAIN = Host(HOST_KHZ, False, shows_lines=True)
SCALING = Host(HOST_KHZ, True)


def brief(mismatches: list[Mismatch]) -> list[tuple[str, str, tuple[int, ...], str]]:
    return [(m.state, m.kind, m.vcpus, m.phase) for m in mismatches]


def test_a_round_of_writes_raises_no_skew_but_a_skewed_hotplug_does() -> None:
    bench = Bench()
    assert bench.boot() == []
    bench.vm.write_all("incoming", 2_600_351)
    bench.vm.start()
    assert bench.new() == []
    bench.vm.new_vcpu(2, "hotplug")
    assert bench.new() == []  # it was only created; its frequency is still to be written
    bench.vm.full_write(2, "hotplug")
    (raised,) = bench.new()
    assert brief([raised]) == [("raised", "vcpu_skew", (2,), "hotplug")]
    assert raised.ppm == pytest.approx(135, abs=0.1)
    assert raised.requested_ppm == pytest.approx(135, abs=0.1)
    assert raised.severity == "critical"


def test_a_second_skewed_vcpu_raises_it_again_and_an_even_round_clears_it() -> None:
    bench = Bench()
    bench.boot(3)
    bench.vm.start()
    for vcpu in (3, 4):
        bench.vm.new_vcpu(vcpu, "hotplug")
        bench.vm.full_write(vcpu, "hotplug", 2_601_000)
    assert brief(bench.new()) == [
        ("raised", "vcpu_skew", (3,), "hotplug"),
        ("raised", "vcpu_skew", (3, 4), "hotplug"),
    ]
    bench.vm.write_all("loadvm")
    assert brief(bench.new()) == [("cleared", "vcpu_skew", (3, 4), "hotplug")]
    bench.vm.emit("vm_end")
    assert bench.new() == []


def test_a_round_that_keeps_a_skew_changes_nothing_while_it_runs() -> None:
    """A skewed guest migrates: each vCPU is written with its own frequency again."""
    bench = Bench()
    bench.boot(3)
    bench.vm.start()
    bench.vm.new_vcpu(3, "hotplug")
    bench.vm.full_write(3, "hotplug", 2_601_000)
    bench.new()
    for vcpu in range(4):
        bench.vm.full_write(vcpu, "loadvm", bench.vm.rates[vcpu])
    assert bench.new() == []


@given(st.integers(HOST_KHZ - 3_000, HOST_KHZ + 3_000), st.sampled_from([0.0, 100.0, 250.0]))
def test_whether_it_is_a_skew_depends_on_the_tolerance(khz: int, tolerance: float) -> None:
    bench = Bench(vcpu_skew=tolerance)
    bench.boot()
    bench.vm.start()
    bench.vm.new_vcpu(2, "hotplug")
    bench.vm.full_write(2, "hotplug", khz)
    ppm = abs(khz - HOST_KHZ) / HOST_KHZ * 1e6
    mismatches = bench.new()
    assert bool(mismatches) == (ppm > tolerance)


def test_a_refused_set_and_its_echo_stay_raised_until_a_set_succeeds() -> None:
    bench = Bench()
    bench.boot(1)
    vm = bench.vm
    vm.syncs[0] += 1
    vm.call(0, "get", "sregs", "incoming", "post_init", HOST_KHZ)
    vm.emit("set", 0, "sregs", khz=2_599_800, status=EINVAL)
    vm.call(0, "get", "sregs", "incoming", "post_init", 2_599_800)
    assert brief(bench.new()) == [
        ("raised", "refused", (0,), "incoming"),
        ("raised", "readback", (0,), "incoming"),
    ]
    vm.rates[0] = 2_599_800  # so KVM keeps reporting
    vm.write_all("incoming")
    assert brief(bench.new()) == [
        ("cleared", "refused", (0,), "incoming"),
        ("cleared", "readback", (0,), "incoming"),
    ]


@pytest.mark.parametrize(("host", "reported"), [(PLAIN, 2_500_000), (SCALING, HOST_KHZ)])
def test_without_scaling_kvm_reports_what_it_refused(host: Host, reported: int) -> None:
    """No GET needs to follow: kvm_set_tsc_khz stores the frequency before it refuses it."""
    bench = Bench(host=host)
    bench.boot(1)
    bench.vm.emit("set", 0, "regs", khz=2_500_000, status=EINVAL)
    state = [item for item in bench.items() if isinstance(item, VcpuState)][-1]
    assert (state.requested, state.reported, state.effective) == (HOST_KHZ, reported, HOST_KHZ)


def test_a_refused_frequency_never_counts_as_the_vcpus() -> None:
    """KVM echoes it to every later GET, but the vCPU keeps its frequency: there is no skew."""
    bench = Bench()
    vm = bench.vm
    for vcpu in range(2):
        vm.new_vcpu(vcpu, "boot")
    vm.write_all("boot")
    vm.start()
    vm.new_vcpu(2, "hotplug")
    vm.syncs[2] = 1
    vm.call(2, "get", "sregs", "hotplug", "post_init", HOST_KHZ)
    vm.emit("set", 2, "sregs", khz=2_599_800, status=EINVAL)
    vm.call(2, "get", "sregs", "hotplug", "post_init", 2_599_800)
    (raised,) = bench.new()
    assert brief([raised]) == [("raised", "refused", (2,), "hotplug")]
    assert "stays at 2600000 kHz" in raised.detail


def test_an_echo_is_not_the_frequency_of_a_vcpu_that_is_plugged_again() -> None:
    refused = HOST_KHZ - 390
    bench = Bench(host=PLAIN._replace(kvm_tolerance_ppm=100))
    bench.boot()
    vm = bench.vm
    vm.start()
    vm.emit("set", 1, "sregs", khz=refused, status=EINVAL)
    vm.unplug(1, noticed=True)
    vm.rates[1] = refused  # so KVM reports
    vm.threads[1] += 1000
    for after in ("regs", "sregs"):
        vm.syncs[1] += after == "sregs"
        vm.emit("get", 1, after, refused)
        vm.emit("set", 1, after, refused, EINVAL)
    mismatches = [mismatch for mismatch in bench.new() if mismatch.state == "raised"]
    assert [mismatch.kind for mismatch in mismatches] == ["refused", "readback", "refused"]
    assert mismatches[-1].ppm == pytest.approx(150)
    assert "stays at 2600000 kHz" in mismatches[-1].detail


@pytest.mark.parametrize("default", [None, 2_550_000])
def test_a_vcpu_without_a_get_keeps_the_default(default: Optional[int]) -> None:
    """Cloud Hypervisor restores a guest with a SET and no GET before it."""
    bench = Bench(host=PLAIN._replace(scaling=None), incoming=False)
    if default is not None:
        bench.vm.emit("set", khz=default)
    bench.vm.new_vcpu(0, "boot")
    bench.vm.events = [event for event in bench.vm.events if event.op != "get"]
    bench.vm.emit("set", 0, "regs", khz=2_500_000, status=EINVAL)
    (raised,) = bench.new()
    assert raised.kind == "refused"
    kept = default or HOST_KHZ
    assert raised.ppm == pytest.approx((kept - 2_500_000) / kept * 1e6)
    assert f"stays at {kept} kHz" in raised.detail


def test_get_get_instead_of_get_set_is_withheld() -> None:
    bench = Bench()
    bench.boot(1)
    vm = bench.vm
    vm.syncs[0] += 1
    for _ in range(2):
        vm.call(0, "get", "sregs", "incoming", "post_init", HOST_KHZ)
    (raised,) = bench.new()
    assert brief([raised]) == [("raised", "withheld", (0,), "incoming")]
    assert (raised.ppm, raised.severity) == (None, "critical")
    vm.write_all("incoming")
    assert brief(bench.new()) == [("cleared", "withheld", (0,), "incoming")]


def test_another_frequency_than_the_command_lines_is_configured() -> None:
    bench = Bench(tsc_khz=2_600_260)
    assert brief(bench.boot(1)) == [("raised", "configured", (0,), "boot")]
    bench.vm.write_all("incoming", 2_600_260)
    assert brief(bench.new()) == [("cleared", "configured", (0,), "boot")]


def test_the_end_of_a_vm_clears_what_it_had() -> None:
    bench = Bench(tsc_khz=1)
    bench.boot(1)
    bench.vm.emit("vm_end")
    assert brief(bench.new()) == [("cleared", "configured", (0,), "boot")]


def effective(items: list[Item]) -> dict[int, Optional[int]]:
    return {item.vcpu: item.effective for item in items if isinstance(item, VcpuState)}


def test_inside_the_tolerance_a_guest_gets_the_hosts_frequency() -> None:
    for host in (PLAIN, SCALING):
        bench = Bench(host=host)
        bench.boot()
        bench.vm.write_all("incoming", 2_600_351)
        raised, _ = bench.new()
        assert brief([raised]) == [("raised", "unscaled", (0,), "incoming")]
        assert raised.ppm == pytest.approx(135, abs=0.1)
        assert raised.seconds_a_day == pytest.approx(11.66, abs=0.01)
        assert effective(bench.items()) == {}
        bench.vm.write_all("incoming")
        assert [m.state for m in bench.new()] == ["raised", "cleared"]  # of one vCPU, of none


@pytest.mark.parametrize(
    ("host", "khz", "expected"),
    [
        (PLAIN, HOST_KHZ + 650, HOST_KHZ),
        (PLAIN, HOST_KHZ + 651, None),  # 250 ppm are 650: catch-up
        (SCALING, 2_000_000, 2_000_000),
        (NO_HOST, 2_000_000, None),
    ],
)
def test_effective(host: Host, khz: int, expected: Optional[int]) -> None:
    bench = Bench(host=host, incoming=False)
    vm = bench.vm
    vm.new_vcpu(0, "boot")
    vm.emit("set", 0, "sregs", khz=khz)
    assert effective(bench.items()).get(0) == expected


def test_what_a_vm_waits_for_does_not_tick_here_yet() -> None:
    bench = Bench(host=PLAIN)
    bench.boot()
    bench.vm.write_all("incoming")
    assert effective(bench.items()) == {0: HOST_KHZ, 1: HOST_KHZ}
    waiting = Bench(host=PLAIN)
    waiting.vm.new_vcpu(0, "boot")
    waiting.vm.write_all("boot")
    assert effective(waiting.items()) == {0: None}


def test_catch_up_is_for_ever_and_its_frequency_is_not_known() -> None:
    bench = Bench(host=PLAIN)
    bench.boot(1)
    bench.vm.full_write(0, "loadvm", 2_700_000)
    items = bench.items()
    assert effective(items) == {0: None}
    (raised,) = [item for item in items if isinstance(item, Mismatch)]
    assert (raised.kind, raised.ppm, raised.severity) == ("unscaled", None, "critical")
    bench.vm.full_write(0, "loadvm")
    items = bench.items()
    assert effective(items) == {0: None}
    assert not [item for item in items if isinstance(item, Mismatch) and item.state == "cleared"]


@pytest.mark.parametrize(
    ("khz", "severity"), [(2_500_000, "critical"), (2_599_740, "warning"), (2_599_974, "info")]
)
def test_a_rate_that_no_call_explains_counts_by_its_size(khz: int, severity: str) -> None:
    """The SET was lost, but the line shows what the vCPU ticks at."""
    bench = Bench(host=SCALING._replace(kvm_tolerance_ppm=250, shows_lines=True))
    bench.boot()
    bench.vm.start()
    lines = tuple(Line(vcpu, 0, khz / HOST_KHZ) for vcpu in range(2))
    bench.vm.emit("tsc_lines")
    bench.vm.events[-1] = bench.vm.events[-1]._replace(lines=lines, vcpu=None)
    (raised,) = bench.new()
    assert (raised.kind, raised.severity) == ("unscaled", severity)
    assert raised.detail == (
        f"vCPU 1 was given 2600000 kHz, but it ticks at {khz} kHz: its last call was not seen"
    )


def test_changed_is_raised_only_if_the_call_cannot_be_a_load() -> None:
    bench = Bench()
    bench.boot(1)
    vm = bench.vm
    vm.start()
    vm.full_write(0, "loadvm", 2_500_000)
    vm.emit("set", 0, None, khz=2_400_000)  # not seen what came before: may be a load
    assert bench.new() == []
    vm.emit("set", 0, "regs", khz=2_300_000)
    vm.emit("set", 0, "regs", khz=2_400_000)
    assert brief(bench.new()) == [
        ("raised", "changed", (0,), "unknown"),
        ("cleared", "changed", (0,), "unknown"),
    ]


def risks(items: list[Item]) -> list[bool]:
    return [item.at_risk for item in items if isinstance(item, Risk)]


def test_a_vm_with_another_frequency_than_its_host_is_at_risk_until_it_has_its_own_again() -> None:
    bench = Bench(host=PLAIN)
    bench.boot()
    bench.vm.write_all("incoming", 2_600_351)
    assert risks(bench.items()) == [True]
    bench.vm.write_all("incoming")
    assert risks(bench.items()) == [False]


def boot_pinned(bench: Bench, khz: int) -> list[Item]:
    for vcpu in range(2):
        bench.vm.new_vcpu(vcpu, "boot")
    bench.vm.write_all("boot", khz)
    return bench.items()


def test_a_pinned_vm_is_at_risk_too() -> None:
    """1 kHz from the host's frequency is enough for kvm_synchronize_tsc."""
    items = boot_pinned(Bench(tsc_khz=HOST_KHZ + 1, host=PLAIN), HOST_KHZ + 1)
    assert risks(items) == [True]
    (risk,) = [item for item in items if isinstance(item, Risk)]
    assert "would start at 0" in risk.detail
    assert "another rate" not in risk.detail
    assert risks(boot_pinned(Bench(tsc_khz=HOST_KHZ, host=PLAIN), HOST_KHZ)) == []


@pytest.mark.parametrize(("max_vcpus", "expected"), [(2, []), (3, [True]), (None, [])])
def test_a_vm_without_a_free_slot_is_not_at_risk(
    max_vcpus: Optional[int], expected: list[bool]
) -> None:
    bench = Bench(host=PLAIN)
    bench.max_vcpus = max_vcpus
    assert risks(boot_pinned(bench, HOST_KHZ + 1)) == expected
    bench.vm.start()
    bench.vm.new_vcpu(2, "hotplug")
    first, *_ = [item for item in bench.items() if isinstance(item, (Call, Risk))]
    assert isinstance(first, Risk) == (max_vcpus is None)  # a plug proves that there are slots
    bench.vm.full_write(2, "hotplug", HOST_KHZ + 1)
    assert risks(bench.items()) == ([False] if max_vcpus == 3 else [])


@pytest.mark.parametrize(
    ("vmm", "can_plug"),
    [
        ("qemu", True),
        ("cloud-hypervisor", True),
        ("firecracker", False),
        ("gvisor", False),
        ("crosvm", False),
    ],
)
def test_a_vm_is_at_risk_only_if_its_vmm_can_plug(vmm: str, can_plug: bool) -> None:
    """If its room is not known, the first plug proves that there is some."""
    bench = Bench(host=PLAIN)
    bench.vmm, bench.max_vcpus = vmm, None
    assert risks(boot_pinned(bench, HOST_KHZ + 1)) == []
    bench.vm.start()
    bench.vm.new_vcpu(2, "hotplug")
    assert risks(bench.items()) == ([True] if can_plug else [])
    known = Bench(host=PLAIN)
    known.vmm = vmm
    assert risks(boot_pinned(known, HOST_KHZ + 1)) == ([True] if can_plug else [])


def test_a_new_vcpu_gets_the_vms_default() -> None:
    bench = Bench(host=SCALING, incoming=False)
    vm = bench.vm
    vm.emit("set", khz=2_000_000)
    vm.new_vcpu(0, "boot")
    vm.rates[0] = 2_000_000
    vm.write_all("boot", 2_000_000)
    items = bench.items()
    assert risks(items) == []
    assert effective(items)[0] == 2_000_000


def test_a_refused_default_is_raised_for_the_vm() -> None:
    bench = Bench()
    bench.vm.emit("set", khz=1, status=EINVAL)
    (raised,) = bench.new()
    assert brief([raised]) == [("raised", "refused", (), "boot")]
    assert "the VM's default" in raised.detail


def test_kvm_does_not_echo_a_refused_default() -> None:
    """kvm_arch_vm_ioctl checks it before it stores it."""
    bench = Bench(host=PLAIN)
    bench.vm.emit("set", khz=HOST_KHZ)
    bench.boot(1)
    bench.vm.emit("set", khz=2_500_000, status=EINVAL)
    assert [mismatch.kind for mismatch in bench.new()] == ["refused"]


def test_a_protected_tsc_has_the_frequency_of_its_launch() -> None:
    """It is the VM's default (tdx_pre_create_vcpu), which KVM does not compare with the host's."""
    pipeline, vm = Pipeline(), History("kvm:1", 100)
    list(pipeline.feed(PLAIN._replace(tsc_khz=2_599_400, kvm_tolerance_ppm=250)))
    vm.emit("vm_create")
    vm.emit("set", khz=HOST_KHZ)
    vm.new_vcpu(0, "boot")
    items = [
        item
        for event in vm.events
        for item in pipeline.feed(event._replace(guest=vm.guest._replace(protected=True)))
    ]
    assert effective(items) == {0: HOST_KHZ}
    assert not [item for item in items if isinstance(item, Mismatch)]


def test_a_set_of_zero_requests_the_hosts_frequency() -> None:
    bench = Bench(host=PLAIN, incoming=False)
    bench.vm.new_vcpu(0, "boot")
    bench.vm.emit("set", 0, "create", khz=0)
    items = bench.items()
    state = [item for item in items if isinstance(item, VcpuState)][-1]
    assert (state.requested, state.reported, state.effective) == (HOST_KHZ,) * 3
    assert not [item for item in items if isinstance(item, Mismatch)]


def test_a_set_changes_what_kvm_would_report() -> None:
    """QEMU's last call of a load is the SET; no GET follows it."""
    bench = Bench(host=PLAIN)
    bench.boot(1)
    bench.vm.write_all("incoming", 2_600_351)
    states = [item for item in bench.items() if isinstance(item, VcpuState)]
    assert [state.reported for state in states] == [HOST_KHZ, 2_600_351]
    assert (states[-1].phase, states[-1].step) == ("incoming", "post_init")


def contradictions(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.claim, item.detail) for item in items if isinstance(item, Contradiction)]


@given(histories(), st.booleans())
def test_kvm_never_contradicts_a_valid_history(history: History, shows_lines: bool) -> None:
    pipeline = Pipeline()
    list(pipeline.feed(EXACT._replace(shows_lines=shows_lines)))
    assert contradictions([item for event in history.events for item in pipeline.feed(event)]) == []


def test_a_skew_is_updated_with_kvms_view_of_it() -> None:
    bench = Bench()
    bench.boot()
    bench.vm.start()
    bench.vm.new_vcpu(2, "hotplug")
    bench.vm.full_write(2, "hotplug", HOST_KHZ + 260)
    bench.vm.emit("clock_updated")
    bench.vm.events[-1] = bench.vm.events[-1]._replace(vm="", master_clock=False)
    skews = [item for item in bench.items() if isinstance(item, Mismatch)]
    assert [(skew.state, skew.vcpus) for skew in skews] == [
        ("raised", (2,)),
        ("updated", (2,)),
        ("updated", (2,)),
    ]
    told = [
        skew.kvm_state and (skew.kvm_state.synchronised, skew.kvm_state.online) for skew in skews
    ]
    assert told == [None, (1, 3), (1, 3)]
    assert [skew.kvm_state and skew.kvm_state.master_clock for skew in skews] == [None, True, False]


def a_skew_by_hotplug() -> Bench:
    bench = Bench()
    bench.boot()
    bench.vm.start()
    bench.vm.new_vcpu(2, "hotplug")
    bench.vm.full_write(2, "hotplug", HOST_KHZ + 260)
    assert brief(bench.new()) == [("raised", "vcpu_skew", (2,), "hotplug")]
    return bench


def test_a_skew_ends_when_the_vcpu_that_caused_it_is_unplugged() -> None:
    bench = a_skew_by_hotplug()
    bench.vm.unplug(2, noticed=True)
    assert brief(bench.new()) == [("cleared", "vcpu_skew", (2,), "hotplug")]
    bench.vm.replug(2, HOST_KHZ + 260)
    assert brief(bench.new()) == [("raised", "vcpu_skew", (2,), "hotplug")]


def test_a_load_that_does_not_reach_an_unplugged_vcpu_is_over_when_the_vm_starts() -> None:
    bench = a_skew_by_hotplug()
    bench.vm.unplug(2, noticed=False)
    bench.vm.write_all("loadvm")
    assert bench.new() == []  # the third might still be written
    bench.vm.start()
    assert brief(bench.new()) == [("cleared", "vcpu_skew", (2,), "hotplug")]
