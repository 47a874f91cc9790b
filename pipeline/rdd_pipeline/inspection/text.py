"""What consoles show of a result: a line that says what it is, and the first lines of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_LINES = 10
"""Lines of a table."""
_LONGEST = 48  # characters of a cell


def text_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, total: int
) -> str:
    """A title and a table below it.

    Args:
        title: What it is.
        rows: The first rows; no more than :data:`MOST_LINES` are shown.
        columns: Which of their values; text to the left, numbers to the right.
        total: How many rows there are.

    Returns:
        Lines without an end of line after the last.
    """
    shown = rows[:MOST_LINES]
    cells = [[*columns], *([_cell(row[name]) for name in columns] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [all(isinstance(row[name], str) for row in shown) for name in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    left = total - len(shown)
    more = [f"… {left} more"] if left > 0 else []
    return "\n".join([title, *(f"  {line}" for line in [*lines, *more])])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
