"""Guests that boot, are hotplugged, migrate and die, without end: ``make soak MINUTES=60``.

Both sources watch at once.  Exit status 0 means that each call was told with its phase and step,
that nothing was lost, and that memory and descriptors at the end are what they were after the
first tenth of the time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

from tests.support.guests import wait_for
from tests.support.observer import Observer, memory, place
from tests.support.scenarios import SCENARIOS, out_of_tolerance

GROWTH = 1.1
"""Of memory, that is no leak: allocators keep what they had."""
_PATIENCE_S = 60


class Watched:
    """An observer, what it has told since it was asked last, and what it takes."""

    def __init__(self, directory: Path, source: str) -> None:
        directory.mkdir()
        self.source = source
        self.observer = Observer(directory, "--json", "--source", source)
        self.calls = 0
        self._output = self.observer.output.open()
        self._places: defaultdict[str, list[str]] = defaultdict(list)
        self.at_first: tuple[int, int] = (0, 0)

    def has_told(self, vm: str, expected: int) -> bool:
        while line := self._output.readline():
            item = json.loads(line)
            if item["type"] == "call":
                self._places[item["vm"]].append(place(item))
        return len(self._places[vm]) >= expected

    def take(self, vm: str) -> list[str]:
        """A VM's calls, which are forgotten here."""
        places = self._places.pop(vm)
        self.calls += len(places)
        return places

    def takes(self) -> tuple[int, int]:
        """Anonymous memory in kB, and descriptors."""
        pid = self.observer.process.pid
        return memory(pid)[0], len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def complaints(self) -> list[str]:
        """What is not as it must be."""
        (first_memory, first_files), (now, files) = self.at_first, self.takes()
        found = self.observer.losses()
        if now > GROWTH * first_memory:
            found.append(f"memory grew from {first_memory} to {now} kB")
        if files > first_files:
            found.append(f"descriptors grew from {first_files} to {files}")
        return found


def one_round(serial: int, directory: Path, watched: Sequence[Watched]) -> None:
    """Every scenario once, each guest's calls as they must be.

    But one: a QEMU that exits by itself is gone, on a busy host, before it can be asked its name.
    """
    for scenario in set(SCENARIOS) - {out_of_tolerance}:
        expected = scenario(directory, f"r{serial}-{scenario.__name__}-")
        for each in watched:
            for vm, places in expected.items():
                told = partial(each.has_told, vm, len(places))
                wait_for(told, f"{vm}'s calls from {each.source}", _PATIENCE_S)
                if (seen := each.take(vm)) != places:
                    sys.exit(f"{each.source}: {vm}: {seen}, and not {places}")


def main(minutes: float) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name, ExitStack() as stack:
        directory = Path(name)
        watched = [Watched(directory / source, source) for source in ("bcc", "ftrace")]
        for each in watched:
            stack.enter_context(each.observer)
        print(
            "minutes  rounds    calls   " + "   ".join(f"{w.source:>6}: kB, fds" for w in watched)
        )
        for serial in count(1):
            with tempfile.TemporaryDirectory(dir=directory) as round_directory:
                one_round(serial, Path(round_directory), watched)
            for each in watched:
                each.observer.metrics()  # as Prometheus does: ended VMs await their last scrapes
            spent = (time.monotonic() - began) / 60
            for each in watched:
                if spent < minutes / 10 or not each.at_first[0]:
                    each.at_first = each.takes()
            taken = "   ".join("{:>9} {:>6}".format(*each.takes()) for each in watched)
            print(f"{spent:7.1f} {serial:7} {watched[0].calls:8}   {taken}", flush=True)
            if spent >= minutes:
                break
        complaints = [f"{w.source}: {text}" for w in watched for text in w.complaints()]
    if complaints:
        sys.exit("\n".join(complaints))
    print("clean: nothing lost, nothing without its phase, memory and descriptors flat")


if __name__ == "__main__":
    main(float(sys.argv[1]))
