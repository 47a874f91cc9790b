from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.fidelity import (
    ERROR_EDGES,
    FidelityTally,
    Measurement,
    choose_student,
    measure_fidelity,
)
from rdd_pipeline.losses import TeacherSignals
from rdd_pipeline.machine import machine
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.report.fidelity_tables import fidelity_markdown, fidelity_tables, write_fidelity
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.stages import run_maps
from rdd_storage import StoreMismatchError
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
HEIGHT, WIDTH = 48, 80
WHOLE = {"crop_size": [HEIGHT, WIDTH], "scale": [1.0, 1.0], "flip": 0.0}


def configuration(
    folder: Path, *, training: dict[str, Any] | None = None, **maps: object
) -> RunConfig:
    tree = tiny_tree(folder)
    tree["maps"] |= maps
    tree["student"]["training"] |= training or {}
    tree["students"] = [
        "supervised",
        {"name": "rdd", "method": "rdd", "rdd": {"min_kept": 0}, "kd": {"weight": 0}},
    ]
    return parse_config(tree)


def build(folder: Path, **maps: object) -> tuple[Path, str]:
    """A teacher with random weights, and its store."""
    config = configuration(folder, **maps)
    weights = folder / "teacher.safetensors"
    # This seed's teacher finds a few pixels easy, most hard.
    save_weights(build_network(config.teacher.network, 8, seed=3), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})
    return weights, run_maps(config, teacher, QUIET).path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build(tmp_path_factory.mktemp("fidelity"))


def measure(
    built: tuple[Path, str], config: RunConfig, *, crops: int = 7, seed: int = 0
) -> Measurement:
    weights, store = built
    return measure_fidelity(
        config,
        choose_student(config, None),
        build_dataset(config.data, "train"),
        store,
        weights,
        crops=crops,
        device=torch.device("cpu"),
        reporter=QUIET,
        seed=seed,
    )


def test_crops_that_are_whole_images_differ_by_quantisation_alone(
    built: tuple[Path, str], tmp_path: Path
) -> None:
    config = configuration(tmp_path, training=WHOLE)
    figures = measure(built, config).fidelity.figures
    assert figures.crops == 8, "batches of two are whole"
    for comparison in (figures.approximation, figures.storage):
        assert comparison.weight.mean_absolute.value < 1e-3
        assert comparison.weight.percentile_95.value < 1e-3
        assert comparison.weight.correlation.value > 0.9999
        assert comparison.true_prob.mean_absolute.value < 8e-3, "a step of the 8-bit code"
        assert comparison.hard_mask.flipped.value == 0
        assert comparison.aux_hard_mask.flipped.value == 0
        assert comparison.hard_mask.iou.value == 1
        assert 0 < comparison.hard_mask.hard_live.value <= 1
        assert comparison.logits.divergence.value < 1e-5
        assert comparison.logits.agreement.value > 0.99
    assert figures.quality.stored.miou == pytest.approx(figures.quality.on_crop.miou, abs=1e-3)
    assert len(figures.by_scale) == 1


def test_crops_at_other_scales_differ_by_the_view_alone(
    built: tuple[Path, str], tmp_path: Path
) -> None:
    """Stored maps stay what the teacher said of the whole image, wherever the crop lies."""
    config = configuration(tmp_path, training={"scale": [0.5, 2.0], "flip": 0.5})
    measured = measure(built, config, crops=24)
    figures = measured.fidelity.figures
    assert figures.storage.weight.percentile_95.value < 1e-3
    assert figures.storage.true_prob.mean_absolute.value < 8e-3
    assert figures.storage.hard_mask.flipped.value == 0
    assert figures.storage.logits.divergence.value < 1e-5
    assert figures.approximation.weight.mean_absolute.value > 1e-3
    assert figures.approximation.logits.divergence.value > 1e-4
    assert [(part.low, part.high) for part in figures.by_scale] == [
        (0.5, 0.75), (0.75, 1.0), (1.0, 1.5), (1.5, 2.0),
    ]  # fmt: skip
    assert sum(part.crops for part in figures.by_scale) == 24
    scales = [example.scale for example in measured.examples]
    assert len(scales) == 3
    assert scales == sorted(scales)
    again = measure(built, config, crops=24)
    assert again.fidelity == measured.fidelity
    assert measure(built, config, seed=1).fidelity.scales != measured.fidelity.scales[:8]


def test_storage_alone_is_told_apart_for_a_store_of_windows_too(tmp_path: Path) -> None:
    maps = {"view": "sliding", "window": [32, 64], "averaging": {"flip": True}}
    figures = measure(
        build(tmp_path, **maps), configuration(tmp_path, training=WHOLE, **maps)
    ).fidelity.figures
    assert figures.storage.weight.percentile_95.value < 1e-3
    assert figures.storage.hard_mask.flipped.value == 0
    assert figures.approximation.weight.mean_absolute.value > 1e-3, "seen whole, it differs"


def test_padding_counts_nowhere(built: tuple[Path, str], tmp_path: Path) -> None:
    """The same images with and without a margin: the stored side sees the same pixels."""
    bare = measure(built, configuration(tmp_path, training=WHOLE))
    wide = {**WHOLE, "crop_size": [HEIGHT + 16, WIDTH + 32]}
    padded = measure(built, configuration(tmp_path, training=wide))
    assert padded.fidelity.image_ids == bare.fidelity.image_ids
    first, second = bare.fidelity.figures, padded.fidelity.figures
    assert first.labelled_pixels == second.labelled_pixels
    for part in ("weight", "true_prob", "aux_true_prob", "hard_mask", "aux_hard_mask"):
        for field in dataclasses.fields(getattr(first.storage, part)):
            expected, found = (
                getattr(getattr(side.storage, part), field.name).value for side in (first, second)
            )
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-7), (part, field.name)
    for example in padded.examples:
        assert example.covered.sum() == HEIGHT * WIDTH
        assert not example.labelled[~example.covered].any()


def hand_made(
    rng: np.random.Generator, batch: int, *, classes: int = 5
) -> tuple[torch.Tensor, list[TeacherSignals]]:
    """Labels (B, 9, 13) with ignored ones, and three estimates that resemble each other."""
    labels = rng.integers(0, classes, (batch, 9, 13))
    labels[rng.random(labels.shape) < 0.2] = 255
    valid = torch.from_numpy(rng.random((batch, 3, 4)) < 0.8)
    base = {name: rng.random(labels.shape) for name in ("weight", "true_prob", "aux_true_prob")}
    logits = rng.normal(size=(batch, classes, 3, 4))
    estimates = []
    for noise in (0.0, 0.2, 0.01):
        fields = {
            name: np.clip(value + noise * rng.normal(size=value.shape), 0, 1)
            for name, value in base.items()
        }
        for value in fields.values():
            value[labels == 255] = rng.random(np.count_nonzero(labels == 255))
        noisy = logits + 4 * noise * rng.normal(size=logits.shape)
        tensors = {name: torch.from_numpy(v.astype(np.float32)) for name, v in fields.items()}
        estimates.append(
            TeacherSignals(
                **tensors,
                logits=torch.from_numpy(noisy.astype(np.float32)),
                logits_valid=valid,
            )
        )
    return torch.from_numpy(labels.astype(np.uint8)), estimates


def hard(prob: np.ndarray, labels: np.ndarray, threshold: float, min_kept: int) -> np.ndarray:
    ordered = np.sort(np.where(labels != 255, prob, 1).ravel())
    return (labels != 255) & (prob <= max(np.float32(threshold), ordered[min_kept - 1]))


def test_every_figure_against_a_direct_computation() -> None:
    rng = np.random.default_rng(5)
    threshold, min_kept = 0.3, 150
    tally = FidelityTally(
        class_names=tuple("abcde"), threshold=threshold, min_kept=min_kept, scale=(0.5, 1.25)
    )
    batches = [hand_made(rng, 3), hand_made(rng, 3)]
    scales = [0.6, 0.9, 1.1, 0.8, 0.55, 0.7]
    for number, (labels, (stored, on_crop, whole)) in enumerate(batches):
        masks = tally.add(
            labels,
            stored=stored,
            on_crop=on_crop,
            whole=whole,
            scales=scales[3 * number : 3 * number + 3],
        )
        assert torch.equal(
            masks[1],
            torch.from_numpy(hard(on_crop.true_prob.numpy(), labels.numpy(), threshold, min_kept)),
        )
    figures = tally.figures()
    labels = np.concatenate([b[0].numpy() for b in batches])
    valid = labels != 255
    assert (figures.crops, figures.labelled_pixels) == (6, valid.sum())

    def joined(estimate: int, name: str) -> np.ndarray:
        parts = [getattr(signals[estimate], name).numpy() for _, signals in batches]
        return np.concatenate(parts).astype(np.float64)

    def masks_of(estimate: int, name: str) -> np.ndarray:
        return np.concatenate(
            [hard(getattr(signals[estimate], name).numpy(), labels.numpy(), threshold, min_kept)
             for labels, signals in batches]
        )  # fmt: skip

    def check_field(error: Any, x: np.ndarray, y: np.ndarray) -> None:
        assert error.mean_absolute.value == pytest.approx(np.abs(x - y).mean())
        assert error.root_mean_square.value == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
        assert error.bias.value == pytest.approx((x - y).mean())
        assert error.correlation.value == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert error.percentile_95.value == pytest.approx(
            np.percentile(np.abs(x - y), 95, method="inverted_cdf"), rel=0.025
        )

    def check_mask(found: Any, x: np.ndarray, y: np.ndarray) -> None:
        assert found.flipped.value == pytest.approx((x != y).mean())
        assert found.hard_stored.value == pytest.approx(x.mean())
        assert found.hard_live.value == pytest.approx(y.mean())
        assert found.iou.value == pytest.approx((x & y).sum() / (x | y).sum())

    positions = np.concatenate([s[0].logits_valid.numpy() for _, s in batches])
    log_q = torch.from_numpy(joined(0, "logits")).log_softmax(1).numpy()
    for live, comparison in ((1, figures.approximation), (2, figures.storage)):
        for name in ("weight", "true_prob", "aux_true_prob"):
            check_field(
                getattr(comparison, name), joined(0, name)[valid], joined(live, name)[valid]
            )
        for name, mask in (
            ("true_prob", comparison.hard_mask),
            ("aux_true_prob", comparison.aux_hard_mask),
        ):
            check_mask(mask, masks_of(0, name)[valid], masks_of(live, name)[valid])
        log_p = torch.from_numpy(joined(live, "logits")).log_softmax(1).numpy()
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(1)[positions].mean()
        assert comparison.logits.divergence.value == pytest.approx(divergence)
        same = (log_p.argmax(1) == log_q.argmax(1))[positions].mean()
        assert comparison.logits.agreement.value == pytest.approx(same)
        apart = np.abs(np.exp(log_p) - np.exp(log_q)).mean(1)[positions].mean()
        assert comparison.logits.mean_absolute.value == pytest.approx(apart)

    grid = labels[:, [0, 4, 8]][:, :, [0, 4, 8, 12]]
    accuracies = []
    for estimate, quality in (
        (0, figures.quality.stored), (1, figures.quality.on_crop), (2, figures.quality.whole),
    ):  # fmt: skip
        top = joined(estimate, "logits").argmax(1)
        accuracies.append((top == grid)[grid != 255].mean())
        assert quality.accuracy.value == pytest.approx(accuracies[-1])
        pairs = [(grid == c, (top == c) & (grid != 255)) for c in range(5)]
        iou = np.mean([(x & y).sum() / (x | y).sum() for x, y in pairs])
        assert quality.miou == pytest.approx(iou)
    assert figures.quality.stored_minus_on_crop.value == pytest.approx(
        accuracies[0] - accuracies[1]
    )

    assert [part.crops for part in figures.by_scale] == [3, 2, 1]
    for part, crops in zip(figures.by_scale, ([0, 4, 5], [1, 3], [2]), strict=True):
        chosen = valid[crops]
        x, y = (joined(estimate, "weight")[crops][chosen] for estimate in (0, 1))
        check_field(part.approximation.weight, x, y)
        x, y = (masks_of(estimate, "true_prob")[crops][chosen] for estimate in (0, 1))
        check_mask(part.approximation.hard_mask, x, y)

    counts, _, _ = np.histogram2d(
        joined(0, "weight")[valid], joined(1, "weight")[valid],
        bins=[np.arange(101) / 100] * 2,
    )  # fmt: skip
    assert np.abs(tally.joint_weight - counts).sum() <= 4, "rounding at the bins' edges alone"
    errors = np.abs(joined(0, "weight") - joined(1, "weight"))[valid]
    assert tally.error_counts("on_crop", "weight").sum() == valid.sum()
    beyond = tally.error_counts("on_crop", "weight")[ERROR_EDGES[:-1] >= 0.1 - 1e-9].sum()
    assert beyond == (errors > 0.1).sum()
    each = tally.crop_figures()
    assert each.weight[2] == pytest.approx(figures.by_scale[2].approximation.weight
                                           .mean_absolute.value)  # fmt: skip
    assert each.flipped[2] == figures.by_scale[2].approximation.hard_mask.flipped.value


def one_pixel_crops(weights: np.ndarray, labels: np.ndarray) -> FidelityTally:
    """A tally of crops whose stored weight is 0 and whose live weight is given."""
    tally = FidelityTally(class_names=("a", "b"), threshold=0.7, min_kept=0, scale=(1.0, 1.0))
    live = torch.from_numpy(weights.astype(np.float32)).reshape(-1, 1, 1)
    stored = TeacherSignals(weight=torch.zeros_like(live), true_prob=torch.ones_like(live))
    on_crop = dataclasses.replace(stored, weight=live)
    tally.add(
        torch.from_numpy(labels.astype(np.uint8)).reshape(-1, 1, 1),
        stored=stored,
        on_crop=on_crop,
        whole=stored,
        scales=[1.0] * len(weights),
    )
    return tally


def test_interval_is_that_of_the_mean_over_crops() -> None:
    weights = np.random.default_rng(0).random(400)
    figures = one_pixel_crops(weights, np.zeros(400)).figures()
    figure = figures.approximation.weight.mean_absolute
    half = 1.96 * weights.std() / 20
    assert figure.low == pytest.approx(weights.mean() - half, abs=0.15 * half)
    assert figure.high == pytest.approx(weights.mean() + half, abs=0.15 * half)


def test_figures_that_nothing_decides_are_none() -> None:
    """Constant maps, empty masks, crops without a label."""
    figures = one_pixel_crops(np.full(3, 0.25), np.array([0, 255, 1])).figures()
    assert figures.labelled_pixels == 2
    assert figures.approximation.weight.mean_absolute.value == 0.25
    assert figures.approximation.weight.correlation.value is None
    assert figures.approximation.hard_mask.iou.value is None
    assert figures.approximation.hard_mask.flipped.value == 0
    assert figures.quality is None
    nothing = one_pixel_crops(np.full(2, 0.25), np.full(2, 255)).figures().approximation
    assert nothing.weight.mean_absolute.value is None
    assert nothing.weight.percentile_95.value is None
    few = one_pixel_crops(np.arange(4) / 4, np.zeros(4)).figures()
    assert few.approximation.weight.mean_absolute.value == 0.375
    assert few.approximation.weight.mean_absolute.low is None, "four crops have no interval"


def test_store_of_another_teacher_or_setting_is_refused(
    built: tuple[Path, str], tmp_path: Path
) -> None:
    weights, store = built
    with pytest.raises(StoreMismatchError, match=r"evaluation\.precision: expected .?bf16"):
        measure(built, configuration(tmp_path, precision="bf16"))
    config = configuration(tmp_path)
    other = tmp_path / "other.safetensors"
    save_weights(build_network(config.teacher.network, 8, seed=4), other)
    with pytest.raises(StoreMismatchError, match=r"teacher\.weights: expected .*, found "):
        measure((other, store), config)
    tree = tiny_tree(tmp_path)
    tree["data"]["seed"] = 9
    with pytest.raises(StoreMismatchError, match=r"data\.seed: expected 9, found 0"):
        measure((weights, store), parse_config(tree))
    with pytest.raises(ConfigError, match="crops: expected at least 1, got 0"):
        measure(built, config, crops=0)


def test_student_is_the_named_one_or_the_first_with_rdd(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert choose_student(config, None).name == "rdd"
    assert choose_student(config, "supervised").name == "supervised"
    with pytest.raises(ConfigError, match="nobody: expected one of supervised, rdd"):
        choose_student(config, "nobody")
    plain = parse_config(tiny_tree(tmp_path) | {"students": ["supervised", "kd"]})
    assert choose_student(plain, None).name == "supervised"


def test_what_the_store_does_not_hold_has_no_row(tmp_path: Path) -> None:
    lean = {"soft_labels": False, "aux_hardness": False}
    measured = measure(build(tmp_path, **lean), configuration(tmp_path, **lean), crops=2)
    figures = measured.fidelity.figures
    for comparison in (figures.approximation, figures.storage):
        assert comparison.logits is None
        assert comparison.aux_true_prob is None
        assert comparison.aux_hard_mask is None
        assert comparison.weight.mean_absolute.value is not None
    assert figures.quality is None
    text = fidelity_markdown(measured.fidelity)
    assert "hard mask, flipped pixels" in text
    assert "soft labels" not in text
    assert "auxiliary" not in text
    assert len(fidelity_tables(measured.fidelity)) == 2
    assert all(path.stat().st_size > 500 for path in write_fidelity(measured, tmp_path / "out"))


def test_files_say_everything(built: tuple[Path, str], tmp_path: Path) -> None:
    wide = {"crop_size": [HEIGHT + 16, WIDTH], "scale": [0.5, 1.5]}
    measured = measure(built, configuration(tmp_path, training=wide), crops=12)
    paths = write_fidelity(measured, tmp_path / "out")
    assert [path.name for path in paths] == ["fidelity.json", "fidelity.md", "fidelity.png"]
    tree = json.loads(paths[0].read_text())
    fidelity = measured.fidelity
    assert tree["fingerprint"] == fidelity.fingerprint
    assert tree["machine"]["versions"] == machine()["versions"]
    assert tree["settings"]["threshold"] == 0.7
    assert tree["settings"]["rdd"] == "student rdd"
    assert len(tree["crops"]) == 12
    mean = fidelity.figures.approximation.weight.mean_absolute
    assert tree["figures"]["approximation"]["weight"]["mean_absolute"] == dataclasses.asdict(mean)
    text = paths[1].read_text()
    assert f"| weight W, mean absolute error | {mean.value:.3g} (" in text
    assert fidelity.fingerprint[:12] in text
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.count("|") in {4, 9}, row
    with Image.open(paths[2]) as image:
        assert image.size[0] > 1200
        assert image.size[1] > 900
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 1000
