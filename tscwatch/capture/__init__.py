"""Sources of events: what happens in the kernel, as :class:`tscwatch.model.Event`.

A source is opened by a function that raises a :class:`tscwatch.errors.TscwatchError` where
this host cannot carry it; :mod:`tscwatch.capture.choice` tries them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from tscwatch.model import Event

SourceName = Literal["auto", "bcc", "ftrace"]


class SourceInfo(NamedTuple):
    """How a source sees the calls."""

    source: str
    attach: str
    function: str


@dataclass
class Health:
    """What a source knows of itself; counts only rise."""

    probes: dict[str, bool] = field(default_factory=dict)
    """Attached or not, by the probe's name."""
    sent: int = 0
    """Events that left the kernel."""
    received: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (stage, reason)."""


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

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """Make the source tell, as ``vcpu_found``, of vCPUs that were there before it.

        A source that cannot read a vCPU tells nothing.

        :param files: process and file descriptor of each.
        """

    def health(self) -> Health:
        """Probes and losses as of the last poll."""

    def close(self) -> None:
        """Leave no probe behind."""
