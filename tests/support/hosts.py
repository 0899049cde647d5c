"""A published state that is as full as that of a real host with bcc and kprobes."""

from __future__ import annotations

from tests.support.histories import HOST_KHZ, History
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Event, Health, Host, Line, Owner, PerVcpu, SourceInfo
from tscwatch.publish.state import State

_VCPUS = 8
_PROBES = (
    *("kvm_vcpu_ioctl", "kvm_arch_vm_ioctl", "kvm_arch_init_vm", "kvm_arch_vcpu_postcreate"),
    *("kvm_arch_destroy_vm", "kvm_arch_vcpu_ioctl", "kvm_track_tsc", "kvm_update_master_clock"),
)
_LOSSES = (
    *("ring_full", "no_return", "no_slot", "throttled", "disabled"),
    *("witness_full", "witness_unreadable", "witness_disabled"),
)


def a_host(vms: int, skewed: int = 0, per_vcpu: PerVcpu = "differing") -> State:
    """Return the state of a host with guests of 8 vCPUs, each of which has an owner.

    :param skewed: in how many guests the last vCPU was plugged apart from the others, and ticks at
        another rate.
    """
    state, pipeline = State(per_vcpu=per_vcpu), Pipeline()
    for item in pipeline.feed(Host(HOST_KHZ, True, 0, "tsc", shows_lines=True)):
        state.update(item)
    for serial in range(vms):
        for event in _life(1000 * (serial + 1), serial < skewed):
            for item in pipeline.feed(event):
                state.update(item)
    health = Health(dict.fromkeys(_PROBES, True), 1, 1, {("kernel", name): 0 for name in _LOSSES})
    state.update_health(SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl"), health)
    return state


def _life(pid: int, is_skewed: bool) -> list[Event]:
    """Return the events of a guest that boots, and whose last vCPU is plugged."""
    vm = History(f"kvm:{pid}", pid, owner=Owner("openstack", name="db", project="shop"))
    vm.emit("vm_create")
    for vcpu in range(_VCPUS - 1):
        vm.new_vcpu(vcpu, "boot")
    vm.write_all("boot")
    vm.start()
    last = _VCPUS - 1
    vm.new_vcpu(last, "hotplug")
    vm.full_write(last, "hotplug", HOST_KHZ + 260 * is_skewed)
    own = Line(last, -HOST_KHZ * is_skewed, 1 + 1e-4 * is_skewed)
    lines = (*(Line(vcpu, 0) for vcpu in range(last)), own)
    vm.emit("tsc_lines")
    vm.events[-1] = vm.events[-1]._replace(lines=lines, host_tsc=HOST_KHZ)
    return vm.events
