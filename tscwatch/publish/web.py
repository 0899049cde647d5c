"""HTTP: ``/metrics``, ``/vms``, ``/healthz``, ``/readyz`` and a page with links to them.

This module also writes the metrics to a text file.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Callable, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile

from tscwatch import __version__
from tscwatch.clock import now_ns
from tscwatch.errors import ListenFailed
from tscwatch.publish.web_config import WebConfig

log = logging.getLogger(__name__)

_MAX_REQUESTS = 128
"""Requests that are handled at the same time, each in a thread."""
_REQUEST_TIMEOUT_S = 10
"""How long a request's thread waits for the client, at each read and write."""
_MAX_BEAT_AGE_NS = 10_000_000_000
_TEXTFILE_INTERVAL_NS = 15_000_000_000

_HEALTH_PATHS = ("/healthz", "/readyz")
"""They need no password: a load balancer or a kubelet has none, and they reveal nothing else."""
_PAGE = f"""\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>tscwatch</title></head>
<body>
<h1>tscwatch {__version__}</h1>
<ul>
<li><a href="/metrics">/metrics</a>: for Prometheus</li>
<li><a href="/vms">/vms</a>: the guests, as JSON for <code>tscwatch top</code></li>
<li><a href="/healthz">/healthz</a>: whether the daemon's loop is alive</li>
<li><a href="/readyz">/readyz</a>: whether all probes are attached</li>
</ul>
</body>
</html>"""

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


@dataclass
class Heartbeat:
    """The state of the daemon's loop, for ``/healthz`` and ``/readyz``."""

    beat_ns: int = field(default_factory=now_ns)
    """Unix time of the last beat, in nanoseconds; at first, that of the start."""
    ready: bool = False
    """Whether all probes are attached."""

    def beat(self) -> None:
        """Record that the loop makes progress; to be called by the loop itself."""
        self.beat_ns = now_ns()

    @property
    def alive(self) -> bool:
        """Whether the loop has made progress in the last 10 seconds."""
        return now_ns() - self.beat_ns < _MAX_BEAT_AGE_NS


class Textfile:
    """Writes the metrics to a file for node_exporter's textfile collector.

    The file is replaced as a whole, so the collector never reads a part of it.  Each write is a
    scrape of the metrics.

    :param path: must end in ``.prom``: node_exporter ignores files with other names.
    """

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path = path
        self._registry = registry
        self._next_ns = 0
        self._failed = False

    def write(self) -> None:
        """Write the file, unless the last attempt was less than 15 seconds ago.

        An error is logged, and not logged again until a write has succeeded.
        """
        if now_ns() < self._next_ns:
            return
        self._next_ns = now_ns() + _TEXTFILE_INTERVAL_NS
        try:
            write_to_textfile(str(self._path), self._registry)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("%s: cannot be written (%s)", self._path, error.strerror)
            self._failed = True


def application(
    registry: CollectorRegistry, heartbeat: Heartbeat, vms: Callable[[], object]
) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application (PEP 3333).

    :param vms: returns the content of ``/vms``, which must be serialisable as JSON.
    """
    metrics = make_wsgi_app(registry)

    def respond(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast(Iterable[bytes], metrics(environ, start_response))
        if path == "/healthz":
            return _health(
                start_response, heartbeat.alive, "alive", "the daemon's loop is not running"
            )
        if path == "/readyz":
            ready = heartbeat.alive and heartbeat.ready
            reason = "a probe is not attached, or the daemon's loop is not running"
            return _health(start_response, ready, "ready", reason)
        if path == "/vms":
            return _response(start_response, "200 OK", json.dumps(vms()), "application/json")
        if path == "/":
            return _response(start_response, "200 OK", _PAGE, "text/html; charset=utf-8")
        paths = "the paths are /, /metrics, /vms, /healthz and /readyz"
        return _response(start_response, "404 Not Found", paths)

    return respond


def _health(start_response: _StartResponse, is_ok: bool, ok: str, reason: str) -> Iterable[bytes]:
    """Respond with the text ``ok``, or with status 503 and the reason."""
    if is_ok:
        return _response(start_response, "200 OK", ok)
    return _response(start_response, "503 Service Unavailable", reason)


def _response(
    start_response: _StartResponse,
    status: str,
    text: str,
    content_type: str = "text/plain; charset=utf-8",
) -> Iterable[bytes]:
    start_response(status, [("Content-Type", content_type)])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = _MAX_REQUESTS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free = threading.BoundedSemaphore(_MAX_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a request; at the limit, close the connection instead.

        Prometheus scrapes again at its next interval.
        """
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
        """Log at debug level: a client may disconnect, or send plain HTTP to a TLS port."""
        log.debug("a request from %s failed: %s", client_address, sys.exc_info()[1])


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Output(io.BufferedIOBase):
    """What is sent to a client.

    wsgiref prints a traceback for an error that is not one of a broken connection, such as those of
    TLS and of a timeout.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: Any) -> int:
        """Send all of some bytes."""
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise BrokenPipeError(str(error)) from error
        return memoryview(data).nbytes


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def setup(self) -> None:
        super().setup()
        self.wfile = _Output(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: there would be a line for each scrape."""


@contextmanager
def serving(
    application: Callable[..., Iterable[bytes]],
    web_config: WebConfig,
    address: str,
    port: int,
    on_thread_start: Callable[[], None],
) -> Iterator[int]:
    """Serve a WSGI application in a thread while this holds; yield the port.

    :param address: an IPv4 or IPv6 address.
    :param port: 0 lets the kernel choose one.
    :param on_thread_start: called first in the thread.  The threads that handle requests are
        started by this thread and inherit its capabilities.
    :raises ConfigError: a TLS file cannot be used.
    :raises ListenFailed: the address or port cannot be bound.
    """
    tls, protected = web_config.tls(), web_config.protect(application, _HEALTH_PATHS)
    server_class = _Server6 if ipaddress.ip_address(address).version == 6 else _Server
    try:
        server = make_server(address, port, protected, server_class, handler_class=_Handler)
    except OSError as error:
        raise ListenFailed(
            f"cannot listen on {address} port {port} ({error.strerror}): set listen.address and "
            "listen.port in the configuration to an address of this host and a free port"
        ) from error
    if tls is not None:
        # The handshake must happen in the request's thread, at its first read. In accept(), a
        # client that sends nothing would block all others.
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    stopping = threading.Event()

    def serve() -> None:
        on_thread_start()
        # Not serve_forever(), which wakes up twice a second to see whether it must stop.
        while not stopping.is_set():
            server.handle_request()

    thread = threading.Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        stopping.set()
        server.socket.shutdown(socket.SHUT_RDWR)  # makes handle_request() return
        thread.join()
        server.server_close()
