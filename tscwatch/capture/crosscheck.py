"""What others say of a VM's TSCs, beside the calls that a source sees.

The kernel: KVM's static tracepoints ``kvm_track_tsc`` and ``kvm_update_master_clock`` are cold and
need neither kprobes nor headers.  QEMU: where its executable has symbols, uprobes on the few cold
functions that :mod:`tscwatch.symbols` knows.  Both are read through a trace instance and not
through bcc, because a perf event on a module's tracepoint holds the module.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from tscwatch import vmm
from tscwatch.capture import Source
from tscwatch.clock import now_ns
from tscwatch.errors import TracefsMissing
from tscwatch.linux import elf, kvm, tracefs
from tscwatch.linux.trace_pipe import Record
from tscwatch.linux.tracefs import TraceInstance
from tscwatch.model import Event, Health, SourceInfo

log = logging.getLogger(__name__)

_TRACEPOINTS = ("kvm_track_tsc", "kvm_update_master_clock")
_BUFFER_KB = 64  # for each CPU; about a thousand records
_MAX_EXECUTABLES = 32


class CrossCheckedSource:
    """A source, and what others say among its events."""

    def __init__(self, source: Source, root: Path) -> None:
        self._source = source
        self._trace = TraceInstance(root, "witness", _BUFFER_KB)
        self._held: list[Event] = []
        self._unsaid: list[Event] = []
        self._module: Optional[int] = None
        self._executables: set[tuple[int, int]] = set()
        """Those that were looked at for symbols, by device and inode."""
        self._follow_module()

    @property
    def info(self) -> SourceInfo:
        """See :meth:`tscwatch.capture.Source.info`."""
        return self._source.info

    @property
    def capabilities(self) -> tuple[int, ...]:
        """See :meth:`tscwatch.capture.Source.capabilities`: the trace instance is root's."""
        return self._source.capabilities

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`.

        A witness speaks before a call (a function of QEMU's) or after it (KVM).  So both are told
        up to one moment, before which everything from either has been read.
        """
        self._follow_module()
        batch = self._held + self._source.poll(0 if self._held else timeout)
        until = now_ns()
        said = self._unsaid
        said += (event(record) for record in self._trace.read() if isinstance(record, Record))
        if said:
            batch += self._source.poll(0)
        batch, self._held = _split(batch, until)
        said, self._unsaid = _split(said, until)
        self._follow_executables(event.pid for event in batch if event.op == "vm_create")
        return list(heapq.merge(batch, said, key=lambda event: event.ts))

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        self._follow_executables({pid for pid, _ in files})
        self._source.report_existing(files)

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
        module = kvm.module_generation()
        if module == self._module:
            return
        if module is not None:
            for name in _TRACEPOINTS:
                self._trace.enable(f"kvm/{name}")
        self._module = module

    def _follow_executables(self, pids: Iterable[int]) -> None:
        """Probe the functions of each QEMU that has symbols, once for all who run it."""
        for pid in pids:
            try:
                path = _on_this_host(pid)
                if path is None:
                    continue
                program = vmm.of_executable(path.name)
                if program is None or not program.functions:
                    continue
                status = path.stat()
                known = (status.st_dev, status.st_ino) in self._executables
                if known or len(self._executables) >= _MAX_EXECUTABLES:
                    continue
                self._executables.add((status.st_dev, status.st_ino))
                self._probe(path, program)
            except OSError as error:  # it is gone, or the kernel takes no uprobe on it
                log.info("process %d is attributed by its calls alone: %s", pid, error)

    def _probe(self, path: Path, program: vmm.Vmm) -> None:
        found = elf.functions(path, program.functions)
        if not set(found) & set(program.steps):
            return
        for name, offset in found.items():
            unique = f"{name}__{len(self._executables)}"
            self._trace.define("uprobe_events", unique, "p", f"{path}:{offset:#x}")
        log.info("%s has symbols: they confirm the phases of its calls", path)


def with_crosscheck(source: Source) -> Source:
    """The source with its witnesses, where this host lets us hear them."""
    try:
        return CrossCheckedSource(source, tracefs.require())
    except (TracefsMissing, OSError) as error:
        log.warning("what KVM holds of a VM's TSCs cannot be read: %s", error)
        return source


def event(record: Record) -> Event:
    """What a witness says, as an event."""
    values = record.values
    told = Event(record.ts, "entered", "", record.pid, record.tid, record.comm)
    clock = bool(values.get("masterclock"))
    if record.name == "kvm_track_tsc":
        return told._replace(
            op="tsc_tracked",
            vcpu=values.get("vcpu_id"),
            matched_vcpus=values.get("offsetmatched", 0),
            online_vcpus=values.get("nr_online", 0),
            master_clock=clock,
        )
    if record.name == "kvm_update_master_clock":
        return told._replace(op="clock_updated", master_clock=clock)
    return told._replace(function=record.name.partition("__")[0])


def _split(events: list[Event], until: int) -> tuple[list[Event], list[Event]]:
    """What is to be told now, and from the first later event on what is not."""
    at = next((at for at, event in enumerate(events) if event.ts > until), len(events))
    return events[:at], events[at:]


def _on_this_host(pid: int) -> Optional[Path]:
    """A process's executable by its path, where that leads to the same file for us.

    A container's leads elsewhere; a probe would keep the container's file system from going.
    """
    link = Path(f"/proc/{pid}/exe")
    path = link.readlink()
    return path if path.exists() and os.path.samestat(path.stat(), link.stat()) else None
