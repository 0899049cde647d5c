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


def has_entries(directory: Path) -> bool:
    """Return whether a directory can be listed and is not empty."""
    try:
        return any(directory.iterdir())
    except OSError:
        return False


def selected(text: str) -> str:
    """Return the choice that a file marks, as in ``local [boot]``, or else the whole text."""
    marked = re.search(r"\[([\w-]+)\]", text)
    return marked[1] if marked else text
