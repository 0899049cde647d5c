"""A minimal VMM on the real KVM, for call sequences that QEMU does not issue.

As a program it executes the steps of its command line, and then waits until its standard input is
closed::

    python -m tests.support.tiny_vmm create-vcpu:0 regs:0 get:0 set:0:2000000 run:0
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.support.guests import PATIENCE_S

CREATE_VM, VCPU_MMAP_SIZE, CREATE_VCPU, RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
SET_TSC_KHZ, GET_TSC_KHZ = 0xAEA2, 0xAEA3
GET_REGS, SET_REGS, REGS_SIZE = 0x8090AE81, 0x4090AE82, 144
SET_MSRS, TSC_MSR = 0x4008AE89, 0x10
IMMEDIATE_EXIT = 1  # offset in struct kvm_run


@cache
def host_khz() -> int:
    """Return the host's frequency in kHz, which KVM gives to a new vCPU (kvm_arch_vcpu_create)."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, CREATE_VM, 0)
    vcpu = fcntl.ioctl(vm, CREATE_VCPU, 0)
    khz = fcntl.ioctl(vcpu, GET_TSC_KHZ, 0)  # a VM answers only since Linux 5.18
    for descriptor in (vcpu, vm, kvm):
        os.close(descriptor)
    return int(khz)


def khz_above_host(ppm: int) -> int:
    """Return a frequency in kHz that is ``ppm`` above the host's."""
    return host_khz() * (1_000_000 + ppm) // 1_000_000


@contextmanager
def process(*steps: str, program: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    """Run the VMM as a process with ``program`` as argv[0]; yield it once all steps are done."""
    vmm = subprocess.Popen(
        [program, "-m", "tests.support.tiny_vmm", *steps],
        executable=sys.executable,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with until_closed(vmm):
        yield vmm


@contextmanager
def herd(size: int, *steps: str) -> Iterator[list[int]]:
    """Run as many processes that execute the same steps; yield their pids once all are done."""
    with process(f"copies:{size - 1}", *steps) as vmm:
        assert vmm.stdout is not None
        assert [vmm.stdout.readline() for _ in range(size - 1)] == ["done\n"] * (size - 1)
        children = Path(f"/proc/{vmm.pid}/task/{vmm.pid}/children").read_text().split()
        yield [vmm.pid, *map(int, children)]


@contextmanager
def until_closed(vmm: subprocess.Popen[str]) -> Iterator[None]:
    """Wait until a VMM has printed ``done``; close its standard input at the end."""
    assert vmm.stdout is not None
    assert vmm.stdin is not None
    try:
        assert vmm.stdout.readline() == "done\n"
        yield
    finally:
        vmm.stdin.close()
        vmm.wait(PATIENCE_S)
        vmm.stdout.close()


class Vmm:
    """Executes steps; each public method is one, with ``-`` for ``_``.

    A vCPU is named by its id.  The VM is that of the last ``new-vm``.
    """

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = -1
        self.vcpus: dict[str, int] = {}

    def new_vm(self) -> None:
        self.vm = fcntl.ioctl(self.kvm, CREATE_VM, 0)

    def create_vcpu(self, name: str) -> None:
        self.vcpus[name] = fcntl.ioctl(self.vm, CREATE_VCPU, int(name))

    def get(self, name: str) -> None:
        fcntl.ioctl(self.vcpus[name], GET_TSC_KHZ, 0)

    def get_by_a_child(self, name: str) -> None:
        """Call GET twice from a child process; KVM fails with EIO, as the memory is another's."""
        child = os.fork()
        if not child:
            for _ in range(2):
                with suppress(OSError):
                    self.get(name)
            os._exit(0)
        os.waitpid(child, 0)

    def set(self, name: str, khz: str) -> None:
        with suppress(OSError):  # tests also set what KVM refuses
            fcntl.ioctl(self.vcpus[name], SET_TSC_KHZ, int(khz))

    def get_of_vm(self) -> None:
        fcntl.ioctl(self.vm, GET_TSC_KHZ, 0)

    def set_on_vm(self, khz: str) -> None:
        fcntl.ioctl(self.vm, SET_TSC_KHZ, int(khz))

    def set_on_no_vcpu(self, path: str) -> None:
        """Issue the SET ioctl on a file that is not KVM's."""
        with suppress(OSError):
            fcntl.ioctl(os.open(path, os.O_RDONLY), SET_TSC_KHZ, 1_000_000)

    def regs(self, name: str) -> None:
        registers = fcntl.ioctl(self.vcpus[name], GET_REGS, bytes(REGS_SIZE))
        fcntl.ioctl(self.vcpus[name], SET_REGS, registers)

    def tsc(self, name: str) -> None:
        """Set the vCPU's TSC to 0, as QEMU does for a new one."""
        fcntl.ioctl(self.vcpus[name], SET_MSRS, struct.pack("=IIIIQ", 1, 0, TSC_MSR, 0, 0))

    def run(self, name: str) -> None:
        """Issue a KVM_RUN that returns at once; KVM counts the vCPU as one that has run."""
        with mmap.mmap(self.vcpus[name], fcntl.ioctl(self.kvm, VCPU_MMAP_SIZE, 0)) as state:
            state[IMMEDIATE_EXIT] = 1
            with suppress(InterruptedError):
                fcntl.ioctl(self.vcpus[name], RUN, 0)

    def close(self) -> None:
        for descriptor in (*self.vcpus.values(), self.vm):
            os.close(descriptor)


def main(steps: list[str]) -> None:
    if steps[0].startswith("copies:"):
        copies = int(steps.pop(0).partition(":")[2])
        for _ in range(copies):
            if not os.fork():
                break
    vmm = Vmm()
    vmm.new_vm()
    for number, step in enumerate(steps):
        if step == "exec":  # execute the remaining steps as another program in the same process
            rest = steps[number + 1 :]
            os.execv(sys.executable, [sys.executable, "-m", "tests.support.tiny_vmm", *rest])
        what, *arguments = step.split(":", 1 if step.startswith("set-on") else -1)
        getattr(vmm, what.replace("-", "_"))(*arguments)
    os.write(sys.stdout.fileno(), b"done\n")  # in one piece: copies share the pipe
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
