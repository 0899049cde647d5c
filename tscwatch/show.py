"""Calls and mismatches as lines: for people, or as JSON objects for programs."""

from __future__ import annotations

import json
import time
from typing import Any, Union

from tscwatch.model import Call, Mismatch, errno_name


def as_json(item: Union[Call, Mismatch]) -> str:
    """One JSON object, without its newline."""
    fields = _call_fields(item) if isinstance(item, Call) else _mismatch_fields(item)
    return json.dumps(fields, separators=(",", ":"))


def as_text(item: Union[Call, Mismatch]) -> str:
    """One line for a terminal or a journal, without its newline."""
    return _call_text(item) if isinstance(item, Call) else _mismatch_text(item)


def _call_fields(call: Call) -> dict[str, Any]:
    event = call.event
    return {
        "type": "call",
        "ts": event.ts / 1e9,
        "vm": call.vm,
        "uuid": call.guest.uuid,
        "pid": event.pid,
        "tid": event.tid,
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
        "ppm": None if mismatch.ppm is None else round(mismatch.ppm, 3),
        "phase": mismatch.phase,
        "detail": mismatch.detail,
    }


def _call_text(call: Call) -> str:
    event = call.event
    place = call.phase if call.step == "unknown" else f"{call.phase}/{call.step}"
    khz = "-" if call.khz is None else str(call.khz)
    result = "" if call.status == 0 else f"  {errno_name(call.status)}"
    return (
        f"{_clock(event.ts)}  {printable(call.vm):<16} vCPU {event.vcpu:<4} "
        f"{event.op.upper()} {khz:>9} kHz  {place}{result}"
    )


def _mismatch_text(mismatch: Mismatch) -> str:
    size = "" if mismatch.ppm is None else f" {mismatch.ppm:.1f} ppm"
    vcpus = ",".join(map(str, mismatch.vcpus))
    return (
        f"{_clock(mismatch.ts)}  {printable(mismatch.vm):<16} vCPU {vcpus:<4} "
        f"MISMATCH {mismatch.state}: {mismatch.kind}{size} ({mismatch.severity}, since "
        f"{mismatch.phase}): {mismatch.detail}"
    )


def _clock(ts: int) -> str:
    seconds, rest = divmod(ts, 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"


def printable(text: str) -> str:
    """A guest names itself: nothing in its name may steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
