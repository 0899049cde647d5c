"""What happens, to journald, with its fields (systemd.journal-fields(7), the native protocol).

``journalctl TSCWATCH_VM=db TSCWATCH_TYPE=mismatch`` then finds what a text would not.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tscwatch.model import Call, Mismatch, Risk
from tscwatch.publish import format

log = logging.getLogger(__name__)

SOCKET = Path("/run/systemd/journal/socket")
_ERROR, _WARNING, _NOTICE, _INFO = 3, 4, 5, 6


def is_standard_output() -> bool:
    """As systemd says in JOURNAL_STREAM (systemd.exec(5))."""
    stream = os.fstat(sys.stdout.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def send(item: format.LogItem, path: Path = SOCKET) -> None:
    """One entry; where journald does not take it, a line on standard output instead."""
    entry = b"".join(_encoded(name, value) for name, value in _fields(item))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journald:
            journald.connect(str(path))
            journald.send(entry)
    except OSError:
        print(format.as_text(item), flush=True)


def _fields(item: format.LogItem) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", format.as_text(item)
    yield "PRIORITY", str(_priority(item))
    yield "SYSLOG_IDENTIFIER", "tscwatch"
    for name, value in format.fields(item).items():
        if value is not None:
            is_list = isinstance(value, (list, tuple))
            text = ",".join(map(str, value)) if is_list else str(value)
            yield f"TSCWATCH_{name.upper()}", text


def _priority(item: format.LogItem) -> int:
    if isinstance(item, Call):
        return _INFO
    if isinstance(item, (Mismatch, Risk)) and item.state == "cleared":
        return _NOTICE
    critical = isinstance(item, Mismatch) and item.severity == "critical"
    return _ERROR if critical else _WARNING


def _encoded(name: str, value: str) -> bytes:
    """With its length, so that nothing in a guest's name begins a field of its own."""
    content = value.encode(errors="backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(content)) + content + b"\n"


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
