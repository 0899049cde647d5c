"""``tscwatch top`` in a real terminal (tmux), and a server of the guests that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from tests.support.guests import wait_for
from tscwatch.publish.web import Heartbeat, application, serving
from tscwatch.publish.web_config import WebConfig

WIDTH, HEIGHT = 80, 24
_SHELL = f"""
trap : INT  # or the shell would end as well
before=$(stty -g)
{sys.executable} -m tscwatch top "$@"
echo "status $?"
[ "$before" = "$(stty -g)" ] && echo restored
exec cat
"""
_STYLES = {
    "1": "font-weight: bold",
    "7": "color: #1e1e1e; background: #d4d4d4",
    "31": "color: #ff6b6b",
    "33": "color: #e5c07b",
    "36": "color: #56b6c2",
}
"""By the code with which a style begins."""


class Terminal:
    """A terminal in which ``tscwatch top`` runs under a shell; as a context manager it closes."""

    def __init__(self, directory: Path, *arguments: str, term: str = "screen-256color") -> None:
        self._server = ("tmux", "-f", "/dev/null", "-S", str(directory / "tmux"))
        # pytest imports readline, which sets LINES and COLUMNS for all that it starts.
        environment = ("env", "-u", "LINES", "-u", "COLUMNS", f"TERM={term}")
        command = (*environment, "sh", "-c", _SHELL, "sh", *arguments)
        size = ("-x", str(WIDTH), "-y", str(HEIGHT))
        self.tmux("new-session", "-d", *size, *command)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.tmux("kill-server")

    def tmux(self, *arguments: str) -> str:
        command = [*self._server, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def lines(self) -> list[str]:
        return self.tmux("capture-pane", "-p").splitlines()

    def styled(self) -> str:
        """Return the screen with the escape sequences of its styles, and with trailing spaces."""
        return self.tmux("capture-pane", "-p", "-e", "-N")

    def state(self, name: str) -> str:
        """Return one of tmux' variables of the terminal."""
        return self.tmux("display-message", "-p", f"#{{{name}}}").strip()

    def wait_for(self, text: str) -> list[str]:
        """Return the lines, once one of them contains a text."""
        try:
            wait_for(lambda: any(text in line for line in self.lines()), text, 20)
        except TimeoutError:
            raise AssertionError("\n".join([f"no {text!r} in:", *self.lines()])) from None
        return self.lines()


@contextmanager
def served(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Serve guests as :meth:`tscwatch.publish.state.State.rows` returns them; yield the address."""
    respond = application(CollectorRegistry(), Heartbeat(), lambda: rows)
    with serving(respond, WebConfig(), "127.0.0.1", 0, lambda: None) as port:
        yield f"http://127.0.0.1:{port}"


def as_html(styled: str) -> str:
    """Return a screen of :meth:`Terminal.styled` as a page."""
    active: set[str] = set()
    first, *rest = re.split(r"\x1b\[([\d;]*)m", styled)
    parts = [escape(first)]
    for codes, text in zip(rest[::2], rest[1::2]):
        for code in codes.split(";"):
            if code == "0":
                active.clear()
            elif code.startswith("3"):  # a colour, or 39: the default one
                active = {other for other in active if not other.startswith("3")} | {code}
            elif code != "49":  # the default background
                active.add(code)
        style = "; ".join(_STYLES[code] for code in sorted(active - {"39"}))
        parts.append(f'<span style="{style}">{escape(text)}</span>')
    return (
        "<!DOCTYPE html><style>body { margin: 8px; color: #d4d4d4; background: #1e1e1e }"
        f"pre {{ margin: 0; font: 14px/18px monospace }}</style><pre>{''.join(parts)}</pre>"
    )
