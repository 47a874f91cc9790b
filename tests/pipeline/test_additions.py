"""Soft labels that are added to a store built without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdd_pipeline.build import BuildResult, pass_options
from rdd_pipeline.config import MapsConfig, RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.errors import NonFiniteError
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import forget_digests
from rdd_pipeline.stages import run_maps, run_student
from rdd_pipeline.teacher_check import compare_with_teacher
from rdd_pipeline.teacher_pass import evaluate_batch, evaluate_logits
from rdd_storage import MapReader, UnknownArrayError, repair_store, store_status, verify_store
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture
def teacher(tmp_path: Path) -> TrainedNetwork:
    config = configure(tmp_path)
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, 8, seed=3), weights)
    return TrainedNetwork(name="teacher", weights=weights, reused=True, result={})


def configure(output: Path, *, images: int = 7, **maps: Any) -> RunConfig:
    """A run whose one student trains from stored maps with or without logits."""
    tree = tiny_tree(output)
    tree["maps"] |= maps
    tree["data"] |= {"seed": 1, "train_images": images}
    without = {"name": "rdd", "method": "rdd", "rdd": {"min_kept": 0.05}, "kd": {"weight": 0.0}}
    tree["students"] = [without]
    return parse_config(tree)


def build(config: RunConfig, teacher: TrainedNetwork) -> BuildResult:
    forget_digests()
    return run_maps(config, teacher, QUIET)


def files(store: str) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file but the root, the manifests and the lease."""
    return {
        name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path(store).rglob("*")
        if path.is_file()
        and (name := path.relative_to(store).as_posix()) != "zarr.json"
        and name.split("/")[0] not in ("lease", "versions")
    }


def test_soft_labels_are_added_and_nothing_else_is_written(
    tmp_path: Path, teacher: TrainedNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    first = build(configure(tmp_path, soft_labels=False), teacher)
    assert (first.version, first.images_built, first.soft_labels_added) == (1, 7, 0)
    before = files(first.path)
    with caplog.at_level("INFO", logger="rdd"):
        second = build(configure(tmp_path, workers=1), teacher)
    assert f"adds soft labels to 7 images of {first.path}, as version 2" in caplog.text
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)
    assert (second.version, second.images_built, second.soft_labels_added) == (2, 0, 7)
    assert second.bytes_per_image > first.bytes_per_image
    after = files(second.path)
    assert before.items() <= after.items(), "another map was written again"
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"logits"}

    fresh = build(configure(tmp_path / "fresh"), teacher)
    assert {name: content for name, (content, _) in files(fresh.path).items()} == {
        name: content for name, (content, _) in after.items()
    }
    assert verify_store(second.path).ok
    assert build(configure(tmp_path), teacher).soft_labels_added == 0
    assert files(second.path) == after


def test_a_run_without_soft_labels_takes_a_store_with_them(
    tmp_path: Path, teacher: TrainedNetwork
) -> None:
    full = build(configure(tmp_path), teacher)
    before = files(full.path)
    lean = configure(tmp_path, soft_labels=False)
    again = build(lean, teacher)
    assert (again.path, again.images_built, again.soft_labels_added) == (full.path, 0, 0)
    victim = Path(full.path) / "logits/c/1/0/0/0"
    victim.write_bytes(victim.read_bytes()[:-30])
    assert repair_store(full.path).reopened == (1,)
    assert build(lean, teacher).images_built == 2
    contents = {name: content for name, (content, _) in before.items()}
    assert {name: content for name, (content, _) in files(full.path).items()} == contents
    rows = compare_with_teacher(
        full.path, build_dataset(lean.data, "train"), lean.teacher.network, teacher.weights,
        maps=lean.maps, images=1, device="cpu", reporter=QUIET,
    )  # fmt: skip
    assert "logits" in {row.array for row in rows}


def test_data_that_changed_grows_first(tmp_path: Path, teacher: TrainedNetwork) -> None:
    build(configure(tmp_path, soft_labels=False, images=5), teacher)
    # The data set's identity does not depend on the number of its images.
    built = build(configure(tmp_path, images=7), teacher)
    assert (built.version, built.images_built, built.soft_labels_added) == (3, 2, 7)
    assert store_status(built.path).versions == (1, 2, 3)
    assert [("logits" in MapReader(built.path, version=v).arrays) for v in (1, 2, 3)] == [
        False, False, True,
    ]  # fmt: skip
    assert verify_store(built.path).ok


def test_students_are_told_and_not_trained_again(tmp_path: Path, teacher: TrainedNetwork) -> None:
    lean = configure(tmp_path, soft_labels=False)
    store = build(lean, teacher).path
    assert not run_student(lean, lean.students[0], store, QUIET).reused
    distilling = lean.students[0].model_copy(
        update={"kd": lean.students[0].kd.model_copy(update={"weight": 1.0})}
    )
    with pytest.raises(UnknownArrayError) as caught:
        run_student(lean, distilling, store, QUIET)
    text = str(caught.value)
    assert store in text
    assert "array(s) logits" in text
    assert "'rdd maps build CONFIG --set maps.soft_labels=true' adds" in text
    assert build(configure(tmp_path), teacher).version == 2
    assert run_student(lean, lean.students[0], store, QUIET).reused


@pytest.mark.parametrize(
    ("maps", "passes"),
    [
        ({}, 1),
        ({"discrepancy": "flip"}, 1),
        ({"discrepancy": "scales"}, 1),
        ({"averaging": {"flip": True, "scales": [0.75, 1.0]}}, 4),
        ({"view": "sliding", "window": [32, 64]}, 4),
    ],
)
def test_logits_alone_are_those_of_the_whole_pass(
    tmp_path: Path, maps: dict[str, Any], passes: int
) -> None:
    """Without the passes that only the discrepancy needs."""
    config = configure(tmp_path)
    dataset = build_dataset(config.data, "train")
    samples = [dataset[0], dataset[1]]
    network = build_network(config.teacher.network, 8, seed=3).eval()
    options = pass_options(MapsConfig(**maps))
    views = options.views(network)
    whole = evaluate_batch(views, samples, options, CPU).result()
    seen: list[int] = []
    network.register_forward_hook(lambda *_: seen.append(1))
    alone = evaluate_logits(views, samples, options, CPU).result()
    assert len(seen) == passes
    for expected, found in zip(whole, alone, strict=True):
        assert expected.logits is not None
        assert found.image_id == expected.image_id
        assert np.array_equal(found.logits, expected.logits)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="train-000000"):
        evaluate_logits(views, samples, options, CPU).result()
