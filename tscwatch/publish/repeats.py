"""Fold log items that repeat, so that no VMM fills the log.

Calls repeat if a VMM polls KVM.  Only those whose phase is unknown are folded: a call that belongs
to a phase is rare, and matters by itself.  Findings repeat if a VMM makes calls that raise and
clear a mismatch again and again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Optional

from tscwatch.model import Call, Contradiction, Mismatch
from tscwatch.publish.format import LogItem, LogLine, moment

_CALLS_LOGGED_SINGLY = 3
_FINDINGS_LOGGED_SINGLY = 8
"""No guest in tests/recordings has more of one kind in 10 s."""
_INTERVAL_NS = 10_000_000_000
_MAX_KINDS = 4096


@dataclass
class _Window:
    """Items of one kind."""

    began: int
    """Unix time in ns of the first one."""
    last: LogItem
    items: int = 0

    @property
    def folded(self) -> int:
        """How many of them were not logged singly."""
        is_call = isinstance(self.last, Call)
        return self.items - (_CALLS_LOGGED_SINGLY if is_call else _FINDINGS_LOGGED_SINGLY)


class Repeats:
    """The items of the last 10 s.

    In 10 s, the first items of a kind are logged singly.  The last one of that time then stands for
    all others (:attr:`tscwatch.publish.format.LogLine.times`).  So the last line about a mismatch
    shows its present state, unless a line is to come within these 10 s.
    """

    def __init__(self) -> None:
        self._windows: dict[Hashable, _Window] = {}
        """In the order of their first items."""

    def fold(self, item: LogItem) -> Iterator[LogLine]:
        """Yield the lines to log now: the item's own, unless it repeats earlier ones."""
        now = moment(item)
        yield from self.due(now)
        kind = _kind(item)
        if kind is None:
            yield LogLine(item)
            return
        if kind not in self._windows and len(self._windows) >= _MAX_KINDS:
            yield from self._end(next(iter(self._windows)))
        window = self._windows.setdefault(kind, _Window(now, item))
        window.last, window.items = item, window.items + 1
        if window.folded <= 0:
            yield LogLine(item)

    def due(self, now: int) -> Iterator[LogLine]:
        """Yield the lines that stand for several items, of the kinds whose 10 s are over.

        :param now: Unix time in nanoseconds.
        """
        while self._windows:
            kind, window = next(iter(self._windows.items()))
            if now - window.began < _INTERVAL_NS:
                return
            yield from self._end(kind)

    def all(self) -> Iterator[LogLine]:
        """Yield the lines that stand for several items, of all kinds."""
        for kind in list(self._windows):
            yield from self._end(kind)

    def _end(self, kind: Hashable) -> Iterator[LogLine]:
        window = self._windows.pop(kind)
        if window.folded > 0:
            yield LogLine(window.last, window.folded)


def _kind(item: LogItem) -> Optional[Hashable]:
    """Return what items that are folded have in common; None if this one is not folded.

    The frequency is not part of it: a VMM may give a vCPU another one with each call.
    """
    if isinstance(item, Call):
        event = item.event
        if item.phase != "unknown":
            return None
        return item.vm, event.pid, event.vcpu, event.op, event.status, item.step
    guest = item.vm, item.guest.pid
    if isinstance(item, Mismatch):
        return (*guest, Mismatch, item.kind)
    if isinstance(item, Contradiction):
        return (*guest, Contradiction, item.claim)
    return (*guest, type(item))
