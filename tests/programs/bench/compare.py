"""Compare the pipeline's time per event with that at an earlier commit.

::

    python -m tests.programs.bench.compare COMMIT

The commit is checked out into a temporary git worktree; the present tree is used as it is, with
uncommitted changes.  Each tree runs its own pipeline benchmark, of which only the printed table is
used, so the two may differ in modules and interfaces.  The trees take turns, and each round gives
one ratio per size, so that other load on the machine affects both sides of a ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.programs.bench import table

ROUNDS = 5
_ROOT = Path(__file__).resolve().parents[3]
_MODULE, _OLD_MODULE = "tests.programs.bench.pipeline", "tests.bench.pipeline"
"""The benchmark's name, and its name up to commit 0f4c58d."""
_ROW = re.compile(r" *(\d+) +(\d+) ")
"""A row of the benchmark's table: vCPUs, events per second, and columns that are not used."""

Times = dict[str, dict[str, float]]
"""Microseconds per event, by the table's title and the number of vCPUs."""


def parse(output: str) -> Times:
    """Parse the benchmark's output: tables of a title, headings and rows, after a blank line each.

    :raises ValueError: a row does not begin with the number of vCPUs and of events per second.
    """
    times: Times = {}
    for block in output.strip().split("\n\n"):
        title, _headings, *rows = block.splitlines()
        times[title] = {}
        for row in rows:
            match = _ROW.match(row)
            if match is None:
                raise ValueError(f"not a row of the pipeline's benchmark: {row!r}")
            times[title][match[1]] = 1e6 / int(match[2])
    return times


class Tree:
    """A checkout whose code runs in subprocesses.

    :raises RuntimeError: an installed tscwatch would run instead.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        is_new = (root / f"{_MODULE.replace('.', '/')}.py").exists()
        self._module = _MODULE if is_new else _OLD_MODULE
        self.package = self._python("-c", "import tscwatch; print(tscwatch.__file__)").strip()
        if root not in Path(self.package).parents:
            raise RuntimeError(f"{root} would run {self.package}")

    def measure(self) -> Times:
        """Run the tree's benchmark once."""
        return parse(self._python("-m", self._module))

    def _python(self, *arguments: str) -> str:
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._root,
            env={**os.environ, "PYTHONPATH": str(self._root)},  # precedes an installed tscwatch
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return process.stdout


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check a commit out into a worktree, and remove that at the end."""
    git = ("git", "-C", str(_ROOT), "worktree")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        root = Path(directory).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(root), commit], check=True)
        try:
            yield root
        finally:
            subprocess.run([*git, "remove", "--force", str(root)], check=True)


def measure(before: Tree, present: Tree) -> list[tuple[Times, Times]]:
    """Run both benchmarks in each round, and let the trees take turns at being the first."""
    rounds = []
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        order = (before, present) if number % 2 == 0 else (present, before)
        times = {tree: tree.measure() for tree in order}
        rounds.append((times[before], times[present]))
    return rounds


def show(commit: str, rounds: list[tuple[Times, Times]]) -> None:
    """Print a table for each of the benchmark's tables, with the sizes that both trees have."""
    columns = ("vCPUs", f"{commit}: us", "present: us", "present / before", "lowest", "highest")
    first_before, first_present = rounds[0]
    for title, sizes in first_present.items():
        rows = []
        for size in sizes:
            if size not in first_before.get(title, {}):
                continue
            pairs = [(before[title][size], present[title][size]) for before, present in rounds]
            ratios = [present / before for before, present in pairs]
            rows.append(
                (
                    size,
                    *(f"{median(times):.2f}" for times in zip(*pairs)),
                    *(f"{ratio:.2f} x" for ratio in (median(ratios), min(ratios), max(ratios))),
                )
            )
        table.show(f"{title}: time per event", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.programs.bench.compare")
    parser.add_argument("commit", metavar="COMMIT", help="the commit to compare with")
    commit = parser.parse_args().commit
    with checked_out(commit) as root:
        before, present = Tree(root), Tree(_ROOT)
        print(f"before:  {before.package}\npresent: {present.package}", flush=True)
        show(commit, measure(before, present))


if __name__ == "__main__":
    main()
