"""Linux capabilities (capabilities(7)): each thread gives up what it needs no more.

They are a thread's, and those that it starts begin with its own.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

from tscwatch.syscall import CAPGET, CAPSET, syscall

SYS_PTRACE, SYS_ADMIN, DAC_READ_SEARCH, PERFMON, BPF = 19, 21, 2, 38, 39
"""By their bit (include/uapi/linux/capability.h)."""

LOOK_AROUND = (SYS_PTRACE, DAC_READ_SEARCH)
"""To see other users' processes: which VMs and vCPUs there are."""

_VERSION_3 = 0x20080522
_WORDS = 2


def keep(capabilities: Iterable[int]) -> None:
    """This thread has these from now on, as far as it had them, and no others.

    :raises OSError: the kernel refused that.
    """
    wanted = sum(1 << bit for bit in capabilities)
    header = struct.pack("=Ii", _VERSION_3, 0)
    data = (ctypes.c_uint32 * (3 * _WORDS))()
    syscall(CAPGET, header, data)
    kept = b""
    for word, (_, permitted, _) in enumerate(struct.iter_unpack("=III", bytes(data))):
        left = permitted & (wanted >> 32 * word) & 0xFFFFFFFF
        kept += struct.pack("=III", left, left, 0)
    syscall(CAPSET, header, kept)
