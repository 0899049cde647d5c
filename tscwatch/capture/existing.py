"""Shows a probe the vCPUs that were there before it.

A vCPU that nobody touches passes by no probe.  So we call KVM on a copy of its file
descriptor: ``kvm_vcpu_ioctl`` refuses that with EIO before it takes the vCPU's lock, because our
memory is not the guest's (``vcpu->kvm->mm``), but the probe at its entry has seen the vCPU by
then and reads it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tscwatch.linux import kvm
from tscwatch.linux.syscall import SYS_PIDFD_GETFD, syscall

log = logging.getLogger(__name__)


def poke_existing(files: Iterable[tuple[int, int]]) -> None:
    """Let each ``(pid, descriptor)`` of a vCPU pass the probe once; the call's argument is pid.

    What is gone by now, or is not ours to take (``PTRACE_MODE_ATTACH_REALCREDS``), is left out.
    """
    left_out = 0
    for pid, descriptor in files:
        try:
            with _copy(pid, descriptor) as copy:
                if "anon_inode:kvm-vcpu" in str(Path(f"/proc/self/fd/{copy}").readlink()):
                    fcntl.ioctl(copy, kvm.GET_TSC_KHZ, pid)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOSYS):
                left_out += 1
            elif error.errno not in (errno.EIO, errno.ESRCH, errno.EBADF):
                raise
    if left_out:
        log.warning(
            "%d vCPUs that were here before could not be read, which takes CAP_SYS_PTRACE and "
            "Linux 5.6: each is known once it is called",
            left_out,
        )


@contextmanager
def _copy(pid: int, descriptor: int) -> Iterator[int]:
    process = os.pidfd_open(pid)
    try:
        copy = syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    try:
        yield copy
    finally:
        os.close(copy)
