"""Recordings: the events of a run as JSON Lines, versioned.

The first line is the header, each further line an event without its empty fields, or the host
as it is from there on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from tscwatch.errors import RecordingError
from tscwatch.model import AFTERS, OPS, Event, Guest, Host

_Record = TypeVar("_Record", Event, Guest, Host)

VERSION = 1
_FORMAT = "tscwatch-recording"
_EMPTY = Event(0, "lost", "", 0, 0, "")
_NOBODY = Guest(0, "")
_EVENT_TYPES: dict[str, type] = {
    **dict.fromkeys(("ts", "pid", "tid", "vcpu", "arg", "result", "sync", "runner", "fd"), int),
    **dict.fromkeys(("op", "vm", "comm", "after", "function"), str),
    **dict.fromkeys(("ran", "master_clock"), bool),
    "scale": float,
}
_GUEST_TYPES: dict[str, type] = {
    **dict.fromkeys(("pid", "tsc_khz"), int),
    **dict.fromkeys(("vmm", "name", "uuid", "machine"), str),
    **dict.fromkeys(("incoming", "restored"), bool),
}
_HOST_TYPES: dict[str, type] = {
    **dict.fromkeys(("tsc_khz", "kvm_tolerance_ppm"), int),
    "scaling": bool,
    "clocksource": str,
}


class Writer:
    """Writes a recording; each event is on its way to the disk before the next is taken.

    :raises RecordingError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise self._failed(error.strerror) from error
        try:
            self._line({"format": _FORMAT, "version": VERSION})
        except RecordingError:
            self._file.close()
            raise

    def write(self, event: Union[Event, Host]) -> None:
        """Append one event, or the host as it is from here on."""
        if isinstance(event, Host):
            self._line({"host": _sparse(event, Host())})
            return
        fields = {"op": event.op, **_sparse(event._replace(guest=None), _EMPTY)}
        if event.guest is not None:
            fields["guest"] = _sparse(event.guest, _NOBODY)
        self._line(fields)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, fields: dict[str, Any]) -> None:
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._failed(error.strerror) from error
        if written != len(line):
            raise self._failed("the disk is full")

    def _failed(self, reason: Optional[str]) -> RecordingError:
        return RecordingError(
            f"{self._path}: cannot be written ({reason}): free space or name another file with -o"
        )


def _sparse(record: _Record, empty: _Record) -> dict[str, Any]:
    return {k: v for k, v in record._asdict().items() if v != getattr(empty, k)}


def read(path: Path) -> Iterator[Union[Event, Host]]:
    """What was recorded, read as it is taken.

    :raises RecordingError: at once or on the way, with the file, the line and the reason.
    """
    lines = _lines(path)
    number, fields = next(lines, (1, {}))
    if fields.get("format") != _FORMAT:
        raise RecordingError(
            f"{path}:{number}: not a recording of tscwatch: make one with 'tscwatch record -o FILE'"
        )
    if fields.get("version") != VERSION:
        raise RecordingError(
            f"{path}:{number}: version {fields.get('version')} of the format is "
            f"not known to this tscwatch, which reads {VERSION}"
        )
    return (_item(f"{path}:{number}", fields) for number, fields in lines)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    raise RecordingError(f"{path}:{number}: the last line is cut off")
                yield number, _object(path, number, line)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror})") from error


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise RecordingError(f"{path}:{number}: not a JSON object")
    return fields


def _item(where: str, fields: dict[str, Any]) -> Union[Event, Host]:
    host, guest = fields.pop("host", None), fields.pop("guest", None)
    if host is not None:
        _check(f"{where}: host", host, _HOST_TYPES)
        return Host(**host)
    _check(f"{where}: event", fields, _EVENT_TYPES)
    event = _EMPTY._replace(**fields)
    if event.op not in OPS or event.after not in (None, *AFTERS):
        raise RecordingError(f"{where}: unknown op {event.op!r} or after {event.after!r}")
    if guest is None:
        return event
    _check(f"{where}: guest", guest, _GUEST_TYPES)
    return event._replace(guest=_NOBODY._replace(**guest))


def _check(where: str, fields: Any, types: dict[str, type]) -> None:
    if not isinstance(fields, dict):
        raise RecordingError(f"{where} is not a JSON object")
    for key, value in fields.items():
        if key not in types:
            raise RecordingError(f"{where} has an unknown field {key!r}")
        if type(value) is not types[key]:
            raise RecordingError(f"{where}'s {key} is not of type {types[key].__name__}")
