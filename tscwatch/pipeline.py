"""attribute → judge, for one event.  Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Union

from tscwatch.attribute import Attributor
from tscwatch.judge import Judge
from tscwatch.model import Call, Event, Fact, Mismatch, VmEnded


class Pipeline:
    """What an event means, and what follows from it."""

    def __init__(self, attributor: Attributor, judge: Judge) -> None:
        self._attributor = attributor
        self._judge = judge

    def feed(self, event: Event) -> Iterator[Union[Fact, Mismatch]]:
        """Facts, each followed by the mismatches that it raises or clears."""
        for fact in self._attributor.feed(event):
            yield fact
            if isinstance(fact, Call):
                yield from self._judge.feed(fact)
            elif isinstance(fact, VmEnded):
                yield from self._judge.end(fact)
