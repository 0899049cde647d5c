"""KVM's ioctl numbers on x86 (include/uapi/linux/kvm.h)."""

from __future__ import annotations

from pathlib import Path

DEV_KVM = Path("/dev/kvm")

CREATE_VM = 0xAE01
CHECK_EXTENSION = 0xAE03
CREATE_VCPU = 0xAE41
SET_CLOCK = 0x4030AE7B
SET_REGS = 0x4090AE82
SET_SREGS = 0x4138AE84
SET_CPUID2 = 0x4008AE90
SET_TSC_KHZ = 0xAEA2
GET_TSC_KHZ = 0xAEA3
ENABLE_CAP = 0x4068AEA3
SET_SREGS2 = 0x4140AECD

CAP_TSC_CONTROL = 60
