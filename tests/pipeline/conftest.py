from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rdd_storage.objects import object_location

_NAME = "maps"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """The S3 server of the storage's tests, and the faults that it can be given."""
    file = Path(__file__).parent.parent / "storage" / "faults.py"
    spec = importlib.util.spec_from_file_location("s3_faults", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Bucket:
    """A prefix of its own in a bucket, and the requests that are made of its objects."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.url = f"s3://{_NAME}/test-{next(_numbers)}"

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


@pytest.fixture(scope="session")
def _s3_server(faults: ModuleType) -> Iterator[Any]:
    server = faults.S3()
    server.make_bucket(_NAME)
    yield server
    server.stop()


@pytest.fixture
def bucket(_s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A bucket on an S3 server, and the environment to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret")
    monkeypatch.setenv("RDD_REQUEST_RETRIES", "2")
    monkeypatch.setenv("RDD_CACHE", str(tmp_path / "cache"))
    _s3_server.reset()
    yield Bucket(_s3_server)
    _s3_server.reset()
