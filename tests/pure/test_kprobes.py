"""The switches for all kprobes of a host, as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tscwatch.linux.kprobes import KprobesSwitch


def test_events_may_be_missing_from_when_a_switch_is_off_until_all_are_on_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kprobes, ftrace = files = tmp_path / "kprobes", tmp_path / "ftrace"
    for file in files:
        file.write_text("1\n")
    switch = KprobesSwitch(files)
    steps = [
        (kprobes, "0", False, False, 1),
        (ftrace, "0", False, False, 1),
        (kprobes, "1", False, False, 1),
        (ftrace, "1", True, True, 1),
        (ftrace, "1", False, True, 1),
        (ftrace, "0", False, False, 2),
    ]
    assert (switch.read(), switch.is_on, switch.gaps) == (False, True, 0)
    for file, text, is_on_again, is_on, gaps in steps:
        file.write_text(f"{text}\n")
        assert (switch.read(), switch.is_on, switch.gaps) == (is_on_again, is_on, gaps)
    assert [record.getMessage() for record in caplog.records] == [
        f"all kprobes of this host are off: write 1 to {file}" for file in (kprobes, ftrace)
    ]


def test_a_switch_that_cannot_be_read_is_on(tmp_path: Path) -> None:
    switch = KprobesSwitch([tmp_path / "none"])
    assert (switch.read(), switch.is_on, switch.gaps) == (False, True, 0)


def test_each_switch_that_is_off_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = tmp_path / "kprobes", tmp_path / "ftrace"
    for file in files:
        file.write_text("0\n")
    KprobesSwitch(files).read()
    assert "{} and {}".format(*files) in caplog.text
