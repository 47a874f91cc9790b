from __future__ import annotations

import importlib.util
import itertools
import sys
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
