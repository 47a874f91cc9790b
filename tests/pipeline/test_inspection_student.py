"""A student's difficulty against its teacher's store, over checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inspection_stores import tiny_dataset
from rdd_pipeline.difficulty import true_class_probability
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.export import describe_network, load_trained
from rdd_pipeline.inspection import DataNeededError, EmptySelectionError, Maps, spearman_from_counts
from rdd_pipeline.networks import build_network, save_weights
from rdd_storage import encode_hardness
from tiny import tiny_config


def _trained(folder: Path) -> Path:
    """The folder of a training with two checkpoints, as its network's weights alone and with the
    parts that some losses add; the first checkpoint's network is sure of nothing."""
    config = tiny_config(folder)
    dataset = tiny_dataset()
    network = build_network(config.teacher.network, dataset.num_classes, seed=1)
    describe_network(folder, config.teacher.network, dataset)
    save_weights(network, folder / "weights.safetensors")
    final = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flat = {name: torch.zeros_like(tensor) for name, tensor in final.items()}
    with_loss = {f"network.{name}": tensor for name, tensor in final.items()}
    for iteration, state in ((2, flat), (4, with_loss | {"projections.x.weight": torch.ones(1)})):
        checkpoint = folder / "checkpoints" / f"{iteration:08d}"
        checkpoint.mkdir(parents=True)
        save_file(state, checkpoint / "model.safetensors")
    return folder


def test_student_history_is_that_of_its_pixels(two_stores: Path, tmp_path: Path) -> None:
    trained = _trained(tmp_path / "student")
    maps = Maps(two_stores / "a.zarr", tiny_dataset())
    history = maps.student_history(trained, images=2)
    assert history.image_ids == (maps.image_ids[0], maps.image_ids[-1])
    assert [step.iteration for step in history.steps] == [2, 4, None]
    flat, last, final = history.steps
    # All classes alike: p = 1/8 everywhere, hard for this student alone or for both.
    assert flat.student_mean == pytest.approx(np.sqrt(7 / 8), abs=0.004)
    assert np.isnan(flat.spearman)
    assert flat.teacher_alone == 0.0
    assert flat.student_alone + flat.both == pytest.approx(1.0)
    assert np.array_equal(last.joint, final.joint)

    joint = np.zeros((251, 251), np.int64)
    network = load_trained(trained).network
    for image_id in history.image_ids:
        sample = maps.source.sample(image_id)
        image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None]
        label = torch.from_numpy(np.array(sample.label))[None]
        with torch.inference_mode():
            p = true_class_probability(network(image).main, label)[0].numpy()
        valid = sample.label != 255
        pairs = maps[image_id].hardness_codes[valid], encode_hardness(p, valid)[valid]
        np.add.at(joint, pairs, 1)
    assert np.array_equal(final.joint, joint)
    assert final.spearman == spearman_from_counts(joint)
    assert final.relative == final.student_alone + final.teacher_alone
    assert final.both + final.student_alone == pytest.approx(joint[:, 137:].sum() / joint.sum())
    assert [row["iteration"] for row in history.table()] == [2, 4, None]

    shutil.copytree(trained / "checkpoints" / "00000002", trained / "snapshots" / "00000002")
    (snapshot,) = (trained / "snapshots" / "00000002").iterdir()
    snapshot.rename(snapshot.with_name("weights.safetensors"))
    kept, again = maps.student_history(trained, images=2).steps
    assert (kept.iteration, again.iteration) == (2, None)
    assert np.array_equal(kept.joint, flat.joint)
    assert np.array_equal(again.joint, final.joint)
    assert history.figure()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_student_history_refuses_what_it_cannot_use(two_stores: Path, tmp_path: Path) -> None:
    trained = _trained(tmp_path / "student")
    store = two_stores / "a.zarr"
    with pytest.raises(DataNeededError, match="labels"):
        Maps(store).student_history(trained)
    maps = Maps(store, tiny_dataset())
    with pytest.raises(EmptySelectionError, match="at least 1"):
        maps.student_history(trained, images=0)
    foreign = tmp_path / "00000009"
    foreign.mkdir()
    save_file({"other.weight": torch.ones(1)}, foreign / "model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint without"):
        maps.student_history(trained, checkpoints=[foreign], images=1)
