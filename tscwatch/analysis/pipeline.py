"""attribute → judge, for one event.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Union

from tscwatch.analysis.attribute import Attributor
from tscwatch.analysis.judge import Judge
from tscwatch.model import (
    Call,
    Event,
    Finding,
    Host,
    Item,
    Kind,
    KvmTscState,
    VcpuFound,
    VcpuUnplugged,
    VmEnded,
    VmStarted,
)


class Pipeline:
    """What an event means, and what follows from it."""

    def __init__(self, attributor: Attributor, judge: Judge) -> None:
        self._attributor = attributor
        self._judge = judge

    def configure(
        self, ts: int, max_vms: int, max_vcpus: int, tolerance_ppm: Mapping[Kind, float]
    ) -> list[Finding]:
        """Take other settings from now on; gives what follows for what is known already."""
        self._attributor.max_vms, self._attributor.max_vcpus = max_vms, max_vcpus
        return self._judge.set_tolerance(tolerance_ppm, ts)

    def feed(self, event: Union[Event, Host]) -> Iterator[Item]:
        """Facts, each followed by what the judge finds in it."""
        if isinstance(event, Host):
            self._judge.host = event
            yield event
            return
        for fact in self._attributor.feed(event):
            yield fact
            if isinstance(fact, Call):
                yield from self._judge.feed(fact)
            elif isinstance(fact, VcpuFound):
                yield from self._judge.adopt(fact)
            elif isinstance(fact, VcpuUnplugged):
                yield from self._judge.unplug(fact)
            elif isinstance(fact, VmStarted):
                yield from self._judge.start(fact)
            elif isinstance(fact, KvmTscState):
                yield from self._judge.compare_with_kvm(fact)
            elif isinstance(fact, VmEnded):
                yield from self._judge.end(fact)
