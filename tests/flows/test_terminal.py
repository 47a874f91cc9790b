"""What a person at a terminal sees: bars that move, nested without an error."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from rdd_flows.environment import configure_logging
from rdd_pipeline.progress import Reporter


def test_bars_nest_and_messages_stand_above_them() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    configure_logging(console, quiet=False)
    reporter = Reporter(console)
    with reporter.bar("train", 10) as outer:
        outer.start_at(4)
        outer.advance(3, note="loss 1.234", items=8)
        with reporter.bar("evaluate", 5) as inner:
            inner.advance(5)
        reporter.say("teacher: reused")
    shown = screen.getvalue()
    for expected in ("train", "7/10", "loss 1.234", "evaluate", "5/5", "teacher: reused"):
        assert expected in shown


def test_without_a_terminal_long_work_logs_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rdd_pipeline.progress._LOG_INTERVAL_SECONDS", 0.0)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False)
    configure_logging(console, quiet=False)
    with Reporter(console).bar("teacher pass", 4) as bar:
        bar.advance(3)
    assert "teacher pass: 3 of 4" in screen.getvalue()


def test_quiet_shows_errors_only() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    configure_logging(console, quiet=True)
    reporter = Reporter(console, quiet=True)
    with reporter.bar("train", 2) as bar:
        bar.advance(2)
    reporter.say("something")
    assert screen.getvalue() == ""
    logging.getLogger("rdd").error("bad")
    assert "bad" in screen.getvalue()
