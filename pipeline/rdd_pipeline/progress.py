"""Progress of long work: moving bars on a terminal, an occasional plain line in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger("rdd")

_LOG_INTERVAL_SECONDS = 15.0


class Bar:
    """One piece of work under way; made by :meth:`Reporter.bar`."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        progress: Progress | None,
        watch: Callable[[str, int, int], object] | None = None,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._progress = progress
        self._watch = watch
        self._done = 0
        self._initial = 0
        self._started = self._logged = time.monotonic()
        self._note = ""
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(name, total=total, rate="", note="")

    def start_at(self, done: int) -> None:
        """Say how much was done by an earlier run; it does not count towards the rate."""
        self._done = self._initial = done
        self._started = time.monotonic()
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=self._total, completed=done)

    def advance(self, amount: int = 1, *, note: str | None = None, items: int = 1) -> None:
        """Move on by ``amount``; ``items`` units of the displayed rate belong to each step."""
        self._done += amount
        if note is not None:
            self._note = note
        if self._watch is not None:
            self._watch(self._name, self._done, self._total)
        now = time.monotonic()
        rate = (self._done - self._initial) * items / max(now - self._started, 1e-9)
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=self._done, rate=f"{rate:.1f} {self._unit}/s", note=self._note
            )
        elif now - self._logged >= _LOG_INTERVAL_SECONDS:
            self._logged = now
            left = (self._total - self._done) * items / max(rate, 1e-9)
            logger.info(
                "%s: %d of %d, %.1f %s/s, about %.0f s left%s",
                *(self._name, self._done, self._total, rate, self._unit, left),
                f"; {self._note}" if self._note else "",
            )

    def progress_to(self, done: int, total: int) -> None:
        """Move to ``done`` of ``total``, for work that learns its size as it goes."""
        if total != self._total:
            self._total = total
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, total=total)
        self.advance(done - self._done)


class Reporter:
    """Where long work shows how far it is and what it decided.

    Args:
        console: A rich console. Bars move only if it is a terminal; otherwise a line is logged
            every 15 seconds.
        quiet: Show no bars and no lines; the log file still has everything.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.watch: Callable[[str, int, int], object] | None = None
        """Called at every step of a bar with its name, what is done of it, and all; it must be
        quick."""

    def say(self, message: str) -> None:
        """Tell the user a fact or decision, in one line."""
        logger.info(message)

    def warn(self, message: str) -> None:
        """Tell the user, in one line, what is likely not wanted."""
        logger.warning(message)

    @contextmanager
    def bar(self, name: str, total: int, unit: str = "images") -> Iterator[Bar]:
        """Show a bar for ``total`` steps of work while the context is open."""
        if self.quiet or not self.console.is_terminal:
            yield Bar(name, total, unit, None, self.watch)
            return
        with Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        ) as progress:
            yield Bar(name, total, unit, progress, self.watch)


_current = Reporter()


def current_reporter() -> Reporter:
    """The process's reporter; the command line sets it, Prefect flows use it as it is."""
    return _current


def set_reporter(reporter: Reporter) -> None:
    """Replace the process's reporter."""
    global _current
    _current = reporter
