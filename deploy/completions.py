"""Writes a shell's completion to standard output: ``python -m deploy.completions bash|zsh``.

The completion is generated from the argument parser.  An argument whose type is a path completes
the names of files.
"""

from __future__ import annotations

import shlex
import sys
from argparse import PARSER, Action, ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path

from deploy.manual import alternatives, commands, value
from tscwatch import cli

_BASH = """\
# Completion of tscwatch(1); the functions are those of bash-completion.
_tscwatch()
{{
    local cur prev words cword split
    _init_completion -s || return
    if ((cword == 1)); then
        {first}
        return
    fi
    case ${{words[1]}}:$prev in
        {values}
    esac
    case ${{words[1]}}:$cur in
        {arguments}
    esac
}}
complete -F _tscwatch tscwatch
"""

_ZSH = """\
#compdef tscwatch
local curcontext=$curcontext state line
typeset -A opt_args
_arguments -C {first} '1: :->command' '*:: :->arguments'
case $state in
    command)
        local -a commands=({commands})
        _describe command commands
        ;;
    arguments)
        case $words[1] in
            {arguments}
        esac
        ;;
esac
"""


def bash(parser: ArgumentParser) -> str:
    """Return the completion for bash."""
    values, arguments = [], []
    for command in commands(parser):
        for action in command.parser._actions:
            names = " | ".join(f"{command.name}:{name}" for name in action.option_strings)
            if not names:
                arguments.append(f"{command.name}:*) {_bash_value(action)} ;;")
            elif value(action):
                values.append(f"{names}) {_bash_value(action)}; return ;;")
        options = _bash_words(_options(command.parser))
        arguments.insert(0, f"{command.name}:-*) {options} ;;")
    first = [*(command.name for command in commands(parser)), *_options(parser)]
    return _BASH.format(
        first=_bash_words(first),
        values="\n        ".join(values),
        arguments="\n        ".join(arguments),
    )


def _bash_value(action: Action) -> str:
    """Return the command that completes the value of an argument."""
    return "_filedir" if action.type is Path else _bash_words(action.choices or ())


def _bash_words(words: Iterable[str]) -> str:
    return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$cur"))'


def _options(parser: ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def zsh(parser: ArgumentParser) -> str:
    """Return the completion for zsh."""
    arguments = [
        f"{command.name}) _arguments {_zsh_arguments(command.parser)} ;;"
        for command in commands(parser)
    ]
    described = (f"{command.name}:{command.help}" for command in commands(parser))
    return _ZSH.format(
        first=_zsh_arguments(parser),
        commands=shlex.join(described),
        arguments="\n            ".join(arguments),
    )


def _zsh_arguments(parser: ArgumentParser) -> str:
    """Return the arguments of zsh's ``_arguments`` for those of a parser, without its commands."""
    return shlex.join(spec for action in parser._actions for spec in _zsh_specs(parser, action))


def _zsh_specs(parser: ArgumentParser, action: Action) -> Iterator[str]:
    completed = f":{value(action)}:{_zsh_value(action)}" if value(action) else ""
    excluded = " ".join(
        name for each in alternatives(parser, action) for name in each.option_strings
    )
    for name in action.option_strings:
        attached = "" if not value(action) else "=" if name.startswith("--") else "+"
        explanation = (action.help or "").replace("]", r"\]")
        yield f"({excluded}){name}{attached}[{explanation}]{completed}"
    if not action.option_strings and action.nargs != PARSER:
        yield f"1{completed}"


def _zsh_value(action: Action) -> str:
    if action.type is Path:
        return "_files"
    return f"({' '.join(action.choices)})" if action.choices else " "


def main() -> None:
    """Write the completion."""
    sys.stdout.write({"bash": bash, "zsh": zsh}[sys.argv[1]](cli.parser()))


if __name__ == "__main__":
    main()
