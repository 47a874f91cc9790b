"""What a training can be asked for, on a network without batch norms or dropout."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.errors import CheckpointError, ConfigError, NonFiniteError
from rdd_pipeline.evaluate import Metrics, averaged_probs, evaluate
from rdd_pipeline.export import load_trained
from rdd_pipeline.losses import LossOutput, TeacherSignals
from rdd_pipeline.methods import build_loss
from rdd_pipeline.networks import SegmentationNetwork, build_network, load_state
from rdd_pipeline.overlays import overlay_pictures
from rdd_pipeline.prefetch import DevicePrefetcher
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_student
from rdd_pipeline.student import prepare_student
from rdd_pipeline.trainer import Loss, TrainingResult, train
from rdd_pipeline.training_log import Pace
from rdd_pipeline.training_state import Snapshots, snapshot_folders
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
CPU = torch.device("cpu")
NETWORK = {
    "type": "custom",
    "factory": "tiny_factories:without_batch_norm",
    "auxiliary": True,
    "divisor": 4,
}
Weights = dict[str, Tensor]


def config_of(output: Path, **training: Any) -> RunConfig:
    tree = tiny_tree(output)
    tree["student"]["network"] = NETWORK
    tree["student"]["training"] |= {"iterations": 4, "log_every": 1, "overlays": 0} | training
    return parse_config(tree)


def nothing_known(network: SegmentationNetwork, device: torch.device) -> Metrics:
    return Metrics.from_confusion(np.eye(2), ("a", "b"))


def trained(
    output: Path,
    *,
    change: Callable[[Loss], Loss] = lambda loss: loss,
    evaluate: Callable[[SegmentationNetwork, torch.device], Metrics] = nothing_known,
    **training: Any,
) -> tuple[TrainingResult, Weights]:
    """Train the supervised student with some settings."""
    config = config_of(output, **training)
    student = config.students[0]
    train_set = build_dataset(config.data, "train")
    prepared = prepare_student(config, student, train_set, reader=None, teacher=None)
    result = train(
        prepared.model,
        change(prepared.loss),
        prepared.stream,
        signals=prepared.signals,
        config=config.student_training(student),
        seed=0,
        directory=output,
        evaluate=evaluate,
        reporter=QUIET,
        name="student",
        device="cpu",
    )
    return result, load_state(output / "weights.safetensors")


def assert_close(found: Weights, expected: Weights, atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0.0, msg=name)


# Nothing padded, so that every batch has as many valid pixels as any other but for its labels.
UNPADDED = {"scale": [1.0, 1.0]}


def mean_over_all_pixels(loss: Loss) -> Loss:
    """Equal weight for each pixel of a batch, ignored or not."""

    def changed(outputs: Any, target: Tensor, teacher: Any, iteration: int) -> LossOutput:
        result = loss(outputs, target, teacher, iteration)
        return LossOutput(total=result.total * (target != 255).float().mean(), terms=result.terms)

    return changed


def test_accumulated_batches_train_as_one_large_batch(tmp_path: Path) -> None:
    options = UNPADDED | {"change": mean_over_all_pixels}
    large, expected = trained(tmp_path / "large", batch_size=4, **options)
    small, found = trained(tmp_path / "small", batch_size=2, accumulate=2, **options)
    assert_close(found, expected, atol=1e-6)
    for a, b in zip(small.history, large.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert small.iterations == large.iterations == 4


def recorded(into: list[Weights]) -> Callable[[SegmentationNetwork, torch.device], Metrics]:
    def record(network: SegmentationNetwork, device: torch.device) -> Metrics:
        into.append({name: t.clone() for name, t in network.state_dict().items()})
        return nothing_known(network, device)

    return record


def test_average_of_weights_is_the_one_computed_by_hand(tmp_path: Path) -> None:
    steps: list[Weights] = []
    averages: list[Weights] = []
    trained(tmp_path / "plain", evaluate=recorded(steps), evaluate_every=1)
    _, saved = trained(tmp_path / "ema", evaluate=recorded(averages), evaluate_every=1, ema=0.75)
    expected = steps[0]
    for step, average in zip(steps, averages, strict=True):
        expected = {name: 0.75 * t + 0.25 * step[name] for name, t in expected.items()}
        assert_close(average, expected, atol=1e-6)
    assert_close(saved, averages[-1])
    assert any(not torch.equal(saved[name], steps[-1][name]) for name in saved)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [5]), (3, [2, 5, 8]), (20, range(1, 10))]
)
def test_snapshots_are_spread_over_the_training(
    tmp_path: Path, count: int, expected: Iterable[int]
) -> None:
    snapshots = Snapshots(tmp_path, count, 10)
    assert [i for i in range(11) if snapshots.due(i)] == list(expected)
    for iteration in (2, 9, 12):
        snapshots.save(torch.nn.Linear(1, 1), iteration)
    snapshots.drop_after(9)
    assert [path.name for path in snapshot_folders(tmp_path)] == ["00000002", "00000009"]


class Killed(BaseException):
    """As sudden as a signal."""


def dying_at(iteration: int) -> Callable[[Loss], Loss]:
    def change(loss: Loss) -> Loss:
        def dying(outputs: Any, target: Tensor, teacher: Any, now: int) -> LossOutput:
            if now == iteration:
                raise Killed
            return loss(outputs, target, teacher, now)

        return dying

    return change


def test_resume_is_exact_with_averaged_weights_and_accumulation(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "iterations": 6,
        "accumulate": 2,
        "ema": 0.5,
        "channels_last": True,
        "precision": "bf16",
        "evaluate_every": 2,
        "snapshots": 5,
    }
    whole, expected = trained(tmp_path / "whole", **options)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", change=dying_at(5), **options)
    resumed, found = trained(tmp_path / "cut", **options)
    assert_close(found, expected)
    assert resumed.history == whole.history
    assert resumed.evaluations == whole.evaluations
    assert (resumed.best_iteration, resumed.best_miou) == (2, 1.0)
    kept = [
        {path.parent.name: path.read_bytes() for path in folder.glob("snapshots/*/*")}
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert sorted(kept[0]) == [f"{iteration:08d}" for iteration in range(1, 6)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("option", [{"channels_last": True}, {"precision": "bf16"}])
def test_options_of_speed_change_little(tmp_path: Path, option: dict[str, Any]) -> None:
    _, expected = trained(tmp_path / "plain")
    result, found = trained(tmp_path / "fast", **option)
    assert_close(found, expected, atol=1e-2)
    assert found.keys() == expected.keys()
    assert np.isfinite([entry["loss"] for entry in result.history]).all()


def test_compiled_training_saves_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backend that generates code takes a minute; what is ours does not depend on it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _, expected = trained(tmp_path / "plain")
    _, found = trained(tmp_path / "compiled", compile=True)
    assert_close(found, expected, atol=1e-6)
    assert set(
        load_state(next((tmp_path / "compiled").glob("checkpoints/*/model.safetensors")))
    ) == set(expected)


def test_failing_compiler_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_compiler))
    with pytest.raises(ConfigError, match=r"training\.compile: .*C\+\+ compiler"):
        trained(tmp_path, compile=True)


def test_loss_that_is_no_number_leaves_its_batch_and_the_last_checkpoint(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def change(loss: Loss) -> Loss:
        def broken(outputs: Any, target: Tensor, teacher: Any, iteration: int) -> LossOutput:
            result = loss(outputs, target, teacher, iteration)
            if iteration < 3:
                return result
            seen.append(target)
            return LossOutput(total=result.total * torch.inf, terms=result.terms)

        return broken

    with pytest.raises(NonFiniteError, match="student: the loss is inf at iteration 4") as caught:
        trained(tmp_path, change=change, checkpoint_every=1)
    folder = tmp_path / "nonfinite"
    [tensors_file], [description] = folder.glob("*.safetensors"), folder.glob("*.json")
    tensors = safetensors.torch.load_file(tensors_file)
    assert torch.equal(tensors["label"], seen[0])
    assert tensors["image"].shape == (2, 3, 32, 64)
    described = json.loads(description.read_text())
    assert described["iteration"] == 4
    assert described["terms"]["loss"] == "inf"
    for name in (str(tensors_file), *described["image_ids"], "gradient_clip"):
        assert name in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


def random_signals(classes: int) -> Callable[[Any], TeacherSignals]:
    """What a teacher of these classes could say of crops of 32 x 64 pixels."""

    def signals(batch: Any) -> TeacherSignals:
        generator = torch.Generator().manual_seed(0)
        size = batch["label"].shape
        return TeacherSignals(
            weight=torch.rand(size, generator=generator),
            true_prob=torch.rand(size, generator=generator),
            logits=torch.randn((size[0], classes, 8, 16), generator=generator),
        )

    return signals


@pytest.mark.parametrize(("name", "terms"), [(0, ["ce"]), (1, ["ce"]), (2, ["tfe", "tse"])])
def test_batches_without_a_valid_pixel_train_on(
    tmp_path: Path, name: int, terms: list[str]
) -> None:
    config = config_of(tmp_path)
    student, train_set = config.students[name], build_dataset(config.data, "train")
    network = build_network(config.student_network(student), train_set.num_classes, seed=0)
    training = config.student_training(student)
    loss = build_loss(student, training, num_classes=train_set.num_classes)
    plain = prepare_student(config, config.students[0], train_set, reader=None, teacher=None)

    def half_blank(outputs: Any, target: Tensor, teacher: Any, iteration: int) -> LossOutput:
        if iteration % 2 == 0:
            target = torch.full_like(target, 255)
        result: LossOutput = loss(outputs, target, teacher, iteration)
        return result

    result = train(
        network,
        half_blank,
        plain.stream,
        signals=random_signals(train_set.num_classes),
        config=training,
        seed=0,
        directory=tmp_path,
        evaluate=nothing_known,
        reporter=QUIET,
        name="blank",
        device="cpu",
    )
    for entry in result.history[::2]:  # iterations 0 and 2: one of each stage
        assert all(entry[term] == 0.0 for term in terms if term in entry)
    for entry in result.history[1::2]:
        assert any(entry[term] > 0.0 for term in terms if term in entry)
    assert all(t.isfinite().all() for t in load_state(tmp_path / "weights.safetensors").values())


def test_best_weights_are_kept_beside_the_last(tmp_path: Path) -> None:
    qualities = iter([0.5, 0.75, 0.25])
    seen: list[Weights] = []
    record = recorded(seen)

    def falling(network: SegmentationNetwork, device: torch.device) -> Metrics:
        record(network, device)
        return Metrics(miou=next(qualities), pixel_accuracy=0.0, class_iou={}, confusion=[])

    result, last = trained(tmp_path, evaluate=falling, iterations=6, evaluate_every=2)
    assert (result.best_iteration, result.best_miou, result.metrics.miou) == (4, 0.75, 0.25)
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {
        "iteration": 4,
        "miou": 0.75,
    }
    assert_close(load_state(tmp_path / "best" / "weights.safetensors"), seen[1])
    assert_close(last, seen[2])


def test_checkpoint_of_another_architecture_names_both(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_student(config, config.students[0], None, QUIET)
    folder = tmp_path / "tiny" / "students" / "supervised"
    other = config_of(tmp_path / "other")
    tree = other.model_dump(mode="json")
    tree["student"]["network"] = tiny_tree(tmp_path)["student"]["network"]
    other = parse_config(tree)
    target = tmp_path / "other" / "tiny" / "students" / "supervised"
    target.mkdir(parents=True)
    (folder / "checkpoints").rename(target / "checkpoints")
    with pytest.raises(CheckpointError) as caught:
        run_student(other, other.students[0], None, QUIET)
    message = str(caught.value)
    assert "factory tiny_factories:without_batch_norm" in message
    assert "architecture FPN, encoder tu-mobilenetv3_small_050" in message
    assert "network.encoder.0.weight" in message


def test_evaluation_averages_mirrored_and_scaled_passes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    val_set = build_dataset(config.data, "val")
    network = build_network(config.student_network(config.students[0]), val_set.num_classes, seed=1)
    network.eval()
    images = torch.from_numpy(np.stack([val_set[0].image])).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = averaged_probs(network, images, flip=True, scales=(1.0, 0.5))
        mirrored = averaged_probs(network, images.flip(-1), flip=True, scales=(1.0, 0.5))
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))
    torch.testing.assert_close(found, mirrored.flip(-1))
    metrics = evaluate(network, val_set, device=CPU, reporter=QUIET, flip=True, scales=(1.0, 0.5))
    assert (metrics.flip, metrics.scales) == (True, [1.0, 0.5])
    labels = np.stack([val_set[i].label for i in range(len(val_set))])
    assert sum(map(sum, metrics.confusion)) == int((labels != 255).sum())


def test_changed_evaluation_evaluates_the_finished_student_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = run_student(config, config.students[0], None, QUIET)
    changed = config_of(tmp_path, evaluation={"flip": True})
    second = run_student(changed, changed.students[0], None, QUIET)
    assert second.reused
    assert second.result["metrics"]["flip"]
    assert second.result["history"] == first.result["history"]
    stored = json.loads(second.weights.with_name("result.json").read_text())
    assert stored["metrics"] == second.result["metrics"]


def test_settings_written_before_an_option_existed_stay_valid(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_student(config, config.students[0], None, QUIET)
    file = tmp_path / "tiny" / "students" / "supervised" / "settings.json"
    assert not {"accumulate", "ema", "compile", "evaluation"} & set(
        json.loads(file.read_text())["training"]
    )
    changed = config_of(tmp_path, ema=0.5)
    assert not run_student(changed, changed.students[0], None, QUIET).reused


def test_tensorboard_has_curves_classes_and_pictures(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluate_every=2, overlays=2)
    trained = run_student(config, config.students[0], None, QUIET)
    folder = trained.weights.parent
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "val/miou", "speed/images_per_second"} <= scalars
    assert {"speed/data_wait_share", "val/pixel_accuracy"} <= scalars
    assert any(name.startswith("val_iou/") for name in scalars)
    assert len(events.Tags()["images"]) == 2
    assert [e.step for e in events.Images(events.Tags()["images"][0])] == [2, 4]
    assert load_trained(folder / "best").class_names == load_trained(folder).class_names


def test_pictures_show_image_label_prediction_and_hardness(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    val_set = build_dataset(config.data, "val")
    network = build_network(config.student_network(config.students[0]), val_set.num_classes, seed=1)
    [(first, picture), (last, _)] = overlay_pictures(network, val_set, 2, CPU)
    assert (first, last) == (val_set.image_ids[0], val_set.image_ids[-1])
    assert picture.shape == (48, 4 * 80 + 3 * 4, 3)
    assert np.array_equal(picture[:, :80], val_set[0].image)
    label = np.asarray(val_set.palette, np.uint8)[np.minimum(val_set[0].label, 0)]
    known = val_set[0].label == 0
    assert np.array_equal(picture[:, 84:164][known], label[known])
    assert network.training


@pytest.mark.parametrize("threaded", [False, True])
def test_prefetcher_hands_out_all_batches_in_order(threaded: bool) -> None:
    batches = [{"image": torch.full((2,), i)} for i in range(5)]
    with DevicePrefetcher(batches, CPU, threaded=threaded) as prefetcher:
        taken = [int(prefetcher.take()["image"][0]) for _ in batches]
        with pytest.raises(StopIteration):
            prefetcher.take()
    assert taken == list(range(5))


def test_prefetcher_passes_errors_on_and_ends_its_thread() -> None:
    def failing() -> Iterator[dict[str, Tensor]]:
        yield {"image": torch.zeros(1)}
        raise OSError("gone")

    with DevicePrefetcher(failing(), CPU, threaded=True) as prefetcher:
        prefetcher.take()
        with pytest.raises(OSError, match="gone"):
            prefetcher.take()
    endless = iter(lambda: {"image": torch.zeros(1)}, None)
    with DevicePrefetcher(endless, CPU, threaded=True) as prefetcher:
        prefetcher.take()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_waiting_for_data_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace(QUIET, "student", accelerated=True)
    for _ in range(3):
        pace.step(images=4, seconds=31.0, waited=1.0)
    assert not caplog.records
    for _ in range(3):
        pace.step(images=4, seconds=31.0, waited=15.5)
    assert [r.message for r in caplog.records] == [
        "student: the accelerator waits for data 50% of the time; raise training.workers, or pack "
        "images and labels with 'rdd data pack'"
    ]
    assert pace.take() == {
        "images_per_second": 24 / 186,
        "data_wait_share": pytest.approx(49.5 / 186),
    }
