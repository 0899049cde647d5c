"""Check a source's events against KVM's own view of the TSCs and the functions that QEMU enters.

* KVM's static tracepoints ``kvm_track_tsc`` (in ``kvm_track_tsc_matching``) and
  ``kvm_update_master_clock`` (in ``pvclock_update_vm_gtod_copy``) report how many of a VM's vCPUs
  KVM considers synchronised, and whether the VM's master clock is on.  They are rarely hit, and
  need neither kprobes nor kernel headers.
* If a VMM's executable has symbols, uprobes report when it enters one of the functions that
  :mod:`tscwatch.vmm` lists for it.  Each of them precedes a TSC call and proves its phase or step.

Both are evidence beside the calls, and are merged into the source's events by time.  They are
recorded in a trace instance, not by bcc: a perf event on a module's tracepoint holds a reference to
the module (``perf_trace_init``), which could then not be unloaded.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

from tscwatch import vmm
from tscwatch.capture import Source
from tscwatch.clock import now_ns
from tscwatch.errors import TracefsMissing
from tscwatch.linux import elf, kvm, tracefs
from tscwatch.linux.process import PROC
from tscwatch.linux.trace_pipe import Record
from tscwatch.linux.tracefs import TraceInstance
from tscwatch.model import Event, Health, SourceInfo

log = logging.getLogger(__name__)

_TRACEPOINTS = ("kvm_track_tsc", "kvm_update_master_clock")
_BUFFER_KB = 64  # per CPU; about a thousand records
_MAX_EXECUTABLES = 32
_ROUNDED_BY_NS = 500


class CrossCheckedSource:
    """A source, with the evidence merged into its events by time.

    :param root: where tracefs is mounted.
    :raises OSError: the kernel refused the trace instance.
    """

    def __init__(self, source: Source, root: Path) -> None:
        self._source = source
        self._trace = TraceInstance(root, "witness", _BUFFER_KB)
        self._later_calls: list[Event] = []
        """Calls that were read by the last poll, but happened too late for it."""
        self._later_evidence: list[Event] = []
        """Likewise."""
        self._module: Optional[int] = None
        self._executables: set[tuple[int, int]] = set()
        """Device and inode number of each executable that was searched for symbols."""
        self._follow_module()

    @property
    def info(self) -> SourceInfo:
        """See :meth:`tscwatch.capture.Source.info`."""
        return self._source.info

    @property
    def capabilities(self) -> tuple[int, ...]:
        """See :meth:`tscwatch.capture.Source.capabilities`: the trace instance needs none."""
        return self._source.capabilities

    @property
    def is_behind(self) -> bool:
        """See :meth:`tscwatch.capture.Source.is_behind`."""
        return self._source.is_behind or self._trace.is_behind

    def poll(self, timeout: float) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.poll`.

        Calls and evidence come from two buffers, and the order between them matters: QEMU enters a
        function before the call that it leads to, and KVM compares the TSCs after it.  So both are
        returned up to a moment before which both buffers have been read completely.  What happened
        later is returned by the next poll.
        """
        calls = self._later_calls + self._source.poll(0 if self._later_calls else timeout)
        self._later_calls = []
        now = now_ns()
        evidence = self._later_evidence
        evidence += (event(record) for record in self._trace.read() if isinstance(record, Record))
        if evidence:
            until = complete_until(now, evidence, self._trace.is_behind)
            calls += self._source.poll(0)
            calls, self._later_calls = _split(calls, until)
            evidence, self._later_evidence = _split(evidence, until)
        self._follow_executables(event.pid for event in calls if event.op == "vm_create")
        return merge(calls, evidence) if evidence else calls

    def report_existing(self, files: Sequence[tuple[int, int]]) -> None:
        """See :meth:`tscwatch.capture.Source.report_existing`."""
        self._follow_executables({pid for pid, _ in files})
        self._source.report_existing(files)

    def restore(self) -> list[Event]:
        """See :meth:`tscwatch.capture.Source.restore`; without evidence, the calls are complete.

        After a load of the kvm module, its tracepoints are off because nobody has enabled them yet.
        """
        try:
            self._follow_module()
        except OSError as error:  # the module has been unloaded again
            log.info("KVM's tracepoints cannot be enabled: %s", error)
        self._trace.restore()
        return self._source.restore()

    def health(self) -> Health:
        """See :meth:`tscwatch.capture.Source.health`."""
        health = self._source.health()
        attached = self._module is not None and self._trace.is_complete
        return replace(
            health,
            probes={**health.probes, **dict.fromkeys(_TRACEPOINTS, attached)},
            lost={
                **health.lost,
                ("kernel", "witness_full"): self._trace.lost,
                ("kernel", "witness_disabled"): self._trace.gaps,
                ("capture", "witness_unreadable"): self._trace.unreadable,
            },
        )

    def close(self) -> None:
        """See :meth:`tscwatch.capture.Source.close`."""
        try:
            self._trace.close()
        finally:
            self._source.close()

    def _follow_module(self) -> None:
        """Enable the tracepoints each time the kvm module has been loaded.

        The tracepoints of a module disappear from tracefs with it, and a new load does not enable
        them.
        """
        module = kvm.module_generation()
        if module == self._module:
            return
        for name in _TRACEPOINTS:
            if module is None:
                self._trace.forget(f"kvm/{name}")
            else:
                self._trace.enable(f"kvm/{name}")
        self._module = module

    def _follow_executables(self, pids: Iterable[int]) -> None:
        """Put uprobes on the executables of these processes, once on each executable.

        Only the executable's own name counts here: a program that a dynamic loader runs, or that
        was renamed, is not cross-checked.
        """
        for pid in pids:
            try:
                self._follow_executable(PROC / f"{pid}/exe")
            except OSError as error:  # the process has ended, or the kernel refused a uprobe
                log.info("the calls of process %d are not cross-checked: %s", pid, error)

    def _follow_executable(self, link: Path) -> None:
        """Put uprobes on an executable, if it is one with symbols that has the same path here.

        The path is one in the process's mount namespace.  An executable in a container is left out
        on purpose: a uprobe holds a reference to the file, and its file system could not be
        unmounted.
        """
        path = link.readlink()
        program = vmm.of_executable(path.name)
        if program is None or not program.functions or not path.exists():
            return
        with link.open("rb") as file:
            status = os.fstat(file.fileno())
            if not os.path.samestat(path.stat(), status):
                return
            seen = (status.st_dev, status.st_ino) in self._executables
            if seen or len(self._executables) >= _MAX_EXECUTABLES:
                return
            self._executables.add((status.st_dev, status.st_ino))
            # The path is its owner's choice: another file can be there at any moment, and in a
            # definition, white space and "#" would end it.
            if self._probe(Path(f"/proc/self/fd/{file.fileno()}"), program):
                log.info("%s has symbols: uprobes cross-check the phases of its calls", path)

    def _probe(self, path: Path, program: vmm.Vmm) -> bool:
        """Put uprobes on a VMM's functions; return False if no symbol is that of a step."""
        offsets = elf.function_offsets(path, program.functions)
        if not set(offsets) & set(program.steps):
            return False
        for name, offset in offsets.items():
            unique = f"{name}__{len(self._executables)}"
            self._trace.define("uprobe_events", unique, "p", f"{path}:{offset:#x}")
        return True


def with_crosscheck(source: Source) -> Source:
    """Return the source with cross-checks, or the source itself if they do not work here."""
    try:
        return CrossCheckedSource(source, tracefs.find_tracefs())
    except (TracefsMissing, OSError) as error:
        log.warning("KVM's own view of a VM's TSCs cannot be read: %s", error)
        return source


def event(record: Record) -> Event:
    """Return the event for a record of one of the tracepoints or uprobes.

    ``vm`` is empty: the record has only the process, the thread and, for ``kvm_track_tsc``, the
    vCPU's id.
    """
    values = record.values
    entered = Event(record.ts, "entered", "", record.pid, record.tid, record.comm)
    master_clock = bool(values.get("masterclock"))
    if record.name == "kvm_track_tsc":
        return entered._replace(
            op="tsc_tracked",
            vcpu=values.get("vcpu_id"),
            matched_vcpus=values.get("offsetmatched", 0),
            online_vcpus=values.get("nr_online", 0),
            master_clock=master_clock,
        )
    if record.name == "kvm_update_master_clock":
        return entered._replace(op="clock_updated", master_clock=master_clock)
    return entered._replace(function=record.name.partition("__")[0])


def complete_until(now: int, evidence: Sequence[Event], is_behind: bool) -> int:
    """Return the moment up to which the evidence is complete.

    :param now: when its reading began.
    :param evidence: not empty.
    :param is_behind: some of it is still unread.
    """
    return min(now, evidence[-1].ts) if is_behind else now


def merge(calls: list[Event], evidence: list[Event]) -> list[Event]:
    """Merge calls and evidence by time.

    trace_pipe's times are rounded to the nearest microsecond (``ns2usecs``).  If a call's time does
    not differ by more than that, a function that the VMM entered goes before the call, and what KVM
    reports goes after it.  So the evidence of two threads can change places too.
    """
    return [*heapq.merge(calls, sorted(evidence, key=_moment), key=_moment)]


def _moment(event: Event) -> int:
    if event.op == "entered":
        return event.ts - _ROUNDED_BY_NS
    return event.ts + _ROUNDED_BY_NS if event.op in ("tsc_tracked", "clock_updated") else event.ts


def _split(events: list[Event], until: int) -> tuple[list[Event], list[Event]]:
    """Split events before the first one that happened later than ``until``."""
    at = next((at for at, event in enumerate(events) if event.ts > until), len(events))
    return events[:at], events[at:]
