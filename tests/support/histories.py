"""Generates valid histories of QEMU VMs for property tests, from the sequences that QEMU issues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hypothesis import strategies as st

from tscwatch.model import After, Event, Guest, Op, Owner, Phase, Step

HOST_KHZ = 2_600_000


@dataclass
class History:
    """The events of one VM's life, and the true phase and step of each of its calls."""

    vm: str
    pid: int
    incoming: bool = False
    owner: Optional[Owner] = None
    events: list[Event] = field(default_factory=list)
    truth: list[tuple[Phase, Step]] = field(default_factory=list)
    syncs: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)
    runners: dict[int, int] = field(default_factory=dict)
    rates: dict[int, int] = field(default_factory=dict)
    generation: set[int] = field(default_factory=set)
    """vCPUs whose TSCs KVM considers synchronised."""
    last_khz: int = 0
    parked: set[int] = field(default_factory=set)
    ran: bool = False
    """The guest has run."""
    vm_ran: bool = False
    """Its present VM has."""

    @property
    def guest(self) -> Guest:
        return Guest(
            self.pid,
            "qemu",
            f"guest-{self.pid}",
            incoming=self.incoming,
            max_vcpus=256,
            owner=self.owner,
        )

    def emit(
        self,
        op: Op,
        vcpu: Optional[int] = None,
        after: Optional[After] = None,
        khz: Optional[int] = None,
        status: int = 0,
    ) -> None:
        on_vcpu = vcpu is not None
        self.events.append(
            Event(
                ts=len(self.events),
                op=op,
                vm=self.vm,
                pid=self.pid,
                tid=self.threads.get(vcpu, self.pid) if vcpu is not None else self.pid,
                comm="qemu-system-x86",
                vcpu=vcpu,
                khz=khz,
                status=status,
                after=after,
                sync=self.syncs.get(vcpu, 0) if vcpu is not None else 0,
                runner=self.runners.get(vcpu, 0) if vcpu is not None else None,
                ran=self.vm_ran if on_vcpu else None,
                guest=self.guest,
            )
        )

    def call(self, vcpu: int, op: Op, after: After, phase: Phase, step: Step, khz: int) -> None:
        self.truth.append((phase, step))
        self.emit(op, vcpu, after, khz)

    def new_vcpu(self, vcpu: int, phase: Phase) -> None:
        self.threads[vcpu] = self.pid + 1 + len(self.threads)
        self.rates[vcpu] = HOST_KHZ
        self.emit("vcpu_create", vcpu, "create")
        self.write_tsc(vcpu)
        self.call(vcpu, "get", "create", phase, "init", HOST_KHZ)
        self.emit("vcpu_setup", vcpu, "create")

    def rebuild(self) -> None:
        """QEMU replaces the VM at a reset (kvm_reset_vmfd), but not its parked vCPUs."""
        self.emit("vm_create")
        threads = {vcpu: self.threads[vcpu] for vcpu in self.plugged}
        requested = dict(self.rates)
        self.syncs, self.runners, self.rates, self.parked = {}, {}, {}, set()
        self.generation, self.last_khz, self.vm_ran = set(), 0, False
        self.threads = dict.fromkeys(threads, self.pid)
        for vcpu in threads:
            self.rates[vcpu] = HOST_KHZ
            self.emit("vcpu_create", vcpu, "create")
            self.write_tsc(vcpu)
            self.call(vcpu, "get", "create", "reset", "init", HOST_KHZ)
            self.call(vcpu, "set", "create", "reset", "init", requested[vcpu])
            self.rates[vcpu] = requested[vcpu]
            self.emit("vcpu_setup", vcpu, "create")
        self.emit("vm_started")  # KVM_SET_CLOCK, also if the guest is stopped
        self.threads = threads
        for vcpu in threads:
            self.full_write(vcpu, "reset", requested[vcpu])

    def unplug(self, vcpu: int, noticed: bool) -> None:
        """QEMU parks the vCPU's file descriptor, and its thread ends."""
        self.parked.add(vcpu)
        if noticed:
            self.emit("vcpu_unplugged", vcpu)

    def replug(self, vcpu: int, khz: int = HOST_KHZ) -> None:
        """QEMU uses the parked file descriptor again, on a new thread."""
        self.parked.discard(vcpu)
        self.threads[vcpu] += 1000
        self.call(vcpu, "get", "regs", "hotplug", "init", self.rates[vcpu])
        self.full_write(vcpu, "hotplug", khz)

    def full_write(self, vcpu: int, phase: Phase, khz: int = HOST_KHZ) -> None:
        self.syncs[vcpu] = self.syncs.get(vcpu, 0) + 1
        self.call(vcpu, "get", "sregs", phase, "post_init", self.rates[vcpu])
        self.call(vcpu, "set", "sregs", phase, "post_init", khz)
        self.rates[vcpu] = khz
        self.write_tsc(vcpu)

    def write_tsc(self, vcpu: int) -> None:
        """Write the vCPU's TSC, as kvm_synchronize_tsc handles it."""
        if self.rates[vcpu] != self.last_khz:
            self.generation.clear()
        self.last_khz = self.rates[vcpu]
        self.generation.add(vcpu)
        self.emit("tsc_tracked", vcpu)
        self.events[-1] = self.events[-1]._replace(
            vm="",
            matched_vcpus=len(self.generation) - 1,
            online_vcpus=len(self.rates),
            master_clock=True,
        )

    @property
    def plugged(self) -> list[int]:
        return [vcpu for vcpu in self.threads if vcpu not in self.parked]

    def write_all(self, phase: Phase, khz: int = HOST_KHZ) -> None:
        for vcpu in self.plugged:
            self.full_write(vcpu, phase, khz)

    def reset(self) -> None:
        """A reset writes all registers, but not the TSC's frequency."""
        for vcpu in self.plugged:
            self.syncs[vcpu] = self.syncs.get(vcpu, 0) + 1
            self.write_tsc(vcpu)

    def start(self) -> None:
        self.ran = self.vm_ran = True
        self.runners.update({vcpu: self.threads[vcpu] for vcpu in self.plugged})
        self.emit("vm_started")


@st.composite
def histories(draw: st.DrawFn, serial: int = 0) -> History:
    """A whole life: any number of boot vCPUs in any order of ids, then any moments."""
    history = History(f"kvm:{serial}", 10_000 * (serial + 1), draw(st.booleans()))
    history.emit("vm_create")
    ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True))
    for vcpu in ids:
        history.new_vcpu(vcpu, "boot")
    history.write_all("boot")
    history.reset()
    moments = st.sampled_from(["plug", "load", "start", "reset", "unplug", "replug", "rebuild"])
    phase: Phase
    for moment in draw(st.lists(moments, max_size=8)):
        if moment == "plug":
            phase = "hotplug" if history.ran else "prelaunch"
            new = 100 + len(history.threads)
            history.new_vcpu(new, phase)
            history.full_write(new, phase)
        elif moment == "load" and history.vm_ran == history.ran:  # a new VM starts before a load
            waiting = history.incoming and not history.ran
            phase = "incoming" if waiting else "loadvm"
            history.write_all(phase, draw(st.sampled_from([HOST_KHZ, 9])))
        elif moment == "start":
            history.start()
        elif moment == "reset":
            history.reset()
        elif moment == "rebuild" and history.ran:
            history.rebuild()
        elif moment == "unplug" and history.ran and len(history.plugged) > 1:
            vcpu = draw(st.sampled_from(history.plugged))
            history.runners.setdefault(vcpu, history.threads[vcpu])
            history.unplug(vcpu, noticed=draw(st.booleans()))
        elif moment == "replug" and history.parked:
            history.replug(draw(st.sampled_from(sorted(history.parked))))
            history.start()
    if draw(st.booleans()):
        history.emit("vm_end")
    return history


def seen_late(history: History, first: int, seen_sregs: bool, ran_known: bool) -> list[Event]:
    """Return what a tscwatch sees that attaches right before the event number ``first``.

    The VM and its vCPUs are found in /proc; earlier commands on the vCPUs are not known.

    :param seen_sregs: whether the write of special registers before the first call was seen.
    :param ran_known: whether debugfs can be read.
    """
    before, later = history.events[:first], history.events[first:]
    if not before or any(event.op == "vm_end" for event in before):
        return later
    ran = next((event.ran for event in reversed(before) if event.ran is not None), False)
    known = ran if ran_known else None
    there = sorted({event.vcpu for event in before if event.vcpu is not None})
    found = before[0]._replace(op="vm_found", vm=f"{history.pid}:9", ran=known, fd=9)
    events = [found, *(found._replace(op="vcpu_found", vcpu=vcpu) for vcpu in there)]
    syncs = {event.vcpu: event.sync for event in before}
    if later and not seen_sregs:
        syncs[later[0].vcpu] = later[0].sync
    blind = set(there)
    for event in later:
        base = syncs.get(event.vcpu, 0)
        if event.vcpu is not None and (event.sync > base or event.op == "vcpu_create"):
            blind.discard(event.vcpu)
        events.append(
            event._replace(
                sync=max(0, event.sync - base),
                after=None if event.vcpu in blind else event.after,
                ran=event.ran if ran_known else None,
                guest=None,
            )
        )
    return events
