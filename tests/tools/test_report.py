"""The report's page in a real browser, in its light and its dark colours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import browser, pictures
from tests.support.prometheus import DEPLOY

BACKGROUND = {browser.LIGHT: (0xFF, 0xFF, 0xFF), browser.DARK: (0x16, 0x18, 0x1C)}
"""The page's colour, by the preferred colour scheme."""
LIFE, CLASSIC_CASE = "bcc-tracepoint-life", "bcc-kprobe-slowed_migration"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    pictures.write_report(LIFE, path)
    return path


def test_the_browser_sees_each_mark(page: Path) -> None:
    seen = browser.load(page, "--dump-dom")
    assert seen.count("<g><title>") == page.read_text().count("<g><title>") == 20
    assert '<h2 id="vm-0">life</h2>' in seen


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("name", "vms"), [(LIFE, 1), (CLASSIC_CASE, 2)])
def test_it_fits_into_a_narrow_and_uses_a_wide_window(
    name: str, vms: int, width: int, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    pictures.write_report(name, page)
    measured = browser.measure(page, width)
    assert measured.width <= width
    assert len(measured.drawings) == 2 * vms  # each drawing and its frame
    assert min(measured.drawings) > width / 2
    if width == 1400:
        assert min(measured.drawings) > 1000


@pytest.mark.parametrize("scheme", BACKGROUND)
def test_it_is_drawn_in_light_and_in_dark(page: Path, scheme: int) -> None:
    picture = page.parent / "page.png"
    browser.draw(page, 800, picture, scheme)
    assert browser.first_pixel(picture) == (800, BACKGROUND[scheme])


@pytest.mark.parametrize("title", pictures.REPORTS)
def test_the_readmes_pictures_can_be_drawn(title: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pictures.draw_report(title, tmp_path, picture)
    committed = browser.first_pixel(DEPLOY / f"{title}.png")
    assert browser.first_pixel(picture) == committed
    assert committed == (pictures.REPORTS[title][1], BACKGROUND[browser.LIGHT])
