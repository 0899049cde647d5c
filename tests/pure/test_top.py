"""The table of ``tscwatch top``, and no daemon that answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pure.test_metrics import feed, skewed
from tscwatch import cli
from tscwatch.publish import top
from tscwatch.publish.state import State


def test_a_skewed_guest_line_by_line() -> None:
    state = State()
    feed(state, skewed())
    assert list(top.table(state.rows())) == [
        "vm                    vcpu  requested   reported  effective  last call            "
        "owner                    state",
        "guest-100                0    2600000    2600000    2600000  boot/post_init       "
        "shop/db                  vcpu_skew 100.0 ppm (critical), KVM: 1 synchronised",
        "                         1    2600260    2600260    2600260  hotplug/post_init",
    ]


def test_no_owner_steers_the_terminal_or_moves_the_columns() -> None:
    state = State()
    owner = {"platform": "kubevirt", "namespace": "\x1b" * 99, "name": "db"}
    feed(state, skewed())
    (row,) = state.rows()
    head, line, _ = top.table([{**row, "owner": owner}])
    assert line.isprintable()
    assert line.index("vcpu_skew") == head.index("state")
    _, line, _ = top.table([{**row, "owner": None}])
    assert line.index("vcpu_skew") == head.index("state")


def test_without_guests_the_table_has_a_head() -> None:
    assert len(list(top.table(State().rows()))) == 1


def test_no_daemon_answers(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert cli.main(["top", "--url", "http://127.0.0.1:9"]) == 12
    assert "tscwatch run" in caplog.text
    (tmp_path / "vms").write_text("not JSON")
    assert cli.main(["top", "--url", tmp_path.as_uri()]) == 12
