"""The host's clock is set while guests run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.support.guests import Guest
from tests.support.observer import Observer
from tests.support.scenarios import boot, plug
from tscwatch import recording
from tscwatch.model import Event

_HOUR = 3600
_FOLLOWED_S = 3


@pytest.fixture
def step() -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the clock by some seconds; correct the clock at the end."""
    offset = time.time() - time.monotonic()

    def move(seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    yield move
    move(offset + time.monotonic() - time.time())


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_a_step_of_the_clock_moves_no_call(
    source: str, tmp_path: Path, step: Callable[[int], None]
) -> None:
    """The log follows the clock, so that it can be compared with others; a recording does not.

    This takes a minute, because two emulated daemons start.
    """
    whole = [*boot(2), *plug(2, "hotplug"), *plug(3, "hotplug")]
    recording_, directory = tmp_path / "recording", tmp_path / "record"
    directory.mkdir()
    arguments = ("-o", str(recording_), "--source", source)
    with (
        Observer(directory, *arguments, command="record") as recorder,
        Observer(tmp_path, "--json", "--source", source) as observer,
        Guest(tmp_path, "there") as there,
    ):
        there.start()
        step(_HOUR)
        there.plug()
        observer.wait_for_calls("there", len(boot(2)) + len(plug(2, "hotplug")))
        step(-2 * _HOUR)
        there.plug()
        time.sleep(_FOLLOWED_S)
        began = time.time()
        with Guest(tmp_path, "later"):
            observer.wait_for_calls("later", len(boot(2)))
        observer.wait_for_calls("there", len(whole))
        assert observer.places("there") == whole
        assert observer.places("later") == boot(2)
        assert all(began < call["ts"] < time.time() for call in observer.calls("later"))
        assert observer.mismatches() == []
        assert not observer.losses()
        assert "Traceback" not in observer.log.read_text()
        recorder.stop()
    times = [event.ts for event in recording.read(recording_) if isinstance(event, Event)]
    assert times == sorted(times)
    assert times[-1] - times[0] < _HOUR * 1e9
