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
from tscwatch.model import PHASES, Call, Event, Item, Mismatch, Phase, TscSpread, VmSeen
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
    *_, slope, level = apart_lines(day)
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


def apart_lines(text: str) -> list[tuple[float, ...]]:
    """Return x1, x2, y1 and y2 of each piece of the line of seconds."""
    numbers = r'class="apart" x1="([\d.]+)%" x2="([\d.]+)%" y1="([\d.]+)" y2="([\d.]+)"'
    return [tuple(map(float, found)) for found in re.findall(numbers, text)]


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
        return apart_lines("\n".join(report.page("r", [*items, call])))

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
def test_the_drawing_fills_the_width_and_no_more(path: Path) -> None:
    places = re.findall(r'x[12]?="([\d.]+)%"', page_of(path.stem))
    assert max(map(float, places)) == 100
    assert all(0 <= float(place) <= 100 for place in places)


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
