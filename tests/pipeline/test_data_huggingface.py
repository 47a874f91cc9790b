"""Tables of images: the package ``datasets`` itself where it is installed, the advice where not."""

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import HuggingFaceData
from rdd_pipeline.data import IGNORE_INDEX, build_dataset, check_dataset, dataset_digests
from rdd_pipeline.errors import ConfigError, DataError

_RNG = np.random.default_rng(0)


def config_of(path, **settings):
    return HuggingFaceData(path=str(path), classes=("road", "sky"), **settings)


def encoded(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not there
    with pytest.raises(ConfigError, match=r"pip install 'rdd-maps\[huggingface\]'"):
        build_dataset(config_of(tmp_path), "train")


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs the package datasets (extra huggingface)")


@pytest.fixture
def rows():
    """Four rows: images of different sizes, labels of 0, 1 and 255."""
    sizes = [(9, 12), (10, 12), (11, 13), (12, 9)]
    images = [_RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    labels = [_RNG.choice(np.array([0, 1, 255], np.uint8), size=size) for size in sizes]
    return images, labels


def table(datasets, rows, which):
    images, labels = rows
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "key": datasets.Value("string")}
    )
    columns = {
        "image": [{"bytes": encoded(images[i]), "path": None} for i in which],
        "mask": [{"bytes": encoded(labels[i]), "path": None} for i in which],
        "key": [f"scene {i}" for i in which],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(params=["save_to_disk", "parquet"])
def saved(request, datasets, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    both = datasets.DatasetDict(
        {"train": table(datasets, rows, range(3)), "validation": table(datasets, rows, [3])}
    )
    folder = tmp_path / "street scenes"
    if request.param == "save_to_disk":
        both.save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        for name, part in both.items():
            part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def test_rows_are_images_with_labels(saved, rows):
    images, labels = rows
    config = config_of(saved, label="mask", ids={0: "sky", 1: "road"})
    train, val = build_dataset(config, "train"), build_dataset(config, "val")
    check_dataset(train)
    check_dataset(val)
    assert (train.name, train.split, val.split) == ("street-scenes", "train", "validation")
    assert train.image_ids == ("00000000", "00000001", "00000002")
    for dataset, first in ((train, 0), (val, 3)):
        for index, sample in enumerate(dataset):
            raw = labels[first + index]
            np.testing.assert_array_equal(sample.image, images[first + index])
            np.testing.assert_array_equal(
                sample.label, np.select([raw == 0, raw == 1], [1, 0], IGNORE_INDEX)
            )
            assert dataset.size(index) == raw.shape
    assert len(set(dataset_digests(train))) == 3
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy[2].label, train[2].label)


def test_names_may_stand_in_a_column(saved):
    config = config_of(saved, label="mask", id="key", name="streets")
    dataset = build_dataset(config, "train")
    assert dataset.image_ids == ("scene 0", "scene 1", "scene 2")
    assert dataset.name == "streets"


def test_wrong_columns_and_splits_are_explained(saved):
    with pytest.raises(DataError, match="has no column label; it has image, mask, key"):
        build_dataset(config_of(saved), "train")
    with pytest.raises(DataError, match="split 'test'"):
        build_dataset(config_of(saved, label="mask", val_split="test"), "val")


def test_a_table_saved_alone_is_not_both_splits(datasets, rows, tmp_path):
    table(datasets, rows, range(2)).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="Save both splits as one DatasetDict"):
        build_dataset(config_of(tmp_path / "one", label="mask"), "train")


def test_damaged_rows_are_named(datasets, rows, tmp_path):
    images, labels = rows
    columns = {
        "image": [encoded(images[0]), encoded(images[1])[:80]],
        "label": [encoded(labels[0]), encoded(np.full((10, 12), 77, np.uint8))],
    }
    part = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "damaged")
    with pytest.raises(DataError) as caught:
        check_dataset(build_dataset(config_of(tmp_path / "damaged"), "train"))
    assert "damaged train row 1 (image): cannot be read as an image" in str(caught.value)
    assert "damaged train row 1 (label): label values 77" in str(caught.value)
    assert "row 0" not in str(caught.value)
