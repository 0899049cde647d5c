"""The README's pictures of the report and of top."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import browser
from tests.support.hosts import a_host
from tests.support.terminal import Terminal, as_html, served
from tscwatch import recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.model import Event
from tscwatch.publish.state import State

RECORDINGS = Path(__file__).parents[1] / "recordings"
REPORTS = {
    "report": ("bcc-tracepoint-life", 1000),
    "report-narrow": ("bcc-kprobe-slowed_migration", 400),
}
"""The recording of each picture of a report, and the width of its window."""
TOP_WIDTH = 692
"""Of a window in which 80 columns and their margins fit."""
_IN_TROUBLE = {
    "db-7": ("slowed_migration", "fast-target"),
    "db-3": ("slowed_migration", "slow-source"),
    "mail-2": ("slowed_pinned", "slowed"),
    "web-001": ("skewed_migration", "target"),
    "build-1": ("skewed_migration", "source"),
}
"""By a guest's name, the recording of what happened to it, and the guest's name in it."""
_GUESTS = 200


def write_report(name: str, page: Path) -> None:
    """Write the report of a recording; its times are in UTC."""
    command = (sys.executable, "-m", "tscwatch", "report", str(RECORDINGS / f"{name}.jsonl"))
    environment = {**os.environ, "TZ": "UTC"}
    subprocess.run([*command, "-o", str(page)], check=True, env=environment)


def draw_report(title: str, directory: Path, picture: Path) -> None:
    """Draw one of :data:`REPORTS`.

    :param directory: for the page.
    """
    name, width = REPORTS[title]
    page = directory / "report.html"
    write_report(name, page)
    browser.draw(page, width, picture)


def draw_top(directory: Path, picture: Path) -> None:
    """Draw top in a terminal of 80 columns with 200 guests.

    :param directory: for the terminal's socket and the page.
    """
    page = directory / "top.html"
    with served(_guests()) as url, Terminal(directory, "--url", url) as terminal:
        terminal.wait_for(f"{_GUESTS} guests")
        page.write_text(as_html(terminal.styled()))
    browser.draw(page, TOP_WIDTH, picture)


def _guests() -> list[dict[str, Any]]:
    """Return guests that do not exist, and guests to which happened what was recorded."""
    rows = [_recorded(*what) for what in _IN_TROUBLE.values()]
    names = [*_IN_TROUBLE, *(f"web-{number:03}" for number in range(2, _GUESTS - len(rows) + 2))]
    rows += a_host(_GUESTS - len(rows)).rows()
    for number, (row, name) in enumerate(zip(rows, names)):
        project = ("shop", "sales", "ops")[number % 3]
        row.update(vm=name, owner={"platform": "openstack", "project": project, "name": name})
    return rows


def _recorded(name: str, guest: str) -> dict[str, Any]:
    """Return a guest as it was before it ended."""
    state, pipeline = State(), Pipeline()
    for event in recording.read(RECORDINGS / f"bcc-kprobe-{name}.jsonl"):
        if not (isinstance(event, Event) and event.op == "vm_end"):
            for item in pipeline.feed(event):
                state.update(item)
    (row,) = (row for row in state.rows() if row["vm"] == guest)
    return row
