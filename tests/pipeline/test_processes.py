"""Several training processes, real ones, over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rdd_pipeline.config import parse_config
from rdd_pipeline.networks import load_state
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from tiny import tiny_tree

TESTS = Path(__file__).parent.parent
QUIET = Reporter(quiet=True)
NETWORK = {
    "type": "custom",
    "factory": "tiny_factories:without_batch_norm",
    "auxiliary": True,
    "divisor": 4,
}


def tree_of(output: Path, **training: Any) -> dict[str, Any]:
    """A student without batch norms, whose images do not meet within a batch."""
    tree = tiny_tree(output)
    tree["student"]["network"] = NETWORK
    # Nothing padded: the mean over the valid positions of each process is that of all.
    tree["student"]["training"] |= {"scale": [1.0, 1.0], "lr": 0.02} | training
    return tree


def launch(tree: dict[str, Any], folder: Path, *options: str) -> list[str | Path]:
    """A command that trains the student ``rdd`` in two processes."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "rdd_flows.cli", "train", config, "--student", "rdd", *options),
    ]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = parse_config(tiny_tree(tmp_path_factory.mktemp("built")))
    return run_maps(config, run_teacher(config, QUIET), QUIET).path


def test_two_processes_train_as_one_with_the_whole_batch(store: str, tmp_path: Path) -> None:
    one = tree_of(tmp_path / "one", batch_size=4, iterations=10)
    one["students"][2]["rdd"]["switch"] = 0.8
    config = parse_config(one)
    single = run_student(config, config.students[2], store, QUIET)

    two = tree_of(tmp_path / "two", batch_size=2, iterations=10, snapshots=3)
    two["students"] = one["students"]
    command = launch(two, tmp_path, "--store", store)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1, done.stdout
    folder = tmp_path / "two" / "tiny" / "students" / "rdd"
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == 2

    # The first stage is a mean over all pixels; the second chooses pixels in each process.
    for entry, expected in zip(result["history"], single.result["history"], strict=True):
        assert entry["lr"] == expected["lr"]
        if expected["tfe_share"] == 1.0:
            for term in ("loss", "tfe", "kd"):
                assert entry[term] == pytest.approx(expected[term], rel=1e-5)
    assert result["history"][-1]["tfe_share"] == 0.0
    # All images are evaluated, each by one process.
    pixels = [sum(map(sum, r["metrics"]["confusion"])) for r in (result, single.result)]
    assert pixels[0] == pixels[1]
    # The main process keeps the snapshots and looks at them.
    snapshots = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert snapshots == ["00000002", "00000005", "00000008"]
    assert [entry["iteration"] for entry in result["difficulty_history"]] == [2, 5, 8, 10]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_writes_a_checkpoint_of_that_very_step_and_resumes_exactly(
    store: str, tmp_path: Path, processes: int
) -> None:
    """A real SIGTERM in mid-training, where no checkpoint would be due."""
    tree = tree_of(tmp_path / "stopped", iterations=200, checkpoint_every=10_000)
    command = launch(tree, tmp_path, "--store", store)
    if processes == 1:
        command = [sys.executable, *command[6:]]
    folder = tmp_path / "stopped" / "tiny" / "students" / "rdd"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while not list(folder.glob("tensorboard/events*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    log_text = (tmp_path / "log").read_text()
    [checkpoint] = (folder / "checkpoints").iterdir()
    iteration = int(checkpoint.name)
    assert 0 < iteration < 200, "the signal came too late to test anything"
    assert f"stopped by SIGTERM at iteration {iteration} of 200" in log_text
    assert "Traceback" not in log_text or processes > 1  # torchrun's own
    assert not (folder / "result.json").exists()
    if processes == 1:
        assert code == 143
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert f"resumes at iteration {iteration} of 200" in done.stderr
        config = parse_config(tree | {"output": str(tmp_path / "whole")})
        whole = run_student(config, config.students[2], store, QUIET)
        expected, weights = load_state(whole.weights), load_state(folder / "weights.safetensors")
        for name in expected:
            assert torch.equal(weights[name], expected[name]), name
    else:
        assert code != 0
