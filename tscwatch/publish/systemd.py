"""systemd's two protocols: service notifications (sd_notify(3)) and journal entries.

Journal entries have fields (systemd.journal-fields(7), the native protocol), so that for example
``journalctl TSCWATCH_VM=db TSCWATCH_TYPE=mismatch`` finds a guest's mismatches.
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
from tscwatch.publish.format import LogItem, LogLine, as_text, fields

log = logging.getLogger(__name__)

JOURNAL = Path("/run/systemd/journal/socket")
_ERROR, _WARNING, _NOTICE, _INFO = 3, 4, 5, 6
_PRIORITIES = {"critical": _ERROR, "warning": _WARNING, "info": _INFO}


def notify_ready(status: str) -> None:
    """Notify systemd that the probes are attached and the port answers."""
    _notify("READY=1", f"STATUS={status}")


def notify_alive(status: str) -> None:
    """Feed systemd's watchdog; to be called by the daemon's loop alone, which is what may hang."""
    _notify("WATCHDOG=1", f"STATUS={status}")


def notify_reloading() -> None:
    """Notify systemd of a reload, which lasts until the next :func:`notify_ready`."""
    _notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def notify_stopping() -> None:
    """Notify systemd that the service is shutting down."""
    _notify("STOPPING=1")


def is_journal_on_standard_output() -> bool:
    """Return whether standard output is the journal, by JOURNAL_STREAM (systemd.exec(5))."""
    stream = os.fstat(sys.stdout.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def send_to_journal(line: LogLine, path: Path = JOURNAL) -> None:
    """Send one journal entry; print a line instead if journald does not accept it."""
    entry = b"".join(_encoded(name, value) for name, value in _journal_fields(line))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journald:
            journald.connect(str(path))
            journald.send(entry)
    except OSError:
        print(as_text(line), flush=True)


def _notify(*states: str) -> None:
    """Send states to NOTIFY_SOCKET, which is set only if systemd started this process."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as systemd:
            systemd.connect(address)
            systemd.send("\n".join(states).encode())
    except OSError as error:
        log.error("NOTIFY_SOCKET %s: systemd cannot be notified (%s)", address, error.strerror)


def _journal_fields(line: LogLine) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", as_text(line)
    yield "PRIORITY", str(_priority(line.item))
    yield "SYSLOG_IDENTIFIER", "tscwatch"
    shown = fields(line)
    owner = shown.pop("owner") or {}
    shown.update((f"owner_{name}", value) for name, value in owner.items())
    for name, value in shown.items():
        if value is not None:
            is_list = isinstance(value, (list, tuple))
            text = ",".join(map(str, value)) if is_list else str(value)
            yield f"TSCWATCH_{name.upper()}", text


def _priority(item: LogItem) -> int:
    if isinstance(item, Call):
        return _INFO
    if isinstance(item, Risk) or (isinstance(item, Mismatch) and item.state == "cleared"):
        return _NOTICE
    return _PRIORITIES[item.severity] if isinstance(item, Mismatch) else _WARNING


def _encoded(name: str, value: str) -> bytes:
    """Encode a field with its length, so that no newline in a guest's name starts another field."""
    content = value.encode(errors="backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(content)) + content + b"\n"
