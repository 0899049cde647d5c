"""What the pure tests share, and which of them run in a package build.

The tests of generated files are left out where Grafana's SDK, which no distribution packages, is
missing: a package is then being built.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.fake_tracefs import FakeTracefs

collect_ignore = (
    [] if find_spec("grafana_foundation_sdk") else ["test_alerts.py", "test_dashboard.py"]
)


@pytest.fixture
def fake_tracefs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTracefs:
    return FakeTracefs(tmp_path, monkeypatch)
