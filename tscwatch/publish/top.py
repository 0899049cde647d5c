"""``tscwatch top``: a live table of the VMs of the running daemon, from its ``/vms``.

All but :func:`run` and what it calls is pure: from rows and keys to lines.
"""

from __future__ import annotations

import signal
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Callable, NamedTuple, NoReturn, Optional

from tscwatch.errors import DaemonSilent, TscwatchError
from tscwatch.model import duration
from tscwatch.publish.client import Client
from tscwatch.publish.format import printable

LEVELS = ("ok", "info", "risk", "warning", "critical")
"""The severities, with those of a guest without a mismatch; the worst one is the last."""

_INTERVAL_S = 1.0
_ESCAPE_MS = 25
"""How long curses waits whether an Escape begins a longer sequence; its default is a second."""
_MAX_PATTERN = 64

_COLUMNS = ("vm", "vcpu", "requested", "reported", "effective", "last call", "owner", "severity")
_ROW = "{:<20} {:>5} {:>10} {:>10} {:>10}  {:<20} {:<24} {:<8} {}"
_VCPU_ROW = "   {:>6} {:>10} {:>10} {:>10}  {}"
_VCPU_HEAD = _VCPU_ROW.format("vcpu", *_COLUMNS[2:6])
_HELP = "q quit  / filter  v vCPUs  PgUp/Dn  sort s severity a apart p ppm n name o owner"
_NARROW = 80
"""Columns of the narrowest terminal in which no column is cut off."""


class Vcpu(NamedTuple):
    """A vCPU's frequencies in kHz, and its last call."""

    vcpu: str
    requested: str
    reported: str
    effective: str
    place: str


_NO_VCPU = Vcpu("-", "-", "-", "-", "-")


class Row(NamedTuple):
    """A guest; all texts are printable."""

    vm: str
    owner: str
    level: str
    """One of :data:`LEVELS`."""
    states: str
    apart_seconds: float
    ppm: float
    vcpus: tuple[Vcpu, ...]


class View(NamedTuple):
    """What the user has chosen to see."""

    order: str = "s"
    """The key of one of :data:`ORDERS`."""
    pattern: str = ""
    """Only guests are shown that contain it, in upper or lower case."""
    typing: bool = False
    """Whether keys are part of the pattern."""
    vcpus: bool = False
    """Whether a guest's vCPUs are shown below it."""
    first: int = 0
    """The first entry that is shown; beyond the last page, that page is shown."""


class Order(NamedTuple):
    """A way to sort guests."""

    name: str
    key: Callable[[Row], Any]


ORDERS: Mapping[str, Order] = {
    "s": Order("severity", lambda row: (-LEVELS.index(row.level), -row.apart_seconds, -row.ppm)),
    "a": Order("seconds apart", lambda row: (-row.apart_seconds, -LEVELS.index(row.level))),
    "p": Order("ppm", lambda row: (-row.ppm, -LEVELS.index(row.level))),
    "n": Order("name", lambda row: ()),
    "o": Order("owner", lambda row: (not row.owner, row.owner)),
}
"""By the key that chooses it; guests that are equal are sorted by name."""

Entry = tuple[Row, Optional[Vcpu]]
"""A line of the table: a guest, or one of its vCPUs."""
Line = tuple[str, str]
"""A text, and its style: one of :data:`LEVELS`, ``head``, ``error`` or empty."""


def parse(vms: Any) -> list[Row]:
    """Return the guests in what :meth:`tscwatch.publish.state.State.rows` returned as JSON.

    :raises ValueError: it is something else.
    """
    try:
        return [_parse_row(vm) for vm in vms]
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError("not the guests of a tscwatch of this version") from error


def _parse_row(vm: dict[str, Any]) -> Row:
    owner = vm.get("owner") or {}
    names = (owner[key] for key in ("namespace", "project", "vmid", "name") if key in owner)
    mismatches = sorted(
        vm["mismatches"],
        key=lambda m: (-LEVELS.index(m["severity"]), -(m.get("apart_seconds") or 0)),
    )
    levels = ["risk" if vm["hotplug_risk"] else "ok", *(m["severity"] for m in mismatches)]
    return Row(
        vm=printable(vm["vm"]),
        owner=printable("/".join(names)),
        level=max(levels, key=LEVELS.index),
        states=printable(", ".join(_states(vm, mismatches))),
        apart_seconds=max((float(m.get("apart_seconds") or 0) for m in mismatches), default=0),
        ppm=max((float(m["ppm"] or 0) for m in mismatches), default=0),
        vcpus=tuple(_parse_vcpu(index, vcpu) for index, vcpu in vm["vcpus"].items()),
    )


def _parse_vcpu(index: str, vcpu: dict[str, Any]) -> Vcpu:
    names = ("requested", "reported", "effective", "place")
    return Vcpu(*(printable(str(each)) for each in (index, *(vcpu.get(n, "-") for n in names))))


def _states(vm: dict[str, Any], mismatches: Iterable[dict[str, Any]]) -> Iterator[str]:
    for mismatch in mismatches:
        apart, ppm, phase = mismatch.get("apart_seconds"), mismatch["ppm"], mismatch.get("phase")
        size = "" if ppm is None else f" {ppm:.1f} ppm"
        if apart is not None:
            size = f" {duration(apart)}"
        since = f" since {phase}" if phase not in (None, "unknown") else ""
        yield f"{mismatch['kind']}{size}{since}"
    if vm["hotplug_risk"]:
        yield "hotplug risk"
    if vm["synchronised"] is not None and vm["synchronised"] < len(vm["vcpus"]):
        yield f"KVM: {vm['synchronised']} synchronised"


def fit(text: str, cells: int) -> str:
    """Return a printable text, filled or cut to a number of terminal cells.

    A cut is marked by ``~``.
    """
    if cells < 1:
        return ""
    widths = [_cells(character) for character in text]
    if sum(widths) <= cells:
        return text + " " * (cells - sum(widths))
    kept = used = 0
    while used + widths[kept] < cells:
        used += widths[kept]
        kept += 1
    return text[:kept] + "~" + " " * (cells - used - 1)


def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of the table that is not live, with all vCPUs; the worst guest is first."""
    yield _ROW.format(*_COLUMNS, "state").rstrip()
    for row in _sorted(rows, "s"):
        for number, vcpu in enumerate(row.vcpus or (_NO_VCPU,)):
            first = number == 0
            yield _ROW.format(
                fit(row.vm if first else "", 20),
                *vcpu,
                fit(row.owner if first else "", 24),
                row.level if first else "",
                row.states if first else "",
            ).rstrip()


def _sorted(rows: Iterable[Row], order: str) -> list[Row]:
    return sorted(rows, key=lambda row: (ORDERS[order].key(row), row.vm))


def entries(rows: Iterable[Row], view: View) -> list[Entry]:
    """Return the lines of the table that the view selects, in its order."""
    pattern = view.pattern.casefold()
    found: list[Entry] = []
    for row in _sorted(rows, view.order):
        if pattern in f"{row.vm} {row.level} {row.states} {row.owner}".casefold():
            found.append((row, None))
            found += ((row, vcpu) for vcpu in row.vcpus if view.vcpus)
    return found


def page_size(view: View, height: int) -> int:
    """Return how many entries a screen has room for."""
    return max(1, height - len(_heads(view, 0)) - 2)


def press(view: View, key: str, page: int, count: int) -> Optional[View]:
    """Return the view after a key; None if the user quits.

    :param key: a character, or one of the names in :func:`_key_names`; empty for any other key.
    :param page: how many entries the screen shows.
    :param count: how many entries there are.
    """
    if view.typing:
        return _type(view, key)
    if key == "q":
        return None
    return _choose(view, key) or _scroll(view, key, page, count)


def _choose(view: View, key: str) -> Optional[View]:
    """Return the view after a key that selects or sorts; None for another key."""
    if key in ORDERS:
        return view._replace(order=key, first=0)
    if key == "v":
        return view._replace(vcpus=not view.vcpus, first=0)
    if key in ("/", "escape"):
        return view._replace(pattern="", typing=key == "/", first=0)
    return None


def _scroll(view: View, key: str, page: int, count: int) -> View:
    last = max(0, count - page)
    now = min(view.first, last)
    target = {
        "down": now + 1,
        "up": now - 1,
        "next": now + page,
        " ": now + page,
        "previous": now - page,
        "home": 0,
        "end": last,
    }.get(key, now)
    return view._replace(first=min(max(0, target), last))


def _type(view: View, key: str) -> View:
    if key == "enter":
        return view._replace(typing=False)
    if key == "escape":
        return view._replace(pattern="", typing=False)
    if key == "backspace":
        return view._replace(pattern=view.pattern[:-1])
    if len(key) == 1 and key.isprintable():
        return view._replace(pattern=(view.pattern + key)[:_MAX_PATTERN])
    return view


def frame(
    rows: Sequence[Row], view: View, size: tuple[int, int], url: str, error: str = ""
) -> list[Line]:
    """Return the lines of a screen; none of them is wider than it, nor are there more.

    :param size: the screen's height and width.
    :param url: the daemon's address.
    :param error: why the rows could not be fetched anew; empty if they could.
    """
    height, width = size
    found, page = entries(rows, view), page_size(view, height)
    first = max(0, min(view.first, len(found) - page))
    scrolled = f" ({first + 1}-{min(first + page, len(found))})" if len(found) > page else ""
    title = f"{_title(rows, view, found, scrolled)}  {url}"
    lines = [(error or title, "error" if error else ""), *_heads(view, width)]
    lines += (_entry_line(entry, width) for entry in found[first : first + page])
    if not found:
        lines.append(("no guest matches" if view.pattern else "no guest", ""))
    lines += [("", "")] * (height - len(lines) - 1)
    last = f"filter: {view.pattern}_" if view.typing else _HELP
    lines = [*lines[: height - 1], (last, "")]
    return [(fit(printable(text), width), style) for text, style in lines]


def _title(rows: Sequence[Row], view: View, found: Sequence[Entry], scrolled: str) -> str:
    levels = Counter(row.level for row in rows)
    counts = ", ".join(f"{levels[level]} {level}" for level in reversed(LEVELS) if levels[level])
    matching = sum(vcpu is None for _, vcpu in found)
    of = f"{matching} of " if view.pattern else ""
    return f"{of}{len(rows)} guests{scrolled} by {ORDERS[view.order].name}: {counts}"


def _heads(view: View, width: int) -> list[Line]:
    head = _guest_line("vm", "severity", "mismatches", "owner", width)
    return [(head, "head"), *([(_VCPU_HEAD, "head")] if view.vcpus else [])]


def _entry_line(entry: Entry, width: int) -> Line:
    row, vcpu = entry
    if vcpu is not None:
        return _VCPU_ROW.format(*vcpu), ""
    return _guest_line(row.vm, row.level, row.states, row.owner, width), row.level


def _guest_line(vm: str, level: str, states: str, owner: str, width: int) -> str:
    more = max(0, width - _NARROW)
    return " ".join(
        (
            fit(vm, 18 + more // 4),
            fit(level, 8),
            fit(states, 35 + more // 2),
            fit(owner, 16 + more // 4),
        )
    )


def run(client: Client) -> None:
    """Show the guests until the user quits; print them once if there is no terminal.

    :raises ConfigError: see :meth:`tscwatch.publish.client.Client.vms`.
    :raises DaemonSilent: nothing answers at first.
    """
    rows = _fetch(client, may_prompt=True)
    if not (sys.stdin.isatty() and sys.stdout.isatty() and _run_live(client, rows)):
        print("\n".join(table(rows)))


def _fetch(client: Client, may_prompt: bool) -> list[Row]:
    vms = client.vms(may_prompt)
    try:
        return parse(vms)
    except ValueError as error:
        raise DaemonSilent(
            f"what answers at {client.url} is {error}: give the address of one with --url"
        ) from error


def _run_live(client: Client, rows: list[Row]) -> bool:
    """Run :func:`_live` in the terminal, which is restored however it ends.

    :returns: False if the terminal has no cursor that can be moved.
    """
    import curses  # noqa: PLC0415  # the daemon imports this module, and needs no terminal

    try:
        curses.setupterm()
    except curses.error:
        return False
    if curses.tigetstr("cup") is None:
        return False
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    curses.wrapper(lambda screen: _live(curses, screen, client, rows))
    return True


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _live(curses: Any, screen: Any, client: Client, rows: list[Row]) -> None:
    """Draw, and wait for a key or the next second, until the user quits."""
    curses.set_escdelay(_ESCAPE_MS)
    with suppress(curses.error):  # the terminal cannot hide its cursor
        curses.curs_set(0)
    styles, names = _styles(curses), _key_names(curses)
    error, due = "", time.monotonic() + _INTERVAL_S
    view: Optional[View] = View()
    while view is not None:
        height, width = screen.getmaxyx()
        _draw(curses, screen, frame(rows, view, (height, width), client.url, error), styles)
        screen.timeout(max(0, int((due - time.monotonic()) * 1000)))
        key = _key(curses, screen, names)
        if time.monotonic() >= due:
            try:
                rows, error = _fetch(client, may_prompt=False), ""
            except TscwatchError as failure:
                error = str(failure)
            due = time.monotonic() + _INTERVAL_S
        view = press(view, key, page_size(view, height), len(entries(rows, view)))


def _styles(curses: Any) -> dict[str, int]:
    styles = {
        "head": curses.A_REVERSE,
        "error": curses.A_BOLD,
        "critical": curses.A_BOLD,
    }
    if curses.has_colors():
        curses.use_default_colors()
        colours = {"critical": curses.COLOR_RED, "warning": curses.COLOR_YELLOW}
        colours |= {"error": curses.COLOR_RED, "risk": curses.COLOR_CYAN}
        for number, (style, colour) in enumerate(colours.items(), 1):
            curses.init_pair(number, colour, -1)
            styles[style] = styles.get(style, 0) | curses.color_pair(number)
    return styles


def _key_names(curses: Any) -> dict[object, str]:
    return {
        curses.KEY_DOWN: "down",
        curses.KEY_UP: "up",
        curses.KEY_NPAGE: "next",
        curses.KEY_PPAGE: "previous",
        curses.KEY_HOME: "home",
        curses.KEY_END: "end",
        curses.KEY_ENTER: "enter",
        curses.KEY_BACKSPACE: "backspace",
        "\n": "enter",
        "\x7f": "backspace",
        "\b": "backspace",
        "\x1b": "escape",
    }


def _key(curses: Any, screen: Any, names: Mapping[object, str]) -> str:
    """Return the key for :func:`press`; empty if none was pressed in time."""
    try:
        key = screen.get_wch()
    except curses.error:
        return ""
    return names.get(key) or (key if isinstance(key, str) else "")


def _draw(curses: Any, screen: Any, lines: Iterable[Line], styles: Mapping[str, int]) -> None:
    screen.erase()
    for y, (text, style) in enumerate(lines):
        # What the terminal's encoding does not have becomes a question mark.
        shown = text.encode(screen.encoding, "replace").decode(screen.encoding)
        with suppress(curses.error):  # in the last cell, or the terminal has just become smaller
            screen.addstr(y, 0, shown, styles.get(style, 0))
    screen.refresh()
