"""What each kind of mismatch and each phase means, where it comes from, what to do."""

from __future__ import annotations

from typing import NamedTuple

from tscwatch.model import Kind, Phase


class Explanation(NamedTuple):
    """Three answers."""

    meaning: str
    origin: str
    advice: str


_PIN = "pin the guest's frequency (QEMU's tsc-frequency, libvirt's <timer name='tsc'>)"

KINDS: dict[Kind, Explanation] = {
    "refused": Explanation(
        "KVM refused a frequency. It reports that frequency from then on, but the guest does not "
        "get it.",
        "KVM_SET_TSC_KHZ fails: kvm_set_tsc_khz stores what it is asked for before it checks "
        "whether the hardware can scale to it.",
        "choose a frequency that this host has, or a host that scales.",
    ),
    "withheld": Explanation(
        "QEMU wanted a frequency and did not even ask KVM for it. After a migration it only warns.",
        "kvm_arch_set_tsc_khz in QEMU: GET, GET where GET, SET would be, when the hardware does "
        "not scale and the frequency is more than 250 ppm off.",
        "migrate the guest to a host of its frequency, or to one that scales.",
    ),
    "vcpu_skew": Explanation(
        "vCPUs of one guest were given different frequencies: they disagree about time, and KVM "
        "takes its master clock from the guest.",
        "mostly a vCPU plugged after a migration: kvm_arch_vcpu_create starts it at the new "
        "host's frequency, and QEMU's kvm_arch_init_vcpu takes that for its own.",
        f"unplug the vCPU that differs, or restart the guest; then {_PIN}.",
    ),
    "configured": Explanation(
        "The guest does not have the frequency that its command line asks for.",
        "-cpu MODEL,tsc-frequency=HZ beside the last SET on the vCPU.",
        "correct the one or the other; a migration brings its source's frequency.",
    ),
    "readback": Explanation(
        "KVM reports another frequency than was set last.",
        "KVM_GET_TSC_KHZ returns vcpu->arch.virtual_tsc_khz.",
        "find who else calls KVM on this vCPU, and report it: this is a bug in KVM or in us.",
    ),
    "unscaled": Explanation(
        "The guest was given a frequency that it does not get: it ticks at the host's.",
        "kvm_set_tsc_khz does not scale inside kvm.tsc_tolerance_ppm; above the host's frequency, "
        "without scaling, it only catches up at each entry.",
        f"keep the guest on hosts of its frequency, or on hosts that scale; else {_PIN}.",
    ),
    "changed": Explanation(
        "A running vCPU was given another frequency, by no load.",
        "KVM_SET_TSC_KHZ on a vCPU that has run, outside QEMU's full-state write.",
        "find the process that did it in the log: QEMU never does.",
    ),
}

PHASES: dict[Phase, Explanation] = {
    "boot": Explanation(
        "The machine is being made: its first vCPUs, up to its completion.",
        "kvm_arch_init_vcpu for each vCPU (init), then qdev_machine_creation_done, which writes "
        "the state of all (post_init).",
        "nothing: every guest begins so.",
    ),
    "prelaunch": Explanation(
        "A vCPU was added to a complete machine that has never run, also while it awaits a "
        "migration.",
        "device_add under -S or -incoming: kvm_arch_init_vcpu, then cpu_common_realizefn.",
        "nothing: libvirt does so for a guest that had hotplugged vCPUs.",
    ),
    "hotplug": Explanation(
        "A vCPU was added to a machine that has run.",
        "device_add: kvm_arch_init_vcpu, then cpu_common_realizefn. A vCPU that was unplugged "
        "comes again without KVM_CREATE_VCPU.",
        "watch for vcpu_skew: this is where it comes from.",
    ),
    "incoming": Explanation(
        "The state of all vCPUs was written at the end of an incoming migration.",
        "qemu_loadvm_state, or loadvm_postcopy_handle_run_bh: cpu_synchronize_all_post_init.",
        "nothing: each vCPU gets the source's frequency.",
    ),
    "loadvm": Explanation(
        "The state of all vCPUs was written from a snapshot.",
        "load_snapshot: qemu_loadvm_state, cpu_synchronize_all_post_init.",
        "nothing: each vCPU gets the snapshot's frequency.",
    ),
    "probe": Explanation(
        "A throw-away VM that only asked for the host's frequency.",
        "libvirt's virHostCPUGetTscInfo, and tscwatch's own look at the host.",
        "nothing: it has no series.",
    ),
    "unknown": Explanation(
        "What was seen does not prove a phase: tscwatch came later than the guest, events were "
        "lost, or another program than QEMU made the call.",
        "the evidence in the call's line.",
        "nothing: the guest's next load or plug is known again.",
    ),
}

TOPICS: dict[str, Explanation] = dict([*KINDS.items(), *PHASES.items()])
