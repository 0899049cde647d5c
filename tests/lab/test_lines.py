"""Guests on a host that scales: how far their TSCs are apart, compared with debugfs read beside it.

tscwatch must agree with debugfs within 1 % or 50 ms: between the two readings, vCPUs of different
rates drift.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from tests.support import tiny_vmm
from tests.support.guests import Guest, make_disk, wait_for
from tests.support.observer import Observer
from tests.support.tiny_vmm import host_khz

pytestmark = pytest.mark.usefixtures("scaling")

PLUGGED = 2
SLOWER = 0.96


@pytest.fixture(scope="module", params=["bcc", "ftrace"])
def observer(
    request: pytest.FixtureRequest, scaling: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    directory = tmp_path_factory.mktemp(request.param)
    with Observer(directory, "--json", "--source", request.param) as it:
        yield it
        assert it.contradictions() == []
        assert it.losses() == []
        assert it.stop() == 0
    assert "Traceback" not in it.log.read_text()


class Truth(NamedTuple):
    """What debugfs shows of a guest."""

    spread: float
    """In seconds of its first vCPU."""
    rates: dict[int, float]
    """Scaling ratios."""


def host_tsc() -> int:
    """Return the TSC now, as a trace instance shows it whose clock is the TSC."""
    instance = Path("/sys/kernel/tracing/instances/oracle")
    if not instance.exists():
        instance.mkdir()
        (instance / "trace_clock").write_text("x86-tsc")
    (instance / "trace_marker").write_text("now")
    line = (instance / "trace").read_text().splitlines()[-1]
    (instance / "trace").write_text("")
    return int(re.findall(r" (\d{6,}): ", line)[0])


def truth(pid: int) -> Truth:
    (directory,) = Path("/sys/kernel/debug/kvm").glob(f"{pid}-*")
    now = host_tsc()
    values, rates = {}, {}
    for files in directory.glob("vcpu*"):
        vcpu = int(files.name[len("vcpu") :])
        assert (files / "guest_mode").read_text().strip() == "0"
        ratio = int((files / "tsc-scaling-ratio").read_text())
        values[vcpu] = (now * ratio >> 32) + int((files / "tsc-offset").read_text())
        rates[vcpu] = ratio / 2**32
    spread = (max(values.values()) - min(values.values())) / (host_khz() * 1000 * rates[0])
    return Truth(spread, rates)


def spread(observer: Observer, name: str) -> Optional[float]:
    return observer.series("vm_tsc_spread_seconds").get(f'vm="{name}"')


def agrees(observer: Observer, guest: Guest) -> bool:
    seen, there = spread(observer, guest.name), truth(guest.pid).spread
    return seen is not None and abs(seen - there) <= max(0.05, 0.01 * there)


def mismatches(observer: Observer, name: str) -> list[tuple[str, str, str, str, list[int]]]:
    """Return the mismatches that were raised and are worth more than a note."""
    return [
        (m["state"], m["kind"], m["severity"], m["phase"], m["vcpus"])
        for m in observer.mismatches()
        if m["vm"] == name and m["severity"] != "info" and m["state"] != "updated"
    ]


def risks(observer: Observer, name: str) -> list[str]:
    return [i["state"] for i in observer.items() if i["type"] == "risk" and i["vm"] == name]


def wait_for_mismatch(observer: Observer, name: str, kind: str, state: str = "raised") -> Any:
    def found() -> list[dict[str, Any]]:
        return [
            m
            for m in observer.mismatches()
            if (m["vm"], m["kind"], m["state"]) == (name, kind, state)
        ]

    wait_for(lambda: bool(found()), f"{kind} {state} of {name}")
    return found()[-1]


def pinned(khz: int) -> str:
    return f"qemu64,tsc-frequency={khz}000"


DESYNC = ("raised", "desync", "critical", "hotplug", [PLUGGED])
SKEW = ("raised", "vcpu_skew", "critical", "hotplug", [PLUGGED])


@pytest.mark.parametrize("ratio", [SLOWER, 1.04, 1.0001])
def test_a_vcpu_plugged_into_a_pinned_guest_starts_at_0(
    ratio: float, observer: Observer, tmp_path: Path
) -> None:
    """The first of these tests takes up to a minute, because the daemon starts."""
    name = f"pinned-{ratio}"
    with Guest(tmp_path, name, cpu=pinned(round(host_khz() * ratio))) as guest:
        guest.start()
        wait_for(lambda: spread(observer, name) == 0, "its lines")
        assert risks(observer, name) == ["raised"]
        guest.plug()
        raised = wait_for_mismatch(observer, name, "desync")
        assert raised["apart_seconds"] == pytest.approx(truth(guest.pid).spread, abs=0.05)
        assert raised["ppm"] == 0
        assert "started at 0 when plugged" in raised["detail"]
        assert "at the same rate" in raised["detail"]
        assert agrees(observer, guest)
        assert [m for m in mismatches(observer, name) if m[1] != "unscaled"] == [DESYNC]
        # A reset writes all TSCs anew, at one frequency.
        guest.execute("system_reset")
        wait_for_mismatch(observer, name, "desync", "cleared")
        wait_for(lambda: agrees(observer, guest), "the new lines")
        assert truth(guest.pid).spread == 0


def test_nothing_happens_to_a_guest_of_the_hosts_frequency(
    observer: Observer, tmp_path: Path
) -> None:
    with Guest(tmp_path, "plain") as guest:
        guest.start()
        guest.plug()
        wait_for(lambda: len(observer.calls("plain")) == 9, "its calls")
        guest.execute("system_reset")
        wait_for(lambda: spread(observer, "plain") == 0, "its lines")
        assert truth(guest.pid).spread == 0
        assert mismatches(observer, "plain") == []
        assert risks(observer, "plain") == []


def test_half_a_wave_of_writes_is_no_desync(observer: Observer, tmp_path: Path) -> None:
    """A guest that was stopped for more than a second gets new TSC values one after another."""
    with Guest(tmp_path, "waiting", cpu=pinned(round(host_khz() * SLOWER))) as guest:
        guest.start()
        guest.execute("stop")
        wait_for(lambda: spread(observer, "waiting") == 0, "its lines")
        guest.execute("system_reset")
        guest.execute("cont")
        wait_for(lambda: agrees(observer, guest), "its lines")
        assert mismatches(observer, "waiting") == []


def test_migrated_from_a_slower_host(observer: Observer, tmp_path: Path) -> None:
    """The plugged vCPU is behind, and drifts; a restart of tscwatch and a migration keep it so.

    This takes a minute, because three guests and another daemon start.
    """
    slow = pinned(round(host_khz() * SLOWER))
    with (
        Guest(tmp_path, "from", cpu=slow) as source,
        Guest(tmp_path, "to", incoming="defer") as target,
    ):
        source.start()
        source.migrate_to(target, tmp_path)
        target.start()
        wait_for(lambda: risks(observer, "to") == ["raised"], "the risk")
        target.plug()
        raised = wait_for_mismatch(observer, "to", "desync")
        wait_for(lambda: agrees(observer, target), "the spread")
        assert mismatches(observer, "to") == [SKEW, DESYNC]
        assert raised["ppm"] == pytest.approx(41_667, rel=0.001)
        skew = observer.mismatches_of(target.pid, "vcpu_skew")[0]
        assert skew["requested_ppm"] == pytest.approx(41_667, rel=0.001)
        assert skew["ppm"] == pytest.approx(41_667, rel=0.001)
        lags = observer.series("vcpu_tsc_lag_seconds")
        assert lags[f'vcpu="{PLUGGED}",vm="to"'] == pytest.approx(truth(target.pid).spread, abs=0.2)
        ratio = observer.series("vm_tsc_rate_spread_ratio")['vm="to"']
        assert ratio == pytest.approx(0.041_667, rel=0.001)
        adopted(tmp_path, observer, target)
        # A reset makes all TSCs start anew, but not at one frequency.
        target.execute("system_reset")
        wait_for(lambda: (spread(observer, "to") or 9) < 1, "the new lines")
        wait_for(lambda: agrees(observer, target), "the spread")
        assert truth(target.pid).spread > 0
        assert mismatches(observer, "to") == [SKEW, DESYNC]
        onward(tmp_path, observer, target)


def adopted(tmp_path: Path, observer: Observer, guest: Guest) -> None:
    """A tscwatch that starts later finds the same."""
    directory = tmp_path / "later"
    directory.mkdir()
    source = "bcc" if 'source="bcc"' in observer.metrics() else "ftrace"
    with Observer(directory, "--json", "--source", source) as later:
        raised = wait_for_mismatch(later, guest.name, "desync")
        assert (raised["severity"], raised["phase"], raised["vcpus"]) == (
            "critical",
            "unknown",
            [PLUGGED],
        )
        wait_for(lambda: agrees(later, guest), "the spread")  # it drifts while lines are read
        assert later.contradictions() == []
        later.process.kill()
        later.process.wait()


def onward(tmp_path: Path, observer: Observer, source: Guest) -> None:
    """A migration takes the difference along."""
    with Guest(tmp_path, "onward", incoming="defer") as target:
        target.plug()
        source.migrate_to(target, tmp_path)
        target.start()
        wait_for_mismatch(observer, "onward", "desync")
        wait_for(lambda: agrees(observer, target), "the spread")
        assert truth(target.pid).spread > 0


def test_a_snapshot_of_a_slower_host_is_loaded(observer: Observer, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "snapshot.qcow2")
    with Guest(tmp_path, "saver", cpu=pinned(round(host_khz() * SLOWER)), disk=disk) as guest:
        guest.start()
        guest.monitor("savevm one")
    with Guest(tmp_path, "loader", disk=disk) as guest:
        guest.start()
        guest.monitor("loadvm one")
        wait_for(lambda: risks(observer, "loader") == ["raised"], "the risk")
        wait_for(lambda: spread(observer, "loader") == 0, "its lines")
        assert mismatches(observer, "loader") == []
        guest.plug()
        wait_for_mismatch(observer, "loader", "desync")
        wait_for(lambda: agrees(observer, guest), "the spread")
        assert mismatches(observer, "loader") == [SKEW, DESYNC]


@pytest.mark.parametrize("default", [True, False])
def test_only_the_vms_default_keeps_a_new_vcpu_together_with_the_others(
    default: bool, observer: Observer
) -> None:
    khz = round(host_khz() * SLOWER)
    steps = [
        *([f"set-on-vm:{khz}"] if default else []),
        *(step for v in (0, 1) for step in (f"create-vcpu:{v}", f"regs:{v}")),
        *(step for v in (0, 1) for step in (f"set:{v}:{khz}", f"tsc:{v}")),
        *("run:0", "run:1", "create-vcpu:2", f"set:2:{khz}", "tsc:2"),
    ]
    with tiny_vmm.process(*steps) as process:
        name = str(process.pid)
        there = truth(process.pid).spread
        assert (there == 0) == default
        wait_for(lambda: spread(observer, name) == pytest.approx(there), "its lines")
        if not default:
            wait_for_mismatch(observer, name, "desync")
        kinds = {kind for _, kind, *_ in mismatches(observer, name)}
        assert kinds == (set() if default else {"desync"})
