"""System calls that Python has no function for, and the thread's capabilities."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Union

SYS_CAPGET, SYS_CAPSET = 125, 126
SYS_PERF_EVENT_OPEN, SYS_BPF, SYS_PIDFD_GETFD = 298, 321, 438
"""System call numbers on x86-64, the only architecture whose guests have a TSC."""

CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 2, 19, 21, 38, 39
"""Capability bits (``include/uapi/linux/capability.h``)."""

INSPECT_PROCESSES = (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)
"""Needed to read other users' ``/proc/PID/fd``, and so to find their VMs and vCPUs."""

_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_WORDS = 2

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: Union[int, bytes, ctypes.Array[ctypes.c_uint32]]) -> int:
    """Call syscall(2) and return its result.

    :raises OSError: the kernel returned an error.
    """
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def drop_capabilities_except(capabilities: Iterable[int]) -> None:
    """Drop all capabilities of this thread except these, as far as it has them.

    Capabilities belong to a thread; threads that it starts later inherit the reduced set
    (capabilities(7)).

    :param capabilities: bits, such as :data:`CAP_SYS_PTRACE`.
    :raises OSError: the kernel refused the change.
    """
    wanted = sum(1 << bit for bit in capabilities)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * (3 * _CAPABILITY_WORDS))()
    syscall(SYS_CAPGET, header, data)
    kept = b""
    for word, (_, permitted, _) in enumerate(struct.iter_unpack("=III", bytes(data))):
        left = permitted & (wanted >> 32 * word) & 0xFFFFFFFF
        kept += struct.pack("=III", left, left, 0)
    syscall(SYS_CAPSET, header, kept)
