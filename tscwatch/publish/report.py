"""``tscwatch report``: a recording as one HTML page.

For each VM, the page has a line for each vCPU with the vCPU's calls as marks.  The horizontal axis
is the order of the calls, because phases follow from the order and never from elapsed time; a gap
of more than a second is marked.  The page has no scripts and loads nothing from the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Optional, Union

from tscwatch.model import VM_SCOPE, Call, Guest, Item, Mismatch, VmSeen, duration, errno_name
from tscwatch.publish.format import clock

COLOURS: Mapping[str, str] = {
    "boot": "#0072b2",
    "prelaunch": "#56b4e9",
    "hotplug": "#d55e00",
    "reset": "#882255",
    "incoming": "#009e73",
    "loadvm": "#cc79a7",
    "probe": "#e6a700",
    "unknown": "#888888",
}
"""By phase; based on the palette of Okabe and Ito, which colour-blind readers can distinguish."""
_DEFAULT_COLOUR = "#444444"
"""For a phase that is not in :data:`COLOURS`."""

# Lengths in the drawing, in pixels.
_CALL_WIDTH = 18
_LABEL_WIDTH = 76
_ROW_HEIGHT = 44
_KHZ_HEIGHT = 16
"""Between the marks of the VM's lowest and highest frequency."""

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
    """Yield the lines of the page.

    :param title: the recording's file name.
    :param items: what the pipeline yields for the recording.
    """
    vms = _vms_with_calls(items)
    calls = sum(len(vm.calls) for vm in vms)
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{_STYLE}</style>"
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p>VMs: {len(vms)}. Calls: {calls}, in the order in which they happened.</p>"
    yield f'<p class="key">{_legend()}</p>'
    for vm in vms:
        yield from _section(vm)


def _vms_with_calls(items: Iterable[Item]) -> list[_Vm]:
    """Return the VMs that made calls, in order of their first item.

    A VM may have the name of one that has ended, so each ``VmSeen`` begins a new one.  Calls of a
    probe, or of a VM beyond the limit, come without one.
    """
    vms: list[_Vm] = []
    latest: dict[str, _Vm] = {}

    def begin(item: Union[VmSeen, Call]) -> _Vm:
        vm = latest[item.vm] = _Vm(item.vm, item.guest)
        vms.append(vm)
        return vm

    for item in items:
        if isinstance(item, VmSeen):
            begin(item)
        elif isinstance(item, Call):
            (latest.get(item.vm) or begin(item)).calls.append(item)
        elif isinstance(item, Mismatch) and item.vm in latest:
            latest[item.vm].mismatches.append(item)
    return [vm for vm in vms if vm.calls]


def _legend() -> str:
    phases = (
        f'<span><svg width="12" height="12"><circle cx="6" cy="6" r="5" fill="{colour}"/></svg> '
        f"{phase}</span>"
        for phase, colour in COLOURS.items()
    )
    return "".join(phases) + "<span>○ GET</span><span>● SET</span><span>✕ failed</span>"


def _section(vm: _Vm) -> Iterator[str]:
    guest = vm.guest
    identity = (guest.vmm, f"process {guest.pid}", guest.machine, guest.uuid)
    yield f"<h2>{escape(vm.name)}</h2>"
    yield f"<p>{escape(', '.join(part for part in identity if part))}</p>"
    yield from _timeline(vm.calls)
    if vm.mismatches:
        yield from _table(
            ("time", "", "kind", "vCPUs", "apart", "ppm", "s a day", "since", "detail"),
            (_mismatch_row(mismatch) for mismatch in vm.mismatches),
            "alarm",
        )
    yield from _table(
        ("time", "vCPU", "call", "kHz", "result", "phase", "step", "evidence"),
        (_call_row(call) for call in vm.calls),
    )


def _timeline(calls: list[Call]) -> Iterator[str]:
    """Yield the drawing of a VM's calls; a mark is higher if its frequency is higher."""
    rows = {vcpu: row for row, vcpu in enumerate(sorted({call.target for call in calls}))}
    all_khz = [call.khz for call in calls if call.khz]
    low, high = min(all_khz, default=0), max(all_khz, default=0)
    width, height = _LABEL_WIDTH + _CALL_WIDTH * (len(calls) + 1), _ROW_HEIGHT * len(rows) + 24

    def position(number: int, call: Call) -> tuple[int, float]:
        fraction = ((call.khz or low) - low) / (high - low) if high > low else 0.5
        y = _ROW_HEIGHT * rows[call.target] + 30 - _KHZ_HEIGHT * fraction
        return _LABEL_WIDTH + _CALL_WIDTH * number, y

    yield f'<div class="line"><svg width="{width}" height="{height}" role="img">'
    for vcpu, row in rows.items():
        base = _ROW_HEIGHT * row + 36
        label = "VM" if vcpu == VM_SCOPE else f"vCPU {vcpu}"
        yield f'<line class="axis" x1="{_LABEL_WIDTH - 8}" x2="{width}" y1="{base}" y2="{base}"/>'
        yield f'<text x="8" y="{base - 6}">{label}</text>'
        points = " ".join(
            f"{x},{y:.1f}"
            for x, y in (position(n, call) for n, call in enumerate(calls) if call.target == vcpu)
        )
        yield f'<polyline class="rate" points="{points}"/>'
    previous: Optional[Call] = None
    for number, call in enumerate(calls):
        x, y = position(number, call)
        if previous is not None and call.event.ts - previous.event.ts > _GAP_NS:
            seconds = (call.event.ts - previous.event.ts) / 1e9
            middle = x - _CALL_WIDTH // 2
            yield f'<line class="break" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>'
            yield f'<text x="{middle + 2}" y="{height - 4}">+{seconds:.1f} s</text>'
        yield _mark(x, y, call)
        previous = call
    yield "</svg></div>"


def _mark(x: int, y: float, call: Call) -> str:
    """Return a circle, or a cross if the call failed; its tooltip is the call's row."""
    colour = COLOURS.get(call.phase, _DEFAULT_COLOUR)
    if call.status:
        shape = (
            f'<path d="M{x - 5},{y - 5:.1f} l10,10 m0,-10 l-10,10" stroke="var(--alarm)" '
            'stroke-width="3"/>'
        )
    else:
        fill = colour if call.event.op == "set" else "var(--paper)"
        shape = (
            f'<circle cx="{x}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" '
            'stroke-width="2"/>'
        )
    return f"<g><title>{escape(' '.join(_call_row(call)))}</title>{shape}</g>"


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
        "-" if mismatch.apart_seconds is None else duration(mismatch.apart_seconds),
        "-" if ppm is None else f"{ppm:.1f}",
        "-" if drift is None else f"{drift:.1f}",
        mismatch.phase,
        mismatch.full_detail,
    )


def _table(
    head: tuple[str, ...], rows: Iterable[tuple[str, ...]], css_class: str = ""
) -> Iterator[str]:
    yield f'<div class="line"><table class="{css_class}"><tr>'
    yield "".join(f"<th>{escape(title)}</th>" for title in head) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table></div>"
