"""KVM's interface on x86: ioctl numbers, the ``kvm`` module, members of ``struct kvm_vcpu``.

The numbers are those of ``include/uapi/linux/kvm.h``.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Optional

DEV_KVM = Path("/dev/kvm")

CREATE_VM = 0xAE01
CHECK_EXTENSION = 0xAE03
CREATE_VCPU = 0xAE41
RUN = 0xAE80
SET_CLOCK = 0x4030AE7B
SET_REGS = 0x4090AE82
SET_SREGS = 0x4138AE84
SET_CPUID2 = 0x4008AE90
SET_TSC_KHZ = 0xAEA2
GET_TSC_KHZ = 0xAEA3
ENABLE_CAP = 0x4068AEA3
SET_SREGS2 = 0x4140AECD

CAP_TSC_CONTROL = 60

VM_FILE = "anon_inode:kvm-vm"
VCPU_FILE = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
"""What ``/proc/PID/fd/FD`` links to if the file is a VM or a vCPU, whose id is the group
(``kvm_dev_ioctl_create_vm``, ``create_vcpu_fd``)."""

VCPU_MEMBERS = (
    ("file.private_data", "file", "private_data"),
    ("vcpu.kvm", "kvm_vcpu", "kvm"),
    ("vcpu.id", "kvm_vcpu", "vcpu_id"),
    ("vcpu.pid", "kvm_vcpu", "pid"),
    ("vcpu.khz", "kvm_vcpu", "arch.virtual_tsc_khz"),
    ("pid.nr", "pid", "numbers"),
    ("kvm.mm", "kvm", "mm"),
    ("task.mm", "task_struct", "mm"),
)
"""``(label, struct, member path)`` of what the probes read, for :func:`btf.offsets`."""

_MODULE = Path("/sys/module/kvm")


def why_unusable(error: OSError) -> str:
    """Return why :data:`DEV_KVM` could not be used, and what to change."""
    if error.errno == errno.EPERM:  # root is never refused by the file's mode
        remedy = (
            "allow it in the device cgroup (DeviceAllow=/dev/kvm rw in the unit, --device /dev/kvm "
            "for a container)"
        )
    elif error.errno == errno.EBUSY:
        remedy = "stop the other hypervisor that uses the CPU's virtualization extensions"
    else:
        remedy = "see dmesg"
    return f"{DEV_KVM} cannot be used ({error.strerror}): {remedy}"


def module_generation(module: Path = _MODULE) -> Optional[int]:
    """Return a number that differs after each load of the module, None while it is not loaded.

    If KVM is built in, the number never changes.
    """
    try:
        if is_module(module) and (module / "initstate").read_text().strip() != "live":
            return None
        return module.stat().st_ino
    except OSError:
        return None


def is_module(module: Path = _MODULE) -> bool:
    """Whether KVM is a module: code that is built in has no load state."""
    return (module / "initstate").exists()
