"""Calls and mismatches as lines: for people, or as JSON objects for programs."""

from __future__ import annotations

import json
import time
from typing import Any, Optional, Union

from tscwatch.model import Call, Contradiction, Mismatch, Risk, errno_name

LogItem = Union[Call, Mismatch, Risk, Contradiction]


def as_json(item: LogItem) -> str:
    """One JSON object, without its newline."""
    return json.dumps(fields(item), separators=(",", ":"))


def fields(item: LogItem) -> dict[str, Any]:
    """What there is to say, by name; ``type`` tells the four apart."""
    if isinstance(item, Call):
        return _call_fields(item)
    if isinstance(item, Mismatch):
        return _mismatch_fields(item)
    if isinstance(item, Risk):
        return _risk_fields(item)
    return _contradiction_fields(item)


def as_text(item: LogItem) -> str:
    """One line for a terminal or a journal, without its newline."""
    if isinstance(item, Call):
        return _call_text(item)
    if isinstance(item, Mismatch):
        return _mismatch_text(item)
    if isinstance(item, Risk):
        return _risk_text(item)
    return _contradiction_text(item)


def _call_fields(call: Call) -> dict[str, Any]:
    event = call.event
    return {
        "type": "call",
        "ts": event.ts / 1e9,
        "vm": call.vm,
        "uuid": call.guest.uuid,
        "pid": event.pid,
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


def _mismatch_fields(mismatch: Mismatch) -> dict[str, Any]:
    return {
        "type": "mismatch",
        "ts": mismatch.ts / 1e9,
        "state": mismatch.state,
        "kind": mismatch.kind,
        "severity": mismatch.severity,
        "vm": mismatch.vm,
        "uuid": mismatch.guest.uuid,
        "pid": mismatch.guest.pid,
        "vcpus": mismatch.vcpus,
        "ppm": _rounded(mismatch.ppm),
        "seconds_a_day": _rounded(mismatch.seconds_a_day),
        "phase": mismatch.phase,
        "detail": mismatch.detail,
        "kvm_synchronised": mismatch.verdict and mismatch.verdict.synchronised,
        "kvm_online": mismatch.verdict and mismatch.verdict.online,
        "kvm_master_clock": mismatch.verdict and mismatch.verdict.master_clock,
    }


def _risk_fields(risk: Risk) -> dict[str, Any]:
    return {
        "type": "risk",
        "ts": risk.ts / 1e9,
        "state": risk.state,
        "vm": risk.vm,
        "uuid": risk.guest.uuid,
        "pid": risk.guest.pid,
        "detail": risk.detail,
    }


def _contradiction_fields(contradiction: Contradiction) -> dict[str, Any]:
    return {
        "type": "contradiction",
        "ts": contradiction.ts / 1e9,
        "claim": contradiction.claim,
        "vm": contradiction.vm,
        "uuid": contradiction.guest.uuid,
        "pid": contradiction.guest.pid,
        "detail": contradiction.detail,
    }


def _rounded(size: Optional[float]) -> Optional[float]:
    return None if size is None else round(size, 3)


def _call_text(call: Call) -> str:
    event = call.event
    place = call.phase if call.step == "unknown" else f"{call.phase}/{call.step}"
    khz = "-" if call.khz is None else str(call.khz)
    whose = "VM       " if event.vcpu is None else f"vCPU {event.vcpu:<4}"
    result = "" if call.status == 0 else f"  {errno_name(call.status)}"
    return (
        f"{clock(event.ts)}  {printable(call.vm):<16} {whose} "
        f"{event.op.upper()} {khz:>9} kHz  {place}{result}"
    )


def _mismatch_text(mismatch: Mismatch) -> str:
    size = ""
    if mismatch.ppm is not None:
        size = f" {mismatch.ppm:.1f} ppm, {mismatch.seconds_a_day:.1f} s a day"
    vcpus = ",".join(map(str, mismatch.vcpus))
    return (
        f"{clock(mismatch.ts)}  {printable(mismatch.vm):<16} vCPU {vcpus:<4} "
        f"MISMATCH {mismatch.state}: {mismatch.kind}{size} ({mismatch.severity}, since "
        f"{mismatch.phase}): {mismatch.whole_detail}"
    )


def _risk_text(risk: Risk) -> str:
    return (
        f"{clock(risk.ts)}  {printable(risk.vm):<16}           "
        f"HOTPLUG RISK {risk.state}: {risk.detail}"
    )


def _contradiction_text(contradiction: Contradiction) -> str:
    return (
        f"{clock(contradiction.ts)}  {printable(contradiction.vm):<16}           "
        f"CONTRADICTION about {contradiction.claim}: {contradiction.detail}"
    )


def clock(ts: int) -> str:
    """Local time of day, in microseconds."""
    seconds, rest = divmod(ts, 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"


def printable(text: str) -> str:
    """A guest names itself: nothing in its name may steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
