"""Draws the README's pictures: ``make pictures``.

The fleet of the dashboard does not exist, but what happens to its guests was recorded of real ones:
the classic case of the README, and a skew within KVM's tolerance.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support import fleet, grafana, pictures
from tests.support.prometheus import DEPLOY, Span, free_port, prometheus

DASHBOARD = {"fleet": ("Fleet", "Pool"), "guest": ("Guest",)}
"""The rows of each picture of the dashboard."""


def main() -> None:
    """Draw each picture."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for title in pictures.REPORTS:
            pictures.draw_report(title, directory, DEPLOY / f"{title}.png")
        pictures.draw_top(directory, DEPLOY / "top.png")
        _draw_dashboard(directory)


def _draw_dashboard(directory: Path) -> None:
    span = Span.until_now(6 * 3600, every_s=60)
    fleet.write_history(directory, fleet.a_fleet(span), span)
    with prometheus(directory, f"127.0.0.1:{free_port()}") as address:
        values = grafana.choose(address, vm="db-7")  # the README's case
        for title, rows in DASHBOARD.items():
            picture = DEPLOY / f"grafana/{title}.png"
            grafana.draw(directory, address, span, values, rows, picture)


if __name__ == "__main__":
    main()
