from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

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
def camvid() -> Path:
    """Folder of real CamVid images; tests that need it are skipped where there is none."""
    root = os.environ.get("RDD_CAMVID")
    if not root:
        pytest.skip("RDD_CAMVID does not name a CamVid folder (SegNet layout)")
    return Path(root)
