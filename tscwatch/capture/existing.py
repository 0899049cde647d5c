"""Makes the entry probe see vCPUs that are older than the probe.

A probe sees a vCPU only when KVM is called on it.  So tscwatch makes a call on a copy of the vCPU's
file descriptor.  ``kvm_vcpu_ioctl`` refuses the call with EIO before it takes the vCPU's
lock, because the caller's memory is not the guest's (``vcpu->kvm->mm``), but the probe at its entry
has run by then and has read the vCPU.
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
    """Call KVM once on each vCPU; the call's argument is the pid of its process.

    vCPUs that have gone are skipped, and so are those whose descriptor may not be copied
    (``PTRACE_MODE_ATTACH_REALCREDS``), which is logged.

    :param files: pid and file descriptor of each vCPU.
    """
    skipped = 0
    for pid, descriptor in files:
        try:
            with _copy(pid, descriptor) as copy:
                if "anon_inode:kvm-vcpu" in str(Path(f"/proc/self/fd/{copy}").readlink()):
                    fcntl.ioctl(copy, kvm.GET_TSC_KHZ, pid)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOSYS):
                skipped += 1
            elif error.errno not in (errno.EIO, errno.ESRCH, errno.EBADF):
                raise
    if skipped:
        log.warning(
            "%d vCPUs that are older than tscwatch could not be read: that takes CAP_SYS_PTRACE "
            "and Linux 5.6; each is tracked from its next call on",
            skipped,
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
