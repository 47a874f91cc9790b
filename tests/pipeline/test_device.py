"""A training step waits nowhere for its device; seen on one that does not exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from rdd_pipeline.config import Method

TESTS = Path(__file__).parents[1]
# CIRKD remembers embeddings of the classes in a batch: how many, their labels say.
METHODS = sorted(set(get_args(Method)) - {"cirkd"})


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case: operations and copies between devices, or the error."""
    done = subprocess.run(
        [sys.executable, TESTS / "pipeline" / "pretended_gpu.py", tmp_path_factory.mktemp("gpu")],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_would_wait_is_noticed(seen: dict[str, dict[str, Any]]) -> None:
    assert "same device" in seen["mixes"]["error"]
    assert seen["waits"]["error"].startswith("DataDependentOutputException")
    assert seen["moves"]["moves"] == ["aten._to_copy.default"]


@pytest.mark.parametrize(
    "case", ["stored, 8 bits", "stored, 16 bits", *(f"online, {name}" for name in METHODS), "fused"]
)
def test_nothing_waits_for_the_device(seen: dict[str, dict[str, Any]], case: str) -> None:
    assert seen[case].get("error") is None
    assert seen[case]["operations"] > 100
    assert seen[case]["moves"] == []


def test_cirkd_alone_has_to_wait(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["online, cirkd"]["error"].startswith("DynamicOutputShapeException: aten.nonzero")
