from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.observer import Observer


@pytest.fixture(scope="module", params=["bcc", "ftrace"])
def observer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    """The daemon with each source in turn, for all tests of a module."""
    directory = tmp_path_factory.mktemp(request.param)
    with Observer(directory, "--json", "--source", request.param) as it:
        yield it
        assert not it.losses()
        assert it.stop() == 0
    assert "Traceback" not in it.log.read_text()
