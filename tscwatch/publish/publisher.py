"""Hands each item of the pipeline to the state, and each log item to the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from tscwatch.model import Call, Contradiction, Item, Mismatch, Risk
from tscwatch.publish import format, systemd
from tscwatch.publish.format import LogLine
from tscwatch.publish.repeats import Repeats
from tscwatch.publish.state import State

Log = Callable[[LogLine], None]


class Publisher:
    """The only consumer of the pipeline; ``log`` may be replaced at any time.

    Items that repeat are folded in the log (:mod:`tscwatch.publish.repeats`), and in nothing else.
    The times of the log's lines never step back: the line of an item that was held back, because it
    was folded or might have been a probe, has the time of the line before it.
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
            if isinstance(item, (Call, Mismatch, Risk, Contradiction)):
                self._log(self._repeats.fold(item))

    def log_due(self, now: int) -> None:
        """Log the items that were folded and have waited long enough; call this each second.

        :param now: Unix time in nanoseconds.
        """
        self._log(self._repeats.due(now))

    def close(self) -> None:
        """Log all items that were folded."""
        self._log(self._repeats.all())

    def _log(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            ts = format.moment(line.item)
            self._last_ts = max(self._last_ts, ts)
            self.log(line._replace(late_ns=self._last_ts - ts))


def choose_log(as_json: bool) -> Log:
    """Return a log on standard output: JSON lines, journal entries with fields, or text."""
    if as_json:
        return lambda line: print(format.as_json(line), flush=True)
    if systemd.is_journal_on_standard_output():
        return systemd.send_to_journal
    return lambda line: print(format.as_text(line), flush=True)


def no_log(_line: LogLine) -> None:
    """Drop the line: standard output is for something else."""
