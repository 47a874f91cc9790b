"""What training does on a GPU, as far as it shows without one: it waits nowhere for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from rdd_pipeline.config import Method
from rdd_pipeline.errors import NonFiniteError
from rdd_pipeline.losses import LossOutput, TeacherSignals
from rdd_pipeline.nonfinite import LossWatch

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


class Event:
    """An event of a CUDA stream, on which nothing is left to do."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@pytest.mark.parametrize("last", [False, True], ids=["with the next pass", "by a flush"])
def test_a_loss_that_is_no_number_is_told_a_pass_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    watch = LossWatch(
        tmp_path, ["a", "b", "c"], name="s", advice="do this", device=torch.device("cuda")
    )

    def look(value: float, image: int, iteration: int) -> bool:
        result = LossOutput(total=torch.tensor(value), terms={})
        batch = {"index": torch.tensor([image])}
        return watch.look(result, batch, TeacherSignals(), iteration)

    assert not look(1.0, 0, 1)
    assert not look(float("nan"), 1, 2)
    with pytest.raises(NonFiniteError, match=r"nan at iteration 2; do this.*images b"):
        watch.flush() if last else look(1.0, 2, 3)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "iteration-00000002-process-0.json",
        "iteration-00000002-process-0.safetensors",
    ]
    watch.flush()  # nothing is left
