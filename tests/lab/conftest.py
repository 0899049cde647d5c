from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import lab_vm


@pytest.fixture(scope="module")
def scaling() -> Iterator[None]:
    """See :func:`tests.support.lab_vm.scaling`."""
    with lab_vm.scaling():
        yield
