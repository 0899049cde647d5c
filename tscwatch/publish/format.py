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


_SECONDS_A_DAY_SHOWN = 0.5

_encode = json.JSONEncoder(separators=(",", ":")).encode


class _Form(NamedTuple):
    fields: Callable[[Any], dict[str, Any]]
    text: Callable[[Any], str]


def as_json(item: LogItem) -> str:
    """Return one JSON object, without its newline."""
    return _encode(fields(item))


def fields(item: LogItem) -> dict[str, Any]:
    """Return the item's fields by name; ``type`` tells the four kinds of item apart."""
    return _FORMS[type(item)].fields(item)


def as_text(item: LogItem) -> str:
    """Return one line for a terminal or a journal, without its newline."""
    return _FORMS[type(item)].text(item)


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
        "type": "call",
        "ts": _seconds(event.ts + call.late_ns),
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
        "times": call.times,
        "late_seconds": call.late_ns / 1e9,
    }


def _call_text(call: Call) -> str:
    event = call.event
    place = call.phase if call.step == "unknown" else f"{call.phase}/{call.step}"
    khz = "-" if call.khz is None else str(call.khz)
    target = "VM       " if event.vcpu is None else f"vCPU {event.vcpu:<4}"
    result = "" if call.status == 0 else f"  {errno_name(call.status)}"
    times = "" if call.times == 1 else f"  ({call.times} times)"
    late = f"  (made {duration(call.late_ns / 1e9)} before)" if call.late_ns else ""
    what = f"{target} {event.op.upper()} {khz:>9} kHz  {place}{result}{times}{late}"
    return f"{_start(event.ts + call.late_ns, call.vm)} {what}"


def _mismatch_fields(mismatch: Mismatch) -> dict[str, Any]:
    kvm = mismatch.kvm_state
    return {
        "type": "mismatch",
        "ts": _seconds(mismatch.ts),
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
        f"{_start(mismatch.ts, mismatch.vm)} vCPU {vcpus:<4} "
        f"MISMATCH {mismatch.state}: {mismatch.kind}{size} ({mismatch.severity}, since "
        f"{mismatch.phase}): {mismatch.full_detail}"
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
        "type": "risk",
        "ts": _seconds(risk.ts),
        "state": risk.state,
        **_identity(risk),
        "detail": risk.detail,
    }


def _risk_text(risk: Risk) -> str:
    return f"{_start(risk.ts, risk.vm)}           HOTPLUG RISK {risk.state}: {risk.detail}"


def _contradiction_fields(contradiction: Contradiction) -> dict[str, Any]:
    return {
        "type": "contradiction",
        "ts": _seconds(contradiction.ts),
        "claim": contradiction.claim,
        **_identity(contradiction),
        "detail": contradiction.detail,
    }


def _contradiction_text(contradiction: Contradiction) -> str:
    return (
        f"{_start(contradiction.ts, contradiction.vm)}           "
        f"CONTRADICTION about {contradiction.claim}: {contradiction.detail}"
    )


def _identity(item: Union[Mismatch, Risk, Contradiction]) -> dict[str, Any]:
    guest = item.guest
    return {"vm": item.vm, "uuid": guest.uuid, "pid": guest.pid, "owner": _owner(guest)}


def _owner(guest: Guest) -> Optional[dict[str, str]]:
    return guest.owner and guest.owner.facts()


def _start(ts: int, vm: str) -> str:
    return f"{clock(ts)}  {printable(vm):<16}"


def _seconds(ts: int) -> float:
    return wall_ns(ts) / 1e9


def _rounded(size: Optional[float]) -> Optional[float]:
    return None if size is None else round(size, 3)


_FORMS: dict[type, _Form] = {
    Call: _Form(_call_fields, _call_text),
    Mismatch: _Form(_mismatch_fields, _mismatch_text),
    Risk: _Form(_risk_fields, _risk_text),
    Contradiction: _Form(_contradiction_fields, _contradiction_text),
}
