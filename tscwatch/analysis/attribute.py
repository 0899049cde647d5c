"""Which lifecycle phase and step a TSC call belongs to.

Pure and ordered: an attribution rests on what came before it for the same VM, never on elapsed
time, and is ``unknown`` if that does not prove one.

What QEMU does (``target/i386/kvm/kvm.c``), and so what counts as proof:

* ``kvm_arch_init_vcpu`` calls before the vCPU's first ``KVM_SET_CPUID2``: step ``init``.  A
  parked vCPU that is plugged again has been set up before, but calls from a new thread.
* ``kvm_arch_put_registers`` at full state calls between ``KVM_SET_SREGS(2)`` and
  ``KVM_SET_REGS``: step ``post_init``.
* ``qdev_machine_creation_done`` writes the full state of all vCPUs once, after the last boot vCPU
  was created and before the VM can run.  A vCPU created after that is plugged: ``prelaunch``
  while the VM has never run, ``hotplug`` once it has.  Its first full-state write belongs to the
  plug.
* At the reset of a confidential guest, QEMU replaces the VM by another one (``kvm_reset_vmfd``).
  The thread that creates the new VM also creates its vCPUs (``kvm_rebind_vcpus``); any other vCPU
  of QEMU's is created by its own thread.  The first full-state write of such a vCPU belongs to the
  ``reset``.
* Any other full-state write is the end of a load (``qemu_loadvm_state``): ``incoming`` or
  ``loadvm``.  It is one of a round over all vCPUs (``cpu_synchronize_all_post_init``).

Other VMMs prove less:

* Cloud Hypervisor reads the frequency in ``configure_vcpu``, before ``KVM_SET_CPUID2``, and sets it
  only when it restores a vCPU's state.
* Firecracker calls neither, except to make a snapshot, or to restore one, then before
  ``KVM_SET_CPUID2``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Optional

from tscwatch import vmm
from tscwatch.model import (
    After,
    Call,
    Contradiction,
    Dropped,
    Event,
    Fact,
    Guest,
    KvmTscState,
    Phase,
    Step,
    TscLines,
    VcpuFound,
    VcpuPlugged,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
    VmStarted,
)

_SPARE_THREADS = 16
"""Threads of a VM, beside those of its vCPUs, whose last entered function is kept."""

_Attribution = tuple[Phase, Step, tuple[str, ...]]
_BlockKey = tuple[Step, int, int, Optional[After]]


@dataclass
class _Vcpu:
    tid: int
    phase: Phase = "unknown"
    """Phase of its creation or last plug; ``unknown`` if it is older than tscwatch."""
    evidence: tuple[str, ...] = ("vcpu:found",)
    found: bool = False
    """It is older than tscwatch, and has not been plugged since."""
    first_write: Optional[int] = None
    """``Event.sync`` of the full-state write that belongs to its creation or plug."""
    block_key: Optional[_BlockKey] = None
    block: int = 0
    gets: int = 0
    """GETs in the present block."""
    unplugged: bool = False


@dataclass(eq=False)
class _Vm:
    name: str
    guest: Guest
    vmm: vmm.Vmm
    seen_created: bool
    keys: set[str]
    ran: bool = False
    """Known to have run; False does not prove the contrary."""
    creator: Optional[int] = None
    """The thread of QEMU that created it, which is the main thread if that was not seen; None for
    other VMMs."""
    predecessor_ran: Optional[bool] = None
    """Whether the VM that its process had before is known to have run; None if it had none."""
    rebuilt: bool = False
    """It replaces that VM after a reset."""
    published: bool = False
    """A ``VmSeen`` was yielded: it is more than a probe."""
    no_events_lost: bool = True
    written: bool = False
    """Some vCPU has had its full-state write."""
    vcpus: dict[int, _Vcpu] = field(default_factory=dict)
    write_round: int = 0
    unwritten: set[int] = field(default_factory=set)
    """vCPUs whose full-state write is still to come in this round or plug."""
    possible_probe: Optional[Event] = None
    """A GET that is held back until it is clear whether the VM only probes KVM."""
    entered: dict[int, str] = field(default_factory=dict)
    """The function of :attr:`Vmm.steps` that each thread has entered last."""
    cause: Optional[str] = None
    """The function of :attr:`Vmm.causes` that the VMM has entered last."""
    kvm_state: Optional[KvmTscState] = None

    @property
    def is_qemu(self) -> bool:
        return self.vmm is vmm.QEMU


class Attributor:
    """The state machines of all VMs on a host.

    :param max_vms: VMs that are tracked at the same time.
    :param max_vcpus: vCPUs that are tracked at the same time, over all VMs.
    """

    def __init__(self, max_vms: int = 1024, max_vcpus: int = 16384) -> None:
        self.max_vms = max_vms
        self.max_vcpus = max_vcpus
        self._vms: dict[str, _Vm] = {}
        self._of_process: dict[int, list[_Vm]] = {}
        self._names: set[str] = set()
        self._vcpus = 0
        self._handlers: dict[str, Callable[[Event], list[Fact]]] = {
            "vm_create": self._vm_appears,
            "vm_found": self._vm_appears,
            "vm_started": self._vm_started,
            "vm_end": self._vm_end,
            "vcpu_create": self._vcpu_appears,
            "vcpu_found": self._vcpu_appears,
            "vcpu_setup": self._vcpu_setup,
            "vcpu_unplugged": self._vcpu_unplugged,
            "get": self._call,
            "set": self._call,
            "tsc_tracked": self._tsc_tracked,
            "clock_updated": self._clock_updated,
            "tsc_lines": self._tsc_lines,
            "entered": self._entered,
            "lost": self._lost,
        }

    def feed(self, event: Event) -> list[Fact]:
        """Return what an event means, in order."""
        return self._handlers[event.op](event)

    # The lives of VMs and vCPUs

    def _vm_appears(self, event: Event) -> list[Fact]:
        facts: list[Fact] = []
        replaced = self._replaced_by(event)
        for old in replaced:
            facts += self._end(old, event.ts)
        if len(self._names) >= self.max_vms:
            room = self._make_room(event, len)
            facts += [*(room or ()), Dropped("vm")]
            if room is None:
                return facts
        seen_created = event.op == "vm_create"
        vm = self._track(event, seen_created)
        before = [old for old in replaced if old.guest.pid == event.pid]
        if before:
            vm.predecessor_ran = any(old.ran for old in before)
            self._rename(vm, before[0])
        if not seen_created and (vm.is_qemu or vm.ran):
            facts.append(_publish(vm))
        return facts

    def _replaced_by(self, event: Event) -> list[_Vm]:
        """Return the VMs that end at the latest with this event, which is about another one.

        QEMU has one VM at a time (``KVMState.vmfd``), although the old one lives on in the kernel
        until the last of its vCPUs is closed.  If the kernel has reused a VM's address, its end was
        missed.
        """
        replaced = [self._vms[event.vm]] if event.vm in self._vms else []
        if event.op == "vm_create" and event.guest and vmm.of_guest(event.guest) is vmm.QEMU:
            siblings = self._of_process.get(event.pid, ())
            replaced += [vm for vm in siblings if vm not in replaced]
        return replaced

    def _track(self, event: Event, seen_created: bool) -> _Vm:
        guest = event.guest or Guest(event.pid, event.comm)
        name = self._unique_name(guest)
        vm = _Vm(name, guest, vmm.of_guest(guest), seen_created, {event.vm}, ran=bool(event.ran))
        if vm.is_qemu:
            vm.creator = event.tid if seen_created else guest.pid
        self._names.add(name)
        self._vms[event.vm] = vm
        self._of_process.setdefault(guest.pid, []).append(vm)
        return vm

    def _rename(self, vm: _Vm, before: _Vm) -> None:
        """Give a VM the name of the one before it, which may not be the first choice any more."""
        if vm.guest.name == before.guest.name:
            self._names.discard(vm.name)
            self._names.add(before.name)
            vm.name = before.name

    def _unique_name(self, guest: Guest) -> str:
        name = guest.name or str(guest.pid)
        if guest.name and name in self._names:
            name = f"{guest.name}-{guest.pid}"
        serial, unique = 1, name
        while unique in self._names:
            serial += 1
            unique = f"{name}-{serial}"
        return unique

    def _find(self, event: Event) -> Optional[_Vm]:
        """Return the event's VM; one that was found in /proc is matched by its process."""
        vm = self._vms.get(event.vm)
        if vm is not None:
            return vm
        same_process = [
            found
            for found in self._of_process.get(event.pid, ())
            if not found.seen_created and len(found.keys) == 1
        ]
        if len(same_process) == 1:
            vm = same_process[0]
            vm.keys.add(event.vm)
            self._vms[event.vm] = vm
        elif len(self._names) < self.max_vms:
            vm = self._track(event, seen_created=False)
        return vm

    def _vm_started(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        if vm is None:
            return []
        # KVM_SET_CLOCK is also a part of the reset that rebuilds a VM, even if that is not resumed.
        vm.ran = vm.ran or not vm.rebuilt
        vm.unwritten.clear()
        return [VmStarted(event.ts, vm.name, vm.guest)] if vm.published else []

    def _vm_end(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        return [] if vm is None else self._end(vm, event.ts)

    def _end(self, vm: _Vm, ts: int) -> list[Fact]:
        facts: list[Fact] = []
        if vm.possible_probe is not None:
            evidence = ("vm:closed-without-setup",)
            facts.append(Call(vm.possible_probe, vm.name, vm.guest, "probe", "init", evidence))
        if vm.published:
            facts.append(VmEnded(vm.name, ts))
        for key in vm.keys:
            del self._vms[key]
        siblings = self._of_process[vm.guest.pid]
        siblings.remove(vm)
        if not siblings:
            del self._of_process[vm.guest.pid]
        self._names.discard(vm.name)
        self._vcpus -= len(vm.vcpus)
        return facts

    def _make_room(self, event: Event, size: Callable[[list[_Vm]], int]) -> Optional[list[Fact]]:
        """Stop tracking a VM of the process that takes most, unless the event's own takes as much.

        QEMU has one process per VM, so a process that creates VMs without end displaces only its
        own.

        :returns: what follows; None if there is no room for the event's VM or vCPU.
        """
        greedy = max(self._of_process.values(), key=size, default=[])
        if size(greedy) <= size(self._of_process.get(event.pid, [])) + 1:
            return None
        return self._end(max(greedy, key=lambda vm: len(vm.vcpus)), event.ts)

    def _vcpu_appears(self, event: Event) -> list[Fact]:
        vm = self._find(event)
        if vm is None or event.vcpu is None:
            return []
        ran = _has_run(vm, event)
        facts = _rule_out_probe(vm) if vm.vcpus else []
        if vm.is_qemu and not vm.published:
            facts.append(_publish(vm))
        known = vm.vcpus.get(event.vcpu)
        if known is None:
            if self._vcpus >= self.max_vcpus:
                room = self._make_room(event, _count_vcpus)
                facts += [*(room or ()), Dropped("vcpu")]
                if room is None:
                    return facts
            self._vcpus += 1
        if event.op == "vcpu_create":
            vm.vcpus[event.vcpu] = vcpu = _Vcpu(event.tid)
            if event.tid == vm.creator:
                _rebuild(vm, event, vcpu)
            else:
                _plug(vm, event, vcpu, ran)
            if vcpu.phase in ("prelaunch", "hotplug"):
                facts.append(VcpuPlugged(event.ts, vm.name, vm.guest, not vm.unwritten))
            return facts
        if known is None:
            vm.vcpus[event.vcpu] = _Vcpu(event.tid, found=True)
        vcpu = vm.vcpus[event.vcpu]
        if event.khz is None:  # it was found in /proc; KVM also reports those that are parked
            vcpu.unplugged = False
        elif event.khz and not vcpu.unplugged:
            present = sum(not vcpu.unplugged for vcpu in vm.vcpus.values())
            found = event.ts, vm.name, vm.guest, event.vcpu, event.khz, present
            facts.append(VcpuFound(*found))
        return facts

    def _vcpu_unplugged(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        if vm is None or event.vcpu is None or event.vcpu not in vm.vcpus:
            return []
        vm.vcpus[event.vcpu].unplugged = True
        vm.unwritten.discard(event.vcpu)
        unplugged = VcpuUnplugged(event.ts, vm.name, vm.guest, event.vcpu, not vm.unwritten)
        return [unplugged] if vm.published else []

    def _vcpu_setup(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        return [] if vm is None else _rule_out_probe(vm)

    def _lost(self, event: Event) -> list[Fact]:
        """Any event may be among the lost ones, so a complete history is no longer proven."""
        affected = self._of_process.get(event.pid, ()) if event.pid else self._vms.values()
        for vm in affected:
            vm.no_events_lost = False
            for vcpu in vm.vcpus.values():
                if vcpu.first_write is None:
                    vcpu.phase, vcpu.evidence = "unknown", ("events:lost",)
        return []

    # KVM's tracepoints and the VMM's functions

    def _tsc_tracked(self, event: Event) -> list[Fact]:
        """KVM does not count the first vCPU of a generation (``kvm_track_tsc_matching``)."""
        vm = self._of_thread(event)
        if vm is None or not vm.published or event.master_clock is None:
            return []
        vm.kvm_state = KvmTscState(
            event.ts,
            vm.name,
            vm.guest,
            event.vcpu,
            event.matched_vcpus + 1,
            event.online_vcpus,
            event.master_clock,
        )
        return [vm.kvm_state]

    def _clock_updated(self, event: Event) -> list[Fact]:
        vm = self._of_thread(event)
        if vm is None or not vm.published or event.master_clock is None:
            return []
        before = vm.kvm_state
        vm.kvm_state = KvmTscState(
            event.ts,
            vm.name,
            vm.guest,
            None,
            before.synchronised if before else None,
            before.online if before else None,
            event.master_clock,
        )
        return [vm.kvm_state]

    def _tsc_lines(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        if vm is None or not vm.published:
            return []
        parked = {index for index, vcpu in vm.vcpus.items() if vcpu.unplugged}
        lines = tuple(line for line in event.lines if line.vcpu not in parked)
        return [TscLines(event.ts, vm.name, vm.guest, lines, event.host_tsc)]

    def _entered(self, event: Event) -> list[Fact]:
        vm, function = self._of_thread(event), event.function
        if vm is None or function is None:
            return []
        if function in vm.vmm.causes:
            vm.cause = function
        elif function in vm.vmm.steps:
            vm.entered[event.tid] = function
            if len(vm.entered) > len(vm.vcpus) + _SPARE_THREADS:
                del vm.entered[next(iter(vm.entered))]
        return []

    def _of_thread(self, event: Event) -> Optional[_Vm]:
        """Return the only VM of the event's process, or the one whose vCPU has its thread."""
        vms = self._of_process.get(event.pid, [])
        if len(vms) > 1:
            vms = [vm for vm in vms if any(v.tid == event.tid for v in vm.vcpus.values())]
        return vms[0] if len(vms) == 1 else None

    # Calls

    def _call(self, event: Event) -> list[Fact]:
        vm = self._find(event)
        if vm is None:
            guest = event.guest or Guest(event.pid, event.comm)
            return [_untracked(event, str(event.pid), guest, "limit:vms")]
        if _may_be_probe(vm, event):
            vm.possible_probe = event
            return []
        if event.vcpu is None:
            return _call_on_vm(event, vm)
        vcpu = vm.vcpus.get(event.vcpu)
        if vcpu is None:
            return self._call_on_unseen_vcpu(event, vm)
        facts = _rule_out_probe(vm)
        vcpu.unplugged = False
        attribute = _ATTRIBUTIONS.get(vm.vmm.name, _attribute_other)
        phase, step, evidence = attribute(vm, vcpu, event, _has_run(vm, event))
        new_block = _count(vcpu, step, event)
        if new_block and step == "post_init":
            is_first = event.sync == vcpu.first_write
            may_be_load = vcpu.found and not _on_new_thread(vcpu, event)
            _begin_write(vm, event, plugged=is_first and not may_be_load)
        if step == "post_init":
            vcpu.tid = event.tid  # it runs on the vCPU's own thread, unlike the init of a rebuild
        if step != "init":
            _finish_write(vm, vcpu, event)
        function = vm.entered.get(event.tid)
        confirmed = function and vm.vmm.confirms(phase, step, vm.cause, function)
        if confirmed:
            evidence = (*evidence, "symbols")
        elif confirmed is False:
            facts.append(_contradiction(vm, event, phase, step, evidence))
        return [
            *facts,
            Call(
                event,
                vm.name,
                vm.guest,
                phase,
                step,
                evidence,
                block=vcpu.block,
                write_round=vm.write_round,
                vcpu_written=event.vcpu not in vm.unwritten,
                all_written=not vm.unwritten,
            ),
        ]

    def _call_on_unseen_vcpu(self, event: Event, vm: _Vm) -> list[Fact]:
        """The vCPU is older than tscwatch, or was dropped because of the limit."""
        facts = self._vcpu_appears(event._replace(op="vcpu_found", khz=None))
        if any(isinstance(fact, Dropped) for fact in facts):
            return [*facts, _untracked(event, vm.name, vm.guest, "limit:vcpus")]
        return [*facts, *self._call(event)]


# Probes


def _publish(vm: _Vm) -> VmSeen:
    vm.published = True
    return VmSeen(vm.name, vm.guest)


def _may_be_probe(vm: _Vm, event: Event) -> bool:
    """Return whether this GET may be all that the VM is for, before it is closed again.

    libvirt's ``virHostCPUGetTscInfo`` creates such VMs, and so does :mod:`tscwatch.host.tsc`.
    """
    nothing_else = not vm.vcpus if event.vcpu is None else event.after == "create"
    return (
        vm.vmm is vmm.OTHER
        and vm.seen_created
        and not vm.published
        and vm.possible_probe is None
        and event.op == "get"
        and nothing_else
        and len(vm.vcpus) <= 1
    )


def _rule_out_probe(vm: _Vm) -> list[Fact]:
    """Publish a VM: what happens on it now proves that it is no probe."""
    if vm.published:
        return []
    facts: list[Fact] = [_publish(vm)]
    if vm.possible_probe is not None:
        evidence = (f"vmm:{vm.guest.vmm}",)
        facts.append(Call(vm.possible_probe, vm.name, vm.guest, "unknown", "unknown", evidence))
        vm.possible_probe = None
    return facts


# Phases and steps


def _attribute_qemu(vm: _Vm, vcpu: _Vcpu, event: Event, ran: Optional[bool]) -> _Attribution:
    if event.after == "create" and event.tid != vcpu.tid:  # its creation was lost
        return "unknown", "init", ("after:create", "vcpu:another-thread")
    if event.after == "create":
        return vcpu.phase, "init", ("after:create", *vcpu.evidence)
    if event.after == "sregs":
        phase, evidence = _phase_of_write(vm, vcpu, event, ran)
        return phase, "post_init", ("after:sregs", *evidence)
    same_block = _block_key("init", event) == vcpu.block_key
    if event.after and (same_block or _on_new_thread(vcpu, event)):
        if not same_block:
            _plug(vm, event, vcpu, ran)
        return vcpu.phase, "init", ("vcpu:new-thread", *vcpu.evidence)
    return "unknown", "unknown", (f"after:{event.after or 'unseen'}",)


def _attribute_cloud_hypervisor(
    vm: _Vm, _vcpu: _Vcpu, event: Event, ran: Optional[bool]
) -> _Attribution:
    evidence = (f"vmm:{vm.guest.vmm}",)
    if event.op == "get" and ran is not None and _on_fresh_vcpu(vm, event):
        return "hotplug" if ran else "boot", "init", (*evidence, *_order(event, ran))
    if event.op == "set" and ran is False and vm.guest.restored:
        return "loadvm", "unknown", (*evidence, "cmdline:restore", *_order(event, ran))
    return "unknown", "unknown", evidence


def _attribute_firecracker(
    vm: _Vm, _vcpu: _Vcpu, event: Event, ran: Optional[bool]
) -> _Attribution:
    evidence = (f"vmm:{vm.guest.vmm}",)
    if ran is False and _on_fresh_vcpu(vm, event):
        return "loadvm", "unknown", (*evidence, *_order(event, ran))
    return "unknown", "unknown", evidence


def _attribute_other(vm: _Vm, _vcpu: _Vcpu, _event: Event, _ran: Optional[bool]) -> _Attribution:
    return "unknown", "unknown", (f"vmm:{vm.guest.vmm}",)


_ATTRIBUTIONS: dict[str, Callable[[_Vm, _Vcpu, Event, Optional[bool]], _Attribution]] = {
    vmm.QEMU.name: _attribute_qemu,
    vmm.CLOUD_HYPERVISOR.name: _attribute_cloud_hypervisor,
    vmm.FIRECRACKER.name: _attribute_firecracker,
}


def _on_fresh_vcpu(vm: _Vm, event: Event) -> bool:
    return event.after == "create" and vm.seen_created and vm.no_events_lost


def _order(event: Event, ran: bool) -> tuple[str, str]:
    return f"after:{event.after}", "vm:ran" if ran else "vm:never-ran"


def _call_on_vm(event: Event, vm: _Vm) -> list[Fact]:
    """A VM-scoped call: QEMU sets the default before it creates the first vCPU (TDX)."""
    phase: Phase = "unknown"
    evidence: tuple[str, ...] = ("scope:vm",)
    first = vm.seen_created and vm.predecessor_ran is None
    if vm.is_qemu and first and vm.no_events_lost and not vm.vcpus:
        phase, evidence = "boot", ("scope:vm", "vm:no-vcpu-yet")
    call = Call(event, vm.name, vm.guest, phase, "unknown", evidence, write_round=vm.write_round)
    return [*_rule_out_probe(vm), call]


def _untracked(event: Event, vm: str, guest: Guest, reason: str) -> Call:
    return Call(event, vm, guest, "unknown", "unknown", (reason,), tracked=False)


def _rebuild(vm: _Vm, event: Event, vcpu: _Vcpu) -> None:
    """A vCPU of the VM that replaces another one; the guest has run if that one had."""
    vm.rebuilt = vm.written = True
    vm.ran = vm.ran or bool(vm.predecessor_ran)
    vcpu.phase, vcpu.evidence = "reset", ("thread:created-the-vm", "process:had-a-vm")
    if vm.predecessor_ran is None:
        vcpu.phase, vcpu.evidence = "unknown", ("thread:created-the-vm",)
    if event.vcpu is not None:
        vm.unwritten.add(event.vcpu)


def _plug(vm: _Vm, event: Event, vcpu: _Vcpu, ran: Optional[bool]) -> None:
    vcpu.tid = event.tid
    vcpu.found = False
    vcpu.first_write = None
    vcpu.phase, vcpu.evidence = _phase_of_new_vcpu(vm, ran)
    if vm.is_qemu and event.vcpu is not None:
        vm.unwritten.add(event.vcpu)


def _phase_of_new_vcpu(vm: _Vm, ran: Optional[bool]) -> tuple[Phase, tuple[str, ...]]:
    if ran:
        return "hotplug", ("vm:ran",)
    if not vm.seen_created:
        return "unknown", ("vm:found",)
    if not vm.no_events_lost:
        return "unknown", ("events:lost",)
    if not vm.written:
        return "boot", ("machine:incomplete",)
    if ran is None:
        return "unknown", ("vm:ran-unknown",)
    return "prelaunch", ("machine:complete", "vm:never-ran")


def _phase_of_write(
    vm: _Vm, vcpu: _Vcpu, event: Event, ran: Optional[bool]
) -> tuple[Phase, tuple[str, ...]]:
    if vcpu.first_write is None:
        vcpu.first_write = event.sync
    if not vm.no_events_lost and event.runner != event.tid:
        return "unknown", ("events:lost",)
    if vcpu.first_write != event.sync:
        return _phase_of_load(vm, ran)
    if vcpu.found and ran and event.runner == event.tid:
        return "loadvm", ("vm:ran", "vcpu:runs-on-this-thread")
    if vcpu.phase == "boot" and ran:
        return "unknown", ("vm:ran",)
    return vcpu.phase, vcpu.evidence


def _phase_of_load(vm: _Vm, ran: Optional[bool]) -> tuple[Phase, tuple[str, ...]]:
    if ran:
        return "loadvm", ("vcpu:written-before", "vm:ran")
    if not vm.guest.incoming:
        return "loadvm", ("vcpu:written-before", "cmdline:no-incoming")
    if ran is None:
        return "unknown", ("vm:ran-unknown", "cmdline:incoming")
    return "incoming", ("vcpu:written-before", "vm:never-ran", "cmdline:incoming")


def _on_new_thread(vcpu: _Vcpu, event: Event) -> bool:
    if event.runner:
        return event.runner != event.tid
    return not vcpu.found and vcpu.tid != event.tid


def _has_run(vm: _Vm, event: Event) -> Optional[bool]:
    """Return whether the guest has run; that a rebuilt VM has not does not prove the contrary."""
    vm.ran = vm.ran or bool(event.ran)
    if vm.ran:
        return True
    return None if vm.rebuilt else event.ran


# Blocks of calls and rounds of writes


def _count(vcpu: _Vcpu, step: Step, event: Event) -> bool:
    """Number the runs of ``kvm_arch_set_tsc_khz``; return True for the first call of one."""
    key = _block_key(step, event)
    new = step == "unknown" or key != vcpu.block_key
    if new:
        vcpu.block_key, vcpu.block, vcpu.gets = key, vcpu.block + 1, 0
    vcpu.gets += event.op == "get"
    return new


def _block_key(step: Step, event: Event) -> _BlockKey:
    return step, event.sync, event.tid, event.after


def _begin_write(vm: _Vm, event: Event, plugged: bool) -> None:
    vm.written = True
    if not plugged and event.vcpu not in vm.unwritten:
        vm.write_round += 1
        vm.unwritten = {index for index, vcpu in vm.vcpus.items() if not vcpu.unplugged}


def _finish_write(vm: _Vm, vcpu: _Vcpu, event: Event) -> None:
    """QEMU is done with a vCPU after a SET that succeeded, or after the second GET."""
    if event.vcpu is not None and (vcpu.gets > 1 or (event.op == "set" and event.status == 0)):
        vm.unwritten.discard(event.vcpu)


def _contradiction(
    vm: _Vm, event: Event, phase: Phase, step: Step, evidence: tuple[str, ...]
) -> Contradiction:
    """The sequence of calls and QEMU's functions disagree."""
    cause = f"after {vm.cause}" if vm.cause else "after no function that would explain it"
    detail = (
        f"by its sequence ({', '.join(evidence)}) the {event.op.upper()} on vCPU {event.vcpu} is "
        f"{phase}/{step}, but QEMU is in {vm.entered[event.tid]}, {cause}"
    )
    return Contradiction(event.ts, vm.name, vm.guest, "phase", detail)


def _count_vcpus(vms: list[_Vm]) -> int:
    return sum(len(vm.vcpus) for vm in vms)
