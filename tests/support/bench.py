"""A pipeline that is fed with the history of one VM of QEMU, step by step."""

from __future__ import annotations

from typing import Optional, cast

from tests.support.histories import HOST_KHZ, History
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Event, Host, Item, Kind, Line, Mismatch

EXACT = Host(HOST_KHZ, True, kvm_tolerance_ppm=0, clocksource="tsc", shows_lines=True)
"""Each vCPU gets exactly what was requested."""
PLUGGED = 100
"""The vCPU that :meth:`Bench.plug` adds."""


class Bench:
    """A VM and the pipeline; each method returns what the pipeline yields for its events.

    :param tsc_khz: the ``tsc-frequency`` of the guest's command line.
    :param tolerances: by the kind of mismatch, in its unit.
    """

    def __init__(
        self,
        tsc_khz: Optional[int] = None,
        host: Host = EXACT,
        incoming: bool = True,
        **tolerances: float,
    ) -> None:
        self.pipeline = Pipeline(tolerance=cast("dict[Kind, float]", tolerances))
        list(self.pipeline.feed(host))
        self._tsc_khz = tsc_khz
        self.vmm = "qemu"
        self.max_vcpus: Optional[int] = 256
        self.vm = History("kvm:1", 100, incoming=incoming)
        self.vm.emit("vm_create")

    def new(self) -> list[Mismatch]:
        """Return the mismatches that the history's new events raise or clear."""
        return [
            item for item in self.items() if isinstance(item, Mismatch) and item.state != "updated"
        ]

    def items(self) -> list[Item]:
        events, self.vm.events = self.vm.events, []
        return [item for event in events for item in self.pipeline.feed(self._configured(event))]

    def _configured(self, event: Event) -> Event:
        if event.guest is None:  # tsc_lines
            return event
        guest = event.guest._replace(vmm=self.vmm, tsc_khz=self._tsc_khz, max_vcpus=self.max_vcpus)
        return event._replace(guest=guest)

    def boot(self, vcpus: int = 2, khz: int = HOST_KHZ) -> list[Mismatch]:
        for vcpu in range(vcpus):
            self.vm.new_vcpu(vcpu, "boot")
        self.vm.write_all("boot", khz)
        return self.new()

    def plug(self) -> list[Item]:
        self.vm.new_vcpu(PLUGGED, "hotplug")
        self.vm.full_write(PLUGGED, "hotplug")
        return self.items()

    def read(
        self,
        *offsets: Optional[int],
        ratios: tuple[float, ...] = (1.0, 1.0, 1.0),
        host_tsc: Optional[int] = None,
    ) -> list[Item]:
        """Read the lines of the vCPUs 0, 1 and 100; those whose offset is None cannot be read."""
        lines = tuple(
            Line(vcpu, offset, ratio)
            for vcpu, offset, ratio in zip((0, 1, PLUGGED), offsets, ratios)
            if offset is not None
        )
        event = Event(99, "tsc_lines", self.vm.vm, 100, 0, "", lines=lines, host_tsc=host_tsc)
        self.vm.events.append(event)
        return self.items()


def running(host: Host = EXACT) -> Bench:
    """Return a guest of two vCPUs that runs, whose TSCs are together."""
    bench = Bench(host=host, incoming=False, desync=1e-6)
    bench.boot()
    bench.vm.reset()
    bench.vm.start()
    bench.read(0, 0)
    return bench
