"""Read the small files of procfs, sysfs, tracefs and debugfs, which may be missing or closed."""

from __future__ import annotations

import re
from pathlib import Path


def read_text(file: Path) -> str:
    """Return the contents of a file without white space around them, "" if it cannot be read.

    Bytes that are not UTF-8 are replaced.
    """
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def entries(directory: Path) -> list[str]:
    """Return the names in a directory, none if it is gone or cannot be listed.

    Path.glob() raises an error if a directory vanishes meanwhile.
    """
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:
        return []


def selected(text: str) -> str:
    """Return the choice that a file marks, as in ``local [boot]``, or else the whole text."""
    marked = re.search(r"\[([\w-]+)\]", text)
    return marked[1] if marked else text
