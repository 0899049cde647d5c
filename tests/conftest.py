from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import lab_vm
from tests.support.machine import missing_for_live

settings.register_profile("tscwatch", deadline=None)  # slow machines are no failure
settings.load_profile("tscwatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, which is the name of the directory that contains it."""
    for item in items:
        tier = Path(item.nodeid.partition("::")[0]).parent.name
        if tier in ("pure", "tools", "live", "lab"):
            item.add_marker(tier)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test, with the reason, if its tier cannot run here."""
    if item.get_closest_marker("live") or item.get_closest_marker("lab"):
        reason = missing_for_live()
        if reason:
            pytest.skip(reason)
    if item.get_closest_marker("lab") and not lab_vm.inside():
        pytest.skip("runs only inside the lab VM: make test-lab")
