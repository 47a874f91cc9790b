"""The consoles that all commands write to: results to ``out``, everything else to ``err``."""

from __future__ import annotations

import os

from rich.console import Console

out = Console()
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = 160  # tables in a log or a pipe need not fit a terminal
err = Console(stderr=True)


def say(text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)
