"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
from typing import Union

BPF, PERF_EVENT_OPEN, PIDFD_GETFD, CAPGET, CAPSET = 321, 298, 438, 125, 126
"""Their numbers on x86-64, where KVM has a TSC."""

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: Union[int, bytes, ctypes.Array[ctypes.c_uint32]]) -> int:
    """syscall(2).

    :raises OSError: the kernel refused it.
    """
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
