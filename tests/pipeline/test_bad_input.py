"""Training on awkward input, from the files to the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.loader import make_loader
from rdd_pipeline.losses import TeacherSignals
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_student
from rdd_pipeline.student import PreparedStudent, prepare_student
from rdd_storage import MapReader, StoreMismatchError
from scene_store import IMAGES, SIZE, build_store
from tiny import tiny_tree

CROP = (64, 96)  # images are 32 x 48
STAGES = {"tfe": 0, "tse": 5}  # an iteration of each


def config_of(
    output: Path, images: int = IMAGES, training: dict[str, Any] | None = None, **student: Any
) -> RunConfig:
    tree = tiny_tree(output)
    tree["data"] |= {"train_images": images, "height": SIZE[0], "width": SIZE[1]}
    tree["student"]["training"] |= {"crop_size": CROP, "scale": [0.5, 1.5]} | (training or {})
    tree["student"] |= student
    return parse_config(tree)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bad-input")
    return build_store(str(folder / "maps.zarr"), build_dataset(config_of(folder).data, "train"))


@pytest.fixture(scope="module")
def prepared(store: str, tmp_path_factory: pytest.TempPathFactory) -> PreparedStudent:
    """The student ``rdd``: both stages, and logit distillation."""
    config = config_of(tmp_path_factory.mktemp("prepared"))
    dataset = build_dataset(config.data, "train")
    ready = prepare_student(
        config, config.students[2], dataset, reader=MapReader(store), teacher=None
    )
    ready.model.eval()  # the same outputs each time
    ready.stream.spans = {}  # one batch for both stages
    return ready


def loss_of(
    ready: PreparedStudent, batch: dict[str, torch.Tensor], signals: TeacherSignals, stage: str
) -> Any:
    """The loss of a batch, and its gradient by the student's logits."""
    with torch.no_grad():
        outputs = ready.model(batch["image"])
    leaves = type(outputs)(*(part.clone().requires_grad_() for part in outputs))
    result = ready.loss(leaves, batch["label"], signals, STAGES[stage])
    result.total.backward()
    return result, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("stage", STAGES)
def test_padding_has_no_say(prepared: PreparedStudent, stage: str) -> None:
    batch = next(iter(make_loader(prepared.stream, batch_size=4)))
    assert batch["label"].shape == (4, *CROP)
    ignored = batch["label"] == 255
    assert 0.3 < ignored.float().mean() < 1.0
    signals = prepared.signals(batch)
    result, gradients = loss_of(prepared, batch, signals, stage)
    assert {stage, "kd"} <= result.terms.keys()
    assert all(value > 0 for value in result.terms.values())

    random = torch.Generator().manual_seed(0)
    noise = torch.rand(ignored.shape, generator=random)
    per_pixel = {
        name: getattr(signals, name).where(~ignored, noise)
        for name in ("weight", "true_prob", "aux_true_prob")
    }
    shift = torch.randn(batch["logits"].shape, generator=random).half()
    logits = batch["logits"] + shift * ~batch["logits_valid"][:, None]
    assert not torch.equal(logits, batch["logits"])
    other = replace(signals, logits=logits, **per_pixel)
    changed, changed_gradients = loss_of(prepared, batch, other, stage)
    assert torch.equal(changed.total, result.total)
    for first, second in zip(gradients, changed_gradients, strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_without_a_valid_pixel_asks_for_nothing(
    prepared: PreparedStudent, stage: str
) -> None:
    batch = next(iter(make_loader(prepared.stream, batch_size=2)))
    batch["label"].fill_(255)
    batch["true_prob_code"].fill_(255)
    batch["aux_true_prob_code"].fill_(255)
    result, gradients = loss_of(prepared, batch, prepared.signals(batch), stage)
    # Logits are compared where there is an image, labelled or not.
    assert torch.equal(result.total, result.terms["kd"])
    batch["logits_valid"].fill_(False)
    result, gradients = loss_of(prepared, batch, prepared.signals(batch), stage)
    assert not result.total
    assert all(not gradient.any() for gradient in gradients)


def test_a_store_of_a_part_of_the_images_and_crops_larger_than_any(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, images=IMAGES + 2)
    rdd = config.students[2]
    with pytest.raises(StoreMismatchError, match=r"found none of these 2:(.|\n)*allow_missing"):
        run_student(config, rdd, store, Reporter(quiet=True))
    config = config_of(
        tmp_path,
        images=IMAGES + 2,
        allow_missing=True,
        training={"jitter": {"hue": 0.1}, "shuffle": "shards"},
    )
    with caplog.at_level("INFO"):
        trained = run_student(config, rdd, store, Reporter(quiet=True))
    assert f"2 of {IMAGES + 2} images have no maps" in caplog.text
    settings = trained.result["settings"]
    assert settings["trained_images"] == IMAGES
    assert settings["shard_images"] == 4
    assert settings["training"]["shuffle"] == "shards"
    assert settings["training"]["jitter"]["hue"] == 0.1
    history = trained.result["history"]
    assert history[0]["tfe_share"] == 1.0
    assert history[-1]["tfe_share"] == 0.0
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    # A student that reads no store trains on all images.
    config = config_of(tmp_path, images=IMAGES + 2, allow_missing=True)
    supervised = run_student(config, config.students[0], None, Reporter(quiet=True))
    settings = supervised.result["settings"]
    assert "trained_images" not in settings
    # Results from before there were these settings stay valid.
    assert not {"jitter", "shuffle", "shuffle_buffer"} & settings["training"].keys()
