"""SIGTERM and SIGINT during a training: first a checkpoint, then what would have happened."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the first SIGTERM or SIGINT within its context, instead of acting on it.

    A second one acts at once, and the first at the latest when the context ends. Only the main
    thread of a process can take signals: in any other, and for a signal that the process ignores,
    everything stays as it was.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The signal that came."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self.requested is not None:
            self.act()  # it came too late for anyone to look at it
        self._restore()

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Let signals act at once within the block, as they did before."""
        self._restore()
        try:
            yield
        finally:
            self._install()

    def act(self, number: signal.Signals | None = None) -> NoReturn:
        """Do what the signal would have done before; end the process where that was nothing.

        Args:
            number: By default the one that came to this process; SIGTERM if none did.
        """
        number = number or self.requested or signal.SIGTERM
        previous = self._previous.get(number)
        self._restore()
        if callable(previous):
            previous(number, None)
        raise SystemExit(128 + number)

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            previous = signal.getsignal(number)
            # None: set by code that is not Python's, which could not be called or put back.
            if previous is not None and previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._note)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self.act(signal.Signals(number))
        self.requested = signal.Signals(number)
