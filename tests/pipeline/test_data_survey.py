"""What ``rdd data check`` counts, and what it prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rdd_pipeline.config import FolderData, FolderSplit, SyntheticData, parse_config
from rdd_pipeline.data import build_dataset, survey_dataset
from tiny import tiny_tree

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"


def write(root, split, name, label):
    for folder, pixels in (("images", np.zeros((*label.shape, 3), np.uint8)), ("labels", label)):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / split / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    """Three training images of two sizes, with known numbers of pixels; one for validation."""
    write(tmp_path, "train", "a", np.array([[0, 0, 0, 1], [0, 0, 0, 255]], np.uint8))
    write(tmp_path, "train", "b", np.array([[0, 0, 255, 255]] * 3, np.uint8))
    write(tmp_path, "train", "c", np.full((2, 4), 255, np.uint8))
    write(tmp_path, "val", "d", np.array([[1, 1], [1, 0]], np.uint8))
    return tmp_path


def config_of(root):
    return FolderData(
        root=root,
        train=FolderSplit(images="images/train", labels="labels/train"),
        val=FolderSplit(images="images/val", labels="labels/val"),
        classes=("road", "tree", "[sky]"),
    )


def test_shares_sizes_and_images_are_counted(root):
    steps = []
    survey = survey_dataset(build_dataset(config_of(root), "train"), steps.append)
    assert sum(steps) == survey.images == 3
    assert survey.sizes == ((2, 4), (3, 4))
    assert [(c.name, c.pixels, c.images) for c in survey.classes] == [
        ("road", 12, 2), ("tree", 1, 1), ("[sky]", 0, 0),
    ]  # fmt: skip
    assert [c.share for c in survey.classes] == pytest.approx([12 / 13, 1 / 13, 0.0])
    assert survey.ignored == pytest.approx(15 / 28)
    assert survey.problems == ()


def test_damaged_files_are_named_and_the_others_counted(root):
    (root / "labels/train/a.png").write_bytes(b"nothing")
    (root / "labels/train/x.png").write_bytes(b"nothing")
    Image.fromarray(np.full((3, 4), 9, np.uint8)).save(root / "labels/train/b.png")
    (root / "images/train/c.png").write_bytes((root / "images/train/c.png").read_bytes()[:40])
    survey = survey_dataset(build_dataset(config_of(root), "train"))
    assert len(survey.problems) == 4
    for name in ("labels/train/a.png", "labels/train/b.png", "images/train/c.png", "x.png: label"):
        assert any(name in problem for problem in survey.problems), name
    assert survey.ignored == 1.0
    assert [c.share for c in survey.classes] == [0.0, 0.0, 0.0]


def test_built_in_scenes_are_drawn_and_counted():
    config = SyntheticData(train_images=4, height=64, width=96)
    survey = survey_dataset(build_dataset(config, "train"))
    assert survey.sizes == ((64, 96),)
    assert sum(c.share for c in survey.classes) == pytest.approx(1.0)
    assert not survey.problems


def rdd_data_check(path, config):
    tree = tiny_tree(path) | {"data": config.model_dump(mode="json")}
    file = path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "rdd_flows.cli", "data", "check", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_lists_everything(root):
    for number in range(25):  # more than the check before a run shows
        write(root, "train", f"wrong{number}", np.full((2, 2), 77, np.uint8))
    (root / "images/val/d.png").unlink()
    done = rdd_data_check(root, config_of(root))
    assert done.returncode == 1, done.stderr
    shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert shown[0] == (
        "folder train: 28 images of 2x2 to 3x4, 3 sizes (height x width), 53.6% of the pixels "
        "ignored, 25 problem(s)"
    )
    assert shown[2:6] == ["road 92.308% 2", "tree 7.692% 1", "[sky] 0.000% 0", "in no image: [sky]"]
    assert len(re.findall(r"wrong\d+\.png: label values 77", done.stderr)) == 25
    assert "val: data.val.images: " in done.stderr, "the second split is looked at all the same"
    assert done.stderr.endswith("26 problem(s)\n")
    assert "Traceback" not in done.stderr


def test_yaml_blocks_of_the_page_are_valid(tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    kinds = []
    for block in blocks:
        kinds.append(parse_config(tiny_tree(tmp_path) | yaml.safe_load(block)).data.type)
    wanted = {"camvid", "cityscapes", "voc", "ade20k", "cocostuff", "folder", "huggingface"}
    assert wanted <= set(kinds)
