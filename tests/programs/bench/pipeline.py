"""Measure the time and memory of the pipeline, and how they grow with the number of vCPUs.

An event's time includes its attribution, its judgement and the update of the published state, but
no I/O.  One table varies the number of VMs on a host, the next the size of one VM.  The sizes are
interleaved in one run; the ratio to the smallest size is more reliable than the absolute figures.
The last table is what a scrape has and takes, by the setting ``metrics.per_vcpu``.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Iterator

from prometheus_client import generate_latest

from tests.programs.bench import table
from tests.support.histories import HOST_KHZ, History
from tests.support.hosts import a_host
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Event, Host
from tscwatch.publish.metrics import Metrics
from tscwatch.publish.state import State

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 5
EVENTS_A_ROUND = 20_000
SCRAPES = 101


class Load:
    """A host with ``vcpus`` vCPUs in VMs of ``per_vm``; each round sets the TSC of all of them."""

    def __init__(self, vcpus: int, per_vm: int) -> None:
        self.vcpus = vcpus
        self.seconds: list[float] = []
        self.scrapes: list[float] = []
        self.page = 0.0
        self._state = State()
        self._pipeline = Pipeline(max_vms=vcpus, max_vcpus=2 * vcpus)
        self._vms = [
            History(f"kvm:{serial}", 100_000 * (serial + 1)) for serial in range(vcpus // per_vm)
        ]
        for item in self._pipeline.feed(Host(HOST_KHZ, False)):
            self._state.update(item)
        events = []
        for vm in self._vms:
            vm.emit("vm_create")
            for vcpu in range(per_vm):
                vm.new_vcpu(vcpu, "boot")
            vm.write_all("boot")
            vm.start()
            events += vm.events
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        self._feed(events)
        self.bytes = (tracemalloc.get_traced_memory()[0] - before) / vcpus
        tracemalloc.stop()

    def measure(self) -> None:
        """Measure one round: snapshots of every VM are loaded until there are enough events."""
        events = list(self._waves())
        start = time.perf_counter()
        self._feed(events)
        self.seconds.append((time.perf_counter() - start) / len(events))

    def scrape(self) -> None:
        """Measure one scrape, as ``/metrics`` generates it."""
        registry = Metrics(self._state).registry()
        start = time.perf_counter()
        text = generate_latest(registry)
        self.scrapes.append((time.perf_counter() - start) / self.vcpus)
        self.page = len(text) / self.vcpus

    def _waves(self) -> Iterator[Event]:
        for _ in range(max(1, EVENTS_A_ROUND // (2 * self.vcpus))):
            for vm in self._vms:
                vm.events.clear()
                vm.write_all("loadvm")
                yield from vm.events

    def _feed(self, events: list[Event]) -> None:
        for event in events:
            for item in self._pipeline.feed(event):
                self._state.update(item)


def compare(title: str, loads: list[Load]) -> None:
    for _ in range(ROUNDS):
        for load in loads:
            load.measure()
            load.scrape()
    base = statistics.median(loads[0].seconds)
    whole = statistics.median(loads[0].scrapes) * loads[0].vcpus
    print(
        f"\n{title}\n   vCPUs   events/s   time per event   spread   bytes per vCPU"
        "   a scrape's time   kB of a scrape"
    )
    for load in loads:
        middle = statistics.median(load.seconds)
        spread = (max(load.seconds) - min(load.seconds)) / middle
        print(
            f"{load.vcpus:8}{1 / middle:11.0f}{middle / base:15.2f} x"
            f"{spread:9.0%}{load.bytes:17.0f}"
            f"{statistics.median(load.scrapes) * load.vcpus / whole:16.1f} x"
            f"{load.page * load.vcpus / 1000:17.0f}"
        )


def scrapes() -> None:
    """Print the series and the time of a scrape, as ``/metrics`` generates it."""
    loads = {
        "no VM": a_host(0),
        "100 VMs, `none`": a_host(100, per_vcpu="none"),
        "100 VMs, `differing`": a_host(100),
        "the same, 10 of them skewed": a_host(100, skewed=10),
        "100 VMs, `all`": a_host(100, per_vcpu="all"),
    }
    registries = {title: Metrics(state).registry_with_process() for title, state in loads.items()}
    seconds: dict[str, list[float]] = {title: [] for title in loads}
    pages: dict[str, bytes] = {}
    for _ in range(SCRAPES):
        for title, registry in registries.items():
            start = time.perf_counter()
            pages[title] = generate_latest(registry)
            seconds[title].append(time.perf_counter() - start)
    rows = [
        (
            title,
            str(sum(not line.startswith(b"#") for line in page.splitlines())),
            f"{statistics.median(seconds[title]) * 1000:.1f} ms",
            f"{len(page) / 1000:.0f} kB",
        )
        for title, page in pages.items()
    ]
    table.show("A scrape", ("VMs of 8 vCPUs", "series", "time", "size"), rows)


def main() -> None:
    compare("VMs of 10 vCPUs", [Load(size, 10) for size in SIZES])
    compare("one VM", [Load(size, size) for size in SIZES])
    scrapes()


if __name__ == "__main__":
    main()
