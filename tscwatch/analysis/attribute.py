"""Which lifecycle phase and step a TSC call belongs to.

Pure and ordered: a verdict rests on what came before it for the same VM, never on elapsed
time, and is ``unknown`` where that does not prove one.

What QEMU does (``target/i386/kvm/kvm.c``), and so what is proof:

* ``kvm_arch_init_vcpu`` calls before the vCPU's first ``KVM_SET_CPUID2``: step ``init``.  A
  parked vCPU that is plugged again has been set up before, but calls from a new thread.
* ``kvm_arch_put_registers`` at full state calls between ``KVM_SET_SREGS(2)`` and
  ``KVM_SET_REGS``: step ``post_init``.
* ``qdev_machine_creation_done`` writes full state to all vCPUs once, after the last boot vCPU
  was created and before the VM can run.  A vCPU created after that is plugged:
  ``prelaunch`` while the VM has never run, ``hotplug`` once it has.  Its first full-state
  write belongs to the plug.
* Any other full-state write is the end of a load (``qemu_loadvm_state``): ``incoming`` or
  ``loadvm``.

Of other VMMs less is proven:

* Cloud Hypervisor asks for the frequency in ``configure_vcpu``, before ``KVM_SET_CPUID2``, and sets
  it only when it restores a vCPU's state.
* Firecracker does neither but to restore a snapshot, before ``KVM_SET_CPUID2``, or to make one.
"""

from __future__ import annotations

import errno
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
    VcpuFound,
    VcpuUnplugged,
    VmEnded,
    VmSeen,
    VmStarted,
)

_VMMS = ("qemu", "cloud-hypervisor", "firecracker")
"""These are no throw-away programs that only ask."""

_SPARE_THREADS = 16
"""Of a VM, beside its vCPUs' own, of which it is remembered what they entered."""

_Attribution = tuple[Phase, Step, tuple[str, ...]]
_BlockKey = tuple[Step, int, int, Optional[After]]


@dataclass
class _Vcpu:
    tid: int
    phase: Phase = "unknown"
    """Of its creation or of its last plug; ``unknown`` for one that was there before us."""
    evidence: tuple[str, ...] = ("vcpu:found",)
    found: bool = False
    first_write: Optional[int] = None
    """The full-state write that belongs to its creation or plug."""
    block_key: Optional[_BlockKey] = None
    block: int = 0
    gets: int = 0
    unplugged: bool = False


@dataclass(eq=False)
class _Vm:
    name: str
    guest: Guest
    seen_created: bool
    keys: set[str]
    ran: bool = False
    """Known to have run; False is no proof of the contrary."""
    published: bool = False
    no_events_lost: bool = True
    """No event was lost while the machine was still being made."""
    written: bool = False
    """Some vCPU has had its full-state write."""
    vcpus: dict[int, _Vcpu] = field(default_factory=dict)
    wave: int = 0
    waiting: set[int] = field(default_factory=set)
    """vCPUs whose full-state write is still to come in this wave or plug."""
    held: Optional[Event] = None
    entered: dict[int, str] = field(default_factory=dict)
    """The function of :data:`symbols.STEPS` that each thread has entered last."""
    cause: Optional[str] = None
    """The one of :data:`symbols.PHASES` that QEMU has entered last."""

    @property
    def is_qemu(self) -> bool:
        return self.guest.vmm == "qemu"


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
            "tsc_tracked": self._kvms_verdict,
            "clock_updated": self._kvms_verdict,
            "entered": self._entered,
            "lost": self._lost,
        }

    def feed(self, event: Event) -> list[Fact]:
        """What an event means, in the order in which it is to be told."""
        return self._handlers[event.op](event)

    # Lives

    def _vm_appears(self, event: Event) -> list[Fact]:
        facts: list[Fact] = []
        if event.vm in self._vms:  # the kernel made a new VM where one was: its end went unseen
            facts += self._vm_end(event)
        if len(self._names) >= self.max_vms:
            room = self._make_room(event, len)
            facts += [*(room or ()), Dropped("vm")]
            if room is None:
                return facts
        seen_created = event.op == "vm_create"
        vm = self._admit(event, seen_created)
        if not seen_created and (vm.is_qemu or vm.ran):
            facts.append(_publish(vm))
        return facts

    def _admit(self, event: Event, seen_created: bool) -> _Vm:
        guest = event.guest or Guest(event.pid, event.comm)
        name = self._unique_name(guest)
        vm = _Vm(name, guest, seen_created, {event.vm}, ran=bool(event.ran))
        self._names.add(name)
        self._vms[event.vm] = vm
        self._of_process.setdefault(guest.pid, []).append(vm)
        return vm

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
        """The event's VM; one that was found in /proc is recognised by its process."""
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
            vm = self._admit(event, seen_created=False)
        return vm

    def _vm_started(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        if vm is None:
            return []
        vm.ran = True
        if not vm.waiting:
            return []
        vm.waiting.clear()
        return [VmStarted(event.ts, vm.name, vm.guest)] if vm.published else []

    def _vm_end(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        return [] if vm is None else self._end(vm, event.ts)

    def _end(self, vm: _Vm, ts: int) -> list[Fact]:
        facts: list[Fact] = []
        if vm.held is not None:
            call = Call(vm.held, vm.name, vm.guest, "probe", "init", ("vm:closed-without-setup",))
            facts.append(call)
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
        """Give up a VM of the process that takes most, unless the event's own takes as much.

        QEMU has a process for each VM: so one that makes VMs without end costs only itself.
        """
        greedy = max(self._of_process.values(), key=size, default=[])
        if size(greedy) <= size(self._of_process.get(event.pid, [])) + 1:
            return None
        return self._end(max(greedy, key=lambda vm: len(vm.vcpus)), event.ts)

    def _vcpu_appears(self, event: Event) -> list[Fact]:
        vm = self._find(event)
        if vm is None or event.vcpu is None:
            return []
        ran = self._has_run(vm, event)
        facts = _release(vm) if vm.vcpus else []
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
            self._plug(vm, event, vcpu, ran)
            return facts
        if known is None:
            vm.vcpus[event.vcpu] = _Vcpu(event.tid, found=True)
        if event.op == "vcpu_found" and event.result:
            facts.append(VcpuFound(event.ts, vm.name, vm.guest, event.vcpu, event.result))
        return facts

    def _plug(self, vm: _Vm, event: Event, vcpu: _Vcpu, ran: Optional[bool]) -> None:
        vcpu.tid = event.tid
        vcpu.found = False
        vcpu.first_write = None
        vcpu.phase, vcpu.evidence = _phase_of_newcomer(vm, ran)
        if vm.is_qemu and event.vcpu is not None:
            vm.waiting.add(event.vcpu)

    def _vcpu_unplugged(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        if vm is None or event.vcpu is None or event.vcpu not in vm.vcpus:
            return []
        vm.vcpus[event.vcpu].unplugged = True
        vm.waiting.discard(event.vcpu)
        return [VcpuUnplugged(event.ts, vm.name, vm.guest, event.vcpu, whole=not vm.waiting)]

    def _vcpu_setup(self, event: Event) -> list[Fact]:
        vm = self._vms.get(event.vm)
        return [] if vm is None else _release(vm)

    def _lost(self, event: Event) -> list[Fact]:
        """What was lost is not known, so what rests on having seen all is not proven."""
        whose = self._of_process.get(event.pid, ()) if event.pid else self._vms.values()
        for vm in whose:
            vm.no_events_lost = False
            for vcpu in vm.vcpus.values():
                if vcpu.first_write is None:
                    vcpu.phase, vcpu.evidence = "unknown", ("events:lost",)
        return []

    def _kvms_verdict(self, event: Event) -> list[Fact]:
        """KVM counts the vCPUs that match the first of their generation, without that one."""
        vm = self._by_thread(event)
        if vm is None or not vm.published or event.master_clock is None:
            return []
        tracked = event.op == "tsc_tracked"
        return [
            KvmTscState(
                event.ts,
                vm.name,
                vm.guest,
                event.vcpu,
                event.arg + 1 if tracked else None,
                event.result if tracked else None,
                event.master_clock,
            )
        ]

    def _entered(self, event: Event) -> list[Fact]:
        vm = self._by_thread(event)
        if vm is None:
            return []
        if event.function in vmm.PHASES:
            vm.cause = event.function
        elif event.function in vmm.STEPS:
            vm.entered[event.tid] = event.function
            if len(vm.entered) > len(vm.vcpus) + _SPARE_THREADS:
                del vm.entered[next(iter(vm.entered))]
        return []

    def _by_thread(self, event: Event) -> Optional[_Vm]:
        """The only VM of a process, or the one that has the thread's vCPU."""
        vms = self._of_process.get(event.pid, [])
        if len(vms) > 1:
            vms = [vm for vm in vms if any(v.tid == event.tid for v in vm.vcpus.values())]
        return vms[0] if len(vms) == 1 else None

    # Calls

    def _call(self, event: Event) -> list[Fact]:
        vm = self._find(event)
        if vm is None:
            guest = event.guest or Guest(event.pid, event.comm)
            return [Call(event, str(event.pid), guest, "unknown", "unknown", ("limit:vms",), False)]
        if event.pid != vm.guest.pid and event.result == -errno.EIO:
            # kvm_vcpu_ioctl: not the VM's memory. Another tscwatch looks at vCPUs so.
            whose = ("process:another",)
            return [Call(event, vm.name, vm.guest, "unknown", "unknown", whose, False)]
        if self._may_be_probe(vm, event):
            vm.held = event
            return []
        if event.vcpu is None:
            return self._call_of_vm(event, vm)
        vcpu = vm.vcpus.get(event.vcpu)
        if vcpu is None:
            return self._call_of_stranger(event, vm)
        facts = _release(vm)
        vcpu.unplugged = False
        phase, step, evidence = self._verdict(vm, vcpu, event)
        new_block = self._count(vcpu, step, event)
        if new_block and step == "post_init":
            self._begin_write(vm, event, plugged=event.sync == vcpu.first_write and not vcpu.found)
        if step != "init":
            self._settle(vm, vcpu, event)
        function = vm.entered.get(event.tid)
        agreed = function and vmm.agrees(phase, step, vm.cause, function)
        if agreed:
            evidence = (*evidence, "symbols")
        elif agreed is False:
            facts.append(_doubt(vm, event, phase, step, evidence))
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
                wave=vm.wave,
                vcpu_written=event.vcpu not in vm.waiting,
                whole=not vm.waiting,
            ),
        ]

    def _call_of_vm(self, event: Event, vm: _Vm) -> list[Fact]:
        """The default of the vCPUs to come: QEMU sets it before it makes the first (TDX)."""
        phase: Phase = "unknown"
        evidence: tuple[str, ...] = ("scope:vm",)
        if vm.is_qemu and vm.seen_created and vm.no_events_lost and not vm.vcpus:
            phase, evidence = "boot", ("scope:vm", "vm:no-vcpu-yet")
        call = Call(event, vm.name, vm.guest, phase, "unknown", evidence, wave=vm.wave)
        return [*_release(vm), call]

    def _call_of_stranger(self, event: Event, vm: _Vm) -> list[Fact]:
        """A vCPU that nothing told of: past the limit, or there before us."""
        facts = self._vcpu_appears(event._replace(op="vcpu_found", result=0))
        if any(isinstance(fact, Dropped) for fact in facts):
            call = Call(event, vm.name, vm.guest, "unknown", "unknown", ("limit:vcpus",), False)
            return [*facts, call]
        return [*facts, *self._call(event)]

    def _may_be_probe(self, vm: _Vm, event: Event) -> bool:
        """One GET, of the VM or of its only vCPU, and all is closed again.

        libvirt's virHostCPUGetTscInfo does so, and tscwatch itself (:mod:`tscwatch.host`).
        """
        only_asked = not vm.vcpus if event.vcpu is None else event.after == "create"
        return (
            vm.guest.vmm not in _VMMS
            and vm.seen_created
            and not vm.published
            and vm.held is None
            and event.op == "get"
            and only_asked
            and len(vm.vcpus) <= 1
        )

    def _verdict(self, vm: _Vm, vcpu: _Vcpu, event: Event) -> _Attribution:
        ran = self._has_run(vm, event)
        if not vm.is_qemu:
            return _verdict_of_other(vm, event, ran)
        if event.after == "create":
            return vcpu.phase, "init", ("after:create", *vcpu.evidence)
        if event.after == "sregs":
            phase, evidence = self._phase_of_write(vm, vcpu, event, ran)
            return phase, "post_init", ("after:sregs", *evidence)
        same_block = _block_key("init", event) == vcpu.block_key
        if event.after and (same_block or self._on_new_thread(vcpu, event)):
            if not same_block:
                self._plug(vm, event, vcpu, ran)
            return vcpu.phase, "init", ("vcpu:new-thread", *vcpu.evidence)
        return "unknown", "unknown", (f"after:{event.after or 'unseen'}",)

    def _phase_of_write(
        self, vm: _Vm, vcpu: _Vcpu, event: Event, ran: Optional[bool]
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

    @staticmethod
    def _on_new_thread(vcpu: _Vcpu, event: Event) -> bool:
        if event.runner:
            return event.runner != event.tid
        return not vcpu.found and vcpu.tid != event.tid

    @staticmethod
    def _has_run(vm: _Vm, event: Event) -> Optional[bool]:
        vm.ran = vm.ran or bool(event.ran)
        return True if vm.ran else event.ran

    # Waves

    @staticmethod
    def _count(vcpu: _Vcpu, step: Step, event: Event) -> bool:
        """Number the runs of kvm_arch_set_tsc_khz; True on the first call of one."""
        key = _block_key(step, event)
        new = step == "unknown" or key != vcpu.block_key
        if new:
            vcpu.block_key, vcpu.block, vcpu.gets = key, vcpu.block + 1, 0
        vcpu.gets += event.op == "get"
        return new

    @staticmethod
    def _begin_write(vm: _Vm, event: Event, plugged: bool) -> None:
        vm.written = True
        if not plugged and event.vcpu not in vm.waiting:
            vm.wave += 1
            vm.waiting = {index for index, vcpu in vm.vcpus.items() if not vcpu.unplugged}

    @staticmethod
    def _settle(vm: _Vm, vcpu: _Vcpu, event: Event) -> None:
        """QEMU is done with a vCPU after a SET that succeeded, or after the second GET."""
        if event.vcpu is not None and (vcpu.gets > 1 or (event.op == "set" and event.result == 0)):
            vm.waiting.discard(event.vcpu)


def _doubt(
    vm: _Vm, event: Event, phase: Phase, step: Step, evidence: tuple[str, ...]
) -> Contradiction:
    """The sequence says one thing and QEMU's functions another."""
    cause = vm.cause or "nothing that was seen"
    detail = (
        f"by its sequence ({', '.join(evidence)}) the {event.op.upper()} on vCPU {event.vcpu} is "
        f"{phase}/{step}, but QEMU is in {vm.entered[event.tid]}, after {cause}"
    )
    return Contradiction(event.ts, vm.name, vm.guest, "phase", detail)


def _count_vcpus(vms: list[_Vm]) -> int:
    return sum(len(vm.vcpus) for vm in vms)


def _publish(vm: _Vm) -> VmSeen:
    vm.published = True
    return VmSeen(vm.name, vm.guest)


def _release(vm: _Vm) -> list[Fact]:
    """It is no probe: whatever happens on the VM now proves that."""
    if vm.published:
        return []
    facts: list[Fact] = [_publish(vm)]
    if vm.held is not None:
        evidence = (f"vmm:{vm.guest.vmm}",)
        facts.append(Call(vm.held, vm.name, vm.guest, "unknown", "unknown", evidence))
        vm.held = None
    return facts


def _verdict_of_other(vm: _Vm, event: Event, ran: Optional[bool]) -> _Attribution:
    evidence: tuple[str, ...] = (f"vmm:{vm.guest.vmm}",)
    phase: Phase = "unknown"
    step: Step = "unknown"
    fresh = event.after == "create" and vm.seen_created and vm.no_events_lost and ran is not None
    if vm.guest.vmm == "cloud-hypervisor":
        if event.op == "get" and fresh:
            phase, step = "hotplug" if ran else "boot", "init"
        elif event.op == "set" and ran is False and vm.guest.restored:
            phase, evidence = "loadvm", (*evidence, "cmdline:restore")
    elif vm.guest.vmm == "firecracker" and fresh and not ran:
        phase = "loadvm"
    if phase != "unknown":
        evidence = (*evidence, f"after:{event.after}", "vm:ran" if ran else "vm:never-ran")
    return phase, step, evidence


def _phase_of_newcomer(vm: _Vm, ran: Optional[bool]) -> tuple[Phase, tuple[str, ...]]:
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


def _phase_of_load(vm: _Vm, ran: Optional[bool]) -> tuple[Phase, tuple[str, ...]]:
    if ran:
        return "loadvm", ("vcpu:written-before", "vm:ran")
    if not vm.guest.incoming:
        return "loadvm", ("vcpu:written-before", "cmdline:no-incoming")
    if ran is None:
        return "unknown", ("vm:ran-unknown", "cmdline:incoming")
    return "incoming", ("vcpu:written-before", "vm:never-ran", "cmdline:incoming")


def _block_key(step: Step, event: Event) -> _BlockKey:
    return step, event.sync, event.tid, event.after
