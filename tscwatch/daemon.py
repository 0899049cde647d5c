"""The loop that carries events from a source to those who want to know."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Callable, Optional, Union

from tscwatch.capture import Source
from tscwatch.clock import now_ns
from tscwatch.host import tsc
from tscwatch.host.inventory import Inventory
from tscwatch.model import Event, Host

TICK_S = 1.0
"""How long the loop sleeps in the kernel when nothing happens, and how often VMs are looked
after that end without a word."""
_SHOWN_AT_ONCE = 512
"""vCPUs: their events must fit in a source's buffer."""


@dataclass
class SignalFlags:
    """What signals asked for."""

    stop: bool = False
    reload: bool = False


@contextmanager
def signals(may_reload: bool) -> Iterator[SignalFlags]:
    """While this holds, SIGINT and SIGTERM wish for the end.

    :param may_reload: SIGHUP wishes for the configuration to be read again, else for the end.
    """
    wishes = SignalFlags()

    def wish(number: int, _frame: Optional[FrameType]) -> None:
        if may_reload and number == signal.SIGHUP:
            wishes.reload = True
        else:
            wishes.stop = True

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, wish) for number in numbers}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def found(source: Source, inventory: Inventory, here: Host) -> Iterator[Union[Event, Host]]:
    """The host and what is on it already, as events.

    VMs that were made since the source opened are left out: it tells of them.

    :param here: the host as it was before the source opened.
    """
    yield here
    before = list(inventory.found())
    batch = source.poll(0)
    made_now = {event.pid for event in batch if event.op == "vm_create"}
    there = [event for event in before if event.pid not in made_now]
    yield from there
    for raw in batch:
        yield from inventory.admit(raw)
    files = [(e.pid, e.fd) for e in there if e.op == "vcpu_found" and e.fd is not None]
    for first in range(0, len(files), _SHOWN_AT_ONCE):
        source.show(files[first : first + _SHOWN_AT_ONCE])
        for raw in source.poll(0):
            yield from inventory.admit(raw)


def watch(
    source: Source,
    inventory: Inventory,
    here: Host,
    wishes: SignalFlags,
    tick: Callable[[], None],
    each_second: Callable[[], None],
) -> Iterator[Union[Event, Host]]:
    """What happens on this host until it is wished to stop.

    :param here: the host as :func:`found` was told of it.
    :param tick: called after each batch, also an empty one.
    :param each_second: called by the loop itself: where it hangs, nobody is told that it lives.
    """
    next_look = now_ns()
    while not wishes.stop:
        for raw in inventory.with_starts(source.poll(TICK_S), lambda: source.poll(0)):
            yield from inventory.admit(raw)
        if now_ns() >= next_look:
            before, here = here, tsc.read(here)
            if here != before:
                yield here
            yield from inventory.gone()
            yield from inventory.unplugged()
            inventory.check_running()
            each_second()
            next_look = now_ns() + int(TICK_S * 1e9)
        tick()
