"""QEMU's functions confirm or contradict the phases of its calls."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.support.histories import History, histories
from tscwatch.analysis.attribute import Attributor
from tscwatch.capture.crosscheck import complete_until, merge
from tscwatch.model import Call, Contradiction, Event, Fact, Phase, Step
from tscwatch.vmm import QEMU

FUNCTION = {step: function for function, step in QEMU.steps.items()}
CAUSE = {phase: function for function, phases in QEMU.causes.items() for phase in phases}


def entered(call: Event, function: str) -> Event:
    return Event(
        call.ts, "entered", "", call.pid, call.tid, call.comm, guest=call.guest, function=function
    )


def with_symbols(history: History) -> list[Event]:
    """Add what uprobes report: the cause, the vCPU's function, and then the calls."""
    truth = iter(history.truth)
    events = []
    for event in history.events:
        if event.op in ("get", "set"):
            phase, step = next(truth)
            if (phase, step) != ("boot", "init"):
                events.append(entered(event, CAUSE[phase]))
            events.append(entered(event, FUNCTION[step]))
        events.append(event)
    return events


def feed(events: list[Event]) -> list[Fact]:
    attributor = Attributor()
    return [fact for event in events for fact in attributor.feed(event)]


@given(histories())
def test_qemus_functions_confirm_every_call_of_a_valid_history(history: History) -> None:
    facts = feed(with_symbols(history))
    assert not [fact for fact in facts if isinstance(fact, Contradiction)]
    assert all(fact.evidence[-1] == "symbols" for fact in facts if isinstance(fact, Call))


def test_another_function_is_a_contradiction_with_both_sides() -> None:
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    events = history.events
    call = next(event for event in events if event.op == "get")
    events.insert(events.index(call), entered(call, "do_kvm_cpu_synchronize_post_init"))
    facts = feed(events)
    (contradiction,) = (fact for fact in facts if isinstance(fact, Contradiction))
    assert contradiction.claim == "phase"
    assert "boot/init" in contradiction.detail
    assert "do_kvm_cpu_synchronize_post_init" in contradiction.detail
    (of_call,) = (fact for fact in facts if isinstance(fact, Call))
    assert "symbols" not in of_call.evidence


def test_functions_entered_by_any_number_of_threads_take_bounded_memory() -> None:
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    attributor = Attributor()
    for event in history.events:
        attributor.feed(event)
    call = history.events[-1]
    for tid in range(1000):
        attributor.feed(entered(call, "kvm_arch_init_vcpu")._replace(tid=tid))
    (vm,) = attributor._vms.values()
    assert len(vm.entered) < 20


@pytest.mark.parametrize(
    ("phase", "step", "cause", "function", "agreed"),
    [
        ("boot", "init", None, "kvm_arch_init_vcpu", True),
        ("boot", "init", "qdev_device_add_from_qdict", "kvm_arch_init_vcpu", True),  # -device
        ("boot", "post_init", "load_snapshot", "do_kvm_cpu_synchronize_post_init", False),
        ("unknown", "post_init", "load_snapshot", "do_kvm_cpu_synchronize_post_init", True),
        ("hotplug", "post_init", None, "kvm_arch_init_vcpu", False),
        ("unknown", "unknown", "load_snapshot", "kvm_arch_init_vcpu", None),
    ],
)
def test_confirmation(
    phase: Phase, step: Step, cause: str | None, function: str, agreed: bool | None
) -> None:
    assert QEMU.confirms(phase, step, cause, function) is agreed


@pytest.mark.parametrize("ns", [0, 499, 500, 501, 999])
def test_evidence_of_the_same_microsecond(ns: int) -> None:
    """bcc's times are in ns; ftrace's, and those of the evidence, are rounded to us."""
    function = Event(1000, "entered", "", 7, 8, "qemu", function="kvm_arch_init_vcpu")
    tracked = function._replace(op="tsc_tracked")
    rounded = (ns + 500) // 1000 * 1000
    for ts in (ns, rounded):
        call = Event(1000 + ts, "get", "vm", 7, 8, "qemu")
        ops = [event.op for event in merge([call], [function, tracked._replace(ts=1000 + rounded)])]
        assert ops == ["entered", "get", "tsc_tracked"]


def test_evidence_of_two_threads_in_one_microsecond() -> None:
    function = Event(1000, "entered", "", 7, 8, "qemu", function="kvm_arch_init_vcpu")
    call = Event(1000, "get", "vm", 7, 8, "qemu")
    other = Event(1000, "tsc_tracked", "", 5, 6, "qemu")
    assert merge([call], [other, function]) == [function, call, other]


def test_while_the_evidence_is_behind_no_call_is_ahead_of_it() -> None:
    """Evidence that is still unread comes after the last one that was read."""
    function = Event(1000, "entered", "", 7, 8, "qemu", function="kvm_arch_init_vcpu")
    assert complete_until(5000, [function], is_behind=False) == 5000
    assert complete_until(5000, [function], is_behind=True) == 1000
    assert complete_until(500, [function], is_behind=True) == 500
