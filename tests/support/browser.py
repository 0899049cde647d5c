"""Headless Chromium: loads, measures and draws a page."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

from tests.support.guests import PATIENCE_S

LIGHT, DARK = 1, 0
"""Chromium's preferred colour scheme."""

_FRAME = """<!DOCTYPE html><title>none</title>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
  onload = () => {{
    const inner = document.querySelector("iframe").contentDocument;
    const drawings = [...inner.querySelectorAll(".scroll, .scroll > svg")];
    const {{scrollWidth, offsetHeight}} = inner.documentElement;
    const widths = drawings.map(drawing => drawing.getBoundingClientRect().width);
    document.title = [scrollWidth, offsetHeight, ...widths].join(" ");
  }};
</script>
"""
"""Measures the page in a frame of a width."""


class Measures(NamedTuple):
    """Lengths of a page, in pixels."""

    width: float
    height: float
    drawings: list[float]
    """The width of each frame of a drawing, and of the drawing in it."""


def load(page: Path, *options: str) -> str:
    """Load a page and return the browser's standard output."""
    command = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    return subprocess.run(
        [*command, *options, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=page.parent,
    ).stdout


def measure(page: Path, width: int) -> Measures:
    """Measure a page in a window of a width."""
    outer = page.parent / f"frame{width}.html"
    outer.write_text(_FRAME.format(page=page.name, width=width))
    seen = load(outer, "--dump-dom", "--allow-file-access-from-files")
    (sizes,) = re.findall("<title>(.*?)</title>", seen)
    page_width, height, *drawings = map(float, sizes.split())
    return Measures(page_width, height, drawings)


def draw(page: Path, width: int, picture: Path, scheme: int = LIGHT) -> None:
    """Draw a whole page in a window of a width.

    :param picture: a PNG to write.
    :param scheme: :data:`LIGHT` or :data:`DARK`.
    """
    height = round(measure(page, width).height)
    size, colours = f"--window-size={width},{height}", f"preferredColorScheme={scheme}"
    load(page, size, f"--blink-settings={colours}", f"--screenshot={picture}")


def first_pixel(picture: Path) -> tuple[int, tuple[int, ...]]:
    """Return a PNG's width and its upper left pixel.

    No filter changes that pixel's bytes (PNG specification, 9.2).
    """
    png = picture.read_bytes()
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
