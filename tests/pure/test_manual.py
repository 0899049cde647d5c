"""The manual page has what ``--help`` and the README's tables have."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path

import pytest

from deploy import manual
from tscwatch import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DATE = datetime(2026, 11, 27, tzinfo=timezone.utc)


def page() -> str:
    """The page without fonts."""
    roff = manual.page(cli.parser(), README, DATE)
    return re.sub(r"\\f[BIR]", "", roff).replace(r"\-", "-")


def part(title: str) -> str:
    return page().partition(f"\n.SH {title}\n")[2].partition("\n.SH ")[0]


def test_it_has_the_sections_of_a_manual() -> None:
    titles = re.findall(r"(?m)^\.SH (.*)$", page())
    expected = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS"]
    expected += ["EXIT STATUS", "SIGNALS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"]
    assert titles == expected
    assert all(map(part, titles))


def test_it_has_each_command_with_each_argument_and_its_help() -> None:
    synopsis, text = part("SYNOPSIS"), part("COMMANDS")
    for command in manual.commands(cli.parser()):
        assert f"tscwatch {command.name}" in synopsis
        described = text.partition(f".SS tscwatch {command.name}\n")[2].partition("\n.SS")[0]
        assert described.startswith(command.help)
        for action in manual.own_actions(command):
            assert action.help
            assert action.help in described
            for name in action.option_strings:
                assert re.search(rf"(?m)^(.*, )?{name}\b", described)


def test_an_argument_is_written_as_it_is_typed() -> None:
    lines = part("SYNOPSIS").splitlines()
    assert "tscwatch replay FILE [--json|--metrics] [--config FILE]" in lines
    assert "tscwatch record [--config FILE] [--source auto|bcc|ftrace] -o FILE" in lines


@pytest.mark.parametrize(
    ("title", "heading"),
    [
        ("EXIT STATUS", "## When it cannot start"),
        ("SIGNALS", "### Signals"),
        ("ENVIRONMENT", "### Environment"),
        ("FILES", "### Files"),
    ],
)
def test_it_has_each_row_of_the_readmes_tables(title: str, heading: str) -> None:
    rows = re.findall(r"(?m)^\| (.*?) \| (.*) \|$", manual.section(README, heading))[2:]
    lines = part(title).split("\n")
    assert rows
    for row in rows:
        item, text = (cell.replace("`", "") for cell in row)
        assert lines[lines.index(item) - 1 : lines.index(item) + 2] == [".TP", item, text]


def test_it_has_each_example_of_the_help() -> None:
    for line in (cli.parser().epilog or "").splitlines()[1:]:
        example, _, meaning = line.strip().partition("  ")
        assert f".TP\n{example}\n{meaning.strip()}" in part("EXAMPLES")


def test_every_variable_that_the_code_reads_is_in_the_readme() -> None:
    code = "".join(file.read_text() for file in (ROOT / "tscwatch").rglob("*.py"))
    read = set(re.findall(r"os\.environ(?:\.get\(|\[)\"(\w+)\"", code))
    read |= set(re.findall(r"\"(\w+)\" in os\.environ", code))
    table = manual.section(README, "### Environment")
    assert read == set(re.findall(r"(?m)^\| `(\w+)`", table))


def test_what_is_special_in_roff_is_escaped() -> None:
    readme = README.replace("tscwatch is a daemon", r"'\fB is a daemon")
    assert (
        manual.page(cli.parser(), readme, DATE)
        .partition(".SH DESCRIPTION\n")[2]
        .startswith(r"\&'\efB is a daemon")
    )
