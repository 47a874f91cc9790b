"""Prefect servers for tests, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx


class _Patient(httpx.HTTPTransport):
    """Asks again while a server with SQLite says that its database is busy, as Prefect does."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for seconds in (0.5, 1, 2, 4, 8, 16):
            response = super().handle_request(request)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return response
            response.close()
            time.sleep(seconds)
        return super().handle_request(request)


def ask(url: str, content: Any = None) -> Any:
    """The answer of a server's API to a request, or to content that is posted."""
    with httpx.Client(transport=_Patient(), timeout=60) as client:
        answer = client.get(url) if content is None else client.post(url, json=content)
    return answer.raise_for_status().json()


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Prefect server of its own: the address of its API, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(home),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
             "--port", str(port)],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            assert process.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)
