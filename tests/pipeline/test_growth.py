"""A data set that changes: the store grows, and the teacher sees only what is new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import forget_digests
from rdd_pipeline.stages import run_maps, run_student
from rdd_pipeline.teacher_check import compare_with_teacher
from rdd_storage import MapReader, StoreMismatchError, uses, verify_store
from tiny import tiny_tree

QUIET = Reporter(quiet=True)


def write_image(root: Path, split: str, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for folder, shape, high in ((split, (48, 80, 3), 256), (f"{split}annot", (48, 80), 11)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, high, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")


@pytest.fixture
def setting(tmp_path: Path) -> tuple[RunConfig, TrainedNetwork, Path]:
    root = tmp_path / "camvid"
    for number in range(5):
        write_image(root, "train", number, seed=number)
    write_image(root, "val", 0, seed=100)
    config = parse_config(tiny_tree(tmp_path) | {"data": {"type": "camvid", "root": str(root)}})
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, 11, seed=3), weights)
    return config, TrainedNetwork(name="t", weights=weights, reused=True, result={}), root


def build(config: RunConfig, teacher: TrainedNetwork) -> BuildResult:
    forget_digests()  # each build stands for a run of its own
    return run_maps(config, teacher, QUIET)


def test_new_changed_and_removed_images(setting: tuple[RunConfig, TrainedNetwork, Path]) -> None:
    config, teacher, root = setting
    first = build(config, teacher)
    assert (first.version, first.images_built) == (1, 5)
    before = MapReader(first.path)
    kept = before.read("hardness", "001")

    write_image(root, "train", 7, seed=7)  # new
    write_image(root, "train", 2, seed=42)  # changed
    for folder in ("train", "trainannot"):
        (root / folder / "004.png").unlink()  # removed
    second = build(config, teacher)
    assert second.path == first.path
    assert (second.version, second.images, second.images_built) == (2, 5, 2)
    after = MapReader(second.path)
    assert set(after.image_ids) == {"000", "001", "002", "003", "007"}
    assert np.array_equal(after.read("hardness", "001"), kept)
    assert not np.array_equal(after.read("hardness", "002"), before.read("hardness", "002"))
    assert before.read("hardness", "004").shape == (48, 80), "an open reader keeps its view"
    assert verify_store(second.path).ok

    third = build(config, teacher)
    assert (third.version, third.images_built) == (2, 0)


def test_students_record_the_version_they_used(
    setting: tuple[RunConfig, TrainedNetwork, Path],
) -> None:
    config, teacher, _ = setting
    maps = build(config, teacher)
    run_student(config, config.students[1], maps.path, QUIET)
    [use] = uses(maps.path)
    assert (use.run, use.version) == ("tiny/kd", 1)


def test_store_agrees_with_its_live_teacher_and_only_with_it(
    setting: tuple[RunConfig, TrainedNetwork, Path], tmp_path: Path
) -> None:
    config, teacher, _ = setting
    maps = build(config, teacher)
    dataset = build_dataset(config.data, "train")

    def compare(weights: Path) -> dict[str, float]:
        rows = compare_with_teacher(
            maps.path, dataset, config.teacher.network, weights, maps=config.maps, images=3,
            device="cpu", reporter=QUIET,
        )  # fmt: skip
        return {row.array: row.largest for row in rows}

    largest = compare(teacher.weights)
    assert set(largest) == set(MapReader(maps.path).arrays)
    # Alone or in a batch the same sums may be added in another order.
    assert largest["discrepancy"] <= 1e-3
    assert largest["hardness"] <= 0.0041
    assert largest["logits"] <= 2e-3
    other = tmp_path / "other.safetensors"
    save_weights(build_network(config.teacher.network, 11, seed=4), other)
    with pytest.raises(StoreMismatchError, match=r"teacher\.weights"):
        compare(other)
