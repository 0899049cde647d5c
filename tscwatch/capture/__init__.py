"""Sources of events: what happens in the kernel, as :class:`tscwatch.model.Event`.

A source is opened by a function that raises a :class:`tscwatch.errors.TscwatchError` if the source
does not work on this host; :mod:`tscwatch.capture.choice` tries them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tscwatch.model import Event, Health, SourceInfo


class Source(Protocol):
    """A way to capture KVM's TSC calls."""

    @property
    def info(self) -> SourceInfo:
        """How the source sees the calls, for the log and ``tscwatch_source_info``."""

    @property
    def capabilities(self) -> tuple[int, ...]:
        """The capability bits that it needs once it is open (:mod:`tscwatch.linux.syscall`)."""

    def poll(self, timeout: float) -> list[Event]:
        """Return the events since the last poll, in order.

        :param timeout: how long to wait for the first one, in seconds.
        """

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """Make the source yield a ``vcpu_found`` for each vCPU that is older than the source.

        A source that cannot read vCPUs yields nothing.

        :param files: pid and file descriptor of each vCPU.
        """

    def health(self) -> Health:
        """Return the state of the probes and the losses as of the last poll."""

    def close(self) -> None:
        """Leave no probe behind."""
