"""Writes the manual page tscwatch(1) to standard output: ``python -m deploy.manual README.md``.

The commands and the examples are those of ``--help``; the rest comes from sections of the README.
The page has the date of ``SOURCE_DATE_EPOCH``.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from tscwatch import __version__, cli

_SECTIONS = (
    ("EXIT STATUS", "## When it cannot start"),
    ("SIGNALS", "### Signals"),
    ("ENVIRONMENT", "### Environment"),
    ("FILES", "### Files"),
)
_SEE_ALSO = ("qemu-system-x86_64(1)", "journalctl(1)", "strace(1)", "systemd.service(5)", "proc(5)")


class Command(NamedTuple):
    """A command of the program, as the parser has it."""

    name: str
    help: str
    parser: ArgumentParser


def commands(parser: ArgumentParser) -> list[Command]:
    """Return the commands of a parser; argparse has no public interface for them."""
    (action,) = (each for each in parser._actions if isinstance(each, _SubParsersAction))
    helps = {each.dest: each.help or "" for each in action._choices_actions}
    return [Command(name, helps[name], each) for name, each in action.choices.items()]


def value(action: Action) -> str:
    """Return what stands for the value of an argument, empty if it takes none."""
    if action.nargs == 0:
        return ""
    metavar = action.metavar or "|".join(action.choices or ()) or action.dest.upper()
    assert isinstance(metavar, str)
    return metavar


def alternatives(parser: ArgumentParser, action: Action) -> list[Action]:
    """Return the arguments that exclude each other, of which an argument is one."""
    groups = (group._group_actions for group in parser._mutually_exclusive_groups)
    return next((members for members in groups if action in members), [action])


def page(parser: ArgumentParser, readme: str, date: datetime) -> str:
    """Return the page as roff, in the macros of man(7)."""
    name = _text(parser.description or "").rstrip(".")
    lines = [
        f'.TH TSCWATCH 1 "{date:%Y-%m-%d}" "tscwatch {__version__}" "User Commands"',
        ".SH NAME",
        rf"tscwatch \- {name[0].lower()}{name[1:]}",
        ".SH SYNOPSIS",
        ".nf",
        *map(_synopsis, commands(parser)),
        ".fi",
        ".SH DESCRIPTION",
        _text(_introduction(readme)),
        ".SH OPTIONS",
        *_arguments(action for action in parser._actions if action.option_strings),
        ".SH COMMANDS",
    ]
    for command in commands(parser):
        lines += [f".SS {_bold('tscwatch ' + command.name)}", _text(command.help)]
        lines += _arguments(own_actions(command))
    for title, heading in _SECTIONS:
        lines += [f".SH {title}", *_rendered(section(readme, heading))]
    names = (name.partition("(") for name in _SEE_ALSO)
    lines += [
        ".SH EXAMPLES",
        *_examples(parser.epilog or ""),
        ".SH SEE ALSO",
        ",\n".join(f".BR {name} ({number}" for name, _, number in names),
    ]
    return "\n".join(lines) + "\n"


def section(readme: str, heading: str) -> str:
    """Return the text below a heading, up to the next one.

    :raises ValueError: there is no such heading.
    """
    _, found, rest = readme.partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"the README has no heading {heading!r}")
    return re.split(r"(?m)^#", rest)[0].strip()


def _introduction(readme: str) -> str:
    """Return the first paragraph that is plain text."""
    return next(each for each in readme.split("\n\n") if each[0] not in "#*!")


def own_actions(command: Command) -> list[Action]:
    """Return the arguments of a command without -h, which each has."""
    return [action for action in command.parser._actions if action.dest != "help"]


def _synopsis(command: Command) -> str:
    words = [_bold(f"tscwatch {command.name}")]
    for action in own_actions(command):
        members = alternatives(command.parser, action)
        if action is members[0]:
            choice = "|".join(_form(each, short=True) for each in members)
            words.append(choice if action.required else f"[{choice}]")
    return " ".join(words)


def _form(action: Action, short: bool = False) -> str:
    """Return an argument as it is typed.

    :param short: only the first of an option's names.
    """
    names = ", ".join(map(_bold, action.option_strings[: 1 if short else None]))
    return f"{names} {_italic(value(action))}".strip() if value(action) else names


def _arguments(actions: Iterable[Action]) -> Iterator[str]:
    for action in actions:
        yield from (".TP", _form(action), _text(action.help or ""))


def _rendered(markdown: str) -> Iterator[str]:
    """Yield paragraphs, and tables of two columns without their heads."""
    for paragraph in markdown.split("\n\n"):
        if not paragraph.startswith("|"):
            yield _text(paragraph)
            continue
        for row in paragraph.split("\n")[2:]:
            item, text = (cell.strip() for cell in row.strip("|").split(" | "))
            yield from (".TP", _text(item), _text(text))


def _examples(epilog: str) -> Iterator[str]:
    """Yield the lines after the first; an example and its meaning are two spaces apart."""
    for line in epilog.splitlines()[1:]:
        example, _, meaning = line.strip().partition("  ")
        yield from (".TP", _bold(example), _text(meaning))


def _text(markdown: str) -> str:
    """Return a paragraph as roff: links as their text, and code in bold."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(markdown.split()))
    parts = plain.replace("**", "").split("`")
    roff = "".join(_bold(part) if index % 2 else _escaped(part) for index, part in enumerate(parts))
    return rf"\&{roff}" if roff.startswith((".", "'")) else roff


def _bold(text: str) -> str:
    literal = _escaped(text).replace("-", r"\-")
    return rf"\fB{literal}\fR"


def _italic(text: str) -> str:
    return rf"\fI{_escaped(text)}\fR"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\e")


def main() -> None:
    """Write the page."""
    date = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), timezone.utc)
    sys.stdout.write(page(cli.parser(), Path(sys.argv[1]).read_text(encoding="utf-8"), date))


if __name__ == "__main__":
    main()
