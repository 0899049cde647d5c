"""Who a VM is: read from its process's command line.

Pure; the reading of ``/proc`` is in :mod:`tscwatch.inventory`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Optional

from tscwatch.model import Guest, Phase, Step

_QEMU = re.compile(r"(qemu-system-|qemu-kvm|qemu$|kvm$)")
_METRIC = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "t": 1_000_000_000_000}
_MAX_LABEL = 200


def parse(pid: int, argv: Sequence[str], comm: str = "") -> Guest:
    """The guest behind a command line.

    :param argv: as in ``/proc/PID/cmdline``; empty where it could not be read, then ``comm``
        says which program it is and the rest is unknown.
    """
    program = PurePath(argv[0]).name if argv else comm
    if not is_qemu(program):
        return Guest(pid, _label(program) or "unknown", restored="--restore" in argv)
    options = _options(argv[1:])
    name = _first_value(options.get("name"), "guest")
    return Guest(
        pid=pid,
        vmm="qemu",
        name=_label(name) if name else None,
        uuid=_label(options["uuid"]) if options.get("uuid") else None,
        machine=_label(_first_value(options.get("machine", options.get("M")), "type") or "")
        or None,
        tsc_khz=_tsc_khz(options.get("cpu", "")),
        incoming="incoming" in options,
    )


def is_qemu(program: str) -> bool:
    """By the name of the executable."""
    return bool(_QEMU.match(program))


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """``{"name": "guest=a"}``: QEMU takes one dash or two; the last of an option wins."""
    options: dict[str, str] = {}
    for this, following in zip(arguments, (*arguments[1:], "")):
        if this.startswith("-"):
            options[this.lstrip("-")] = following
    return options


def _properties(value: str) -> list[tuple[str, str]]:
    """Split a QemuOpts string; a doubled comma stands for a comma (util/qemu-option.c)."""
    parts = re.findall(r"(?:[^,]|,,)+", value)
    return [
        (key, content.replace(",,", ","))
        for key, _, content in (part.partition("=") for part in parts)
    ]


def _first_value(value: Optional[str], key: str) -> Optional[str]:
    """``key=X`` wherever it stands, else the unnamed first word (QEMU's implied option)."""
    properties = _properties(value or "")
    if not properties:
        return None
    for name, content in properties:
        if name == key:
            return content
    name, content = properties[0]
    return None if content else name.replace(",,", ",")


def _tsc_khz(cpu: str) -> Optional[int]:
    """``tsc-frequency`` is plain hertz, ``tsc-freq`` takes a metric suffix.

    x86_cpu_parse_featurestr and x86_cpuid_set_tsc_freq (target/i386/cpu.c), which divides by
    1000 as we do.
    """
    khz = None
    for name, content in _properties(cpu):
        if name in ("tsc-frequency", "tsc-freq", "tsc_freq", "tsc_frequency"):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)[bB]?", content)
            if match:
                khz = int(float(match[1]) * _METRIC[match[2].lower()]) // 1000
    return khz or None


def _label(text: str) -> str:
    return text[:_MAX_LABEL]


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
