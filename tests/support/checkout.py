"""Copies the checkout, for what must not change it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.lab_vm import ROOT


@contextmanager
def copied() -> Iterator[Path]:
    """Yield a directory with the files that git tracks, and a link to the virtual environment."""
    with TemporaryDirectory() as name:
        copy = f"git ls-files -z | xargs -0 cp --parents --archive --target-directory {name}"
        subprocess.run(["sh", "-c", copy], check=True, cwd=ROOT)
        (Path(name) / ".venv").symlink_to(ROOT / ".venv")
        yield Path(name)
