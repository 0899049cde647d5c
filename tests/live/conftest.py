from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.observer import EACH_VCPU, Observer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that share a daemon last: the others disturb it, or need none beside theirs."""
    live = [item for item in items if item.path.parent == HERE]
    ordered = iter(sorted(live, key=lambda item: "observer" in getattr(item, "fixturenames", ())))
    items[:] = [next(ordered) if item.path.parent == HERE else item for item in items]


@pytest.fixture
def observer(shared_daemon: Observer) -> Observer:
    """Return a daemon that tests share, once per source; it shows what is printed from now on."""
    shared_daemon.forget()
    return shared_daemon


@pytest.fixture(scope="package", params=["bcc", "ftrace"])
def shared_daemon(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    """Yield a daemon that runs until the last test that shares it.

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
