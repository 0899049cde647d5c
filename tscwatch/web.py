"""``/metrics`` over HTTP."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from tscwatch.errors import ListenFailed


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 30  # a scraper that never speaks must not keep a thread

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


@contextmanager
def serving(registry: CollectorRegistry, address: str, port: int) -> Iterator[int]:
    """Serve while this holds; gives the port, which is the kernel's choice for 0.

    :raises ListenFailed: the address cannot be bound.
    """
    server_class = _Server6 if ipaddress.ip_address(address).version == 6 else _Server
    try:
        server = make_server(
            address, port, make_wsgi_app(registry), server_class, handler_class=_Handler
        )
    except OSError as error:
        raise ListenFailed(
            f"cannot listen on {address} port {port} ({error.strerror}): set listen.address and "
            "listen.port in the configuration to an address of this host and a free port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
