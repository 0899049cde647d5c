from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.observer import EACH_VCPU, Observer


@pytest.fixture(scope="module", params=["bcc", "ftrace"])
def observer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    """Yield a daemon that all tests of a module share, once per source.

    At the end no event may be lost, the daemon must exit with status 0, and its log must contain no
    traceback.
    """
    directory = tmp_path_factory.mktemp(request.param)
    options = ("--json", "--source", request.param)
    with Observer(directory, *options, config=EACH_VCPU) as it:
        yield it
        assert not it.losses()
        assert it.stop() == 0
    assert "Traceback" not in it.log.read_text()
