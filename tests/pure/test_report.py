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
from tscwatch.model import PHASES, Call, Phase
from tscwatch.publish import report


class Balanced(HTMLParser):
    """Checks that each element is closed, and that the page loads and runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("circle", "line", "polyline", "path")
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag != "meta":
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
    assert text.count("<td>SET</td>") == sum(call.event.op == "set" for call in calls)


@given(histories(), st.text())
def test_a_guest_name_cannot_inject_html(history: History, name: str) -> None:
    guest = history.guest._replace(name=f"<script>{name}")
    events = [event._replace(guest=guest) for event in history.events]
    parsed("\n".join(report.page("r", replay(events))))


def test_every_phase_has_a_colour() -> None:
    assert set(PHASES) <= set(report.COLOURS)


def test_a_call_of_a_phase_without_a_colour_is_drawn() -> None:
    items = replay(recording.read(RECORDINGS[0]))
    call = next(item for item in items if isinstance(item, Call))
    new = call._replace(phase=cast(Phase, "a-new-phase"))
    text = "\n".join(report.page("r", [new]))
    parsed(text)
    assert text.count("<g><title>") == 1
    assert "<td>a-new-phase</td>" in text


def test_a_page_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["report", str(RECORDINGS[0]), "-o", str(tmp_path)]) == 10
    assert "name another file with -o" in caplog.text
