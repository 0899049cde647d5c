"""The program that runs the parts of the test suite: what it starts, and what it counts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.programs import suite
from tests.programs.suite import Case, Part, Result

PASSES, FAILS = (sys.executable, "-c", ""), (sys.executable, "-c", "raise SystemExit(3)")

REPORT = """\
<testsuites><testsuite>
  <testcase classname="tests.pure.test_one" name="test_a[x]" time="1.5"/>
  <testcase classname="tests.pure.test_one" name="test_b" time="0.1">
    <failure message="assert 1 == 2&#10; where 1 = one()">text</failure>
  </testcase>
  <testcase classname="tests.pure.test_one" name="test_c" time="0">
    <skipped message="needs root">text</skipped>
  </testcase>
  <testcase classname="tests.pure.test_one" name="test_d" time="0">
    <error message="failed on setup">text</error>
  </testcase>
</testsuite></testsuites>
"""


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)


def outcomes(*parts: Part) -> dict[str, str]:
    """Run parts; return the outcome and the reason of each."""
    results = suite.run_all(parts)
    tests = [test for result in results for test in result.tests]
    return {test.part: " ".join(filter(None, (test.outcome, test.reason))) for test in tests}


def test_what_needs_a_part_that_failed_is_not_run_and_has_failed() -> None:
    assert outcomes(
        Part("second", PASSES, after=("first",)),
        Part("first", FAILS),
        Part("third", PASSES, after=("another",)),
    ) == {
        "first": "failed exit status 3",
        "second": "failed not run, because first failed",
        "third": "passed",
    }


def test_a_core_for_each_part_and_one_part_on_the_host() -> None:
    on_host, other = Part("live", PASSES, on_host=True), Part("lab", PASSES)
    full = [other] * (os.cpu_count() or 1)
    assert suite.may_start(other, full[1:])
    assert not suite.may_start(other, full)
    assert suite.may_start(on_host, full)
    assert not suite.may_start(on_host, [on_host])
    assert suite.may_start(other, [on_host])


def test_the_output_of_a_part_is_kept(tmp_path: Path) -> None:
    suite.run(Part("loud", (sys.executable, "-c", "print('here')")))
    assert (tmp_path / "loud.log").read_text() == "here\n"


def test_a_report_of_pytest(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    file = "tests/pure/test_one.py"
    assert list(suite.read("pure", report)) == [
        Case("pure", f"{file}::test_a[x]", 1.5, "passed"),
        Case("pure", f"{file}::test_b", 0.1, "failed", "assert 1 == 2"),
        Case("pure", f"{file}::test_c", 0, "skipped", "needs root"),
        Case("pure", f"{file}::test_d", 0, "failed", "failed on setup"),
    ]


def test_the_table_ends_with_the_slowest_tests_what_did_not_pass_and_the_sum() -> None:
    tests = (
        *(Case("live", f"test_{number}", number, "passed") for number in range(12)),
        *(Case("live", "test_x", 0, "skipped", "needs root"),) * 3,
        Case("live", "test_bad", 0.5, "failed", "why"),
    )
    lines = suite.table([Result("live", 70, tests)], 71).splitlines()
    assert lines[1].split() == ["live", "16", "3", "1", "70"]
    assert lines[2].split() == ["all", "16", "3", "1", "71"]
    slowest = [line.split()[2] for line in lines if line.endswith(tuple("0123456789"))][2:]
    assert slowest == [f"test_{number}" for number in range(11, 1, -1)]
    assert lines[-4:] == [
        "SKIPPED live (3): needs root",
        "FAILED live  test_bad  why",
        "",
        "12 passed, 1 failed, 3 skipped",
    ]


@pytest.mark.parametrize(("command", "status"), [(PASSES, 0), (FAILS, 1)])
def test_the_exit_status(
    command: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "PARTS", (Part("only", command), Part("never", FAILS)))
    assert suite.main(["only"]) == status


def test_without_kvm_what_runs_on_the_host_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "PARTS", (Part("live", FAILS, on_host=True), Part("lab", PASSES)))
    monkeypatch.setattr(suite, "missing_for_live", lambda: "needs /dev/kvm")
    assert suite.main(["live", "lab"]) == 0
    shown = capsys.readouterr().out
    assert "SKIPPED live (1): needs /dev/kvm\n" in shown
    assert shown.endswith("1 passed, 0 failed, 1 skipped\n")
