"""The report's page in a real browser, in its light and its dark colours."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from tests.pure.test_replay import RECORDINGS
from tests.support.guests import PATIENCE_S
from tscwatch import cli

BACKGROUND = {1: (0xFF, 0xFF, 0xFF), 0: (0x16, 0x18, 0x1C)}
"""The page's colour, by Chromium's preferred colour scheme: 0 is dark, 1 is light."""


FRAME = """<!DOCTYPE html><title>none</title>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
  onload = () => {{
    const inner = document.querySelector("iframe").contentDocument;
    const drawings = [...inner.querySelectorAll(".scroll, .scroll > svg")];
    const sizes = drawings.map(drawing => drawing.getBoundingClientRect().width);
    document.title = [inner.documentElement.scrollWidth, ...sizes].join(" ");
  }};
</script>
"""
"""Measures the page in a frame of a width."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "page.html"
    (recording,) = (path for path in RECORDINGS if path.stem == "bcc-tracepoint-life")
    assert cli.main(["report", str(recording), "-o", str(path)]) == 0
    return path


def chromium(page: Path, *options: str) -> str:
    """Load a page in the browser and return its standard output."""
    return subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *options, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=page.parent,
    ).stdout


def test_the_browser_sees_each_mark(page: Path) -> None:
    seen = chromium(page, "--dump-dom")
    assert seen.count("<g><title>") == page.read_text().count("<g><title>") == 20
    assert '<h2 id="vm-0">life</h2>' in seen


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_into_a_narrow_and_uses_a_wide_window(page: Path, width: int) -> None:
    outer = page.parent / f"frame{width}.html"
    outer.write_text(FRAME.format(page=page.name, width=width))
    seen = chromium(outer, "--dump-dom", "--allow-file-access-from-files")
    (sizes,) = re.findall("<title>(.*?)</title>", seen)
    page_width, *drawings = map(float, sizes.split())
    assert page_width <= width
    assert len(drawings) == 2  # the drawing and its frame
    assert min(drawings) > width / 2
    if width == 1400:
        assert min(drawings) > 1000


@pytest.mark.parametrize("scheme", BACKGROUND)
def test_it_is_drawn_in_light_and_in_dark(page: Path, scheme: int) -> None:
    chromium(page, f"--blink-settings=preferredColorScheme={scheme}", "--screenshot=page.png")
    width, pixel = first_pixel((page.parent / "page.png").read_bytes())
    assert width > 500
    assert pixel == BACKGROUND[scheme]


def first_pixel(png: bytes) -> tuple[int, tuple[int, ...]]:
    """Return a PNG's width and its upper left pixel.

    No filter changes that pixel's bytes (PNG specification, 9.2).
    """
    position, packed, width = 8, b"", 0
    while position < len(png):
        size, kind = struct.unpack_from(">I4s", png, position)
        content = png[position + 8 : position + 8 + size]
        if kind == b"IHDR":
            (width,) = struct.unpack_from(">I", content)
        elif kind == b"IDAT":
            packed += content
        position += size + 12
    return width, tuple(zlib.decompressobj().decompress(packed, 4)[1:])
