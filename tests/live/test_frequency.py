"""What the guest really gets, against the real KVM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import vmm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import guest, skewed_migration
from tscwatch.host import tsc
from tscwatch.model import Host

KHZ = vmm.host_khz()
INSIDE = KHZ * 1_000_100 // 1_000_000
ABOVE = KHZ * 1_010_000 // 1_000_000


def of_vm(observer: Observer, pid: int, kind: str) -> list[dict[str, Any]]:
    return [m for m in observer.mismatches() if (m["pid"], m["kind"]) == (pid, kind)]


def wait_for_one(observer: Observer, pid: int, kind: str) -> dict[str, Any]:
    wait_for(lambda: bool(of_vm(observer, pid, kind)), f"{kind} of {pid}")
    return of_vm(observer, pid, kind)[0]


def series(observer: Observer, name: str) -> dict[str, float]:
    """By its labels as they stand."""
    found = re.findall(rf"(?m)^tscwatch_{name}(?:{{(.*)}})? (\S+)$", observer.metrics())
    return {labels: float(value) for labels, value in found}


def test_the_host_is_told_as_kvm_knows_it(observer: Observer) -> None:
    here = tsc.read(Host())
    assert here.tsc_khz == KHZ
    assert series(observer, "host_tsc_hertz") == {"": KHZ * 1000}
    assert series(observer, "host_tsc_scaling_supported") == {"": float(bool(here.scaling))}
    tolerance = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm").read_text()
    assert series(observer, "host_tsc_tolerance_ratio") == {"": int(tolerance) * 1e-6}
    assert list(series(observer, "host_clocksource_info")) == [f'clocksource="{here.clocksource}"']


def test_inside_the_tolerance_nothing_is_scaled(observer: Observer) -> None:
    with vmm.process("create-vcpu:0", "regs:0", f"set:0:{INSIDE}") as process:
        raised = wait_for_one(observer, process.pid, "unscaled")
        assert raised["ppm"] == pytest.approx(100, abs=1)
        label = f'vcpu="0",vm="{process.pid}"'
        assert series(observer, "vcpu_tsc_requested_hertz")[label] == INSIDE * 1000
        assert series(observer, "vcpu_tsc_effective_hertz")[label] == KHZ * 1000


@pytest.mark.skipif(bool(tsc.read(Host()).scaling), reason="needs a host that cannot scale")
def test_a_vcpu_that_only_catches_up_has_no_known_frequency(observer: Observer) -> None:
    """Nor after it was set back: KVM never ends the catch-up mode."""
    with vmm.process("create-vcpu:0", "regs:0", f"set:0:{ABOVE}", f"set:0:{KHZ}") as process:
        wait_for(lambda: len(observer.calls(str(process.pid))) == 2, "its calls")
        assert wait_for_one(observer, process.pid, "unscaled")["ppm"] is None
        label = f'vcpu="0",vm="{process.pid}"'
        assert series(observer, "vcpu_tsc_requested_hertz")[label] == KHZ * 1000
        assert label not in series(observer, "vcpu_tsc_effective_hertz")


@pytest.mark.skipif(bool(tsc.read(Host()).scaling), reason="needs a host that cannot scale")
def test_a_refused_frequency_is_reported_by_kvm_and_is_not_the_guests(observer: Observer) -> None:
    with vmm.process("create-vcpu:0", "regs:0", "get:0", "set:0:1000000", "get:0") as process:
        wait_for(lambda: len(observer.calls(str(process.pid))) == 3, "its calls")
        label = f'vcpu="0",vm="{process.pid}"'
        assert series(observer, "vcpu_tsc_reported_hertz")[label] == 1_000_000_000
        assert series(observer, "vcpu_tsc_effective_hertz")[label] == KHZ * 1000


def test_a_running_vcpu_that_is_given_another_frequency(observer: Observer) -> None:
    steps = ("create-vcpu:0", "regs:0", f"set:0:{KHZ}", "run:0", f"set:0:{INSIDE}", f"set:0:{KHZ}")
    with vmm.process(*steps) as process:
        if 'attach="syscall"' in observer.metrics():  # cannot tell whether a vCPU has run
            wait_for_one(observer, process.pid, "unscaled")
            assert of_vm(observer, process.pid, "changed") == []
            return
        wait_for(lambda: len(of_vm(observer, process.pid, "changed")) == 2, "the change")
        raised, cleared = of_vm(observer, process.pid, "changed")
    assert (raised["state"], cleared["state"]) == ("raised", "cleared")
    assert raised["ppm"] == pytest.approx(100, abs=1)


def test_the_vms_own_frequency_is_the_default_of_its_vcpus(observer: Observer) -> None:
    steps = ("get-of-vm", f"set-on-vm:{INSIDE}", "create-vcpu:0", "regs:0", "get:0")
    with vmm.process(*steps) as process:
        name = str(process.pid)
        wait_for(lambda: len(observer.calls(name)) == 3, "its calls")
        calls = [(c["scope"], c["vcpu"], c["op"], c["khz"]) for c in observer.calls(name)]
        assert calls == [
            ("vm", None, "get", KHZ),
            ("vm", None, "set", INSIDE),
            ("vcpu", 0, "get", INSIDE),
        ]
        assert wait_for_one(observer, process.pid, "unscaled")["ppm"] == pytest.approx(100, abs=1)


def test_a_vm_that_is_only_asked_is_a_probe(observer: Observer) -> None:
    with vmm.process("get-of-vm", "close") as process:
        wait_for(lambda: bool(observer.calls(str(process.pid))), "the probe")
        (call,) = observer.calls(str(process.pid))
        assert (call["phase"], call["scope"]) == ("probe", "vm")
        assert f'vm="{process.pid}"' not in observer.metrics()


def test_the_risk_is_told_before_the_hotplug(observer: Observer, tmp_path: Path) -> None:
    """After a migration from a host of another frequency, with no tsc-frequency of its own."""
    prefix = tmp_path.name
    with guest(tmp_path, f"{prefix}calm") as calm:
        calm.start()
        skewed_migration(tmp_path, prefix)
        label = f'vm="{prefix}calm"'
        assert series(observer, "vm_hotplug_risk")[label] == 0
    told = [item for item in observer.items() if item["vm"] == f"{prefix}target"]
    kinds = [(item["type"], item.get("kind"), item.get("phase")) for item in told]
    risk = kinds.index(("risk", None, None))
    assert risk < kinds.index(("call", None, "hotplug"))
    assert risk < kinds.index(("mismatch", "vcpu_skew", "hotplug"))
    assert ("mismatch", "unscaled", "incoming") in kinds
    assert not [
        item
        for item in observer.items()
        if item["type"] == "risk" and item["vm"] != f"{prefix}target"
    ]
