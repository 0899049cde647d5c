"""A Prometheus with the history of many hosts, none of which exists.

The series are those that tscwatch would publish: of simulated hosts, and of hosts on which what was
recorded of a real guest happens again.  promtool imports them.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Callable, NamedTuple

from tests.support.hosts import a_host
from tests.support.prometheus import Span
from tscwatch import recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.clock import wall_ns
from tscwatch.model import Event, Host
from tscwatch.publish.metrics import Metrics
from tscwatch.publish.state import State

HOUR_S = 3600
RECORDINGS = Path(__file__).parents[1] / "recordings"
Series = dict[str, float]
"""The values of a scrape by series, each without the labels of its target."""


class Target(NamedTuple):
    """A host: its name, its pool, and what it publishes from each time on."""

    instance: str
    pool: str
    published: Iterable[tuple[int, Series]]


def series(state: State, renamed: Callable[[str], str]) -> Series:
    """Return what a scrape of a host has.

    :param renamed: yields a name for a guest that is unique in the fleet.
    """
    scraped = {"up{": 1.0}
    for family in Metrics(state).registry().collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            if "vm" in labels:
                labels["vm"] = renamed(labels["vm"])
            text = "".join(f'{name}="{value}",' for name, value in labels.items())
            scraped[f"{sample.name}{{{text}"] = float(sample.value)
    return scraped


def simulated(number: int, pool: str, host: Host, vms: int, skewed: int = 0) -> Target:
    """Return a host whose state never changes.

    :param host: its frequency, clocksource and scaling; its guests do not depend on them.
    """
    state = a_host(vms, skewed)
    state.update(host)
    instance = f"{pool}-h{number:02}"
    return Target(instance, pool, [(0, series(state, lambda vm: f"{instance}-{vm}"))])


def replayed(
    instance: str, pool: str, vm: str, name: str, guest: str, span: Span, begins: int
) -> Target:
    """Return a host on which what was recorded of a guest happens again, within an hour.

    Then, the guest's lines are read at each scrape, as tscwatch does.

    :param vm: the guest's new name.
    :param name: the name of the recording.
    :param guest: the guest's name in it.
    """
    items = list(recording.read(RECORDINGS / f"{name}.jsonl"))
    (host,) = (item for item in items if isinstance(item, Host))
    events = [item for item in items if isinstance(item, Event)]
    (pid,) = {event.pid for event in events if event.guest and event.guest.name == guest}
    events = [event for event in events if event.pid == pid and event.op != "vm_end"]
    states = _replay(host, events, span, begins)
    return Target(instance, pool, ((at, series(state, lambda _: vm)) for at, state in states))


def _replay(
    host: Host, events: list[Event], span: Span, begins: int
) -> Iterator[tuple[int, State]]:
    """Yield the state at each scrape; the last of the calls is made an hour after ``begins``."""
    state, pipeline = a_host(0), Pipeline()
    for item in pipeline.feed(host):
        state.update(item)
    first = events[0].ts
    slower = HOUR_S / (max(event.ts for event in events if event.op == "set") - first)
    waiting = [(begins + min(HOUR_S, slower * (event.ts - first)), event) for event in events]
    last = events[-1]
    for now in range(*span):
        due = [event for at, event in waiting if at <= now]
        waiting = [(at, event) for at, event in waiting if at > now]
        if not waiting and not due and last.op == "tsc_lines" and last.host_tsc and host.tsc_khz:
            ticks = (now - begins - HOUR_S) * host.tsc_khz * 1000
            due = [last._replace(host_tsc=last.host_tsc + ticks)]
        for event in due:
            for item in pipeline.feed(event._replace(ts=now * 1_000_000_000 - wall_ns(0))):
                state.update(item)
        yield now, state


def write_history(directory: Path, targets: Iterable[Target], span: Span) -> None:
    """Import the targets' series into the database that a Prometheus in ``directory`` uses."""
    file = directory / "history.om"
    with file.open("w") as output:
        for target in targets:
            labels = f'instance="{target.instance}",pool="{target.pool}",job="tscwatch"}}'
            published = list(target.published)
            for (begin, scraped), (end, _) in zip(published, [*published[1:], (span.end, {})]):
                times = [at for at in range(*span) if begin <= at < end]
                for name, value in scraped.items():
                    output.writelines(f"{name}{labels} {value} {at}\n" for at in times)
        output.write("# EOF\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(file)]
    subprocess.run([*command, str(directory / "tsdb")], check=True, capture_output=True)
    file.unlink()


def a_fleet(span: Span) -> Iterator[Target]:
    """Yield hosts of three pools, of which some are in trouble."""
    chance = random.Random(1)
    for pool, khz in {"rack-1": 2_596_115, "rack-2": 2_596_130, "rack-3": 2_445_430}.items():
        for number in range(1, 21):
            odd = (pool, number) == ("rack-2", 4)
            off = 310 if odd else round(chance.gauss(0, 9))
            host = Host(khz + off, pool != "rack-3", 250, "hpet" if odd else "tsc")
            yield simulated(number, pool, host, chance.randint(4, 9))
    start = span.start
    for instance, pool, vm, name, guest, begins in (
        ("rack-1-h21", "rack-1", "db-7", "slowed_migration", "fast-target", start + 1800),
        ("rack-1-h22", "rack-1", "mail-2", "slowed_pinned", "slowed", start + 10800),
        ("rack-2-h21", "rack-2", "web-3", "skewed_migration", "target", start + 7200),
        ("rack-2-h22", "rack-2", "build-1", "skewed_migration", "target", start + 12000),
    ):
        yield replayed(instance, pool, vm, f"bcc-kprobe-{name}", guest, span, begins)
