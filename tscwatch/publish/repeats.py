"""Fold calls that repeat, so that a VMM that polls KVM does not fill the log.

Only calls whose phase is unknown are folded.  A call that belongs to a phase is rare, and matters
by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from tscwatch.model import Call

_LOGGED_SINGLY = 3
_INTERVAL_NS = 10_000_000_000
_MAX_KINDS = 4096


@dataclass
class _Window:
    """Calls that differ in nothing but their time."""

    began: int
    """Unix time in ns of the first one."""
    last: Call
    calls: int = 0


class Repeats:
    """The calls of the last 10 s."""

    def __init__(self) -> None:
        self._windows: dict[Hashable, _Window] = {}
        """In the order of their first calls."""

    def fold(self, call: Call) -> Iterator[Call]:
        """Yield the calls to log now: the call itself, unless it repeats earlier ones.

        In 10 s, three calls of a kind are logged singly.  The last one of that time then stands for
        all others (:attr:`tscwatch.model.Call.times`).
        """
        if call.phase != "unknown":
            yield call
            return
        event = call.event
        yield from self.due(event.ts)
        kind = call.vm, event.pid, event.vcpu, event.op, event.khz, event.status, call.step
        if kind not in self._windows and len(self._windows) >= _MAX_KINDS:
            yield from self._end(next(iter(self._windows)))
        window = self._windows.setdefault(kind, _Window(event.ts, call))
        window.last, window.calls = call, window.calls + 1
        if window.calls <= _LOGGED_SINGLY:
            yield call

    def due(self, now: int) -> Iterator[Call]:
        """Yield the calls that stand for others, of the kinds whose 10 s are over.

        :param now: Unix time in nanoseconds.
        """
        while self._windows:
            kind, window = next(iter(self._windows.items()))
            if now - window.began < _INTERVAL_NS:
                return
            yield from self._end(kind)

    def all(self) -> Iterator[Call]:
        """Yield the calls that stand for others, of all kinds."""
        for kind in list(self._windows):
            yield from self._end(kind)

    def _end(self, kind: Hashable) -> Iterator[Call]:
        window = self._windows.pop(kind)
        if window.calls > _LOGGED_SINGLY:
            yield window.last._replace(times=window.calls - _LOGGED_SINGLY)
