"""What the real KVM holds of a VM's TSCs, beside what its calls say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.live.test_frequency import KHZ, of_vm, series
from tests.support import vmm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import SCENARIOS, skewed


def contradictions(observer: Observer) -> list[dict[str, Any]]:
    return [item for item in observer.items() if item["type"] == "contradiction"]


def test_kvm_sees_the_skew_and_gives_up_its_master_clock(
    observer: Observer, tmp_path: Path
) -> None:
    prefix = tmp_path.name
    with skewed(tmp_path, prefix) as guest:
        pid = guest.pid

        def told() -> list[tuple[int, int]]:
            return [
                (skew["kvm_synchronised"], skew["kvm_online"])
                for skew in of_vm(observer, pid, "vcpu_skew")
                if skew["state"] == "updated"
            ]

        wait_for(lambda: bool(told()), "KVM's word")
        assert set(told()) == {(1, 3)}
        label = f'vm="{prefix}target"'
        wait_for(lambda: series(observer, "vm_master_clock")[label] == 0, "the master clock's end")
        assert series(observer, "vm_tsc_matched_vcpus")[label] == 1
        assert series(observer, "vm_tsc_matched_vcpus")[f'vm="{prefix}source"'] == 2
    assert contradictions(observer) == []


def test_kvm_and_we_agree_in_all_scenarios(observer: Observer, tmp_path: Path) -> None:
    for scenario in SCENARIOS:
        expected = scenario(tmp_path, f"{tmp_path.name}{scenario.__name__}-")
        for vm, places in expected.items():
            observer.wait_for_calls(vm, len(places))
    assert contradictions(observer) == []
    assert len(series(observer, "vm_tsc_matched_vcpus")) >= len(SCENARIOS)


def test_a_refused_frequency_parts_vcpus_that_tick_alike(observer: Observer) -> None:
    """kvm_set_tsc_khz keeps what it refuses, and kvm_synchronize_tsc compares that."""
    steps = ("create-vcpu:0", "create-vcpu:1", "regs:0", "get:0", "get:1", "set:1:1000000", "tsc:1")
    with vmm.process(*steps) as process:
        wait_for(lambda: bool(contradictions(observer)), "the contradiction")
        (contradiction,) = contradictions(observer)
        assert (contradiction["pid"], contradiction["claim"]) == (process.pid, "no_vcpu_skew")
        assert f"2 at {KHZ} kHz" in contradiction["detail"]
        assert "1 of 2 vCPUs for synchronised" in contradiction["detail"]
        assert of_vm(observer, process.pid, "vcpu_skew") == []
        counts = series(observer, "contradictions_total")
        assert counts['claim="no_vcpu_skew"'] == 1
