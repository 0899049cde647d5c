"""Make the entry probe see vCPUs created before it was attached.

A probe reads a vCPU only when somebody calls an ioctl on it.  So tscwatch makes such a call itself,
on a copy of the vCPU's file descriptor (pidfd_getfd(2)).  ``kvm_vcpu_ioctl`` refuses it with EIO
because the caller's address space is not the VM's (``vcpu->kvm->mm``), and does so before it takes
``vcpu->mutex``, so the guest is not disturbed.  But the probe at the function's entry has run by
then, and has read the vCPU.
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
    """Call ``KVM_GET_TSC_KHZ`` once on each vCPU, with the pid of its process as the argument.

    The argument is for the probe, which has no other way to find that process.  A vCPU that no
    longer exists is skipped.  So is one whose descriptor cannot be copied, for example without the
    right to do so (``PTRACE_MODE_ATTACH_REALCREDS``); a warning is then logged.

    :param files: pid and file descriptor of each vCPU.
    """
    skipped: list[OSError] = []
    for pid, descriptor in files:
        try:
            with _copy(pid, descriptor) as copy:
                # The process may have closed the vCPU and reused the descriptor.
                if kvm.VCPU_FILE.fullmatch(str(Path(f"/proc/self/fd/{copy}").readlink())):
                    fcntl.ioctl(copy, kvm.GET_TSC_KHZ, pid)
        except OSError as error:
            # KVM has refused the call as intended, or the process or its descriptor is gone.
            if error.errno not in (errno.EIO, errno.ESRCH, errno.EBADF):
                skipped.append(error)
    if skipped:
        log.warning(
            "%d vCPUs that are older than tscwatch could not be read (%s), which takes "
            "CAP_SYS_PTRACE, Linux 5.6 or later, and a free file descriptor: each is tracked from "
            "its next TSC call on",
            len(skipped),
            skipped[0].strerror,
        )


@contextmanager
def _copy(pid: int, descriptor: int) -> Iterator[int]:
    """Yield a copy of a process's file descriptor, and close it at the end."""
    process = os.pidfd_open(pid)
    try:
        copy = syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    try:
        yield copy
    finally:
        os.close(copy)
