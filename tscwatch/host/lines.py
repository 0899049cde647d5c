"""Read the lines of a VM's vCPUs from KVM's debugfs (``arch/x86/kvm/debugfs.c``).

The ratio has a file only where the hardware scales.  While a vCPU runs a nested guest, the files
show that guest's line, so the vCPU is left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from tscwatch.linux.files import entries
from tscwatch.model import Line

_MAX_DIGITS = 32


def read_lines(directory: Path) -> tuple[Line, ...]:
    """Return the lines of a VM's vCPUs in ascending order; empty if they cannot be read.

    :param directory: of the VM in KVM's debugfs.
    """
    names = entries(directory)
    vcpus = sorted(int(name[4:]) for name in names if name[:4] == "vcpu" and name[4:].isdigit())
    lines = (_line(vcpu, f"{directory}/vcpu{vcpu}/") for vcpu in vcpus)
    return tuple(line for line in lines if line is not None)


def _line(vcpu: int, files: str) -> Optional[Line]:
    """Return the line of a vCPU, None if it is gone, or if it runs a nested guest."""
    if _number(files + "guest_mode"):
        return None
    offset = _number(files + "tsc-offset")
    ratio = _number(files + "tsc-scaling-ratio")
    bits = None if ratio is None else _number(files + "tsc-scaling-ratio-frac-bits")
    if offset is None or _number(files + "guest_mode"):  # it may have entered a nested guest
        return None
    if ratio is None or bits is None:
        return Line(vcpu, offset)
    return Line(vcpu, offset, ratio / (1 << bits))


def _number(path: str) -> Optional[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(descriptor, _MAX_DIGITS))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
