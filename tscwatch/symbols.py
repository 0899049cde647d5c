"""What QEMU's own functions say of a call: where its executable has symbols, they are seen entered.

Only entries: a probe on a function's return would break QEMU's coroutines, which change stacks.
Pure.
"""

from __future__ import annotations

from typing import Optional

from tscwatch.model import Phase, Step

STEPS: dict[str, Step] = {
    "kvm_arch_init_vcpu": "init",
    "do_kvm_cpu_synchronize_post_init": "post_init",
}
"""On the vCPU's own thread, right before the call."""

PHASES: dict[str, tuple[Phase, ...]] = {
    "qdev_machine_creation_done": ("boot",),
    "qdev_device_add_from_qdict": ("prelaunch", "hotplug"),
    "process_incoming_migration_co": ("incoming",),
    "loadvm_postcopy_handle_run_bh": ("incoming",),
    "load_snapshot": ("loadvm",),
}
"""On QEMU's main thread, some time before: what it does that for."""

FUNCTIONS = (*STEPS, *PHASES)


def agrees(phase: Phase, step: Step, cause: Optional[str], function: str) -> Optional[bool]:
    """Whether a call is what its sequence says; None where that says nothing.

    :param cause: what QEMU's main thread has entered last, None where that was not seen.
    :param function: what the call's own thread has entered last.
    """
    if step == "unknown":
        return None
    same_phase = cause is None or phase in ("unknown", *PHASES[cause])
    return step == STEPS[function] and same_phase
