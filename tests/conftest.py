from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Small tensors: more threads only wait for each other. Subprocesses of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # tests share tests/tiny.py


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Folder of real CamVid images; tests that need it are skipped where there is none."""
    root = os.environ.get("RDD_CAMVID")
    if not root:
        pytest.skip("RDD_CAMVID does not name a CamVid folder (SegNet layout)")
    return Path(root)
