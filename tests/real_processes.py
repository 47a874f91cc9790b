"""What tests of real processes wait for and look at."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(answer: Callable[[], Any], seconds: float = 240) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    return found


def processes_of_session(session: int) -> list[str]:
    """Command lines of the processes of a session that are still alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def other_version(folder: Path) -> str:
    """A folder that, first on a process's path, makes rdd-maps look like another version."""
    metadata = folder / "rdd_maps-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: rdd-maps\nVersion: 9.9.9\n")
    return str(folder)
