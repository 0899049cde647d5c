"""What each kind of mismatch and each phase means, where it comes from, what to do."""

from __future__ import annotations

from collections.abc import Mapping

from tscwatch.analysis.mismatch import MISMATCHES, Explanation
from tscwatch.model import Phase

PHASES: Mapping[Phase, Explanation] = {
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

TOPICS: Mapping[str, Explanation] = {
    **{kind: rule.explanation for kind, rule in MISMATCHES.items()},
    **{phase: explanation for phase, explanation in PHASES.items()},
}
