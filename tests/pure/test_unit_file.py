"""The unit file agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

from tscwatch import errors

UNIT = (Path(__file__).parents[2] / "deploy/systemd/tscwatch.service").read_text()


def test_the_service_is_not_started_again_after_an_error_that_would_come_again() -> None:
    """The port may be free by then; the unit runs as root, and the rest is of other commands."""
    (statuses,) = re.findall(r"(?m)^RestartPreventExitStatus=(.*)$", UNIT)
    again = {errors.ListenFailed, errors.NotRoot, errors.RecordingError, errors.DaemonSilent}
    others = set(errors.TscwatchError.__subclasses__()) - again
    assert sorted(map(int, statuses.split())) == sorted(each.exit_status for each in others)
