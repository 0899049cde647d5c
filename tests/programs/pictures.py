"""Draws the README's pictures of the dashboard: ``make pictures``.

The fleet does not exist, but what happens to its guests was recorded of real ones: the classic case
of the README, and a skew within KVM's tolerance.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support import fleet, grafana
from tests.support.prometheus import DEPLOY, Span, free_port, prometheus

PICTURES = {"fleet": ("Fleet", "Pool"), "guest": ("Guest",)}
"""The rows of each picture."""


def main() -> None:
    """Draw each picture."""
    span = Span.until_now(6 * 3600, every_s=60)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fleet.write_history(directory, fleet.a_fleet(span), span)
        with prometheus(directory, f"127.0.0.1:{free_port()}") as address:
            values = grafana.choose(address)
            for title, rows in PICTURES.items():
                picture = DEPLOY / f"grafana/{title}.png"
                grafana.draw(directory, address, span, values, rows, picture)


if __name__ == "__main__":
    main()
