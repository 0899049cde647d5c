from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import lab_vm


@pytest.fixture(scope="module")
def scaling() -> Iterator[None]:
    """See :func:`tests.support.lab_vm.scaling`."""
    with lab_vm.scaling():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of lockdown last: only another boot lifts it."""
    items.sort(key=lambda item: "test_lockdown" in item.nodeid)
