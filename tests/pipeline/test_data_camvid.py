import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import CamVidData
from rdd_pipeline.data import IGNORE_INDEX, build_dataset, check_dataset, dataset_digests
from rdd_pipeline.errors import DataError, ImageReadError

_HEIGHT, _WIDTH = 18, 24


def make_camvid(root, split="train", count=3, suffix=".png", seed=0):
    """A miniature of the SegNet layout: same folders, file names and encodings."""
    rng = np.random.default_rng(seed)
    images, labels = root / split, root / f"{split}annot"
    images.mkdir(parents=True)
    labels.mkdir()
    for index in range(count):
        name = f"0001TP_{6690 + 30 * index:06d}"
        image = rng.integers(0, 256, size=(_HEIGHT, _WIDTH, 3), dtype=np.uint8)
        label = rng.integers(0, 12, size=(_HEIGHT, _WIDTH), dtype=np.uint8)
        Image.fromarray(image).save(images / f"{name}{suffix}")
        Image.fromarray(label).save(labels / f"{name}.png")
    return root


@pytest.fixture
def root(tmp_path):
    return make_camvid(tmp_path / "camvid")


def opened(root, split="train"):
    return build_dataset(CamVidData(root=root, val_split="train"), "train")


def problems_of(root):
    with pytest.raises(DataError) as caught:
        check_dataset(opened(root))
    return str(caught.value)


def names(root):
    return sorted((root / "train").iterdir()), sorted((root / "trainannot").iterdir())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPG", ".bmp", ".tif", ".webp"])
def test_reads_images_of_any_suffix(tmp_path, suffix):
    root = make_camvid(tmp_path / "camvid", suffix=suffix)
    dataset = opened(root)
    check_dataset(dataset)
    assert dataset.image_ids == ("0001TP_006690", "0001TP_006720", "0001TP_006750")
    sample = dataset[1]
    assert sample.image.shape == (_HEIGHT, _WIDTH, 3)
    assert dataset.size(1) == (_HEIGHT, _WIDTH)
    image_file, label_file = (files[1] for files in names(root))
    raw = np.asarray(Image.open(label_file))
    np.testing.assert_array_equal(sample.label, np.where(raw == 11, IGNORE_INDEX, raw))
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(image_file)))


def test_classes_and_palette_are_the_customary_ones(root):
    dataset = opened(root)
    assert dataset.num_classes == 11
    assert dataset.class_names[0] == "Sky"
    assert dataset.class_names[10] == "Bicyclist"
    assert dataset.palette[3] == (128, 64, 128)  # Road
    assert len(dataset.palette) == 11


def test_splits_come_from_the_configuration(tmp_path):
    root = make_camvid(tmp_path / "camvid", split="test", count=2)
    dataset = build_dataset(CamVidData(root=root, val_split="test"), "val")
    assert dataset.split == "test"
    assert len(dataset) == 2


def test_digest_is_over_the_files(root):
    dataset = opened(root)
    images, labels = names(root)
    expected = hashlib.sha256(images[2].read_bytes() + labels[2].read_bytes()).hexdigest()
    assert dataset_digests(dataset)[2] == expected


def test_identity_does_not_say_where_the_files_lie(root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    assert opened(moved).identity() == opened(root).identity()
    assert opened(root).identity()["label_mapping"] == {"11": IGNORE_INDEX}


def test_missing_folders_show_the_expected_tree(root):
    shutil.rmtree(root / "trainannot")
    with pytest.raises(DataError) as caught:
        opened(root)
    message = str(caught.value)
    assert "data.root: no folder" in message
    assert "trainannot" in message
    assert "0001TP_006690.png" in message
    assert "11 = unlabelled" in message


def test_a_folder_without_images_is_refused(root):
    for path in (root / "train").iterdir():
        path.unlink()
    (root / "train" / "readme.txt").write_text("nothing")
    with pytest.raises(DataError, match="no images in"):
        opened(root)


def test_all_problems_are_collected(tmp_path):
    root = make_camvid(tmp_path / "camvid", count=7)
    images, labels = names(root)
    labels[0].unlink()
    images[1].unlink()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(labels[2])
    wrong = np.zeros((_HEIGHT, _WIDTH), np.uint8)
    wrong[0, :3] = (12, 200, 200)
    Image.fromarray(wrong).save(labels[3])
    images[4].write_bytes(images[4].read_bytes()[:600])
    labels[5].write_bytes(b"no image at all")
    Image.fromarray(np.zeros((_HEIGHT, _WIDTH, 3), np.uint8)).save(labels[6])
    message = problems_of(root)
    assert "camvid train: 7 problem(s)" in message
    assert f"{images[0]}: image without a label; expected {labels[0]}" in message
    assert f"{labels[1]}: label without an image" in message
    assert (
        f"{labels[2]}: expected the size of its image, 18x24 (height x width), got 5x6" in message
    )
    assert f"{labels[3]}: label values 12, 200 (3 pixels) are outside the classes" in message
    assert f"{images[4]}: cannot be read as an image" in message
    assert f"{labels[5]}: cannot be read as an image" in message
    assert f"{labels[6]}: expected one class index per pixel" in message


def test_many_problems_are_cut_short(tmp_path):
    root = make_camvid(tmp_path / "camvid", count=25)
    for path in names(root)[1]:
        path.unlink()
    message = problems_of(root)
    assert "25 problem(s)" in message
    assert message.count("image without a label") == 20
    assert message.endswith("... and 5 more")


def test_two_images_of_one_name_are_a_problem(root):
    image = names(root)[0][0]
    shutil.copy(image, image.with_suffix(".jpg"))
    assert "has the same name" in problems_of(root)


def test_reading_a_broken_pair_names_the_file(root):
    images, labels = names(root)
    dataset = opened(root)
    labels[0].unlink()
    with pytest.raises(ImageReadError, match=labels[0].name):
        dataset[0]
    with pytest.raises(ImageReadError, match=labels[0].name):
        dataset.digest(0)
    Image.fromarray(np.full((_HEIGHT, _WIDTH), 77, np.uint8)).save(labels[1])
    with pytest.raises(DataError, match="label values 77"):
        dataset[1]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(labels[2])
    with pytest.raises(DataError, match="size of its image"):
        dataset[2]
    images[2].unlink()
    with pytest.raises(ImageReadError, match="no such file"):
        dataset.size(2)


@pytest.fixture(scope="module")
def real_root():
    folder = os.environ.get("RDD_CAMVID")
    if not folder:
        pytest.skip("needs the environment variable RDD_CAMVID: the folder of CamVid")
    return Path(folder)


def test_real_camvid(real_root):
    dataset = build_dataset(CamVidData(root=real_root), "val")
    assert len(dataset) == 101
    assert dataset.size(0) == (360, 480)
    seen = set()
    for index in range(0, len(dataset), 10):
        sample = dataset[index]
        assert sample.image.shape == (360, 480, 3)
        seen |= set(np.unique(sample.label).tolist())
    assert seen == {*range(11), IGNORE_INDEX}
    assert len(set(dataset_digests(dataset))) == 101
