"""What the kernel itself says of a VM's TSCs, beside the calls that a source sees.

KVM's static tracepoints ``kvm_track_tsc`` and ``kvm_update_master_clock`` are cold and need
neither kprobes nor headers.  They are read through a trace instance and not through bcc, because
a perf event on a module's tracepoint holds the module.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from tscwatch.capture import Health, Source, SourceInfo, kvm_module, tracefs
from tscwatch.capture.trace import Instance, Record, clear_stale, process_of
from tscwatch.errors import TracefsMissing
from tscwatch.model import Event

log = logging.getLogger(__name__)

_TRACEPOINTS = ("kvm_track_tsc", "kvm_update_master_clock")
_BUFFER_KB = 64  # for each CPU; about a thousand records


class Witnessed:
    """A source, and the kernel's word among its events."""

    def __init__(self, source: Source, root: Path) -> None:
        self._source = source
        self._trace = Instance(root, "witness", _BUFFER_KB)
        self._module: Optional[int] = None
        self._follow_module()

    @property
    def info(self) -> SourceInfo:
        """See :meth:`tscwatch.capture.Source.info`."""
        return self._source.info

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`.

        What happened before the kernel's word has left the source when that was read before.
        """
        self._follow_module()
        batch = self._source.poll(timeout)
        said = [event(record) for record in self._trace.read() if isinstance(record, Record)]
        if not said:
            return batch
        return list(heapq.merge(batch + self._source.poll(0), said, key=lambda event: event.ts))

    def show(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.show`."""
        self._source.show(files)

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        health = self._source.health()
        attached = self._module is not None
        return Health(
            {**health.probes, **dict.fromkeys(_TRACEPOINTS, attached)},
            health.sent,
            health.received,
            {
                **health.lost,
                ("kernel", "witness_full"): self._trace.lost,
                ("capture", "witness_unreadable"): self._trace.unreadable,
            },
        )

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        self._trace.close()
        self._source.close()

    def _follow_module(self) -> None:
        """The tracepoints come and go with the module; when it comes again, they are off."""
        module = kvm_module.load_number()
        if module == self._module:
            return
        if module is not None:
            for name in _TRACEPOINTS:
                self._trace.enable(f"kvm/{name}")
        self._module = module


def beside(source: Source) -> Source:
    """The source with the kernel's word, where this host lets us read that."""
    try:
        root = tracefs.require()
        clear_stale(root)
        return Witnessed(source, root)
    except (TracefsMissing, OSError) as error:
        log.warning("what KVM holds of a VM's TSCs cannot be read: %s", error)
        return source


def event(record: Record) -> Event:
    """A record of one of the two tracepoints, as an event."""
    values = record.values
    told = Event(
        record.ts,
        "clock_updated",
        "",
        process_of(record),
        record.tid,
        record.comm,
        master_clock=bool(values.get("masterclock")),
    )
    if record.name != "kvm_track_tsc":
        return told
    return told._replace(
        op="tsc_tracked",
        vcpu=values.get("vcpu_id"),
        arg=values.get("offsetmatched", 0),
        result=values.get("nr_online", 0),
    )
