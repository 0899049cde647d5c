"""What systemd is told of a service (sd_notify(3)); nothing where it did not start us."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


def ready(status: str) -> None:
    """The probes are attached and the port answers."""
    _notify("READY=1", f"STATUS={status}")


def alive(status: str) -> None:
    """For the watchdog: to be said by the loop itself, which is what may hang."""
    _notify("WATCHDOG=1", f"STATUS={status}")


def reloading() -> None:
    """Until the next :func:`ready`."""
    _notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """The end has begun."""
    _notify("STOPPING=1")


def _notify(*states: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_systemd:
            to_systemd.connect(address)
            to_systemd.send("\n".join(states).encode())
    except OSError as error:
        log.error("NOTIFY_SOCKET %s: systemd cannot be told (%s)", address, error.strerror)
