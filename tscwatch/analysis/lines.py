"""How far apart the TSCs of a VM's vCPUs are, from their lines.  Pure.

A vCPU's TSC is a line: the host's TSC times a ratio, plus an offset (``kvm_read_l1_tsc``).  A guest
needs all its vCPUs to be on one line.  Different offsets keep them apart; different ratios also
make them drift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Optional

from tscwatch.model import Line


class Spread(NamedTuple):
    """A comparison of lines."""

    seconds: float
    """From the TSC that is farthest behind to the one that is farthest ahead."""
    rate_ppm: float
    """From the slowest to the fastest."""
    reference: int
    """The median of the largest group of vCPUs whose TSCs agree."""
    lags: dict[int, float]
    """How many seconds each vCPU is behind the reference; negative if it is ahead."""


def compare(
    lines: Sequence[Line], tsc_khz: int, host_tsc: Optional[int], tolerance_s: float
) -> Optional[Spread]:
    """Compare the lines of a VM's vCPUs at one moment.

    Seconds are those of the guest, which counts cycles of the rate that most of its vCPUs have.

    :param lines: at least one.
    :param tsc_khz: the host's frequency.
    :param host_tsc: the host's TSC at that moment, which only different ratios need.
    :param tolerance_s: vCPUs that are closer to each other than this agree.
    :returns: None if ``host_tsc`` is needed and not known.
    """
    first = lines[0]
    ratios = Counter(line.ratio for line in lines)
    if len(ratios) > 1 and host_tsc is None:
        return None
    # Relative to the first line, because a double cannot hold all digits of an old host's TSC.
    cycles = {
        line.vcpu: (host_tsc or 0) * (line.ratio - first.ratio) + (line.offset - first.offset)
        for line in lines
    }
    hertz = tsc_khz * 1000 * max(ratios, key=lambda ratio: ratios[ratio])
    seconds = {vcpu: value / hertz for vcpu, value in cycles.items()}
    group = _largest_group(seconds, tolerance_s)
    reference = group[(len(group) - 1) // 2]
    origin = seconds[reference]
    return Spread(
        seconds=max(seconds.values()) - min(seconds.values()),
        rate_ppm=(max(ratios) - min(ratios)) / min(ratios) * 1e6,
        reference=reference,
        lags={vcpu: origin - value for vcpu, value in seconds.items()},
    )


def _largest_group(seconds: dict[int, float], tolerance_s: float) -> list[int]:
    """Return the largest group of vCPUs that agree, the one that is farthest behind first.

    If several groups are as large, take the one that has the lowest id.
    """
    groups: list[list[int]] = []
    previous: Optional[float] = None
    for vcpu, value in sorted(seconds.items(), key=lambda item: (item[1], item[0])):
        if previous is None or value - previous > tolerance_s:
            groups.append([])
        groups[-1].append(vcpu)
        previous = value
    most = max(map(len, groups))
    return min((group for group in groups if len(group) == most), key=min)
