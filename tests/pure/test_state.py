"""What the state keeps of VMs that have ended or were never seen."""

from __future__ import annotations

import pytest

from tests.pure.test_metrics import feed, skewed
from tscwatch.model import (
    Call,
    Contradiction,
    Event,
    Guest,
    Item,
    KvmTscState,
    Mismatch,
    Risk,
    TscSpread,
    VcpuState,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
)
from tscwatch.publish.state import State

GUEST = Guest(7, "qemu", "db")
CALL = Call(Event(5, "get", "kvm:1", 7, 7, "qemu", 0, 9), "db", GUEST, "boot", "init", ())
SKEW = Mismatch(1, "raised", "vcpu_skew", "db", GUEST, (1,), 4.0, "critical", "hotplug", "off")


@pytest.mark.parametrize(
    "item",
    [
        VmEnded("db", 1),
        VcpuState("db", 0),
        VcpuUnplugged(1, "db", GUEST, 0, True),
        KvmTscState(1, "db", GUEST, 0, 1, 2, True),
        TscSpread(1, "db", 0.5, None),
        SKEW,
        SKEW._replace(state="cleared"),
        Risk(1, "db", GUEST, True, "off"),
        Contradiction(1, "db", GUEST, "phase", "two sides"),
        CALL,
    ],
    ids=lambda item: type(item).__name__,
)
def test_what_concerns_a_vm_beyond_the_limit_is_at_most_counted(item: Item) -> None:
    state = State()
    state.update(item)
    assert state.vms == {}
    assert sum(state.calls.values()) == (item is CALL)
    assert sum(state.mismatches.values()) == (item is SKEW)
    assert sum(state.contradictions.values()) == isinstance(item, Contradiction)


def test_a_vm_that_has_ended_is_neither_in_top_nor_in_the_status() -> None:
    state = State()
    feed(state, skewed())
    state.update(VmSeen("other", GUEST))
    assert state.summary() == "watching 2 VMs, 1 mismatches"
    assert [row["vm"] for row in state.rows()] == ["guest-100", "other"]
    state.update(VmEnded("guest-100", 9))
    assert state.summary() == "watching 1 VMs, 0 mismatches"
    assert [row["vm"] for row in state.rows()] == ["other"]
    assert set(state.vms) == {"guest-100", "other"}  # until it has been scraped


def test_a_mismatch_ends_when_it_is_cleared_and_begins_anew() -> None:
    state = State()
    state.update(VmSeen("db", GUEST))
    for ts, change in ((1, "raised"), (2, "updated"), (3, "cleared"), (4, "cleared")):
        state.update(SKEW._replace(ts=ts, state=change))  # type: ignore[arg-type]
        vm = state.vms["db"]
        assert vm.started == ({} if change == "cleared" else {"vcpu_skew": 1})
        assert set(vm.mismatches) == set(vm.started)
    state.update(SKEW._replace(ts=5))
    assert state.vms["db"].started == {"vcpu_skew": 5}
    assert state.mismatches["vcpu_skew"] == 2


def test_the_time_of_the_last_call_never_steps_back() -> None:
    state = State()
    for ts, last in ((5, 5), (3, 5), (8, 8)):
        state.update(CALL._replace(event=CALL.event._replace(ts=ts)))
        assert state.last_call_ts == last
    assert state.errors == {}


def test_a_row_of_top_has_what_is_known() -> None:
    state = State()
    state.update(VmSeen("db", GUEST))
    state.update(VcpuState("db", 3, None, 5, 6, "boot", "init"))
    state.update(VcpuState("db", 1, 4))
    state.update(SKEW._replace(apart_seconds=0.5))
    state.update(Risk(1, "db", GUEST, True, "off"))
    state.update(KvmTscState(1, "db", GUEST, 0, 1, 2, False))
    (row,) = state.rows()
    size = {"ppm": 4.0, "apart_seconds": 0.5, "severity": "critical", "phase": "hotplug"}
    assert row == {
        "vm": "db",
        "owner": None,
        "vcpus": {
            1: {"requested": 4},
            3: {"reported": 5, "effective": 6, "place": "boot/init"},
        },
        "mismatches": [{"kind": "vcpu_skew", **size}],
        "hotplug_risk": True,
        "synchronised": 1,
        "master_clock": False,
    }
    assert list(row["vcpus"]) == [1, 3]
