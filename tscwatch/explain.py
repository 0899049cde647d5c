"""Explanations for ``tscwatch explain``: what each kind of mismatch and each phase means.

The explanation of a kind is a part of the kind, in :mod:`tscwatch.analysis.mismatch`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tscwatch.analysis.mismatch import MISMATCHES, Explanation
from tscwatch.model import Phase

PHASES: Mapping[Phase, Explanation] = {
    "boot": Explanation(
        "The machine was being created with its first vCPUs, or had just been completed.",
        "in QEMU, kvm_arch_init_vcpu for each vCPU (step init), then qdev_machine_creation_done, "
        "which writes the full state of all vCPUs (step post_init).",
        "nothing: every guest starts in this way.",
    ),
    "prelaunch": Explanation(
        "A vCPU was added to a complete machine that has never run; it may be waiting for an "
        "incoming migration.",
        "device_add to a QEMU that was started with -S or -incoming: kvm_arch_init_vcpu (step "
        "init), then cpu_common_realizefn (step post_init).",
        "nothing: libvirt adds hotpluggable vCPUs in this way before it starts a guest.",
    ),
    "hotplug": Explanation(
        "A vCPU was added to a machine that has run.",
        "QEMU's device_add: kvm_arch_init_vcpu (step init), then cpu_common_realizefn (step "
        "post_init). For a vCPU that was unplugged before, QEMU uses its old file descriptor "
        "again, without KVM_CREATE_VCPU.",
        "check for desync and vcpu_skew: most often, they come from a hotplug into a guest whose "
        "frequency is not exactly its host's.",
    ),
    "reset": Explanation(
        "The guest was reset, and QEMU rebuilt its VM: it created another one, with new vCPUs.",
        "kvm_reset_vmfd, since QEMU 11: kvm_rebind_vcpus calls kvm_arch_init_vcpu for each vCPU "
        "(step init), then each vCPU's full state is written (step post_init). QEMU does so for "
        "confidential guests, whose vCPUs cannot be reset, and with the machine property "
        "x-change-vmfd-on-reset.",
        "nothing: QEMU requests the frequency that the guest had before. An ordinary reset makes "
        "no TSC call.",
    ),
    "incoming": Explanation(
        "QEMU wrote the full state of all vCPUs at the end of an incoming migration.",
        "cpu_synchronize_all_post_init, called by qemu_loadvm_state or, after a postcopy "
        "migration, by loadvm_postcopy_handle_run_bh.",
        "nothing, unless there is a mismatch: QEMU requests the frequency that the guest had on "
        "the source.",
    ),
    "loadvm": Explanation(
        "The VMM wrote the state of the vCPUs at the end of a snapshot load.",
        "in QEMU, cpu_synchronize_all_post_init, called by qemu_loadvm_state, which load_snapshot "
        "calls. Cloud Hypervisor and Firecracker restore one vCPU after another.",
        "nothing, unless there is a mismatch: the VMM requests the frequency that is in the "
        "snapshot.",
    ),
    "probe": Explanation(
        "A short-lived VM was created only to read the host's frequency.",
        "libvirt's virHostCPUGetTscInfo, or tscwatch itself when it reads the host's frequency.",
        "nothing: such a VM has no metrics of its own.",
    ),
    "unknown": Explanation(
        "The observed events do not prove a phase, for example because the guest is older than "
        "tscwatch, events were lost, or the VMM is not QEMU.",
        "the call's evidence, a field of the JSON log and of the journal entry, lists what was "
        "proven.",
        "nothing: the next load or hotplug of a QEMU guest has a phase again.",
    ),
}

TOPICS: Mapping[str, Explanation] = {
    **{kind: kind_rules.explanation for kind, kind_rules in MISMATCHES.items()},
    **{phase: explanation for phase, explanation in PHASES.items()},
}
"""The explanation of each kind and each phase, by its name."""
