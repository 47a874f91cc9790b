from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rdd_storage.objects import object_location


class Bucket:
    """A prefix of its own in a bucket, and the requests that are made of its objects."""

    def __init__(self, server: Any, url: str) -> None:
        self.server = server
        self.url = url

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        object_location(self.url).put(key, content)

    def delete(self, key: str) -> None:
        """Remove an object."""
        object_location(self.url).delete(key)

    def upload(self, folder: Path) -> str:
        """Copy all files below a folder; returns the URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(path.relative_to(folder).as_posix(), path.read_bytes())
        self.forget()
        return self.url

    def forget(self) -> None:
        """Forget requests so far."""
        self.server.reset_requests()

    def requests(self) -> dict[str, int]:
        """How many requests there were, by kind."""
        kinds = [
            "list" if "list-type" in request.path else request.method.lower()
            for request in self.server.requests
        ]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


@pytest.fixture
def bucket(s3: Any, place_on_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """A prefix in a bucket on an S3 server, the environment to reach it, and an empty cache."""
    monkeypatch.setenv("RDD_CACHE", str(tmp_path / "cache"))
    return Bucket(s3, place_on_s3)
