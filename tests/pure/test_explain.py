"""Everything that has a name is explained."""

from __future__ import annotations

import pytest

from tscwatch import cli, explain
from tscwatch.model import KINDS, PHASES


def test_every_kind_and_every_phase() -> None:
    assert tuple(explain.TOPICS) == (*KINDS, *PHASES)
    for topic, parts in explain.TOPICS.items():
        assert all(parts), f"{topic} is not fully explained"


def test_as_an_operator_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "withheld"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("what  QEMU wanted a frequency")
    assert "kvm_arch_set_tsc_khz" in said
    assert max(map(len, said.splitlines())) <= 80


def test_an_unknown_topic_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "drift"])
    assert ended.value.code == 2
    assert "vcpu_skew" in capsys.readouterr().err
