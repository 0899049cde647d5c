"""A recording as one page of HTML: a line for each vCPU, its calls as marks in their order.

Self-contained: no network, no script.  The horizontal axis is the order of calls, which is what
phases rest on; where more than a second passed, the page says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Optional

from tscwatch.model import Call, Guest, Item, Mismatch, VmSeen, errno_name
from tscwatch.publish.format import clock

COLOURS: Mapping[str, str] = {
    "boot": "#0072b2",
    "prelaunch": "#56b4e9",
    "hotplug": "#d55e00",
    "incoming": "#009e73",
    "loadvm": "#cc79a7",
    "probe": "#e6a700",
    "unknown": "#888888",
}
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
_OTHER_COLOUR = "#444444"
_STEP, _LEFT, _ROW, _SWING = 18, 76, 44, 16
_GAP_NS = 1_000_000_000

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #d8d8d8;
  --alarm: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --faint: #3a3d44; --alarm: #ff7a8a; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.line { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--faint); border-radius: 6px; }
svg text { fill: var(--ink); font-size: 12px; }
svg .axis, svg .break { stroke: var(--faint); }
svg .rate { fill: none; stroke: var(--ink); stroke-opacity: .45; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem .8rem; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--faint); }
.alarm { color: var(--alarm); }
.key span { margin-right: 1.2em; white-space: nowrap; }
""".strip()


@dataclass
class _Vm:
    name: str
    guest: Guest
    calls: list[Call] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)


def page(title: str, items: Iterable[Item]) -> Iterator[str]:
    """The page, line by line.

    :param title: what was recorded; the file's name.
    """
    vms = _by_vm(items)
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{_STYLE}</style>"
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p>{len(vms)} VMs, {sum(len(vm.calls) for vm in vms)} calls, in their order.</p>"
    yield f'<p class="key">{_key()}</p>'
    for vm in vms:
        yield from _section(vm)


def _by_vm(items: Iterable[Item]) -> list[_Vm]:
    """One for each life: a name may come again."""
    lives: list[_Vm] = []
    now: dict[str, _Vm] = {}
    for item in items:
        if isinstance(item, (VmSeen, Call)):
            if isinstance(item, VmSeen) or item.vm not in now:
                now[item.vm] = _Vm(item.vm, item.guest)
                lives.append(now[item.vm])
            if isinstance(item, Call):
                now[item.vm].calls.append(item)
        elif isinstance(item, Mismatch) and item.vm in now:
            now[item.vm].mismatches.append(item)
    return [vm for vm in lives if vm.calls]


def _key() -> str:
    phases = (
        f'<span><svg width="12" height="12"><circle cx="6" cy="6" r="5" fill="{colour}"/></svg> '
        f"{phase}</span>"
        for phase, colour in COLOURS.items()
    )
    return "".join(phases) + "<span>○ GET</span><span>● SET</span><span>✕ failed</span>"


def _section(vm: _Vm) -> Iterator[str]:
    guest = vm.guest
    facts = (guest.vmm, f"process {guest.pid}", guest.machine, guest.uuid)
    yield f"<h2>{escape(vm.name)}</h2>"
    yield f"<p>{escape(', '.join(fact for fact in facts if fact))}</p>"
    yield from _timeline(vm)
    if vm.mismatches:
        yield from _table(
            ("time", "", "kind", "vCPUs", "ppm", "s a day", "since", "detail"),
            (_mismatch_row(mismatch) for mismatch in vm.mismatches),
            "alarm",
        )
    yield from _table(
        ("time", "vCPU", "call", "kHz", "result", "phase", "step", "evidence"),
        (_call_row(call) for call in vm.calls),
    )


def _timeline(vm: _Vm) -> Iterator[str]:
    rows = {vcpu: row for row, vcpu in enumerate(sorted({_vcpu(call) for call in vm.calls}))}
    rates = [call.khz for call in vm.calls if call.khz]
    low, high = min(rates, default=0), max(rates, default=0)
    width, height = _LEFT + _STEP * (len(vm.calls) + 1), _ROW * len(rows) + 24

    def place(number: int, call: Call) -> tuple[int, float]:
        above = ((call.khz or low) - low) / (high - low) if high > low else 0.5
        return _LEFT + _STEP * number, _ROW * rows[_vcpu(call)] + 30 - _SWING * above

    yield f'<div class="line"><svg width="{width}" height="{height}" role="img">'
    for vcpu, row in rows.items():
        base = _ROW * row + 36
        label = "VM" if vcpu < 0 else f"vCPU {vcpu}"
        yield f'<line class="axis" x1="{_LEFT - 8}" x2="{width}" y1="{base}" y2="{base}"/>'
        yield f'<text x="8" y="{base - 6}">{label}</text>'
        points = " ".join(
            f"{x},{y:.1f}"
            for x, y in (place(n, c) for n, c in enumerate(vm.calls) if _vcpu(c) == vcpu)
        )
        yield f'<polyline class="rate" points="{points}"/>'
    before: Optional[Call] = None
    for number, call in enumerate(vm.calls):
        x, y = place(number, call)
        if before is not None and call.event.ts - before.event.ts > _GAP_NS:
            seconds = (call.event.ts - before.event.ts) / 1e9
            middle = x - _STEP // 2
            yield f'<line class="break" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>'
            yield f'<text x="{middle + 2}" y="{height - 4}">+{seconds:.1f} s</text>'
        yield _mark(x, y, call)
        before = call
    yield "</svg></div>"


def _vcpu(call: Call) -> int:
    return -1 if call.event.vcpu is None else call.event.vcpu


def _mark(x: int, y: float, call: Call) -> str:
    colour = COLOURS.get(call.phase, _OTHER_COLOUR)
    fill = colour if call.event.op == "set" else "var(--paper)"
    title = escape(" ".join(_call_row(call)))
    shape = (
        f'<circle cx="{x}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
    )
    if call.status:
        shape = (
            f'<path d="M{x - 5},{y - 5:.1f} l10,10 m0,-10 l-10,10" stroke="var(--alarm)" '
            'stroke-width="3"/>'
        )
    return f"<g><title>{title}</title>{shape}</g>"


def _call_row(call: Call) -> tuple[str, ...]:
    event = call.event
    return (
        clock(event.ts),
        "VM" if event.vcpu is None else str(event.vcpu),
        event.op.upper(),
        "-" if call.khz is None else str(call.khz),
        errno_name(call.status),
        call.phase,
        call.step,
        ", ".join(call.evidence),
    )


def _mismatch_row(mismatch: Mismatch) -> tuple[str, ...]:
    ppm, drift = mismatch.ppm, mismatch.seconds_a_day
    return (
        clock(mismatch.ts),
        mismatch.state,
        f"{mismatch.kind} ({mismatch.severity})",
        ", ".join(map(str, mismatch.vcpus)),
        "-" if ppm is None else f"{ppm:.1f}",
        "-" if drift is None else f"{drift:.1f}",
        mismatch.phase,
        mismatch.full_detail,
    )


def _table(
    head: tuple[str, ...], rows: Iterable[tuple[str, ...]], style: str = ""
) -> Iterator[str]:
    yield f'<div class="line"><table class="{style}"><tr>'
    yield "".join(f"<th>{escape(title)}</th>" for title in head) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table></div>"
