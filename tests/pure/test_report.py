"""The HTML page of ``tscwatch report``."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_replay import RECORDINGS, replay
from tests.support.histories import History, histories
from tscwatch import cli, recording
from tscwatch.model import (
    PHASES,
    Call,
    Event,
    Guest,
    Host,
    Item,
    Mismatch,
    Phase,
    TscSpread,
    VmSeen,
)
from tscwatch.publish import report


class Balanced(HTMLParser):
    """Checks that each element is closed, and that the page loads and runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("circle", "line", "path")
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "onload", "onclick"}
        assert (dict(attrs).get("href") or "#").startswith("#")  # only within the page
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == ["html"]  # its end tag is optional
    return parser


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_each_call_has_a_mark_and_a_row(path: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["report", str(path), "-o", str(page)]) == 0
    text = page.read_text()
    parsed(text)
    calls = [item for item in replay(recording.read(path)) if isinstance(item, Call)]
    assert len(re.findall("<g><title>", text)) == len(calls)
    assert text.count(">SET</td>") == sum(call.event.op == "set" for call in calls)


@given(histories(), st.text())
def test_a_guest_name_cannot_inject_html(history: History, name: str) -> None:
    guest = history.guest._replace(name=f"<script>{name}")
    events = [event._replace(guest=guest) for event in history.events]
    parsed("\n".join(report.page("r", replay(events))))


def page_of(stem: str) -> str:
    (path,) = (path for path in RECORDINGS if path.stem == stem)
    return "\n".join(report.page(stem, replay(recording.read(path))))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_mismatch_has_one_mark_and_one_row_from_raised_to_cleared(path: Path) -> None:
    active, lives = set(), 0
    for item in replay(recording.read(path)):
        if isinstance(item, Mismatch) and item.state == "cleared":
            active.discard((item.vm, item.guest.pid, item.kind))
        elif isinstance(item, Mismatch):
            lives += (item.vm, item.guest.pid, item.kind) not in active
            active.add((item.vm, item.guest.pid, item.kind))
    text = page_of(path.stem)
    assert text.count('<g class="mismatch">') == lives
    assert text.count('<td data-head="raised">') == lives
    assert text.count('<td data-head="cleared" class="quiet">-</td>') == len(active)


def test_a_row_has_the_largest_sizes_and_the_last_detail() -> None:
    text = page_of("bcc-kprobe-slowed_migration")
    rows = re.findall(r"<tr><td data-head=.raised.*?</tr>", text)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row)[2:] for row in rows]
    assert [row[:6] for row in cells] == [
        ["vcpu_skew (critical)", "2", "-", "41666.8", "3600.0", "hotplug"],
        ["desync (critical)", "2", "1.8 s", "41666.8", "3600.0", "hotplug"],
    ]
    assert all("its master clock is on" in row[6] for row in cells)


def test_the_scales_of_frequencies_and_of_seconds() -> None:
    text = page_of("bcc-kprobe-slowed_migration")
    names = re.findall(r"<span style=.top:(.*?)px.>(.*?)</span>", text)
    assert [name for _, name in names][-7:] == [
        "vCPU 0",
        "vCPU 1",
        "vCPU 2",
        "2492270 kHz<br>-40000.2 ppm",
        "2596115 kHz<br>the host's",
        "0 s",
        "1.8 s<br>apart",
    ]
    assert float(names[-1][0]) < float(names[-2][0])  # higher is more
    (line,) = re.findall(r"<line class=.apart.*?/>", text)
    assert 'x2="100.00%"' in line
    assert f'y1="{names[-1][0]}"' in line
    since = re.findall(r'class="apart" x1="([\d.]+)', line)
    raised = re.findall(r'class="raised" x1="([\d.]+)', text)
    assert float(*since) < float(raised[-1])  # a desync is raised for the distance that was read
    assert 'class="apart"' not in page_of("bcc-tracepoint-life")


def test_a_day_of_drift_leaves_the_calls_their_room() -> None:
    hour, day = page_of_drift(3600), page_of_drift(86_400)
    widths = [re.findall(r"min-width:(\d+)px", text) for text in (hour, day)]
    assert widths[0] == widths[1]
    assert len(day) < 1.05 * len(hour)
    calls = re.findall(r'<circle cx="([\d.]+)%" cy="[\d.]+" r="5"', day)
    assert float(calls[-1]) > 50
    (largest, size) = re.findall(r"top:([\d.]+)px.>([^<]*)<br>apart", day)[-1]
    assert size == "3597.8 s"  # it catches up 1.8 s, and is then ahead by 3,600 s a day
    *_, slope, level = pieces(day, "apart")
    assert slope[2] > slope[3] == float(largest)
    assert level[1:] == (100, float(largest), float(largest))


def page_of_drift(seconds: int) -> str:
    """Return the page of the classic case, whose guest lives on and has its lines read."""
    (path,) = (path for path in RECORDINGS if path.stem == "bcc-kprobe-slowed_migration")
    *events, end, other_end = recording.read(path)
    read = events[-1]
    assert isinstance(read, Event)
    assert read.host_tsc is not None
    for later in range(10, seconds, 10):
        host_tsc = read.host_tsc + later * 2_596_115_000
        events.append(read._replace(ts=read.ts + later * 10**9, host_tsc=host_tsc))
    return "\n".join(report.page("drift", replay([*events, end, other_end])))


def pieces(text: str, css_class: str) -> list[tuple[float, ...]]:
    """Return x1, x2, y1 and y2 of each piece of a line."""
    numbers = rf'class="{css_class}" x1="([\d.-]+)%?" x2="([\d.-]+)%" y1="([\d.]+)" y2="([\d.]+)"'
    return [tuple(map(float, found)) for found in re.findall(numbers, text)]


def places(text: str, what: str) -> list[tuple[float, float]]:
    """Return x and y of each ``call``, or of each ``rate`` where a frequency begins."""
    radius = {"call": "5", "rate": "2.5"}[what]
    circle = rf'<circle cx="([\d.-]+)%" cy="([\d.]+)" r="{radius}"'
    cross = r'<svg x="([\d.-]+)%" y="([\d.]+)" overflow' if what == "call" else "$^"
    found = re.findall(f"{circle}|{cross}", text)
    return [(float(each[0] or each[2]), float(each[1] or each[3])) for each in found]


def named(text: str) -> dict[str, float]:
    """Return y of each name beside a drawing."""
    found = re.findall(r"<span style=.top:([\d.]+)px.>(.*?)</span>", text)
    return {name: float(y) for y, name in found}


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1))
def test_few_readings_have_a_place_between_two_calls(readings: list[int | None]) -> None:
    call = next(item for item in replay(recording.read(RECORDINGS[0])) if isinstance(item, Call))
    spreads = [TscSpread(ts, call.vm, size, 0) for ts, size in enumerate(readings)]
    items: list[Item] = [VmSeen(call.vm, call.guest), call, *spreads, call]
    _, (vm,) = report._vms_with_calls(items)
    kept = [moment for moment in vm.moments if isinstance(moment, TscSpread)]
    assert len(kept) <= 7
    assert [kept[0], kept[-1]] == [spreads[0], spreads[-1]]
    known = [each for each in spreads if each.seconds is not None]
    if known:
        largest = max(known, key=lambda each: each.seconds or 0)
        assert {known[0], largest, known[-1]} <= set(kept)
    for one, other in zip(kept, kept[1:]):  # no line is drawn over readings that are not known
        if one.seconds is not None and other.seconds is not None:
            assert None not in readings[one.ts : other.ts]


def test_seconds_are_steps_unless_the_tscs_drift() -> None:
    call = next(item for item in replay(recording.read(RECORDINGS[0])) if isinstance(item, Call))
    mismatch = Mismatch(
        3, "raised", "desync", call.vm, call.guest, (1,), 0, "critical", "unknown", "apart"
    )

    def line(*readings: TscSpread | Call) -> list[tuple[float, ...]]:
        items = [VmSeen(call.vm, call.guest), *readings, mismatch]
        return pieces("\n".join(report.page("r", [*items, call])), "apart")

    fast, slow = TscSpread(1, call.vm, 2, 0), TscSpread(2, call.vm, 1, 0)
    drifting = fast._replace(rate_ppm=9)
    assert [is_sloped(piece) for piece in line(fast, slow)] == [False, False, False]
    assert [is_sloped(piece) for piece in line(drifting, slow)] == [True, False]
    assert [is_sloped(piece) for piece in line(drifting, call, slow)] == [False, False, False]
    unknown = TscSpread(2, call.vm, None, None)
    assert len(line(drifting, unknown)) == 1


def is_sloped(piece: tuple[float, ...]) -> bool:
    x1, x2, y1, y2 = piece
    return x1 != x2 and y1 != y2


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_what_happened_is_spread_evenly_over_the_width(path: Path) -> None:
    """Calls and mismatches have places of their own; lines lead from one to another or the end."""
    drawings = page_of(path.stem).split('<div class="scroll">')[1:]
    assert drawings
    for text in drawings:
        (width,) = re.findall(r"min-width:(\d+)px", text)
        moments = int(width) // 13
        grid = [round((number + 0.5) / moments * 100, 2) for number in range(moments)]
        calls = [x for x, _ in places(text, "call")]
        raised = [x1 for x1, _, _, _ in pieces(text, "raised")]
        assert calls == sorted(calls)
        assert len({*calls, *raised}) == len([*calls, *raised])
        assert {*calls, *raised} <= set(grid)
        assert {x for x, _ in places(text, "rate")} <= set(calls)
        rates = pieces(text, "rate")
        assert {x1 for x1, _, _, _ in rates} <= set(calls)
        assert {x2 for _, x2, _, _ in rates} <= {*calls, 100}
        assert max((x2 for _, x2, _, _ in rates), default=100) == 100
        aparts = pieces(text, "apart")
        assert {x for x1, x2, _, _ in aparts for x in (x1, x2)} <= {*grid, 100}
        between = [(one + other) / 2 for one, other in zip(grid, grid[1:])]
        for x, *_ in pieces(text, "break"):
            assert min(abs(x - place) for place in between) < 0.01


def drawn(*calls: tuple[int | None, int | None, int], host: Host | None = None) -> str:
    """Return the page of one VM.

    :param calls: of each its vCPU, its kHz and its status.
    """
    guest = Guest(1, "qemu", "guest")
    items: list[Item] = [] if host is None else [host]
    items.append(VmSeen("guest", guest))
    for second, (vcpu, khz, status) in enumerate(calls):
        event = Event(second * 10**9, "set", "kvm:1", 1, 1, "qemu", vcpu, khz, status)
        items.append(Call(event, "guest", guest, "boot", "init", ()))
    return "\n".join(report.page("r", items))


def test_a_frequency_is_a_line_from_its_call_to_the_next_one_of_its_vcpu() -> None:
    refused = 0, 9000, -22
    calls = [(0, 1000, 0), (1, 1000, 0), (0, 3000, 0), refused, (1, 2000, 0)]
    text = drawn(*calls, host=Host(2000))
    y = named(text)
    assert list(y) == [
        "vCPU 0",
        "vCPU 1",
        "1000 kHz<br>-500000.0 ppm",
        "3000 kHz<br>+500000.0 ppm",
        "2000 kHz<br>the host's",
    ]
    first, second, low, high, middle = y.values()
    assert first < second < high < middle < low
    assert middle - high == low - middle
    assert pieces(text, "rate") == [
        (10, 50, low, low),
        (50, 50, low, high),
        (50, 100, high, high),
        (30, 90, low, low),
        (90, 90, low, middle),
        (90, 100, middle, middle),
    ]
    assert places(text, "rate") == [(10, low), (50, high), (30, low), (90, middle)]
    rows = [(10, first), (30, second), (50, first), (70, first), (90, second)]
    assert places(text, "call") == rows
    axes = [(0, 100, name, name) for name in y.values()]
    assert sorted(pieces(text, "axis")) == sorted(axes)


def test_a_vms_default_and_one_frequency() -> None:
    text = drawn((None, 1000, 0), (0, 1000, 0), (0, None, -22), (0, 1000, 0))
    assert list(named(text)) == ["VM", "vCPU 0", "1000 kHz"]
    level = named(text)["1000 kHz"]
    lines = [(12.5, 100), (37.5, 87.5), (87.5, 100)]
    assert pieces(text, "rate") == [(x1, x2, level, level) for x1, x2 in lines]
    assert places(text, "rate") == [(12.5, level), (37.5, level), (87.5, level)]
    nothing = drawn((0, None, -22))
    assert list(named(nothing)) == ["vCPU 0"]
    assert pieces(nothing, "rate") == []


@given(st.lists(st.integers(1, 50), min_size=2))
def test_the_ends_and_what_has_room_between_them_are_named(khz: list[int]) -> None:
    text = drawn(*((0, each, 0) for each in khz))
    found = {int(name.split()[0]): y for name, y in named(text).items() if "kHz" in name}
    assert {min(khz), max(khz)} <= set(found) <= set(khz)
    levels = sorted(found.values())
    assert all(other - one > 25.9 for one, other in zip(levels, levels[1:]))
    (bottom,) = re.findall(r'<svg width="100%" height="(\d+)"', text)
    for y in levels:  # half of a name has room above and below
        assert named(text)["vCPU 0"] + 26 < y <= int(bottom) - 18


def test_a_gap_of_more_than_a_second_is_marked_between_its_calls() -> None:
    assert pieces(drawn((0, 1, 0), (0, 1, 0)), "break") == []
    guest = Guest(1, "qemu", "guest")
    events = (Event(ts, "set", "kvm:1", 1, 1, "qemu", 0, 1) for ts in (0, 10**9 + 1, 4 * 10**9))
    items = [Call(event, "guest", guest, "boot", "init", ()) for event in events]
    text = "\n".join(report.page("r", items))
    assert [x1 for x1, *_ in pieces(text, "break")] == [33.33, 66.67]
    assert re.findall(r">\+([^<]*)<", text) == ["1.0 s", "3.0 s"]


def test_the_index_names_the_worst_guest_first() -> None:
    few = page_of("bcc-kprobe-slowed_migration")
    assert "<a href=" not in few
    stems = ("bcc-tracepoint-life", "bcc-kprobe-slowed_pinned", "bcc-kprobe-slowed_migration")
    items = []
    for stem in (*stems, "bcc-tracepoint-out_of_tolerance"):
        (path,) = (path for path in RECORDINGS if path.stem == stem)
        items += replay(recording.read(path))
    text = "\n".join(report.page("r", items))
    parsed(text)
    index = re.findall(r'<a href="#(.*?)">(.*?)</a></td><td[^>]*>(\w+)<', text)
    assert [(name, worst) for _, name, worst in index][:3] == [
        ("fast-target", "critical"),
        ("slowed", "critical"),
        ("withheld", "critical"),
    ]
    assert [worst for _, _, worst in index][3:] == ["ok"] * (len(index) - 3)
    assert sorted((vm, name) for vm, name, _ in index) == sorted(
        re.findall(r'<h2 id="(.*?)">(.*?)</h2>', text)
    )


def test_no_name_in_the_index_injects_html() -> None:
    call = next(item for item in replay(recording.read(RECORDINGS[0])) if isinstance(item, Call))
    calls = [call._replace(vm=f"<script>{number}\"'") for number in range(9)]
    parsed("\n".join(report.page("r", calls)))


def test_every_phase_has_a_colour() -> None:
    assert set(PHASES) <= set(report.COLOURS)


def test_a_call_of_a_phase_without_a_colour_is_drawn() -> None:
    items = replay(recording.read(RECORDINGS[0]))
    call = next(item for item in items if isinstance(item, Call))
    new = call._replace(phase=cast(Phase, "a-new-phase"))
    text = "\n".join(report.page("r", [new]))
    parsed(text)
    assert text.count("<g><title>") == 1
    assert ">a-new-phase</td>" in text


def test_a_page_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["report", str(RECORDINGS[0]), "-o", str(tmp_path)]) == 10
    assert "name another file with -o" in caplog.text
