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
from tscwatch.model import PHASES, Call, Mismatch, Phase
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
