"""Recordings: the events of a run as JSON Lines.

The first line is a header with the version of the format.  Each further line is an event without
the fields that have their default, or the host's parameters from that point on.

Version 2 had no ``tsc_lines``, and a SET had the vCPU's scaling ratio, ``scale``, though read later
than the SET; it is dropped.  Version 1 had two integers, ``arg`` and ``result``, whose meaning
depended on the operation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import (
    Any,
    Callable,
    Literal,
    NamedTuple,
    Optional,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from tscwatch.errors import RecordingError
from tscwatch.model import Event, Guest, Host, Line

_Record = TypeVar("_Record", Event, Guest, Host)

VERSION = 3
_FORMAT = "tscwatch-recording"
_EMPTY_EVENT = Event(0, "lost", "", 0, 0, "")
_EMPTY_GUEST = Guest(0, "")


class _Field(NamedTuple):
    """What a JSON value must be."""

    type: type
    choices: tuple[str, ...] = ()


def _fields(record: type) -> dict[str, _Field]:
    """Return the fields of a record by name, from its annotations; not those that are records."""
    fields = {}
    for name, hint in get_type_hints(record).items():
        optional = get_origin(hint) is Union
        inner = (
            next(each for each in get_args(hint) if each is not type(None)) if optional else hint
        )
        if get_origin(inner) is Literal:
            fields[name] = _Field(str, get_args(inner))
        elif inner in (int, str, bool, float):
            fields[name] = _Field(inner)
    return fields


_RANGE = 1 << 64

_EVENT_FIELDS, _GUEST_FIELDS, _HOST_FIELDS, _LINE_FIELDS = map(_fields, (Event, Guest, Host, Line))
_EVENT_FIELDS_2 = {**_EVENT_FIELDS, "scale": _Field(float)}
_EVENT_FIELDS_1 = {**_EVENT_FIELDS_2, "arg": _Field(int), "result": _Field(int)}


class Writer:
    """Writes a recording; each event is handed to the kernel before the next one is taken.

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
        """Append an event, or the host's parameters from this point on.

        :raises RecordingError: the file cannot be written.
        """
        if isinstance(event, Host):
            self._line({"host": _sparse(event, Host())})
            return
        fields = {"op": event.op, **_sparse(event._replace(guest=None, lines=()), _EMPTY_EVENT)}
        if event.lines:
            fields["lines"] = [line._asdict() for line in event.lines]
        if event.guest is not None:
            # Recordings are given to others.  Only the guest's own name shows whose it is.
            fields["guest"] = _sparse(event.guest._replace(owner=None, vmid=None), _EMPTY_GUEST)
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
    """Read a recording, line by line as the caller consumes it.

    :raises RecordingError: at once or while iterating, with the file, the line and the reason.
    """
    lines = _lines(path)
    number, header = next(lines, (1, {}))
    if header.get("format") != _FORMAT:
        raise RecordingError(
            f"{path}:{number}: not a recording of tscwatch: make one with 'tscwatch record -o FILE'"
        )
    parse = _EVENT_PARSERS.get(header.get("version", 0))
    if parse is None:
        versions = " and ".join(map(str, _EVENT_PARSERS))
        raise RecordingError(
            f"{path}:{number}: version {header.get('version')} of the format is not supported; "
            f"this tscwatch reads versions {versions}"
        )
    return (_item(f"{path}:{number}", fields, parse) for number, fields in lines)


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


def _item(
    where: str, fields: dict[str, Any], parse: Callable[[str, dict[str, Any]], Event]
) -> Union[Event, Host]:
    host, guest = fields.pop("host", None), fields.pop("guest", None)
    if host is not None:
        _check(f"{where}: host", host, _HOST_FIELDS)
        _check_positive(f"{where}: host", host.get("tsc_khz", 1))
        return Host(**host)
    lines = fields.pop("lines", [])
    event = parse(f"{where}: event", fields)._replace(lines=_parse_lines(where, lines))
    if guest is None:
        return event
    _check(f"{where}: guest", guest, _GUEST_FIELDS)
    return event._replace(guest=_EMPTY_GUEST._replace(**guest))


def _parse_lines(where: str, lines: Any) -> tuple[Line, ...]:
    if not isinstance(lines, list):
        raise RecordingError(f"{where}: event's lines is not of type list")
    for line in lines:
        _check(f"{where}: line", line, _LINE_FIELDS)
        if not {"vcpu", "offset"} <= line.keys():
            raise RecordingError(f"{where}: line has no vcpu or no offset")
        _check_positive(f"{where}: line", line.get("ratio", 1))
    return tuple(Line(**line) for line in lines)


def _event(where: str, fields: dict[str, Any]) -> Event:
    _check(where, fields, _EVENT_FIELDS)
    return _EMPTY_EVENT._replace(**fields)


def _event_of_version_2(where: str, fields: dict[str, Any]) -> Event:
    _check(where, fields, _EVENT_FIELDS_2)
    fields.pop("scale", None)
    return _EMPTY_EVENT._replace(**fields)


def _event_of_version_1(where: str, fields: dict[str, Any]) -> Event:
    _check(where, fields, _EVENT_FIELDS_1)
    arg, result = fields.pop("arg", 0), fields.pop("result", 0)
    fields.pop("scale", None)
    event = _EMPTY_EVENT._replace(**fields)
    if event.op == "set":
        return event._replace(khz=arg, status=result)
    if event.op == "get":
        return event._replace(khz=result if result >= 0 else None, status=min(result, 0))
    if event.op == "vcpu_found":
        return event._replace(khz=result or None)
    if event.op == "lost":
        return event._replace(lost_events=arg)
    if event.op == "tsc_tracked":
        return event._replace(matched_vcpus=arg, online_vcpus=result)
    return event


_EVENT_PARSERS = {1: _event_of_version_1, 2: _event_of_version_2, 3: _event}


def _check_positive(where: str, divisor: float) -> None:
    if divisor <= 0:
        raise RecordingError(f"{where}'s rate is not positive")


def _check(where: str, fields: Any, known: dict[str, _Field]) -> None:
    if not isinstance(fields, dict):
        raise RecordingError(f"{where} is not a JSON object")
    for key, value in fields.items():
        if key not in known:
            raise RecordingError(f"{where} has an unknown field {key!r}")
        wanted = known[key]
        if type(value) is not wanted.type:
            raise RecordingError(f"{where}'s {key} is not of type {wanted.type.__name__}")
        if isinstance(value, (int, float)) and not -_RANGE < value < _RANGE:  # such as NaN
            raise RecordingError(f"{where}'s {key} is out of range")
        if wanted.choices and value not in wanted.choices:
            raise RecordingError(f"{where} has an unknown {key} {value!r}")
