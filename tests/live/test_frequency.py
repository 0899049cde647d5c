"""Host and effective frequencies, and the mismatches that follow from them, on the real KVM."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_vmm
from tests.support.guests import Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import skewed_migration
from tests.support.tiny_vmm import host_khz, khz_above_host
from tscwatch.host import tsc
from tscwatch.linux import kvm
from tscwatch.linux.tracefs import TscCounter, find_tracefs

TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")
without_scaling = pytest.mark.skipif(
    bool(tsc.read().scaling), reason="needs a host that cannot scale"
)


def wait_for_one(observer: Observer, pid: int, kind: str) -> dict[str, Any]:
    """Wait for a mismatch of a kind, and return the first one of this process."""
    wait_for(lambda: bool(observer.mismatches_of(pid, kind)), f"{kind} of {pid}")
    return observer.mismatches_of(pid, kind)[0]


def test_the_hosts_metrics_are_what_kvm_has(observer: Observer) -> None:
    here = tsc.read()
    assert here.tsc_khz == host_khz()
    assert observer.series("host_tsc_hertz") == {"": host_khz() * 1000}
    assert observer.series("host_tsc_scaling_supported") == {"": float(bool(here.scaling))}
    tolerance = TOLERANCE.read_text()
    assert observer.series("host_tsc_tolerance_ratio") == {"": int(tolerance) * 1e-6}
    assert list(observer.series("host_clocksource_info")) == [f'clocksource="{here.clocksource}"']


def test_a_new_vcpu_has_the_same_frequency_as_its_vm() -> None:
    """Linux before 5.18 reports only the former."""
    with kvm.DEV_KVM.open("r+b", buffering=0) as dev:
        vm = fcntl.ioctl(dev, kvm.CREATE_VM, 0)
        try:
            assert tsc._khz_of_a_new_vcpu(vm) == fcntl.ioctl(vm, kvm.GET_TSC_KHZ, 0)
        finally:
            os.close(vm)


def test_the_host_is_read_once_for_each_load_of_kvm(observer: Observer) -> None:
    """Each reading creates a VM, which the daemon that made it sees too."""
    time.sleep(3)
    printed = map(json.loads, observer.output.read_text().split("\n")[:-1])
    assert not [item for item in printed if item.get("pid") == observer.process.pid]


def test_inside_the_tolerance_nothing_is_scaled(observer: Observer) -> None:
    khz = khz_above_host(100)
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{khz}") as process:
        raised = wait_for_one(observer, process.pid, "unscaled")
        assert raised["ppm"] == pytest.approx(100, abs=1)
        label = f'vcpu="0",vm="{process.pid}"'
        assert observer.series("vcpu_tsc_requested_hertz")[label] == khz * 1000
        assert observer.series("vcpu_tsc_effective_hertz")[label] == host_khz() * 1000
        for bound in ("min", "max"):
            series = observer.series(f"vm_tsc_effective_{bound}_hertz")
            assert series[f'vm="{process.pid}"'] == host_khz() * 1000


@without_scaling
def test_a_vcpu_that_only_catches_up_has_no_known_frequency(observer: Observer) -> None:
    """Even when the host's frequency is set again, because KVM never leaves catch-up mode."""
    khz, above = host_khz(), khz_above_host(10_000)
    with tiny_vmm.process("create-vcpu:0", "regs:0", f"set:0:{above}", f"set:0:{khz}") as process:
        wait_for(lambda: len(observer.calls(str(process.pid))) == 2, "its calls")
        assert wait_for_one(observer, process.pid, "unscaled")["ppm"] is None
        label = f'vcpu="0",vm="{process.pid}"'
        assert observer.series("vcpu_tsc_requested_hertz")[label] == khz * 1000
        assert label not in observer.series("vcpu_tsc_effective_hertz")


@without_scaling
def test_a_refused_frequency_is_reported_by_kvm_and_is_not_the_guests(observer: Observer) -> None:
    with tiny_vmm.process("create-vcpu:0", "regs:0", "get:0", "set:0:1000000", "get:0") as process:
        wait_for(lambda: len(observer.calls(str(process.pid))) == 3, "its calls")
        label = f'vcpu="0",vm="{process.pid}"'
        assert observer.series("vcpu_tsc_reported_hertz")[label] == 1_000_000_000
        assert observer.series("vcpu_tsc_effective_hertz")[label] == host_khz() * 1000


@pytest.mark.also_in_lab
def test_a_running_vcpu_that_is_given_another_frequency(observer: Observer) -> None:
    khz, other = host_khz(), khz_above_host(100)
    steps = ("create-vcpu:0", "regs:0", f"set:0:{khz}", "run:0", f"set:0:{other}", f"set:0:{khz}")
    with tiny_vmm.process(*steps) as process:
        if 'attach="syscall"' in observer.metrics():  # has no information whether a vCPU has run
            wait_for_one(observer, process.pid, "unscaled")
            assert observer.mismatches_of(process.pid, "changed") == []
            return
        wait_for(lambda: len(observer.mismatches_of(process.pid, "changed")) == 2, "the change")
        raised, cleared = observer.mismatches_of(process.pid, "changed")
    assert (raised["state"], cleared["state"]) == ("raised", "cleared")
    assert raised["ppm"] == pytest.approx(100, abs=1)


@pytest.mark.also_in_lab
def test_the_vms_own_frequency_is_the_default_of_its_vcpus(observer: Observer) -> None:
    khz = khz_above_host(100)
    steps = ("get-of-vm", f"set-on-vm:{khz}", "create-vcpu:0", "regs:0", "get:0")
    with tiny_vmm.process(*steps) as process:
        name = str(process.pid)
        wait_for(lambda: len(observer.calls(name)) == 3, "its calls")
        calls = [(c["scope"], c["vcpu"], c["op"], c["khz"]) for c in observer.calls(name)]
        assert calls == [
            ("vm", None, "get", host_khz()),
            ("vm", None, "set", khz),
            ("vcpu", 0, "get", khz),
        ]
        assert wait_for_one(observer, process.pid, "unscaled")["ppm"] == pytest.approx(100, abs=1)


def test_a_vm_whose_frequency_is_only_read_is_a_probe(observer: Observer) -> None:
    with tiny_vmm.process("get-of-vm", "close") as process:
        wait_for(lambda: bool(observer.calls(str(process.pid))), "the probe")
        (call,) = observer.calls(str(process.pid))
        assert (call["phase"], call["scope"]) == ("probe", "vm")
        assert f'vm="{process.pid}"' not in observer.metrics()


def test_the_risk_is_reported_before_the_hotplug(observer: Observer, tmp_path: Path) -> None:
    """After a migration from a host with another frequency, if the target has no tsc-frequency."""
    prefix = tmp_path.name
    with Guest(tmp_path, f"{prefix}calm") as calm:
        calm.start()
        skewed_migration(tmp_path, prefix)
        label = f'vm="{prefix}calm"'
        assert observer.series("vm_hotplug_risk")[label] == 0
    reported = [item for item in observer.items() if item["vm"] == f"{prefix}target"]
    kinds = [(item["type"], item.get("kind"), item.get("phase")) for item in reported]
    risk = kinds.index(("risk", None, None))
    assert risk < kinds.index(("call", None, "hotplug"))
    assert risk < kinds.index(("mismatch", "vcpu_skew", "hotplug"))
    assert ("mismatch", "unscaled", "incoming") in kinds
    assert not [
        item
        for item in observer.items()
        if item["type"] == "risk" and item["vm"] == f"{prefix}calm"
    ]


def test_the_hosts_tsc_is_read_whatever_others_do_to_its_trace_instance() -> None:
    counter = TscCounter(find_tracefs())
    try:
        first = counter.read()
        (instance,) = find_tracefs().glob(f"instances/tscwatch-tsc-*-{os.getpid()}")
        (instance / "trace_clock").write_text("local")
        second = counter.read()
        instance.rmdir()
        third = counter.read()
        assert first is not None
        assert second is not None
        assert third is not None
        assert first < second < third
        assert third - first < 60 * host_khz() * 1000
    finally:
        counter.close()
    assert not instance.exists()
