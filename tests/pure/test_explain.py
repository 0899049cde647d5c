"""Every kind of mismatch and every phase has an explanation."""

from __future__ import annotations

import re

import pytest

from tscwatch import cli, explain
from tscwatch.analysis.mismatch import MISMATCHES
from tscwatch.model import KINDS, PHASES


def test_every_kind_has_its_rules() -> None:
    assert tuple(MISMATCHES) == KINDS


@pytest.mark.parametrize("topic", (*KINDS, *PHASES))
def test_every_kind_and_every_phase_is_explained(topic: str) -> None:
    assert topic in explain.TOPICS, f"{topic} has no explanation"
    for name, part in explain.TOPICS[topic]._asdict().items():
        assert part, f"the explanation of {topic} has no {name}"


def test_nothing_else_is_explained() -> None:
    assert tuple(explain.TOPICS) == (*KINDS, *PHASES)


def test_the_output_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "withheld"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("what  QEMU wanted a frequency")
    assert "kvm_arch_set_tsc_khz" in output
    assert max(map(len, output.splitlines())) <= 80


def test_without_a_topic_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain"]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"(?m)^  (\w+)", output) == [*KINDS, *PHASES]
    assert max(map(len, output.splitlines())) <= 80


def test_an_unknown_topic_lists_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "drift"])
    assert ended.value.code == 2
    assert "vcpu_skew" in capsys.readouterr().err
