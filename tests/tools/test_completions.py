"""The completions, in interactive shells: what ``tscwatch`` gets after a line and a tab."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import PATIENCE_S, wait_for
from tests.support.lab_vm import ROOT

FILES = ("recording.jsonl", "with space.jsonl", "page.html", "etc/config.yaml")
START = {
    "bash": (
        "bash --noprofile --rcfile start -i",
        "source /usr/share/bash-completion/bash_completion; "
        "source tree/usr/share/bash-completion/completions/tscwatch",
    ),
    "zsh": (
        "zsh --no-global-rcs -i",
        "fpath=($PWD/tree/usr/share/zsh/site-functions $fpath); autoload -Uz compinit; compinit -u",
    ),
}
PROGRAM = "tscwatch() { printf '%s\\n' \"$@\" > part; mv part words; }; PS1='ready> '"


class Shell:
    """An interactive shell in a terminal, in whose directory there are FILES."""

    def __init__(self, name: str, directory: Path) -> None:
        subprocess.run(["make", "-s", "install", f"DESTDIR={directory}/tree"], check=True, cwd=ROOT)
        for file in FILES:
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).touch()
        command, start = START[name]
        for file in ("start", ".zshrc"):
            (directory / file).write_text(f"{start}\n{PROGRAM}\n")
        self._words = directory / "words"
        self._terminal, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command.split(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "TERM": "dumb", "HOME": str(directory)},
            start_new_session=True,
        )
        os.close(theirs)

    def complete(self, line: str) -> list[str]:
        """Type a line, a tab and a return; return the arguments of ``tscwatch``."""
        output = b""
        while b"ready> " not in output:
            output += os.read(self._terminal, 4096)
        os.write(self._terminal, f"tscwatch {line}\t\n".encode())
        wait_for(self._words.exists, f"{line} in {self._process.args!r}")
        words = self._words.read_text().splitlines()
        self._words.unlink()
        return words

    def end(self) -> None:
        os.close(self._terminal)
        self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module", params=START)
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    started = Shell(request.param, tmp_path_factory.mktemp(request.param))
    yield started
    started.end()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("expl", ["explain"]),
        ("--vers", ["--version"]),
        ("run --text", ["run", "--textfile"]),
        ("run --source ft", ["run", "--source", "ftrace"]),
        ("run --config etc/con", ["run", "--config", "etc/config.yaml"]),
        ("run --config=etc/con", ["run", "--config=etc/config.yaml"]),
        ("record -o pa", ["record", "-o", "page.html"]),
        ("replay rec", ["replay", "recording.jsonl"]),
        ("replay with", ["replay", "with space.jsonl"]),
        (
            "report recording.jsonl --output pa",
            ["report", "recording.jsonl", "--output", "page.html"],
        ),
        ("explain vcpu_", ["explain", "vcpu_skew"]),
        ("doctor rec", ["doctor", "rec"]),
        ("top --url rec", ["top", "--url", "rec"]),
    ],
)
def test_a_tab_completes(shell: Shell, line: str, expected: list[str]) -> None:
    assert shell.complete(line) == expected
