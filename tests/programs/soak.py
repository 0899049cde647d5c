"""Starts and ends guests for a long time under both sources: ``make soak MINUTES=60``.

The guests boot, are hotplugged and unplugged, migrate, load snapshots, and exit, also by
themselves.  ``make soak-lab`` does so on the lab's kernel.  Exit status 0 means that both
sources reported each call with the right phase and step, that no event was lost, and that neither
memory (by more than :data:`GROWTH`) nor the number of file descriptors is higher than it ever was
in the first tenth of the time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Optional

from tests.support.guests import wait_for
from tests.support.observer import Observer, memory, place
from tests.support.scenarios import (
    CORE_SCENARIOS,
    FTRACE_MAY_MISS_PHASE,
    failed_incoming,
    out_of_tolerance,
    unknowns,
    unplug_and_replug,
)

SCENARIOS = (*CORE_SCENARIOS, unplug_and_replug, failed_incoming)
"""In the last one, and in ``out_of_tolerance``, QEMU exits by itself."""

GROWTH = 1.1
"""The factor by which memory may grow, since allocators keep memory that was freed."""
_PATIENCE_S = 60
_PREFIX = "soak"


class Watched:
    """A daemon under one source, the calls that it has reported, and the resources that it uses."""

    def __init__(self, directory: Path, source: str) -> None:
        directory.mkdir()
        self.source = source
        self.observer = Observer(directory, "--json", "--source", source)
        self.calls = 0
        self._output = self.observer.output.open()
        self._rest = ""
        self._places: defaultdict[str, list[str]] = defaultdict(list)
        self._contradictions: list[str] = []
        self._most_at_first = 0, 0

    def has_reported(self, vm: str, expected: int) -> bool:
        """Read the daemon's new output; return whether it has that many calls of a VM."""
        for item in self._new_items():
            if item["type"] == "call":
                self._places[item["vm"]].append(place(item))
            elif item["type"] == "contradiction" and item["vm"].startswith(_PREFIX):
                self._contradictions.append(f"contradiction: {item['vm']}: {item['detail']}")
        return len(self._places[vm]) >= expected

    def _new_items(self) -> list[Any]:
        *lines, self._rest = (self._rest + self._output.read()).split("\n")
        return [json.loads(line) for line in lines]

    def take(self, vm: str) -> list[str]:
        """Return a VM's calls and forget them."""
        places = self._places.pop(vm, [])
        self.calls += len(places)
        return places

    def resources(self) -> tuple[int, int]:
        """Return the daemon's anonymous memory in kB and its number of file descriptors."""
        pid = self.observer.process.pid
        return memory(pid)[0], len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def note_resources(self) -> None:
        """Take what the daemon uses now as what it may use; memory rises and falls by 1 MiB."""
        (memory_kb, files), (most_memory, most_files) = self.resources(), self._most_at_first
        self._most_at_first = max(memory_kb, most_memory), max(files, most_files)

    def report_failure(self, failure: Optional[type[BaseException]], *_: object) -> None:
        """Print the daemon's exit status, if it has ended, and the end of its log and output."""
        if failure is not None:
            print(f"{self.source}: exit status {self.observer.process.poll()}")
            for file in (self.observer.log, self.observer.output):
                print(file.read_text(errors="replace")[-4000:])

    def failures(self) -> list[str]:
        """Describe lost events, contradictions and leaks."""
        (most_memory, most_files), (now, files) = self._most_at_first, self.resources()
        found = self.observer.losses() + self._contradictions
        if now > GROWTH * most_memory:
            found.append(f"memory grew from {most_memory} to {now} kB")
        if files > most_files:
            found.append(f"file descriptors grew from {most_files} to {files}")
        return found


def one_round(serial: int, directory: Path, watched: Sequence[Watched]) -> None:
    """Run the scenarios once each, and exit if a daemon reports other calls than expected.

    The calls of ``out_of_tolerance`` are not compared: on a busy host its QEMU has exited before
    the daemon can read the VM's name.
    """
    for scenario in SCENARIOS:
        expected = scenario(directory, f"{_PREFIX}{serial}-{scenario.__name__}-")
        if scenario is out_of_tolerance:
            continue
        for each in watched:
            for vm, places in expected.items():
                with suppress(TimeoutError):  # the comparison below shows what is missing
                    wait_for(partial(each.has_reported, vm, len(places)), "calls", _PATIENCE_S)
                missed = unknowns(seen := each.take(vm), places)
                if missed is None or (missed and scenario not in FTRACE_MAY_MISS_PHASE):
                    losses = each.observer.losses()
                    sys.exit(f"{each.source}: {vm}: expected {places}, saw {seen}; lost: {losses}")


def main(minutes: float) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name, ExitStack() as stack:
        directory = Path(name)
        watched = [Watched(directory / source, source) for source in ("bcc", "ftrace")]
        for each in watched:
            stack.enter_context(each.observer)
            stack.push(each.report_failure)
        print(
            "minutes  rounds    calls   " + "   ".join(f"{w.source:>6}: kB, fds" for w in watched)
        )
        for serial in count(1):
            with tempfile.TemporaryDirectory(dir=directory) as round_directory:
                one_round(serial, Path(round_directory), watched)
            for each in watched:
                each.observer.metrics()  # series of ended VMs are kept until they were scraped
            spent = (time.monotonic() - began) / 60
            for each in watched:
                if spent < minutes / 10 or serial == 1:
                    each.note_resources()
            columns = "   ".join("{:>9} {:>6}".format(*each.resources()) for each in watched)
            print(f"{spent:7.1f} {serial:7} {watched[0].calls:8}   {columns}", flush=True)
            if spent >= minutes:
                break
        failures = [f"{w.source}: {text}" for w in watched for text in w.failures()]
    if failures:
        sys.exit("\n".join(failures))
    print(
        "OK: every call was reported correctly, no event was lost, KVM agreed, and nothing leaked."
    )


if __name__ == "__main__":
    main(float(sys.argv[1]))
