from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.errors import CheckpointError, ConfigError, NonFiniteError
from rdd_pipeline.inspection import Maps
from rdd_pipeline.networks import load_state
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from rdd_pipeline.training_log import Averages
from rdd_pipeline.training_setup import poly_schedule
from rdd_storage import StoreMismatchError
from tiny import tiny_config, tiny_tree

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, BuildResult]:
    """A trained teacher and its store."""
    config = tiny_config(tmp_path_factory.mktemp("built"))
    return config, run_maps(config, run_teacher(config, QUIET), QUIET)


def with_output(config: RunConfig, output: Path) -> RunConfig:
    return config.model_copy(update={"output": output})


def test_students_train_without_the_teacher(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, maps = built
    config = with_output(config, tmp_path)  # no teacher in this folder
    for student in config.students:
        trained = run_student(config, student, maps.path, QUIET)
        assert not trained.reused
        history = trained.result["history"]
        assert [entry["iteration"] for entry in history] == [2.0, 4.0, 6.0]
        terms = {"supervised": "ce", "kd": "kd", "rdd": "kd"}
        assert terms[student.name] in history[-1]
        assert 0.0 <= trained.result["metrics"]["miou"] <= 1.0
        assert load_state(trained.weights)
        assert run_student(config, student, maps.path, QUIET).reused
    assert not (tmp_path / "tiny" / "teacher").exists()


def test_both_stages_leave_their_diagnostics(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, maps = built
    rdd = next(student for student in config.students if student.name == "rdd")
    training = config.student.training.model_copy(update={"snapshots": 2})
    rdd = rdd.model_copy(update={"training": training})
    trained = run_student(with_output(config, tmp_path), rdd, maps.path, QUIET)
    result, folder = trained.result, trained.weights.parent
    history = result["history"]
    first, last = history[0], history[-1]
    assert first["tfe_share"] == 1.0
    assert 0.0 < first["mean_weight"] <= 1.0
    assert "relative" not in first
    assert last["tfe_share"] == 0.0
    assert 0.0 <= last["relative"] <= 1.0
    assert {"hard_teacher", "hard_student", "hard_both", "tau_student", "empty_masks"} <= set(last)
    classes = result["class_history"]
    assert [entry["iteration"] for entry in classes] == [
        entry["iteration"] for entry in history if "relative" in entry
    ]
    shares = [share for share in classes[-1]["relative"] if share is not None]
    assert shares
    assert all(0.0 <= share <= 1.0 for share in shares)

    over_time = result["difficulty_history"]
    assert [entry["iteration"] for entry in over_time] == [2, 4, 6]
    maps_of_run = Maps(maps.path, config)
    earlier, _, end = maps_of_run.student_history(folder).table()
    assert over_time[-1] == end | {"iteration": 6}
    # A snapshot is a network like any other.
    snapshot = folder / "snapshots" / "00000002"
    alone = maps_of_run.student_history(snapshot).table()[-1]
    assert alone == earlier | {"iteration": None} != end
    assert over_time[1] | {"iteration": 6} != over_time[2]


def test_classes_are_counted_over_batches() -> None:
    averages = Averages()
    assert averages.take_classes() == []
    label = torch.tensor([[[0, 0, 2], [2, 255, 2]]], dtype=torch.uint8)
    relative = torch.tensor([[[1, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    averages.count_classes(label, relative, 4)
    averages.count_classes(torch.zeros(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool), 4)
    assert averages.take_classes() == [0.75, None, 0.6667, None]
    assert averages.take_classes() == []


def test_equal_seeds_give_equal_weights_and_other_seeds_others(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, maps = built
    rdd = config.students[2]
    first = run_student(with_output(config, tmp_path / "a"), rdd, maps.path, QUIET)
    second = run_student(with_output(config, tmp_path / "b"), rdd, maps.path, QUIET)
    other = run_student(
        with_output(config, tmp_path / "c"), rdd.model_copy(update={"seed": 1}), maps.path, QUIET
    )
    assert_equal_weights(first.weights, second.weights)
    with pytest.raises(AssertionError):
        assert_equal_weights(first.weights, other.weights)


Uninterrupted = Callable[[tuple[str, ...]], tuple[TrainedNetwork, dict[str, Any]]]


@pytest.fixture(scope="module")
def uninterrupted(
    built: tuple[RunConfig, BuildResult], tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    """Trains a student by some methods, once for all tests; with the configuration's tree."""
    config, maps = built
    teacher = config.run_dir / "teacher" / "weights.safetensors"

    @functools.cache
    def trained(method: tuple[str, ...]) -> tuple[TrainedNetwork, dict[str, Any]]:
        tree = tiny_tree(tmp_path_factory.mktemp("whole"))
        tree["student"]["training"]["iterations"] = 20
        tree["students"][2]["method"] = list(method)
        whole = parse_config(tree)
        return run_student(whole, whole.students[2], maps.path, QUIET, teacher), tree

    return trained


# A loader's processes are to change nothing: each is compared with a training without them.
@pytest.mark.parametrize(
    ("workers", "method"), [(0, ("rdd",)), (1, ("rdd",)), (0, ("rdd", "cirkd"))]
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    built: tuple[RunConfig, BuildResult],
    uninterrupted: Uninterrupted,
    tmp_path: Path,
    workers: int,
    method: tuple[str, ...],
) -> None:
    """A real SIGKILL of a real ``rdd train``, at some moment after its first checkpoint."""
    config, maps = built
    expected, whole = uninterrupted(method)
    tree = copy.deepcopy(whole) | {"output": str(tmp_path / "killed")}
    tree["student"]["training"]["workers"] = workers
    rdd = parse_config(tree).students[2]
    teacher = config.run_dir / "teacher" / "weights.safetensors"
    if rdd.needs_teacher:
        shutil.copytree(teacher.parent, tmp_path / "killed" / "tiny" / "teacher")

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [
        *(sys.executable, "-m", "rdd_flows.cli", "train", str(file)),
        *("--student", "rdd", "--store", maps.path, "--quiet"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    checkpoints = tmp_path / "killed" / "tiny" / "students" / "rdd" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("0*")):
        assert process.poll() is None, "ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    weights = checkpoints.parent / "weights.safetensors"
    assert not weights.exists(), "the kill came too late to test anything"

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(expected.weights, weights)
    resumed = json.loads((checkpoints.parent / "result.json").read_text())
    assert resumed["history"] == expected.result["history"]


def test_changed_settings_train_anew_and_keep_the_earlier_result(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, maps = built
    config = with_output(config, tmp_path)
    rdd = config.students[2]
    run_student(config, rdd, maps.path, QUIET)
    changed = rdd.model_copy(update={"rdd": rdd.rdd.model_copy(update={"relation": "or"})})
    assert not run_student(config, changed, maps.path, QUIET).reused
    assert (tmp_path / "tiny/students/.previous/rdd-1/weights.safetensors").exists()


def test_settings_that_only_watch_do_not_retrain(
    built: tuple[RunConfig, BuildResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = built
    config = with_output(config, tmp_path)
    run_student(config, config.students[0], None, QUIET)
    training = config.student.training.model_copy(
        update={"log_every": 3, "workers": 1, "snapshots": 2}
    )
    student = config.student.model_copy(update={"training": training})
    again = config.model_copy(update={"student": student})
    with caplog.at_level("INFO", "rdd"):
        assert run_student(again, config.students[0], None, QUIET).reused
    assert "was trained without training.snapshots" in caplog.text


def test_distilled_student_needs_a_store(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ConfigError, match="needs a map store"):
        run_student(config, config.students[2], None, QUIET)


def test_store_of_other_data_is_refused_with_a_difference(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    _, maps = built
    tree = tiny_tree(tmp_path)
    tree["data"]["seed"] = 5
    config = parse_config(tree)
    with pytest.raises(StoreMismatchError, match="seed: expected 5, found 0"):
        run_student(config, config.students[2], maps.path, QUIET)


def test_diverging_training_stops_and_says_what_to_do(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["student"]["training"]["lr"] = 1e20
    config = parse_config(tree)
    with pytest.raises(NonFiniteError, match=r"supervised: the loss is .* lower training\.lr"):
        run_student(config, config.students[0], None, QUIET)


def test_checkpoint_of_another_network_is_refused(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, _ = built
    config = with_output(config, tmp_path)
    run_student(config, config.students[0], None, QUIET)
    folder = tmp_path / "tiny" / "students" / "supervised"
    (folder / "result.json").unlink()
    checkpoint = next((folder / "checkpoints").glob("0*"))
    model = checkpoint / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete the folder to train anew"):
        run_student(config, config.students[0], None, QUIET)


def test_poly_schedule_warms_up_and_reaches_zero() -> None:
    training = tiny_config(Path("x")).student.training.model_copy(
        update={"iterations": 100, "warmup_iterations": 10}
    )
    factor = poly_schedule(training)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == pytest.approx(1.0)
    assert factor(50) == pytest.approx(0.5**0.9)
    assert factor(100) == 0.0


def test_teacher_from_a_checkpoint_is_loaded_not_trained(
    built: tuple[RunConfig, BuildResult], tmp_path: Path
) -> None:
    config, _ = built
    weights = config.run_dir / "teacher" / "weights.safetensors"
    tree = tiny_tree(tmp_path)
    tree["teacher"] = {"network": tree["teacher"]["network"], "checkpoint": str(weights)}
    teacher = run_teacher(parse_config(tree), QUIET)
    assert_equal_weights(teacher.weights, weights)
    trained = json.loads((weights.parent / "result.json").read_text())
    assert teacher.result["metrics"] == trained["metrics"]


def assert_equal_weights(first: Path, second: Path) -> None:
    a, b = load_state(first), load_state(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
