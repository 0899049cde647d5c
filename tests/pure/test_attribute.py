"""Phases and steps: over all valid histories, after losses, and for VMs seen in part."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.histories import HOST_KHZ, History, histories, seen_late
from tscwatch.analysis.attribute import Attributor
from tscwatch.model import Call, Dropped, Event, Fact, Guest, KvmTscState, Op, VmEnded, VmSeen


def feed(events: list[Event], attributor: Attributor | None = None) -> list[Fact]:
    attributor = attributor or Attributor()
    return [fact for event in events for fact in attributor.feed(event)]


def attributions(facts: list[Fact], vm: str = "") -> list[tuple[str, str]]:
    return [
        (fact.phase, fact.step)
        for fact in facts
        if isinstance(fact, Call) and (not vm or fact.event.vm == vm)
    ]


@given(histories())
def test_every_call_of_a_valid_history_is_right(history: History) -> None:
    assert attributions(feed(history.events)) == history.truth


def without_runners(history: History) -> list[Event]:
    """Return the events as a source yields them that has no access to ``struct kvm_vcpu``."""
    return [event._replace(runner=None) for event in history.events]


@given(histories())
def test_no_call_needs_the_vcpus_runner(history: History) -> None:
    assert attributions(feed(without_runners(history))) == history.truth


@given(st.data())
def test_interleaved_histories_are_attributed_as_each_alone(data: st.DataObject) -> None:
    pair = data.draw(st.tuples(histories(0), histories(1)))
    queues = [list(history.events) for history in pair]
    mixed = []
    while any(queues):
        queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
        mixed.append(queue.pop(0))
    facts = feed(mixed)
    for history in pair:
        assert attributions(facts, history.vm) == history.truth


@settings(max_examples=500)
@given(histories(), st.data(), st.booleans(), st.booleans())
def test_a_late_start_gives_unknown_or_the_truth(
    history: History, data: st.DataObject, seen_sregs: bool, ran_known: bool
) -> None:
    cut = data.draw(st.integers(1, len(history.events)))
    truth = dict(zip((e.ts for e in history.events if e.op in ("get", "set")), history.truth))
    late = seen_late(history, cut, seen_sregs, ran_known)
    for events in (late, history.events[cut:]):  # found in /proc, or not even that
        for fact in feed(events):
            if isinstance(fact, Call):
                phase, step = truth[fact.event.ts]
                assert fact.phase in (phase, "unknown")
                assert fact.step in (step, "unknown")


@given(histories(), st.data())
def test_after_a_loss_no_attribution_is_wrong(history: History, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(history.events)))
    last = data.draw(st.integers(first, len(history.events)))
    lost = Event.lost(0, last - first)
    truth = dict(zip((e.ts for e in history.events if e.op in ("get", "set")), history.truth))
    for fact in feed([*history.events[:first], lost, *history.events[last:]]):
        if isinstance(fact, Call):
            assert fact.phase in (truth[fact.event.ts][0], "unknown")


def test_after_a_loss_a_write_on_another_thread_is_no_load() -> None:
    """The lost event may have been the init of a vCPU that was plugged again."""
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    history.new_vcpu(1, "boot")
    history.write_all("boot")
    history.start()
    seen = len(history.events)
    history.replug(1)
    history.write_all("loadvm")
    lost = Event.lost(0, 1)
    facts = feed([*history.events[:seen], lost, *history.events[seen + 1 :]])
    replugged, loaded = attributions(facts)[-6:-4], attributions(facts)[-4:-2]
    assert replugged == [("unknown", "post_init")] * 2
    assert loaded == [("loadvm", "post_init")] * 2  # on vCPU 0, whose thread ran it before


def test_after_a_loss_the_first_write_that_is_seen_may_not_be_the_plugs() -> None:
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    history.write_all("boot")
    history.start()
    history.new_vcpu(1, "hotplug")
    seen = len(history.events)
    history.full_write(1, "hotplug")
    missed = len(history.events)
    history.start()  # runs vCPU 1 too
    history.write_all("loadvm")
    lost = Event.lost(0, missed - seen)
    facts = feed([*history.events[:seen], lost, *history.events[missed:]])
    assert attributions(facts)[-4:-2] == [("loadvm", "post_init")] * 2
    assert attributions(facts)[-2:] == [("unknown", "post_init")] * 2


@given(histories())
def test_a_vm_that_ended_leaves_nothing(history: History) -> None:
    vcpus = {event.vcpu for event in history.events} - {None}
    attributor = Attributor(max_vms=1, max_vcpus=len(vcpus))
    history.emit("vm_end")
    facts = feed(history.events, attributor)
    lives = 1 + sum(event.op == "vm_create" for event in history.events[1:])
    assert sum(isinstance(fact, VmSeen) for fact in facts) == lives
    assert sum(isinstance(fact, VmEnded) for fact in facts) == lives
    assert not [fact for fact in feed(history.events, attributor) if isinstance(fact, Dropped)]


def rebuilt(started: bool) -> History:
    """A guest that was reset, whose VM QEMU has replaced."""
    history = History("kvm:1", 100, incoming=True)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    history.write_all("boot")
    if started:
        history.start()
    history.rebuild()
    return history


def test_a_rebuilt_vm_is_the_same_guest() -> None:
    history = rebuilt(started=True)
    old = [event._replace(vm="kvm:0") for event in history.events[:9]]
    assert history.events[9].op == "vm_create"
    facts = feed([*old, *history.events[9:], old[0]._replace(op="vm_end")])  # as kprobes see it
    assert attributions(facts) == history.truth
    lives = [fact for fact in facts if isinstance(fact, (VmSeen, VmEnded))]
    assert [type(fact) for fact in lives] == [VmSeen, VmEnded, VmSeen]
    assert {fact.vm for fact in lives} == {"guest-100"}


def test_a_vcpu_that_is_plugged_again_into_a_rebuilt_vm() -> None:
    """The main thread has created it, so its first calls were made by that one."""
    history = rebuilt(started=True)
    history.new_vcpu(1, "hotplug")
    history.full_write(1, "hotplug")
    history.rebuild()
    history.start()
    history.unplug(1, noticed=True)
    history.replug(1)
    for events in (history.events, without_runners(history)):
        assert attributions(feed(events)) == history.truth
    assert history.truth[-3:] == [
        ("hotplug", "init"),
        ("hotplug", "post_init"),
        ("hotplug", "post_init"),
    ]


@pytest.mark.parametrize("runner_known", [True, False])
def test_a_call_of_a_rebuilt_vcpus_own_thread_is_no_plug(runner_known: bool) -> None:
    history = rebuilt(started=True)
    history.start()
    history.emit("set", 0, "regs", khz=5)
    events = history.events if runner_known else without_runners(history)
    assert attributions(feed(events)) == [*history.truth, ("unknown", "unknown")]


def test_a_rebuilt_vm_keeps_its_name_although_its_namesake_is_gone() -> None:
    first, second = History("kvm:1", 100), History("kvm:2", 200)
    for history in (first, second):
        history.emit("vm_create")
        history.new_vcpu(0, "boot")
    first.emit("vm_end")
    second.rebuild()
    named = [e._replace(guest=Guest(e.pid, "qemu", "web")) for e in second.events]
    at = [event.op for event in named].index("vm_create", 1)
    web = [event._replace(guest=Guest(event.pid, "qemu", "web")) for event in first.events]
    facts = feed([*web[:-1], *named[:at], web[-1], *named[at:]])
    assert [fact.vm for fact in facts if isinstance(fact, VmSeen)] == ["web", "web-200", "web-200"]


@pytest.mark.parametrize("ran", [None, False])
def test_what_follows_a_reset_before_the_first_start_is_unknown(ran: bool | None) -> None:
    """QEMU calls KVM_SET_CLOCK for the new VM although it does not start it."""
    history = rebuilt(started=False)
    history.new_vcpu(1, "prelaunch")
    history.full_write(1, "prelaunch")
    history.write_all("incoming")
    proven = ("boot", "reset")
    expected = [(phase if phase in proven else "unknown", step) for phase, step in history.truth]
    assert attributions(feed([event._replace(ran=ran) for event in history.events])) == expected


def test_what_is_plugged_into_a_rebuilt_vm_is_no_part_of_a_boot() -> None:
    """QEMU does not write the state of a guest that is protected."""
    history = rebuilt(started=False)
    events = [event for event in history.events[9:] if event.after != "sregs"]
    history.new_vcpu(1, "prelaunch")
    facts = feed([*history.events[:9], *events, *history.events[-4:]])
    assert attributions(facts)[-1] == ("unknown", "init")


@pytest.mark.parametrize("lost", ["vm_create", "vcpu_create"])
def test_a_rebuilt_vm_that_is_seen_in_part_has_no_phase(lost: Op) -> None:
    history = rebuilt(started=True)
    seen = [event.op for event in history.events].index(lost, 9) + 1
    after_loss = [*history.events[:8], Event.lost(0, seen - 8), *history.events[seen:]]
    found, *late = seen_late(history, seen, seen_sregs=True, ran_known=True)
    found = found._replace(ran=True)  # debugfs still shows the old VM
    for events in (after_loss, [found, *late]):
        facts = [fact for fact in feed(events) if isinstance(fact, Call)]
        assert {fact.phase for fact in facts if fact.event.ts >= seen} == {"unknown"}


def test_a_vm_after_execve_is_not_rebuilt() -> None:
    """Each of its vCPUs is created by a thread of its own (cpr-exec)."""
    history = rebuilt(started=True)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    assert attributions(feed(history.events)) == history.truth


def test_a_rebuilt_vm_whose_predecessor_was_not_seen_has_no_phase() -> None:
    history = rebuilt(started=True)
    at = [event.op for event in history.events].index("vm_create", 1)
    assert {phase for phase, _ in attributions(feed(history.events[at:]))} == {"unknown"}


def stranger(op: str, **fields: object) -> Event:
    """An event of a program other than QEMU."""
    guest = Guest(7, "other")
    event = Event(0, "get", "kvm:7", 7, 7, "other", guest=guest, runner=0, ran=False)
    return event._replace(op=op, **fields)  # type: ignore[arg-type]


MADE = [stranger("vm_create"), stranger("vcpu_create", vcpu=0, after="create")]
ASKED = stranger("get", vcpu=0, after="create", khz=HOST_KHZ)


def test_a_vm_with_one_get_that_is_closed_is_a_probe_and_leaves_no_series() -> None:
    facts = feed([*MADE, ASKED, stranger("vm_end")])
    assert attributions(facts) == [("probe", "init")]
    assert not [fact for fact in facts if isinstance(fact, VmSeen)]


def test_a_vm_that_sets_its_vcpu_up_is_no_probe() -> None:
    facts = feed([*MADE, ASKED, stranger("vcpu_setup", vcpu=0), stranger("vm_end")])
    assert attributions(facts) == [("unknown", "unknown")]
    assert isinstance(facts[0], VmSeen)


def of(vmm: str, *events: Event, restored: bool = False) -> list[tuple[str, str]]:
    guest = Guest(7, vmm, restored=restored)
    return attributions(feed([event._replace(guest=guest) for event in (*MADE, *events)]))


RAN = stranger("get", vcpu=1, after="create", khz=HOST_KHZ, ran=True)
SET_AT_RESTORE = stranger("set", vcpu=0, after="regs", khz=HOST_KHZ)


def test_cloud_hypervisor() -> None:
    assert of("cloud-hypervisor", ASKED) == [("boot", "init")]
    assert of("cloud-hypervisor", ASKED, RAN) == [("boot", "init"), ("hotplug", "init")]
    assert of("cloud-hypervisor", SET_AT_RESTORE) == [("unknown", "unknown")]  # or migrated in
    assert of("cloud-hypervisor", SET_AT_RESTORE, restored=True) == [("loadvm", "unknown")]
    saved = ASKED._replace(after="regs", ran=True)
    assert of("cloud-hypervisor", saved, restored=True) == [("unknown", "unknown")]
    assert of("cloud-hypervisor", ASKED._replace(ran=None)) == [("unknown", "unknown")]


def test_firecracker() -> None:
    at_restore = stranger("set", vcpu=0, after="create", khz=HOST_KHZ)
    assert of("firecracker", ASKED, at_restore) == [("loadvm", "unknown")] * 2
    assert of("firecracker", ASKED._replace(after="regs", ran=True)) == [("unknown", "unknown")]


def test_another_vmm_proves_nothing() -> None:
    assert of("crosvm", ASKED, RAN) == [("unknown", "unknown")] * 2


def test_what_is_past_the_limits_is_counted_and_unknown() -> None:
    attributor = Attributor(max_vms=1, max_vcpus=1)
    first, second = History("kvm:1", 100), History("kvm:2", 200)
    for history in (first, second):
        history.emit("vm_create")
        history.new_vcpu(0, "boot")
    first.new_vcpu(1, "boot")
    facts = feed([*first.events, *second.events], attributor)
    assert [fact.what for fact in facts if isinstance(fact, Dropped)].count("vm") == 1
    assert [fact.what for fact in facts if isinstance(fact, Dropped)].count("vcpu") >= 1
    untracked = [fact for fact in facts if isinstance(fact, Call) and not fact.tracked]
    assert {(call.phase, call.step) for call in untracked} == {("unknown", "unknown")}
    assert {call.event.vm for call in untracked} == {"kvm:1", "kvm:2"}


def test_two_guests_of_one_name_have_two_labels() -> None:
    first, second = History("kvm:1", 100), History("kvm:2", 200)
    for history in (first, second):
        history.emit("vm_create")
        history.events[0] = history.events[0]._replace(guest=Guest(history.pid, "qemu", "web"))
        history.new_vcpu(0, "boot")
    labels = [f.vm for f in feed([*first.events, *second.events]) if isinstance(f, VmSeen)]
    assert labels == ["web", "web-200"]


def test_a_guest_found_at_the_start_is_unknown_until_a_hotplug_proves_itself() -> None:
    history = History("kvm:1", 100)
    history.new_vcpu(0, "boot")
    history.start()
    history.events.clear()
    history.truth.clear()
    found = Event(0, "vm_found", "100:8", 100, 100, "qemu", ran=True, guest=history.guest)
    history.new_vcpu(1, "hotplug")
    history.full_write(1, "hotplug")
    history.write_all("loadvm")
    facts = feed([found, found._replace(op="vcpu_found", vcpu=0), *history.events])
    assert attributions(facts) == history.truth
    assert [fact.vm for fact in facts if isinstance(fact, VmSeen)] == ["guest-100"]


def clock_update(history: History, tid: int) -> Event:
    """A kvm_update_master_clock on a thread, by which alone its VM can be found."""
    history.emit("clock_updated")
    return history.events.pop()._replace(vm="", tid=tid, master_clock=False)


def test_with_two_vms_in_a_process_kvms_view_goes_to_the_one_with_the_thread() -> None:
    pair = [History("kvm:1", 100), History("kvm:2", 100)]
    for number, history in enumerate(pair):
        history.emit("vm_create")
        history.threads[50] = 900 + number  # shifts the thread ids
        history.new_vcpu(number, "boot")
        del history.threads[50]
    pair[1].threads[1] += 10
    pair[1].events = [event._replace(tid=event.tid + 10) for event in pair[1].events]
    for history in pair:  # QEMU has only one
        guest = history.guest._replace(vmm="crosvm")
        history.events = [event._replace(guest=guest) for event in history.events]
    attributor = Attributor()
    feed([*pair[0].events, *pair[1].events], attributor)
    of_second = feed([clock_update(pair[1], pair[1].threads[1])], attributor)
    assert [fact.vm for fact in of_second if isinstance(fact, KvmTscState)] == ["guest-100-100"]
    assert feed([clock_update(pair[1], 100)], attributor) == []  # the main thread's may be either's


def test_kvms_view_of_a_probe_is_ignored() -> None:
    history = History("kvm:1", 100)
    history.emit("vm_create")
    probe = [event._replace(guest=Guest(100, "libvirtd")) for event in history.events]
    assert feed([*probe, clock_update(history, 100)]) == []


@given(st.lists(st.integers(1, 5), max_size=60), st.integers(2, 8))
def test_no_process_pushes_out_what_takes_less(pids: list[int], limit: int) -> None:
    """A process is left out only while no other process has two VMs more than it."""
    attributor = Attributor(max_vms=limit)
    tracked: Counter[int] = Counter()
    for serial, pid in enumerate(pids):
        event = Event(serial, "vm_create", f"kvm:{serial}", pid, pid, "vmm")
        attributor.feed(event)
        tracked = Counter({each: len(vms) for each, vms in attributor._of_process.items()})
        assert sum(tracked.values()) == min(serial + 1, limit)
        for each in set(pids[: serial + 1]):
            made = pids[: serial + 1].count(each)
            assert tracked[each] == made or tracked[each] + 1 >= max(tracked.values())
