from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tscwatch", deadline=None)  # no test depends on the time it takes
settings.load_profile("tscwatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tier is the folder that a test lies in."""
    for item in items:
        tier = Path(item.path).parent.name
        if tier in ("pure", "live", "lab"):
            item.add_marker(tier)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("live") or item.get_closest_marker("lab"):
        reason = _why_not_live()
        if reason:
            pytest.skip(reason)
    if item.get_closest_marker("lab") and "TSCWATCH_LAB" not in os.environ:
        pytest.skip("runs inside the lab VM: make test-lab")


def _why_not_live() -> str:
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "needs /dev/kvm"
    if not Path("/sys/kernel/tracing/events").is_dir():
        return "needs tracefs: mount -t tracefs none /sys/kernel/tracing"
    return ""
