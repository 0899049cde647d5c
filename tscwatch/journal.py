"""What happens, to journald, with its fields (systemd.journal-fields(7), the native protocol).

``journalctl TSCWATCH_VM=db TSCWATCH_TYPE=mismatch`` then finds what a text would not.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from tscwatch import show
from tscwatch.model import Call, Mismatch, Risk

SOCKET = Path("/run/systemd/journal/socket")
_ERROR, _WARNING, _NOTICE, _INFO = 3, 4, 5, 6


def is_standard_output() -> bool:
    """As systemd says in JOURNAL_STREAM (systemd.exec(5))."""
    stream = os.fstat(sys.stdout.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def send(item: show.Shown, path: Path = SOCKET) -> None:
    """One entry; where journald does not take it, a line on standard output instead."""
    entry = b"".join(_encoded(name, value) for name, value in _fields(item))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journald:
            journald.connect(str(path))
            journald.send(entry)
    except OSError:
        print(show.as_text(item), flush=True)


def _fields(item: show.Shown) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", show.as_text(item)
    yield "PRIORITY", str(_priority(item))
    yield "SYSLOG_IDENTIFIER", "tscwatch"
    for name, value in show.fields(item).items():
        if value is not None:
            is_list = isinstance(value, (list, tuple))
            text = ",".join(map(str, value)) if is_list else str(value)
            yield f"TSCWATCH_{name.upper()}", text


def _priority(item: show.Shown) -> int:
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
