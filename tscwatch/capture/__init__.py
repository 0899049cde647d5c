"""Sources of events: they turn what KVM does into :class:`tscwatch.model.Event`.

Each source has a function that opens it, and that raises :class:`tscwatch.errors.TscwatchError` if
the source does not work on this host.  :mod:`tscwatch.capture.choice` tries them in order.
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
        """The capabilities that it still needs once it is open, by their numbers.

        See capabilities(7) and ``CAP_*`` in :mod:`tscwatch.linux.syscall`.
        """

    def poll(self, timeout: float) -> list[Event]:
        """Return the events since the last poll, in the order in which they happened.

        :param timeout: how long to wait for the first one, in seconds.  With 0, return at once.
        """

    @property
    def is_behind(self) -> bool:
        """Whether events had happened before the last poll that it has not returned."""

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """Make the next polls return a ``vcpu_found`` for each of these vCPUs.

        They were created before the source was opened.  A source that has no access to
        ``struct kvm_vcpu`` returns nothing for them.

        :param files: pid and file descriptor of each vCPU.
        """

    def restore(self) -> list[Event]:
        """Attach probes to a kvm module that was loaded meanwhile.  Put back what somebody else has
        disabled or removed in the kernel, and log it.

        Call this about once a second.  It costs a few reads of small files.

        :return: a ``lost`` if events may have been lost until now.
        """

    def health(self) -> Health:
        """Return the state of the probes, and how many events were lost, as of the last poll."""

    def close(self) -> None:
        """Detach all probes and remove what the source created in the kernel."""
