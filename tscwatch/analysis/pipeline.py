"""attribute -> judge, for one event.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Optional, Union

from tscwatch.analysis.attribute import Attributor
from tscwatch.analysis.judge import Judge
from tscwatch.model import Event, Fact, Finding, Host, Item, Kind


class Pipeline:
    """What events mean, and what follows from that.

    :param max_vms: VMs that are tracked at the same time.
    :param max_vcpus: vCPUs that are tracked at the same time, over all VMs.
    :param tolerance: see :class:`Judge`.
    """

    def __init__(
        self,
        max_vms: int = 1024,
        max_vcpus: int = 16384,
        tolerance: Optional[Mapping[Kind, float]] = None,
    ) -> None:
        self._attributor = Attributor(max_vms, max_vcpus)
        self._judge = Judge(tolerance)

    def configure(
        self, ts: int, max_vms: int, max_vcpus: int, tolerance: Mapping[Kind, float]
    ) -> list[Finding]:
        """Apply other settings; return the findings that change at once."""
        self._attributor.max_vms, self._attributor.max_vcpus = max_vms, max_vcpus
        return self._judge.set_tolerance(tolerance, ts)

    def feed(self, event: Union[Event, Host]) -> Iterator[Item]:
        """Yield each fact that follows from an event, and after it the findings that it causes."""
        facts: Iterable[Union[Fact, Host]] = (
            [event] if isinstance(event, Host) else self._attributor.feed(event)
        )
        for fact in facts:
            yield fact
            yield from self._judge.feed(fact)
