"""KVM's own view of a VM's TSCs, from its tracepoints, compared with the VM's calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import CORE_SCENARIOS, skewed


@pytest.mark.also_in_lab
def test_kvm_sees_the_skew_and_gives_up_its_master_clock(
    observer: Observer, tmp_path: Path
) -> None:
    prefix = tmp_path.name
    with skewed(tmp_path, prefix) as target:
        pid = target.pid

        def updates() -> list[tuple[int, int]]:
            return [
                (skew["kvm_synchronised"], skew["kvm_online"])
                for skew in observer.mismatches_of(pid, "vcpu_skew")
                if skew["state"] == "updated"
            ]

        wait_for(lambda: bool(updates()), "KVM's view of the skew")
        assert set(updates()) == {(1, 3)}
        # KVM gives up the master clock when the new vCPU enters the guest, that is, when the
        # firmware starts it.
        target.execute("system_reset")
        label = f'vm="{prefix}target"'
        wait_for(lambda: observer.series("vm_master_clock")[label] == 0, "the master clock")
        assert observer.series("vm_tsc_matched_vcpus")[label] == 1
        assert observer.series("vm_tsc_matched_vcpus")[f'vm="{prefix}source"'] == 2
    assert observer.contradictions() == []


def test_kvm_and_we_agree_in_all_scenarios(observer: Observer, tmp_path: Path) -> None:
    for scenario in CORE_SCENARIOS:
        expected = scenario(tmp_path, f"{tmp_path.name}{scenario.__name__}-")
        for vm, places in expected.items():
            observer.wait_for_calls(vm, len(places))
    assert observer.contradictions() == []
    assert len(observer.series("vm_tsc_matched_vcpus")) >= len(CORE_SCENARIOS)


def test_kvms_count_is_not_held_against_lines_that_it_does_not_apply(observer: Observer) -> None:
    """kvm_set_tsc_khz stores also a refused frequency, and kvm_synchronize_tsc compares it.

    On a KVM that applies no offsets, so that all are 0, the vCPUs are together all the same.
    """
    steps = ("create-vcpu:0", "create-vcpu:1", "regs:0", "get:0", "get:1", "set:1:1000000", "tsc:1")
    with tiny_vmm.process(*steps) as process:
        label = f'vm="{process.pid}"'
        wait_for(
            lambda: (
                observer.series("vm_tsc_matched_vcpus").get(label) == 1
                and label in observer.series("vm_tsc_spread_seconds")
            ),
            "KVM's count and the lines",
        )
        assert observer.series("vm_tsc_spread_seconds")[label] == 0
        assert observer.mismatches_of(process.pid, "vcpu_skew") == []
        assert observer.mismatches_of(process.pid, "desync") == []
        assert observer.contradictions() == []
