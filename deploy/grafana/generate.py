"""Generates Grafana's dashboard: ``make grafana``."""

from __future__ import annotations

from pathlib import Path

from deploy.alerts.generate import RUNBOOK
from deploy.grafana import dashboard

HERE = Path(__file__).parent


def generated() -> dict[str, str]:
    """Return the content of each generated file, by file name."""
    return {"dashboard.json": dashboard.generated(RUNBOOK)}


if __name__ == "__main__":
    for name, content in generated().items():
        (HERE / name).write_text(content)
