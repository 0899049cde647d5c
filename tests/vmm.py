"""A small VMM of our own on the real KVM, for what QEMU would not do.

As a program it does what its arguments say and then waits for its standard input to close::

    python -m tests.vmm create-vcpu:0 regs:0 get:0 set:0:2000000 run:0
"""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.guests import PATIENCE_S

CREATE_VM, VCPU_MMAP_SIZE, CREATE_VCPU, RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
SET_TSC_KHZ, GET_TSC_KHZ = 0xAEA2, 0xAEA3
GET_REGS, SET_REGS, REGS_SIZE = 0x8090AE81, 0x4090AE82, 144
IMMEDIATE_EXIT = 1  # byte of struct kvm_run


def host_khz() -> int:
    """What a new vCPU starts with: the host's frequency (kvm_arch_vcpu_create)."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, CREATE_VM, 0)
    khz = fcntl.ioctl(vm, GET_TSC_KHZ, 0)  # of the VM: no vCPU is made
    os.close(vm)
    os.close(kvm)
    return int(khz)


@contextmanager
def process(*steps: str, program: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    """The VMM as a process that calls itself ``program``, once it has done its steps."""
    vmm = subprocess.Popen(
        [program, "-m", "tests.vmm", *steps],
        executable=sys.executable,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert vmm.stdout is not None
    assert vmm.stdin is not None
    try:
        assert vmm.stdout.readline() == "done\n"
        yield vmm
    finally:
        vmm.stdin.close()
        vmm.wait(PATIENCE_S)
        vmm.stdout.close()


def run(vcpu: int, size: int) -> None:
    """A KVM_RUN that returns at once: KVM then knows the vCPU for one that has run."""
    with mmap.mmap(vcpu, size) as state:
        state[IMMEDIATE_EXIT] = 1
        with suppress(InterruptedError):
            fcntl.ioctl(vcpu, RUN, 0)


def main(steps: list[str]) -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, CREATE_VM, 0)
    vcpus: dict[str, int] = {}
    for step in steps:
        what, *arguments = step.split(":", 1 if step.startswith("set-on") else -1)
        if what == "create-vcpu":
            vcpus[arguments[0]] = fcntl.ioctl(vm, CREATE_VCPU, int(arguments[0]))
        elif what == "get":
            fcntl.ioctl(vcpus[arguments[0]], GET_TSC_KHZ, 0)
        elif what == "set":
            with suppress(OSError):  # KVM's refusal is what the test wants to see seen
                fcntl.ioctl(vcpus[arguments[0]], SET_TSC_KHZ, int(arguments[1]))
        elif what == "get-of-vm":
            fcntl.ioctl(vm, GET_TSC_KHZ, 0)
        elif what == "set-on-vm":
            fcntl.ioctl(vm, SET_TSC_KHZ, int(arguments[0]))
        elif what == "regs":
            registers = fcntl.ioctl(vcpus[arguments[0]], GET_REGS, bytes(REGS_SIZE))
            fcntl.ioctl(vcpus[arguments[0]], SET_REGS, registers)
        elif what == "run":
            run(vcpus[arguments[0]], fcntl.ioctl(kvm, VCPU_MMAP_SIZE, 0))
        elif what == "set-on-no-vcpu":
            with suppress(OSError):
                fcntl.ioctl(os.open(arguments[0], os.O_RDONLY), SET_TSC_KHZ, 1_000_000)
        elif what == "close":
            for descriptor in (*vcpus.values(), vm):
                os.close(descriptor)
        else:
            raise ValueError(step)
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
