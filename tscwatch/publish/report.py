"""``tscwatch report``: a recording as one HTML page.

For each VM, the page has a drawing with a row for each vCPU and the vCPU's calls as marks, and
below it the frequencies and how far the TSCs are apart.  The horizontal axis is the order of what
happened, because phases follow from the order and never from elapsed time; a gap of more than a
second between two calls is marked.  However long TSCs drift between two calls, the drift takes no
more room than a few calls.  The page has no scripts and loads nothing from the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Optional, Union

from tscwatch.model import (
    SEVERITIES,
    VM_SCOPE,
    Call,
    Guest,
    Host,
    Item,
    Mismatch,
    TscSpread,
    VmSeen,
    duration,
    errno_name,
)
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
_LEAST_STEP = 13
"""Between two moments; it is larger if the page is wider."""
_ROW_HEIGHT = 26
_LANE_HEIGHT = 14
"""Of a name of a mismatch; neighbours are in different lanes."""
_LANES = 3
_SCALE_HEIGHT = 84
_MARGIN = 18
"""Above and below a scale."""
_LEAST_TICK_DISTANCE = 26

_GAP_NS = 1_000_000_000
_MANY_VMS = 4
"""From this number on, the page has an index."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #d8d8d8;
  --alarm: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --faint: #3a3d44; --alarm: #ff7a8a; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 96rem; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
.line { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--faint); border-radius: 6px; }
.plot { display: flex; }
.names { position: relative; flex: 0 0 7.2rem; font-size: 12px; line-height: 1.1; }
.names span { position: absolute; right: .5rem; transform: translateY(-50%); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll { flex: 1; min-width: 0; overflow-x: auto; }
.scroll > svg { display: block; }
svg text { fill: var(--ink); font-size: 12px; }
svg .axis, svg .break { stroke: var(--faint); }
svg .rate { stroke: var(--ink); stroke-opacity: .45; }
svg .raised, svg .apart { stroke: var(--alarm); }
svg .raised { stroke-dasharray: 3 3; }
svg .apart { stroke-width: 2; }
svg text.alarm { fill: var(--alarm); }
a { color: inherit; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem .8rem; }
th, td { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0;
  border-bottom: 1px solid var(--faint); overflow-wrap: normal; }
.alarm { color: var(--alarm); }
.key span { margin-right: 1.2em; white-space: nowrap; display: inline-block; }
@media (max-width: 640px) {
  body { padding: 0 .6rem; }
  h1 { font-size: 1.3rem; }
  tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; border-bottom: 1px solid var(--faint); }
  tr:first-child { display: none; }
  td { border: 0; padding: .1rem 0; overflow-wrap: anywhere; }
  td::before { content: attr(data-head) " "; color: var(--ink); opacity: .65; }
  td.quiet { display: none; } }
""".strip()


@dataclass
class _Life:
    """A mismatch from when it was raised until it was cleared."""

    first: Mismatch
    last: Mismatch
    """As it was before it was cleared."""
    severity: str
    """The worst one that it had."""
    apart_seconds: Optional[float] = None
    """The largest one that it had, likewise its rate."""
    ppm: Optional[float] = None
    cleared: Optional[int] = None
    """Unix time in nanoseconds; None at the end of the recording."""

    def take(self, mismatch: Mismatch) -> None:
        """Take what is new about it."""
        self.last = mismatch
        self.severity = max(self.severity, mismatch.severity, key=SEVERITIES.index)
        self.apart_seconds = _larger(self.apart_seconds, mismatch.apart_seconds)
        self.ppm = _larger(self.ppm, mismatch.ppm)


_Moment = Union[Call, TscSpread, _Life]
"""What has a place of its own on the horizontal axis; a life has it where it was raised."""


@dataclass
class _Vm:
    name: str
    guest: Guest
    moments: list[_Moment] = field(default_factory=list)
    lives: list[_Life] = field(default_factory=list)

    @property
    def calls(self) -> list[Call]:
        return [moment for moment in self.moments if isinstance(moment, Call)]

    def take_spread(self, spread: TscSpread) -> None:
        """Take how far the TSCs are apart, before the mismatch that was raised for it."""
        last = self.moments[-1] if self.moments else None
        is_its = isinstance(last, _Life) and last.first.ts == spread.ts
        begin = end = len(self.moments) - is_its
        readings = [spread]
        while begin and isinstance(before := self.moments[begin - 1], TscSpread):
            readings.insert(0, before)
            begin -= 1
        self.moments[begin:end] = _needed(readings)

    def take(self, mismatch: Mismatch) -> None:
        """Begin, continue or end the life of a mismatch."""
        lives = (life for life in self.lives if life.first.kind == mismatch.kind)
        life = next((life for life in lives if life.cleared is None), None)
        if mismatch.state == "cleared":
            if life is not None:
                life.cleared = mismatch.ts
            return
        if life is None:
            life = _Life(mismatch, mismatch, mismatch.severity)
            self.lives.append(life)
            self.moments.append(life)
        life.take(mismatch)


def _needed(readings: Sequence[TscSpread]) -> list[TscSpread]:
    """Return those of consecutive readings that have a place in the drawing: at most seven.

    While TSCs drift, each reading is another one; a place for each would leave none for the calls.

    :returns: the first and the last one; of those that are known, also the first, the largest and
        the last one; and between two of these, one that is not known if there was any.
    """
    known = [number for number, reading in enumerate(readings) if reading.seconds is not None]
    kept = {0, len(readings) - 1}
    if known:
        largest = max(known, key=lambda number: readings[number].seconds or 0)
        ends = sorted({known[0], largest, known[-1]})
        kept.update(ends)
        for one, other in zip(ends, ends[1:]):
            kept.update([n for n in range(one, other) if readings[n].seconds is None][:1])
    return [readings[number] for number in sorted(kept)]


def _larger(one: Optional[float], other: Optional[float]) -> Optional[float]:
    return max((size for size in (one, other) if size is not None), default=None)


def page(title: str, items: Iterable[Item]) -> Iterator[str]:
    """Yield the lines of the page.

    :param title: the recording's file name.
    :param items: what the pipeline yields for the recording.
    """
    host_khz, vms = _vms_with_calls(items)
    calls = sum(len(vm.calls) for vm in vms)
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{_STYLE}</style>"
    yield f"<h1>{escape(title)}</h1>"
    host = "" if host_khz is None else f" The host's frequency is {host_khz} kHz."
    yield f"<p>VMs: {len(vms)}. Calls: {calls}, in the order in which they happened.{host}</p>"
    yield f'<p class="key">{_legend()}</p>'
    if len(vms) >= _MANY_VMS:
        yield from _index(vms)
    for number, vm in enumerate(vms):
        yield from _section(number, vm, host_khz)


def _vms_with_calls(items: Iterable[Item]) -> tuple[Optional[int], list[_Vm]]:
    """Return the host's frequency, and the VMs that made calls, in order of their first item.

    A VM may have the name of one that has ended, so each ``VmSeen`` begins a new one.  Calls of a
    probe, or of a VM beyond the limit, come without one.
    """
    host_khz: Optional[int] = None
    vms: list[_Vm] = []
    latest: dict[str, _Vm] = {}

    def begin(item: Union[VmSeen, Call]) -> _Vm:
        vm = latest[item.vm] = _Vm(item.vm, item.guest)
        vms.append(vm)
        return vm

    for item in items:
        if isinstance(item, Host):
            host_khz = item.tsc_khz or host_khz
        elif isinstance(item, VmSeen):
            begin(item)
        elif isinstance(item, Call):
            (latest.get(item.vm) or begin(item)).moments.append(item)
        elif isinstance(item, TscSpread) and item.vm in latest:
            latest[item.vm].take_spread(item)
        elif isinstance(item, Mismatch) and item.vm in latest:
            latest[item.vm].take(item)
    return host_khz, [vm for vm in vms if vm.calls]


def _index(vms: Sequence[_Vm]) -> Iterator[str]:
    """Yield the table of all guests; the worst one is first."""
    rows = []
    for number, vm in enumerate(vms):
        worst = max((SEVERITIES.index(life.severity) for life in vm.lives), default=-1)
        apart = max((life.apart_seconds or 0 for life in vm.lives), default=0)
        ppm = max((life.ppm or 0 for life in vm.lives), default=0)
        row = (
            f'<a href="#vm-{number}">{escape(vm.name)}</a>',
            "ok" if worst < 0 else SEVERITIES[worst],
            ", ".join(dict.fromkeys(life.first.kind for life in vm.lives)) or "-",
            duration(apart) if apart else "-",
            f"{ppm:.1f}" if ppm else "-",
            str(len(vm.calls)),
        )
        rows.append(((-worst, -apart, -ppm, number), row))
    head = ("guest", "worst", "mismatches", "apart", "ppm", "calls")
    yield from _html_table(head, (row for _, row in sorted(rows)))


def _legend() -> str:
    phases = (
        f'<span><svg width="12" height="12"><circle cx="6" cy="6" r="5" fill="{colour}"/></svg> '
        f"{phase}</span>"
        for phase, colour in COLOURS.items()
    )
    return "".join(phases) + "<span>○ GET</span><span>● SET</span><span>✕ failed</span>"


def _section(number: int, vm: _Vm, host_khz: Optional[int]) -> Iterator[str]:
    guest = vm.guest
    identity = (guest.vmm, f"process {guest.pid}", guest.machine, guest.uuid)
    yield f'<h2 id="vm-{number}">{escape(vm.name)}</h2>'
    yield f"<p>{escape(', '.join(part for part in identity if part))}</p>"
    yield from _drawing(vm, host_khz)
    if vm.lives:
        yield from _table(
            ("raised", "cleared", "kind", "vCPUs", "apart", "ppm", "s a day", "since", "detail"),
            map(_life_row, vm.lives),
            "alarm",
        )
    calls = vm.calls
    yield f"<details><summary>{len(calls)} calls</summary>"
    yield from _table(
        ("time", "vCPU", "call", "kHz", "result", "phase", "step", "evidence"),
        map(_call_row, calls),
    )
    yield "</details>"


class _Scale:
    """A vertical scale of the drawing.

    :param top: its upper end in the drawing.
    :param values: what it must have room for; not empty.
    """

    def __init__(self, top: int, values: Iterable[float]) -> None:
        found = set(values)
        self.low, self.high = min(found), max(found)
        self.height = _SCALE_HEIGHT if self.high > self.low else 0
        self.top = top + _MARGIN
        self.bottom = self.top + self.height + _MARGIN

    def y(self, value: float) -> float:
        """Return a value's place in the drawing."""
        if self.high == self.low:
            return self.top
        return self.top + self.height * (self.high - value) / (self.high - self.low)


def _drawing(vm: _Vm, host_khz: Optional[int]) -> Iterator[str]:
    """Yield the drawing of a VM; horizontal positions are percentages, so it fills the page."""
    rows = {vcpu: row for row, vcpu in enumerate(sorted({call.target for call in vm.calls}))}
    top = _LANE_HEIGHT * min(_LANES, len(vm.lives))
    below = top + _ROW_HEIGHT * len(rows)
    khz = {call.khz for call in vm.calls if call.khz and not call.status}
    rates = _Scale(below, khz or {0})
    seconds = [moment.seconds or 0 for moment in vm.moments if isinstance(moment, TscSpread)]
    is_apart = any(life.first.kind == "desync" for life in vm.lives) and any(seconds)
    aparts = _Scale(rates.bottom, [0, *seconds]) if is_apart else None
    height = (aparts or rates).bottom
    names = [
        (top + _ROW_HEIGHT * (row + 0.5), "VM" if vcpu == VM_SCOPE else f"vCPU {vcpu}")
        for vcpu, row in rows.items()
    ]
    ticks = _ticks(rates, khz)
    names += ((rates.y(value), _frequency(value, host_khz)) for value in ticks)
    lines = [names[row][0] for row in range(len(rows))] + [rates.y(value) for value in ticks]
    if aparts is not None:
        names += (
            (aparts.y(0), "0 s"),
            (aparts.y(aparts.high), f"{duration(aparts.high)}<br>apart"),
        )
        lines += (aparts.y(value) for value in (0, aparts.high))
    yield f'<div class="line plot"><div class="names" style="height:{height}px">'
    yield "".join(f'<span style="top:{y:.1f}px">{name}</span>' for y, name in names) + "</div>"
    least = _LEAST_STEP * len(vm.moments)
    style = f"min-width:{least}px"
    yield f'<div class="scroll"><svg width="100%" height="{height}" style="{style}" role="img">'
    for y in lines:
        yield f'<line class="axis" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
    yield from _raised(vm, height)
    if aparts is not None:
        yield from _apart_line(vm, aparts)
    for vcpu in rows:
        places = [
            (_x(number, vm), rates.y(moment.khz))
            for number, moment in enumerate(vm.moments)
            if isinstance(moment, Call)
            and moment.target == vcpu
            and moment.khz
            and not moment.status
        ]
        yield from _steps(places)
        yield from (_dot(x, y) for x, y in places)
    yield from _marks(vm, {vcpu: names[row][0] for vcpu, row in rows.items()}, height)
    yield "</svg></div></div>"


def _x(number: float, vm: _Vm) -> float:
    """Return the place of a moment, in percent."""
    return (number + 0.5) / len(vm.moments) * 100


def _ticks(scale: _Scale, values: Iterable[int]) -> list[int]:
    """Return the values that are written beside the scale: the ends, and what has room between."""
    ends = {int(scale.low), int(scale.high)}
    chosen = sorted(ends - {0})
    for value in sorted(set(values) - ends):
        distance = min((abs(scale.y(value) - scale.y(other)) for other in chosen), default=0)
        if distance >= _LEAST_TICK_DISTANCE:
            chosen.append(value)
    return chosen


def _frequency(khz: int, host_khz: Optional[int]) -> str:
    """Return a frequency, and how far it is from the host's."""
    if host_khz is None:
        return f"{khz} kHz"
    ppm = (khz - host_khz) / host_khz * 1e6
    return f"{khz} kHz<br>{ppm:+.1f} ppm" if ppm else f"{khz} kHz<br>the host's"


def _steps(places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Draw a frequency, which stays as it is until the next place, and after the last one."""
    ends = [*(x for x, _ in places[1:]), 100.0]
    before: Optional[float] = None
    for (x, y), until in zip(places, ends):
        if before is not None and before != y:
            yield _line("rate", x, x, before, y)
        yield _line("rate", x, until, y, y)
        before = y


def _line(css_class: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{css_class}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="2.5" fill="var(--ink)"/>'


def _raised(vm: _Vm, height: int) -> Iterator[str]:
    """Mark where mismatches were raised."""
    lane = 0
    for number, moment in enumerate(vm.moments):
        if not isinstance(moment, _Life):
            continue
        x, y = _x(number, vm), _LANE_HEIGHT * (lane % _LANES + 1) - 3
        anchor, dx = ("end", -4) if x > 50 else ("start", 4)
        what = escape(" ".join(_life_row(moment)))
        yield f'<g class="mismatch"><title>{what}</title>'
        yield f'<line class="raised" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>'
        yield (
            f'<text class="alarm" x="{x:.2f}%" dx="{dx}" y="{y}" text-anchor="{anchor}">'
            f"{moment.first.kind}</text></g>"
        )
        lane += 1


def _apart_line(vm: _Vm, scale: _Scale) -> Iterator[str]:
    """Draw how many seconds the TSCs are apart; there is no line while that is not known.

    From one reading to the next, the line is straight if the TSCs drift and no call was made
    meanwhile, else a step.
    """
    known: Optional[tuple[float, float]] = None
    drifts = False
    for number, moment in enumerate(vm.moments):
        if not isinstance(moment, TscSpread):
            drifts = drifts and not isinstance(moment, Call)
            continue
        x, y = _x(number, vm), None if moment.seconds is None else scale.y(moment.seconds)
        if known is not None:
            level = y if drifts and y is not None else known[1]
            yield _line("apart", known[0], x, known[1], level)
            if y is not None and y != level:
                yield _line("apart", x, x, level, y)
        known, drifts = None if y is None else (x, y), bool(moment.rate_ppm)
    if known is not None:
        yield _line("apart", known[0], 100, known[1], known[1])


def _marks(vm: _Vm, rows: Mapping[int, float], height: int) -> Iterator[str]:
    """Draw the calls, and the gaps between them."""
    previous: Optional[Call] = None
    for number, call in enumerate(vm.moments):
        if not isinstance(call, Call):
            continue
        if previous is not None and call.event.ts - previous.event.ts > _GAP_NS:
            gap, x = (call.event.ts - previous.event.ts) / 1e9, _x(number - 0.5, vm)
            yield f'<line class="break" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>'
            yield f'<text x="{x:.2f}%" dx="2" y="{height - 4}">+{duration(gap)}</text>'
        yield _mark(_x(number, vm), rows[call.target], call)
        previous = call


def _mark(x: float, y: float, call: Call) -> str:
    """Return a circle, or a cross if the call failed; its tooltip is the call's row."""
    colour = COLOURS.get(call.phase, _DEFAULT_COLOUR)
    if call.status:
        shape = (
            f'<svg x="{x:.2f}%" y="{y:.1f}" overflow="visible"><path d="M-5,-5 l10,10 m0,-10 '
            'l-10,10" stroke="var(--alarm)" stroke-width="3"/></svg>'
        )
    else:
        fill = colour if call.event.op == "set" else "var(--paper)"
        shape = (
            f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" '
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


def _life_row(life: _Life) -> tuple[str, ...]:
    ppm, last = life.ppm, life.last
    drift = last._replace(ppm=ppm).seconds_a_day
    return (
        clock(life.first.ts),
        "-" if life.cleared is None else clock(life.cleared),
        f"{last.kind} ({life.severity})",
        ", ".join(map(str, last.vcpus)),
        "-" if life.apart_seconds is None else duration(life.apart_seconds),
        "-" if ppm is None else f"{ppm:.1f}",
        "-" if drift is None else f"{drift:.1f}",
        last.phase,
        last.full_detail,
    )


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = ""
) -> Iterator[str]:
    yield from _html_table(head, (tuple(map(escape, row)) for row in rows), css_class)


def _html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = ""
) -> Iterator[str]:
    """Yield a table; on a narrow screen each cell has its column's title beside it.

    :param rows: cells as HTML.
    """
    yield f'<div class="line"><table class="{css_class}"><tr>'
    yield "".join(f"<th>{escape(title)}</th>" for title in head) + "</tr>"
    for row in rows:
        cells = (
            f'<td data-head="{title}"{_QUIET if cell == "-" else ""}>{cell}</td>'
            for title, cell in zip(head, row)
        )
        yield "<tr>" + "".join(cells) + "</tr>"
    yield "</table></div>"


_QUIET = ' class="quiet"'
"""Of a cell without a value, which a narrow screen omits."""
