from __future__ import annotations

import atexit
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Small tensors: more threads only wait for each other. Subprocesses of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The user's own cache is not for files of tests.
if "RDD_CACHE" not in os.environ:
    os.environ["RDD_CACHE"] = tempfile.mkdtemp(prefix="rdd-cache-")
    atexit.register(shutil.rmtree, os.environ["RDD_CACHE"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).parent))  # tests share tests/tiny.py


@pytest.fixture(scope="session")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two teachers' stores of one data set, and its configuration; not to be changed.

    ``a.zarr`` has everything; ``b.zarr`` has 16-bit hardness and nothing that is optional.
    """
    from inspection_stores import build_store
    from tiny import write_tiny

    folder = tmp_path_factory.mktemp("two-stores")
    build_store(folder / "a.zarr")
    build_store(folder / "b.zarr", seed=1, noise=1.5, bits=16, extras=False)
    write_tiny(folder / "tiny.yaml", folder / "runs")
    return folder


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """The module faults.py."""
    import faults

    return faults


@pytest.fixture(scope="session")
def _s3_server(faults: ModuleType) -> Iterator[Any]:
    # One for all tests of a process: moto's servers in one process share their buckets.
    server = faults.S3()
    server.make_bucket("maps")
    yield server
    server.stop()


@pytest.fixture
def s3(_s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 server with a bucket "maps", and the environment to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
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


_numbers = itertools.count()


@pytest.fixture
def place_on_s3(s3: Any) -> str:
    """A prefix of its own in the bucket."""
    return f"s3://maps/test-{next(_numbers)}"


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Folder of real CamVid images; tests that need it are skipped where there is none."""
    root = os.environ.get("RDD_CAMVID")
    if not root:
        pytest.skip("RDD_CAMVID does not name a CamVid folder (SegNet layout)")
    return Path(root)
