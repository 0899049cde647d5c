"""Sources of events: what happens in the kernel, as :class:`tscwatch.model.Event`.

A source is opened by a function that raises a :class:`tscwatch.errors.TscwatchError` where
this host cannot carry it; :mod:`tscwatch.capture.choice` tries them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tscwatch.model import Event, Health, SourceInfo


class Source(Protocol):
    """A way of seeing KVM's TSC calls."""

    @property
    def info(self) -> SourceInfo:
        """For the log and for ``tscwatch_source_info``."""

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What it needs of :mod:`tscwatch.privileges` once it is open."""

    def poll(self, timeout: float) -> list[Event]:
        """The events since the last poll, in order; waits up to ``timeout`` seconds for one."""

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """Make the source tell, as ``vcpu_found``, of vCPUs that were there before it.

        A source that cannot read a vCPU tells nothing.

        :param files: process and file descriptor of each.
        """

    def health(self) -> Health:
        """Probes and losses as of the last poll."""

    def close(self) -> None:
        """Leave no probe behind."""
