"""A trained student taken away: one line to load, ONNX, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rdd_pipeline.data import build_dataset
from rdd_pipeline.errors import CheckpointError, DataError
from rdd_pipeline.export import (
    describe_network,
    export_folder,
    export_onnx,
    image_files,
    load_trained,
    predict_folder,
)
from rdd_pipeline.networks import build_network, save_weights
from tiny import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a training leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder)
    save_weights(build_network(config.student.network, 8, seed=1), folder / "weights.safetensors")
    describe_network(folder, config.student.network, build_dataset(config.data, "train"))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, shape in (("a.png", (50, 70, 3)), ("sub/b.jpg", (64, 64, 3)), ("c.png", (40, 40))):
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folder_loads_in_one_line_and_predicts_as_the_network(trained: Path) -> None:
    model = load_trained(trained)
    assert len(model.class_names) == len(model.palette) == 8
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(image).permute(2, 0, 1)[None]).main
    expected = F.interpolate(logits, (50, 70), mode="bilinear", align_corners=True)[0].argmax(0)
    assert np.array_equal(model.predict(image), expected.numpy())
    assert not model.network.training


def test_exported_folder_is_the_same_network(trained: Path, tmp_path: Path) -> None:
    export_folder(trained, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "network.json",
        "weights.safetensors",
    }
    image = np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    first, second = load_trained(trained), load_trained(tmp_path / "out")
    assert np.array_equal(first.predict(image), second.predict(image))


def test_onnx_gives_the_same_logits_for_any_batch(trained: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = load_trained(trained)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, path, (50, 70)) < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 50, 70, generator=torch.Generator().manual_seed(1))
    [found] = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        logits = F.interpolate(
            model.network(images).main, (50, 70), mode="bilinear", align_corners=True
        )
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


def test_overlays_and_labels_of_a_folder(trained: Path, images: Path, tmp_path: Path) -> None:
    model = load_trained(trained)
    written = list(predict_folder(model, images, tmp_path / "over", opacity=0.25))
    names = ["a.png", "c.png", "sub/b.png"]
    assert [str(path.relative_to(tmp_path / "over")) for path in written] == names
    image = np.asarray(Image.open(images / "a.png"))
    colours = np.asarray(model.palette)[model.predict(image)]
    with Image.open(written[0]) as overlay:
        assert overlay.mode == "RGB"
        np.testing.assert_allclose(np.asarray(overlay), 0.75 * image + 0.25 * colours, atol=0.5)
    [first, *_] = predict_folder(model, images, tmp_path / "labels", labels=True)
    with Image.open(first) as label:
        assert label.mode == "P"
        assert np.array_equal(np.asarray(label), model.predict(image))


def test_folder_without_images_and_clashing_names(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no images"):
        image_files(trained)
    Image.new("RGB", (8, 8)).save(images / "a.jpg")
    with pytest.raises(DataError, match=r"suffix alone.*a\.png"):
        list(predict_folder(load_trained(trained), images, tmp_path / "out"))


def test_what_is_no_finished_training_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"network\.json: missing; give the folder"):
        load_trained(tmp_path)
    export_folder(trained, tmp_path)
    description = tmp_path / "network.json"
    tree = json.loads(description.read_text())
    description.write_text(json.dumps(tree | {"format": 99}))
    with pytest.raises(CheckpointError, match="expected format 1, got 99"):
        load_trained(tmp_path)
    description.write_text(json.dumps(tree | {"palette": [[1, 2]]}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_trained(tmp_path)


def test_predict_and_export_as_a_user_types_them(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    rdd = [sys.executable, "-m", "rdd_flows.cli"]
    done = subprocess.run(
        [*rdd, "predict", str(trained), str(images), "--out", str(tmp_path / "out"), "--quiet"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 pictures" in done.stdout
    done = subprocess.run(
        [*rdd, "export", str(images), "--out", str(tmp_path / "net")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "network.json: missing" in done.stderr
