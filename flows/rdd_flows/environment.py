"""Where this process logs to."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_LOGGED = (None, "rdd")  # the root, and our own logger, which may not hand on to the root


def configure_logging(console: Console, *, quiet: bool) -> None:
    """Show what ``rdd`` says: above moving bars on a terminal, as dated lines in a log."""
    logger = logging.getLogger("rdd")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.handlers = [handler]


def quiet_prefect() -> None:
    """Take Prefect's own lines off the console of this process; call it after Prefect's import.

    For the command line, which shows its own progress; a flow under a Prefect worker keeps them.
    """
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if type(h).__name__ != "PrefectConsoleHandler"]


def log_to_file(path: Path) -> logging.Handler:
    """Write everything that ``rdd``, Prefect and Dask log to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _LOGGED:
        logger = logging.getLogger(name)
        if name is None or not logger.propagate:  # else the root has its lines already
            logger.addHandler(handler)
    return handler


def stop_logging_to_file(handler: logging.Handler) -> None:
    """Undo :func:`log_to_file`."""
    for name in _LOGGED:
        logging.getLogger(name).removeHandler(handler)
    handler.close()
