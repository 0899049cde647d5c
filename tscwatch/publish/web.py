"""``/metrics``, ``/healthz`` and ``/readyz`` over HTTP; the metrics as a file beside them."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Callable, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile

from tscwatch.clock import now_ns
from tscwatch.errors import ListenFailed
from tscwatch.publish.web_config import WebConfig

log = logging.getLogger(__name__)

_MAX_REQUESTS = 128  # at once; each has a thread
_HUNG_NS = 10_000_000_000
_TEXTFILE_NS = 15_000_000_000
_START = Callable[[str, list[tuple[str, str]]], object]


@dataclass
class Heartbeat:
    """Whether the daemon's loop lives, and whether all its probes are in place."""

    beat_ns: int = 0
    ready: bool = False

    def beat(self) -> None:
        """Called by the loop itself."""
        self.beat_ns = now_ns()

    @property
    def alive(self) -> bool:
        """The last beat is not long ago."""
        return now_ns() - self.beat_ns < _HUNG_NS


class Textfile:
    """The metrics for node_exporter's textfile collector: a whole file, a scrape each time.

    :param path: must end in ``.prom``, or node_exporter does not read it.
    """

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path = path
        self._registry = registry
        self._next_ns = 0
        self._failed = False

    def write(self) -> None:
        """When it is time; what keeps it from being written is logged once."""
        if now_ns() < self._next_ns:
            return
        self._next_ns = now_ns() + _TEXTFILE_NS
        try:
            write_to_textfile(str(self._path), self._registry)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("%s: cannot be written (%s)", self._path, error.strerror)
            self._failed = True


def application(
    registry: CollectorRegistry, pulse: Heartbeat, vms: Callable[[], object]
) -> Callable[..., Iterable[bytes]]:
    """What answers (PEP 3333)."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: _START) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast(Iterable[bytes], metrics(environ, start))
        if path == "/healthz":
            return _say(start, pulse.alive, "alive", "the loop hangs")
        if path == "/readyz":
            return _say(start, pulse.alive and pulse.ready, "ready", "a probe is not in place")
        if path == "/vms":
            return _page(start, "200 OK", json.dumps(vms()), "application/json")
        return _page(start, "404 Not Found", "there are /metrics, /vms, /healthz and /readyz")

    return answer


def _say(start: _START, well: bool, yes: str, no: str) -> Iterable[bytes]:
    return _page(start, "200 OK", yes) if well else _page(start, "503 Service Unavailable", no)


def _page(
    start: _START, status: str, text: str, kind: str = "text/plain; charset=utf-8"
) -> Iterable[bytes]:
    start(status, [("Content-Type", kind)])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = _MAX_REQUESTS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free = threading.BoundedSemaphore(_MAX_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Past the limit a client is hung up on: Prometheus comes again."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that breaks off, or speaks HTTP to TLS, is no fault of ours."""
        log.debug("a request of %s failed: %s", client_address, sys.exc_info()[1])


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # a scraper that never speaks must not keep a thread

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


@contextmanager
def serving(
    answer: Callable[..., Iterable[bytes]],
    guard: WebConfig,
    address: str,
    port: int,
    on_thread_start: Callable[[], None],
) -> Iterator[int]:
    """Serve an :func:`application` while this holds.

    Gives the port, which is the kernel's choice for 0.

    :raises ListenFailed: the address cannot be bound.
    """
    tls, answer = guard.tls(), guard.protect(answer)
    server_class = _Server6 if ipaddress.ip_address(address).version == 6 else _Server
    try:
        server = make_server(address, port, answer, server_class, handler_class=_Handler)
    except OSError as error:
        raise ListenFailed(
            f"cannot listen on {address} port {port} ({error.strerror}): set listen.address and "
            "listen.port in the configuration to an address of this host and a free port"
        ) from error
    if tls is not None:
        # The handshake is the handler's: a client that keeps silent must not keep others waiting.
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    ending = threading.Event()

    def serve() -> None:
        on_thread_start()  # the request threads inherit its capabilities
        while not ending.is_set():  # serve_forever looks for that twice a second
            server.handle_request()

    thread = threading.Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        ending.set()
        server.socket.shutdown(socket.SHUT_RDWR)  # wakes it
        thread.join()
        server.server_close()
