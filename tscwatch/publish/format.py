"""Log items as lines: for people, or as JSON objects for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Union, get_args

from tscwatch.clock import wall_ns
from tscwatch.model import Call, Contradiction, Guest, Mismatch, Risk, duration, errno_name

LogItem = Union[Call, Mismatch, Risk, Contradiction]
LOG_ITEMS: tuple[type, ...] = get_args(LogItem)


class LogLine(NamedTuple):
    """A line of the log."""

    item: LogItem
    times: int = 1
    """How many items that repeat it stands for; ``item`` is the last one of them."""
    late_ns: int = 0
    """How much earlier the item happened than its line shows, because times never step back."""


_SECONDS_A_DAY_SHOWN = 0.5

_encode = json.JSONEncoder(separators=(",", ":")).encode


class _Form(NamedTuple):
    type: str
    fields: Callable[[Any], dict[str, Any]]
    text: Callable[[Any], str]


def moment(item: LogItem) -> int:
    """Return when it happened, as Unix time in nanoseconds."""
    return item.event.ts if isinstance(item, Call) else item.ts


def as_json(line: LogLine) -> str:
    """Return one JSON object, without its newline."""
    return _encode(fields(line))


def fields(line: LogLine) -> dict[str, Any]:
    """Return the line's fields by name; ``type`` tells the four kinds of item apart."""
    form = _FORMS[type(line.item)]
    return {
        "type": form.type,
        "ts": wall_ns(moment(line.item) + line.late_ns) / 1e9,
        **form.fields(line.item),
        "times": line.times,
        "late_seconds": line.late_ns / 1e9,
    }


def as_text(line: LogLine) -> str:
    """Return one line for a terminal or a journal, without its newline."""
    item = line.item
    start = f"{clock(moment(item) + line.late_ns)}  {printable(item.vm):<16}"
    times = "" if line.times == 1 else f"  (the last of {line.times})"
    late = f"  ({duration(line.late_ns / 1e9)} late)" if line.late_ns else ""
    return f"{start} {_FORMS[type(item)].text(item)}{times}{late}"


def clock(ts: int) -> str:
    """Return the local time of day, to the microsecond.

    :param ts: Unix time in nanoseconds.
    """
    seconds, rest = divmod(wall_ns(ts), 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"


def printable(text: str) -> str:
    """Escape what is not printable: guests choose their names, and must not control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _call_fields(call: Call) -> dict[str, Any]:
    event = call.event
    return {
        "vm": call.vm,
        "uuid": call.guest.uuid,
        "pid": event.pid,
        "owner": _owner(call.guest),
        "tid": event.tid,
        "scope": call.scope,
        "vcpu": event.vcpu,
        "op": event.op,
        "khz": call.khz,
        "result": call.status,
        "phase": call.phase,
        "step": call.step,
        "evidence": call.evidence,
    }


def _call_text(call: Call) -> str:
    event = call.event
    place = call.phase if call.step == "unknown" else f"{call.phase}/{call.step}"
    khz = "-" if call.khz is None else str(call.khz)
    target = "VM       " if event.vcpu is None else f"vCPU {event.vcpu:<4}"
    result = "" if call.status == 0 else f"  {errno_name(call.status)}"
    return f"{target} {event.op.upper()} {khz:>9} kHz  {place}{result}"


def _mismatch_fields(mismatch: Mismatch) -> dict[str, Any]:
    kvm = mismatch.kvm_state
    return {
        "state": mismatch.state,
        "kind": mismatch.kind,
        "severity": mismatch.severity,
        **_identity(mismatch),
        "vcpus": mismatch.vcpus,
        "apart_seconds": None
        if mismatch.apart_seconds is None
        else round(mismatch.apart_seconds, 9),
        "requested_ppm": _rounded(mismatch.requested_ppm),
        "ppm": _rounded(mismatch.ppm),
        "seconds_a_day": _rounded(mismatch.seconds_a_day),
        "phase": mismatch.phase,
        "detail": mismatch.detail,
        "kvm_synchronised": kvm and kvm.synchronised,
        "kvm_online": kvm and kvm.online,
        "kvm_master_clock": kvm and kvm.master_clock,
    }


def _mismatch_text(mismatch: Mismatch) -> str:
    sizes = ", ".join(_sizes(mismatch))
    size = f" {sizes}" if sizes else ""
    vcpus = ",".join(map(str, mismatch.vcpus))
    return (
        f"vCPU {vcpus:<4} MISMATCH {mismatch.state}: {mismatch.kind}{size} "
        f"({mismatch.severity}, since {mismatch.phase}): {mismatch.full_detail}"
    )


def _sizes(mismatch: Mismatch) -> Iterator[str]:
    """Yield the sizes of a mismatch; seconds a day only where there are some."""
    if mismatch.apart_seconds is not None:
        yield f"{duration(mismatch.apart_seconds)} apart"
    if mismatch.requested_ppm is not None:
        yield f"requested {mismatch.requested_ppm:.1f} ppm"
    if mismatch.ppm:
        label = "" if mismatch.requested_ppm is None else "effective "
        yield f"{label}{mismatch.ppm:.1f} ppm"
    if mismatch.seconds_a_day is not None and mismatch.seconds_a_day >= _SECONDS_A_DAY_SHOWN:
        yield f"{mismatch.seconds_a_day:.1f} s a day"


def _risk_fields(risk: Risk) -> dict[str, Any]:
    return {
        "state": risk.state,
        **_identity(risk),
        "detail": risk.detail,
    }


def _risk_text(risk: Risk) -> str:
    return f"          HOTPLUG RISK {risk.state}: {risk.detail}"


def _contradiction_fields(contradiction: Contradiction) -> dict[str, Any]:
    return {
        "claim": contradiction.claim,
        **_identity(contradiction),
        "detail": contradiction.detail,
    }


def _contradiction_text(contradiction: Contradiction) -> str:
    return f"          CONTRADICTION about {contradiction.claim}: {contradiction.detail}"


def _identity(item: Union[Mismatch, Risk, Contradiction]) -> dict[str, Any]:
    guest = item.guest
    return {"vm": item.vm, "uuid": guest.uuid, "pid": guest.pid, "owner": _owner(guest)}


def _owner(guest: Guest) -> Optional[dict[str, str]]:
    return guest.owner and guest.owner.facts()


def _rounded(size: Optional[float]) -> Optional[float]:
    return None if size is None else round(size, 3)


_FORMS: dict[type, _Form] = {
    Call: _Form("call", _call_fields, _call_text),
    Mismatch: _Form("mismatch", _mismatch_fields, _mismatch_text),
    Risk: _Form("risk", _risk_fields, _risk_text),
    Contradiction: _Form("contradiction", _contradiction_fields, _contradiction_text),
}
