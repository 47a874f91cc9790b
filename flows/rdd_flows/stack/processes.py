"""Processes that outlive the command that started them, and how they are found and ended again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from rdd_flows.stack.state import MARK

_SAME_START = 1.0  # seconds that two readings of a start time may differ
_KILLED = 10.0


def start(
    pid_file: Path,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    folder: Path,
    user: int | None = None,
    group: int | None = None,
) -> None:
    """Start a process in a session of its own; its number and start time go to ``pid_file``.

    Args:
        pid_file: Where the process is remembered.
        command: Program and arguments; no secrets, since everyone can read them.
        environment: All of its environment.
        log: File that its output is added to.
        folder: Its working folder.
        user: Account to run under; None runs under this process's.
        group: That account's group.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
        )
    started = psutil.Process(process.pid).create_time()
    pid_file.write_text(json.dumps({"pid": process.pid, "started": started}))


def find(pid_file: Path) -> psutil.Process | None:
    """The process that a file remembers, if it runs; a later process of its number is none."""
    try:
        known = json.loads(pid_file.read_text())
        process = psutil.Process(known["pid"])
        if abs(process.create_time() - known["started"]) > _SAME_START:
            return None
        return process if is_alive(process) else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def stop(process: psutil.Process, *, number: signal.Signals, grace: float) -> None:
    """End a process: by the signal, and by SIGKILL with its children after ``grace`` seconds."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.send_signal(number)
        if _wait([process], grace):
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            _wait(family, _KILLED)


def stop_marked(mark: str, *, keep: Iterable[psutil.Process], grace: float) -> None:
    """End all processes of a stack but those in ``keep`` and their children.

    A flow goes on when its worker was killed, so a process's parents do not tell whose it is.
    """
    kept = {os.getpid()}
    for process in keep:
        with contextlib.suppress(psutil.NoSuchProcess):
            kept |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    others = marked(mark, kept)
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait(others, grace)
    # Asked again: those that were ended may have started others in the meantime.
    others = marked(mark, kept)
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(others, _KILLED)


def marked(mark: str, but: Collection[int] = ()) -> list[psutil.Process]:
    """The processes that carry a stack's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in but and process.environ().get(MARK) == mark and is_alive(process):
                found.append(process)
    return found


def _wait(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Wait for processes to end; True where one has not."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False
