"""Hands each item of the pipeline to the state, and each log item to the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from tscwatch.model import Item
from tscwatch.publish import format, systemd
from tscwatch.publish.format import LOG_ITEMS, LogItem
from tscwatch.publish.state import State

Log = Callable[[LogItem], None]


class Publisher:
    """The only consumer of the pipeline; ``log`` may be replaced at any time."""

    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self.log = log

    def publish(self, items: Iterable[Item]) -> None:
        """Publish items in their order."""
        for item in items:
            self._state.update(item)
            if isinstance(item, LOG_ITEMS):
                self.log(item)  # type: ignore[arg-type]  # LOG_ITEMS are those of LogItem


def choose_log(as_json: bool) -> Log:
    """Return a log on standard output: JSON lines, journal entries with fields, or text."""
    if as_json:
        return lambda item: print(format.as_json(item), flush=True)
    if systemd.is_journal_on_standard_output():
        return systemd.send_to_journal
    return lambda item: print(format.as_text(item), flush=True)


def no_log(_item: LogItem) -> None:
    """Drop the item: standard output is for something else."""
