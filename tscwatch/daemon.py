"""The daemon: the order in which it starts, its loop, its reload and its end.

``tscwatch run`` is :class:`Daemon`; ``tscwatch record`` is :func:`record`.  Both read the same
:class:`EventStream`.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Optional, Union

from tscwatch import config, recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.capture.choice import open_source
from tscwatch.clock import follow_wall_clock, now_ns
from tscwatch.errors import ConfigError, TracefsMissing
from tscwatch.host import rights, tsc
from tscwatch.host.inventory import Inventory
from tscwatch.linux.syscall import INSPECT_PROCESSES, drop_capabilities_except
from tscwatch.linux.tracefs import TscCounter, find_tracefs
from tscwatch.model import Event, Host, SourceName
from tscwatch.publish import systemd, web
from tscwatch.publish.metrics import Metrics
from tscwatch.publish.publisher import Log, Publisher, choose_log
from tscwatch.publish.state import State
from tscwatch.publish.web_config import load_web_config

log = logging.getLogger(__name__)

_TICK_S = 1.0
"""How long the loop sleeps in the kernel when nothing happens, and how often it looks for VMs and
vCPUs whose end no probe reports."""
_TICK_NS = int(_TICK_S * 1e9)
_BUSY_S = 0.05
"""How long it sleeps instead while lines are to be read again soon."""
_POKED_AT_ONCE = 512
"""vCPUs; their events must fit in a source's buffer."""

_NEEDS_RESTART = ("source", "address", "port", "web_config")


@dataclass
class SignalFlags:
    """What signals have requested."""

    stop: bool = False
    reload: bool = False


@contextmanager
def signal_flags(may_reload: bool) -> Iterator[SignalFlags]:
    """Set flags on SIGINT, SIGTERM and SIGHUP while this holds.

    :param may_reload: SIGHUP requests a reload, else the end.
    """
    flags = SignalFlags()

    def handle(number: int, _frame: Optional[FrameType]) -> None:
        if may_reload and number == signal.SIGHUP:
            flags.reload = True
        else:
            flags.stop = True

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield flags
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class EventStream:
    """A source's events, completed with what ``/proc`` and debugfs show.

    :raises TscwatchError: see :func:`open_source`.
    """

    def __init__(self, name: SourceName) -> None:
        # Before the source opens, because reading the host's frequency creates a VM.
        self._host = tsc.read()
        self._inventory = Inventory()
        self._tsc_counter: Optional[TscCounter] = None
        self._next_sweep = 0
        self.source = open_source(name)
        for sentence in rights.missing():
            log.warning("%s", sentence)

    def close(self) -> None:
        """Leave no probe behind."""
        self.source.close()
        if self._tsc_counter is not None:
            self._tsc_counter.close()

    def drop_capabilities(self) -> None:
        """Keep only what the source needs, and what it takes to find VMs."""
        drop_capabilities_except((*INSPECT_PROCESSES, *self.source.capabilities))

    def existing(self) -> Iterator[Union[Event, Host]]:
        """Yield the host, and the VMs and vCPUs that are older than the source."""
        yield self._host
        # The sweep yields which of the vCPUs are parked.
        found = [*self._inventory.existing(), *self._inventory.sweep()]
        batch = self.source.poll(0)
        # The source reports these itself: they were created after it had opened.
        created = {event.pid for event in batch if event.op == "vm_create"}
        existing = [event for event in found if event.pid not in created]
        yield from existing
        yield from self._enrich(batch)
        files = [(e.pid, e.fd) for e in existing if e.op == "vcpu_found" and e.fd is not None]
        for first in range(0, len(files), _POKED_AT_ONCE):
            self.source.report_existing(files[first : first + _POKED_AT_ONCE])
            yield from self._enrich(self.source.poll(0))
        yield from self._read_lines()

    def follow(self, flags: SignalFlags) -> Iterator[Iterator[Union[Event, Host]]]:
        """Yield what happens on this host, in batches, until ``flags.stop``.

        A batch comes at least each second, and may be empty.  Exhaust each before the next.
        """
        while not flags.stop:
            yield self._next_batch()

    def _next_batch(self) -> Iterator[Union[Event, Host]]:
        """Wait for events, and yield them before anything else is read: none waits for that."""
        writing = self._host.shows_lines and self._inventory.has_lines_due
        batch = self.source.poll(_BUSY_S if writing else _TICK_S)
        follow_wall_clock()  # the times of these events are about to be printed
        yield from self._enrich(batch)
        if now_ns() >= self._next_sweep:
            yield from self._host_if_changed()  # it may create a VM: before probes are attached
            yield from self.source.restore()
            yield from self._inventory.sweep()
            self._next_sweep = now_ns() + _TICK_NS
        yield from self._read_lines()

    def _enrich(self, batch: list[Event]) -> list[Event]:
        return self._inventory.enrich(batch, self._drain)

    def _drain(self) -> list[Event]:
        return self.source.poll(0)

    def _read_lines(self) -> list[Event]:
        if not self._host.shows_lines or self.source.is_behind:
            return []
        return self._inventory.read_lines(
            self._drain, lambda: self.source.is_behind, self._host_tsc
        )

    def _host_tsc(self) -> Optional[int]:
        """Return the host's TSC now; only guests whose vCPUs have different ratios need it."""
        try:
            if self._tsc_counter is None:
                self._tsc_counter = TscCounter(find_tracefs())
            return self._tsc_counter.read()
        except (OSError, TracefsMissing) as error:
            log.warning("the host's TSC cannot be read: %s", error)
            return None

    def _host_if_changed(self) -> list[Host]:
        before, self._host = self._host, tsc.read()
        return [] if self._host == before else [self._host]


class Daemon:
    """``tscwatch run``.

    :param config_path: the configuration; the defaults if None.
    :param source: overrides the configuration's.
    :param as_json: log JSON lines, whatever the configuration sets.
    :param textfile: where node_exporter's textfile collector reads the metrics.
    :raises ConfigError: the configuration cannot be used.
    """

    def __init__(
        self,
        config_path: Optional[Path],
        source: Optional[SourceName],
        as_json: bool,
        textfile: Optional[Path],
    ) -> None:
        self._config_path = config_path
        self._as_json = as_json
        settings = self._settings = config.load(config_path)
        self._source_name = source or settings.source
        self._state = State(settings.max_vms, settings.per_vcpu)
        self._metrics = Metrics(self._state)
        self._textfile = textfile and web.Textfile(textfile, self._metrics.registry())
        self._heartbeat = web.Heartbeat()
        self._pipeline = Pipeline(settings.max_vms, settings.max_vcpus, settings.tolerance)
        self._publisher = Publisher(self._state, self._choose_log())
        self._next_tick = 0

    def run(self) -> None:
        """Observe this host until SIGTERM or SIGINT.

        :raises TscwatchError: it cannot start.
        """
        with ExitStack() as stack:
            self._flags = stack.enter_context(signal_flags(may_reload=True))
            address = self._listen(stack)
            self._stream = stack.enter_context(closing(EventStream(self._source_name)))
            self._stream.drop_capabilities()
            self._update_health()
            stack.callback(self._publisher.close)
            self._publish(self._stream.existing())
            log.info("metrics: %s/metrics", address)
            systemd.notify_ready(self._state.summary())
            stack.callback(systemd.notify_stopping)
            for batch in self._stream.follow(self._flags):
                self._publish(batch)
                self._tick()

    def _listen(self, stack: ExitStack) -> str:
        """Serve HTTP as long as ``stack`` lives; return the scheme, address and port."""
        settings = self._settings
        web_config = load_web_config(settings.web_config)
        registry = self._metrics.registry_with_process()
        application = web.application(registry, self._heartbeat, self._state.rows)
        port = stack.enter_context(
            web.serving(
                application,
                web_config,
                settings.address,
                settings.port,
                on_thread_start=lambda: drop_capabilities_except(()),
            )
        )
        scheme = "http" if web_config.cert_file is None else "https"
        return f"{scheme}://{settings.address}:{port}"

    def _publish(self, events: Iterable[Union[Event, Host]]) -> None:
        for event in events:
            self._publisher.publish(self._pipeline.feed(event))

    def _tick(self) -> None:
        """Do what is due after a batch, and what is due each second."""
        self._update_health()
        if now_ns() < self._next_tick:
            return
        self._next_tick = now_ns() + _TICK_NS
        if self._flags.reload:
            self._reload()
        self._publisher.log_due(now_ns())
        self._heartbeat.beat()
        systemd.notify_alive(self._state.summary())
        if self._textfile:
            self._textfile.write()

    def _update_health(self) -> None:
        source = self._stream.source
        health = source.health()
        self._state.update_health(source.info, health)
        self._heartbeat.ready = all(health.probes.values())

    def _reload(self) -> None:
        """Read the configuration again; if it cannot be used, the previous one stays in force."""
        self._flags.reload = False
        systemd.notify_reloading()
        try:
            settings = config.load(self._config_path)
        except ConfigError as error:
            log.error("%s: the previous configuration stays in force", error)
            self._state.update_reload(False)
        else:
            self._apply(settings)
            self._state.update_reload(True)
            log.info("the configuration was reloaded")
        systemd.notify_ready(self._state.summary())

    def _apply(self, settings: config.Config) -> None:
        before, self._settings = self._settings, settings
        if any(getattr(settings, name) != getattr(before, name) for name in _NEEDS_RESTART):
            log.warning("changes of source and listen take effect at the next start")
        self._publisher.log = self._choose_log()
        self._state.per_vcpu = settings.per_vcpu
        limits = settings.max_vms, settings.max_vcpus
        findings = self._pipeline.configure(now_ns(), *limits, settings.tolerance)
        self._publisher.publish(findings)

    def _choose_log(self) -> Log:
        return choose_log(self._as_json or self._settings.log_format == "json")


def record(config_path: Optional[Path], source: Optional[SourceName], output: Path) -> None:
    """Write this host's events to a recording until SIGTERM, SIGINT or SIGHUP.

    :param source: overrides the configuration's.
    :raises TscwatchError: it cannot start, or the recording cannot be written.
    """
    name = source or config.load(config_path).source
    with ExitStack() as stack:
        flags = stack.enter_context(signal_flags(may_reload=False))
        stream = stack.enter_context(closing(EventStream(name)))
        writer = stack.enter_context(closing(recording.Writer(output)))
        stream.drop_capabilities()
        log.info("recording to %s: end with Ctrl-C", output)
        for event in stream.existing():
            writer.write(event)
        for batch in stream.follow(flags):
            for event in batch:
                writer.write(event)
