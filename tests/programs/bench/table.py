"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others are right-aligned.

    :param columns: the headings, as many as each row has cells.
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    print(f"\n{title}")
    for row in (columns, *rows):
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:]))
        print(f"  {row[0].ljust(widths[0])}   {'   '.join(cells)}", flush=True)
