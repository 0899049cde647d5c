"""Recordings of real QEMU runs, replayed: their phases and mismatches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Optional, Union

import pytest

from tscwatch import recording, vmm
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import (
    Call,
    Contradiction,
    Event,
    Host,
    Item,
    Mismatch,
    Risk,
    VcpuState,
    VmEnded,
    VmSeen,
)

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings").glob("*.jsonl"))


SOURCES = ("bcc-tracepoint", "ftrace-syscall", "bcc-kprobe", "ftrace-kprobe")


def replay(events: Iterable[Union[Event, Host]]) -> list[Item]:
    pipeline = Pipeline()
    return [item for event in events for item in pipeline.feed(event)]


def places(items: Iterable[object], vm: str) -> list[str]:
    return [
        f"{item.event.vcpu} {item.event.op} {item.phase}/{item.step}"
        for item in items
        if isinstance(item, Call) and item.vm == vm
    ]


def mismatches(name: str) -> list[Mismatch]:
    events = recording.read(next(path for path in RECORDINGS if path.stem == name))
    return [item for item in replay(events) if isinstance(item, Mismatch)]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_each_call_has_its_phase_and_step(path: Path) -> None:
    items = replay(recording.read(path))
    expected = json.loads(path.with_suffix(".expected.json").read_text())
    assert {vm: places(items, vm) for vm in expected} == expected


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_late_start_never_gives_a_wrong_phase(path: Path) -> None:
    """Without any part of the beginning, a call has the same phase and step, or unknown."""
    events = list(recording.read(path))
    truth = {id(c.event): (c.phase, c.step) for c in replay(events) if isinstance(c, Call)}
    for cut in range(1, len(events)):
        for call in replay(events[cut:]):
            if isinstance(call, Call):
                phase, step = truth[id(call.event)]
                assert call.phase in (phase, "unknown")
                assert call.step in (step, "unknown")


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_vcpus_runner_is_a_thread_of_its_vm(path: Path) -> None:
    """It is fetched through vcpu->pid, which is null until the first KVM_RUN."""
    events = [event for event in recording.read(path) if isinstance(event, Event)]
    threads = {(event.pid, event.tid) for event in events}
    runners = {(event.pid, event.runner) for event in events if event.runner}
    assert runners <= threads


@pytest.mark.parametrize("source", SOURCES)
def test_the_hotplug_after_a_migration_is_a_skew(source: str) -> None:
    found = mismatches(f"{source}-skewed_migration")
    raised, *_, cleared = [m for m in found if m.kind == "vcpu_skew"]
    assert (raised.state, raised.phase, raised.vcpus) == ("raised", "hotplug", (2,))
    assert raised.requested_ppm == pytest.approx(135, abs=1)
    assert (raised.ppm, raised.seconds_a_day) == (0, 0)  # within the tolerance they tick alike
    assert raised.severity == "warning"
    assert cleared.state == "cleared"  # with the VM's end


@pytest.mark.parametrize("source", SOURCES)
def test_what_the_skewed_guest_really_gets(source: str) -> None:
    """Within the tolerance nothing is scaled: all its vCPUs tick alike, whatever was requested."""
    path = next(path for path in RECORDINGS if path.stem == f"{source}-skewed_migration")
    items = replay(recording.read(path))
    (host,) = (item for item in items if isinstance(item, Host))
    rates = {item.effective for item in items if isinstance(item, VcpuState)}
    assert rates - {None} == {host.tsc_khz}
    unscaled = [m for m in mismatches(path.stem) if (m.kind, m.vm) == ("unscaled", "target")]
    assert (unscaled[-1].state, unscaled[-1].phase, unscaled[-1].vcpus) == (
        "cleared",
        "incoming",
        (0, 1),
    )
    before_the_plug = [item for item in items if isinstance(item, (Risk, Call))]
    risk = next(i for i, item in enumerate(before_the_plug) if isinstance(item, Risk))
    plug = next(
        i
        for i, item in enumerate(before_the_plug)
        if isinstance(item, Call) and item.phase == "hotplug"
    )
    assert risk < plug


def test_a_frequency_that_qemu_could_not_set_is_withheld() -> None:
    raised, _ = mismatches("bcc-tracepoint-out_of_tolerance")
    assert (raised.kind, raised.phase, raised.severity) == ("withheld", "boot", "critical")


def test_a_set_that_kvm_refused() -> None:
    """QEMU reads the refused value back and assumes that it was set."""
    found = mismatches("bcc-kprobe-refused")
    assert [(m.state, m.kind) for m in found] == [
        ("raised", "refused"),
        ("raised", "configured"),
        ("cleared", "refused"),  # with the VM's end
        ("cleared", "configured"),
    ]
    assert {m.phase for m in found} == {"boot"}
    assert [m.ppm for m in found] == [pytest.approx(100, abs=1)] * 4


@pytest.mark.parametrize(
    "path",
    [path for path in RECORDINGS if path.stem.split("-")[2] in ("life", "interleaved")],
    ids=lambda path: path.stem,
)
def test_a_healthy_life_has_no_mismatch(path: Path) -> None:
    assert not [item for item in replay(recording.read(path)) if isinstance(item, Mismatch)]


def case(name: str, max_vcpus: Optional[int] = None) -> list[Item]:
    """Replay a recording from before vCPUs had lines.

    :param max_vcpus: of the guests, which such a recording does not have.
    """
    events = recording.read(Path(__file__).parent.parent / "recordings/cases" / f"{name}.jsonl")
    return replay(
        event._replace(guest=event.guest._replace(max_vcpus=max_vcpus))
        if max_vcpus and isinstance(event, Event) and event.guest
        else event
        for event in events
    )


def raised(items: Iterable[Item]) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Return what was raised and is worth more than a note."""
    return [
        (item.kind, item.severity, item.phase, item.vcpus)
        for item in items
        if isinstance(item, Mismatch) and item.state == "raised" and item.severity != "info"
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pinned-2kHz-on-a-scaling-host", []),
        ("plug-into-a-guest-pinned-1-kHz-off", [("desync", "critical", "hotplug", (2,))]),
        (
            "skew-of-1-kHz",
            [
                ("vcpu_skew", "warning", "hotplug", (2,)),
                ("desync", "critical", "hotplug", (2,)),
            ],
        ),
        ("restore-cloud-hypervisor-apart", [("desync", "critical", "loadvm", (1,))]),
        ("restore-cloud-hypervisor-close", []),
        ("risk-where-nothing-can-be-plugged", []),
        ("gvisor-on-a-scaling-host", []),
    ],
)
def test_what_a_guest_suffers(name: str, expected: list[tuple[str, str, str, tuple[int]]]) -> None:
    items = case(name)
    assert raised(items) == expected
    assert [item for item in items if isinstance(item, Contradiction)] == []


def test_by_how_much_tscs_are_apart_is_not_known_from_kvms_count() -> None:
    items = case("plug-into-a-guest-pinned-1-kHz-off")
    (desync, *_) = [m for m in items if isinstance(m, Mismatch) and m.kind == "desync"]
    assert desync.apart_seconds is None
    assert "KVM considers 1 of 3 vCPUs synchronised" in desync.full_detail
    assert "not known" in desync.detail


def test_a_skew_of_1_khz_ticks_alike() -> None:
    (skew, *_) = [
        m for m in case("skew-of-1-kHz") if isinstance(m, Mismatch) and m.kind == "vcpu_skew"
    ]
    assert skew.requested_ppm == pytest.approx(0.4, abs=0.05)
    assert skew.ppm == 0


@pytest.mark.parametrize("max_vcpus", [None, 4])
def test_the_risk_comes_before_the_plug(max_vcpus: Optional[int]) -> None:
    items = case("plug-into-a-guest-pinned-1-kHz-off", max_vcpus)
    at = [i for i, item in enumerate(items) if isinstance(item, Risk) and item.at_risk]
    plug = [i for i, c in enumerate(items) if isinstance(c, Call) and c.phase == "hotplug"]
    assert at[0] < plug[0]


@pytest.mark.parametrize("max_vcpus", [None, 2])
def test_no_risk_where_nothing_can_be_plugged(max_vcpus: Optional[int]) -> None:
    items = case("risk-where-nothing-can-be-plugged", max_vcpus)
    assert not [item for item in items if isinstance(item, Risk)]
    assert [i for i in case("risk-where-nothing-can-be-plugged", 3) if isinstance(i, Risk)]


def test_a_sandbox_is_seen_as_one() -> None:
    (seen,) = [item for item in case("gvisor-on-a-scaling-host") if isinstance(item, VmSeen)]
    assert vmm.of_guest(seen.guest).is_sandbox


@pytest.mark.parametrize("source", ["bcc-kprobe", "ftrace-kprobe"])
def test_a_vcpu_plugged_into_a_slower_guest(source: str) -> None:
    """Recorded on a KVM that scales: the size is in the lines."""
    pinned = raised(
        replay(recording.read(RECORDINGS[0].with_name(f"{source}-slowed_pinned.jsonl")))
    )
    assert pinned == [("desync", "critical", "hotplug", (2,))]
    found = mismatches(f"{source}-slowed_migration")
    desync = next(m for m in found if m.kind == "desync")
    skew = next(m for m in found if m.kind == "vcpu_skew")
    assert (desync.vcpus, desync.phase) == ((2,), "hotplug")
    assert desync.apart_seconds is not None
    assert desync.apart_seconds > 0.1
    assert desync.ppm == skew.ppm == pytest.approx(41_667, rel=1e-3)
    assert skew.requested_ppm == pytest.approx(41_667, rel=1e-3)


@pytest.mark.parametrize(
    "path",
    [path for path in RECORDINGS if path.stem.endswith("-vm_rebuilt_at_reset")],
    ids=lambda path: path.stem,
)
def test_a_rebuilt_vm_replaces_the_one_before(path: Path) -> None:
    lives = [item for item in replay(recording.read(path)) if isinstance(item, (VmSeen, VmEnded))]
    assert [type(item) for item in lives] == [VmSeen, VmEnded] * 3
    assert {item.vm for item in lives} == {"rebuilt"}


def test_no_recording_has_a_contradiction() -> None:
    for path in RECORDINGS:
        items = replay(recording.read(path))
        assert [item for item in items if isinstance(item, Contradiction)] == [], path
