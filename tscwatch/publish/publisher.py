"""Hands each item of the pipeline to the state, and each log item to the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from tscwatch.model import Call, Contradiction, Item, Mismatch, Risk
from tscwatch.publish import format, systemd
from tscwatch.publish.format import LogItem
from tscwatch.publish.repeats import Repeats
from tscwatch.publish.state import State

Log = Callable[[LogItem], None]


class Publisher:
    """The only consumer of the pipeline; ``log`` may be replaced at any time.

    Calls that repeat are folded in the log (:mod:`tscwatch.publish.repeats`).  The times of the
    log's lines never step back: the line of a call that was held back, because it might have been a
    probe or was folded, has the time of the line before it.
    """

    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self._repeats = Repeats()
        self._last_ts = 0
        self.log = log

    def publish(self, items: Iterable[Item]) -> None:
        """Publish items in their order."""
        for item in items:
            self._state.update(item)
            if isinstance(item, Call):
                self._log(self._repeats.fold(item))
            elif isinstance(item, (Mismatch, Risk, Contradiction)):
                self._last_ts = max(self._last_ts, item.ts)
                self.log(item._replace(ts=self._last_ts))

    def log_due(self, now: int) -> None:
        """Log the calls that were folded and have waited long enough; call this each second.

        :param now: Unix time in nanoseconds.
        """
        self._log(self._repeats.due(now))

    def close(self) -> None:
        """Log all calls that were folded."""
        self._log(self._repeats.all())

    def _log(self, calls: Iterable[Call]) -> None:
        for call in calls:
            self._last_ts = max(self._last_ts, call.event.ts)
            late_ns = self._last_ts - call.event.ts
            self.log(call._replace(late_ns=late_ns) if late_ns else call)


def choose_log(as_json: bool) -> Log:
    """Return a log on standard output: JSON lines, journal entries with fields, or text."""
    if as_json:
        return lambda item: print(format.as_json(item), flush=True)
    if systemd.is_journal_on_standard_output():
        return systemd.send_to_journal
    return lambda item: print(format.as_text(item), flush=True)


def no_log(_item: LogItem) -> None:
    """Drop the item: standard output is for something else."""
