"""Generates Grafana's dashboard: ``make grafana``."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.alerts.generate import RUNBOOK
from deploy.grafana import dashboard

HERE = Path(__file__).parent


def generated(runbook: str = RUNBOOK) -> dict[str, str]:
    """Return the content of each generated file, by file name.

    :param runbook: the URL of ``RUNBOOK.md``.
    """
    return {"dashboard.json": dashboard.generated(runbook)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runbook", default=RUNBOOK)
    for name, content in generated(**vars(parser.parse_args())).items():
        (HERE / name).write_text(content)
