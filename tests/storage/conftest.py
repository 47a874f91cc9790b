from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def building() -> ModuleType:
    """The module build_store.py."""
    return _load("build_store")


@pytest.fixture(scope="session")
def store(building: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published store; not to be changed."""
    path = tmp_path_factory.mktemp("stores") / "shared.zarr"
    building.build(path)
    return path


@pytest.fixture
def own_store(building: ModuleType, tmp_path: Path) -> Path:
    """A published store that the test may damage."""
    path = tmp_path / "own.zarr"
    building.build(path)
    return path


_numbers = itertools.count()


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """The module faults.py."""
    return _load("faults")


@pytest.fixture(scope="session")
def _s3_server(faults: ModuleType) -> Iterator[ModuleType]:
    server = faults.S3()
    server.make_bucket("maps")
    yield server
    server.stop()


@pytest.fixture
def s3(
    _s3_server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ModuleType]:
    """An S3 server with a bucket "maps", and the environment to reach it."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("RDD_REQUEST_RETRIES", "2")
    _s3_server.reset()
    yield _s3_server
    _s3_server.reset()


@pytest.fixture
def place_on_s3(s3: ModuleType) -> str:
    """A prefix of its own in the bucket."""
    return f"s3://maps/test-{next(_numbers)}"


@pytest.fixture
def place_in_memory() -> str:
    """A memory store of its own."""
    return f"memory://test-{next(_numbers)}"


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place for stores, of each kind."""
    if request.param == "local":
        return str(tmp_path / "place")
    value: str = request.getfixturevalue(
        f"place_{'in_memory' if request.param == 'memory' else 'on_s3'}"
    )
    return value
