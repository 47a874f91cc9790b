import hashlib
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from rdd_pipeline.config import SyntheticData
from rdd_pipeline.data import (
    IGNORE_INDEX,
    SyntheticDataset,
    build_dataset,
    check_dataset,
    dataset_digests,
)
from rdd_pipeline.errors import ConfigError


def scenes(split="train", images=6, height=64, width=96, seed=0):
    return SyntheticDataset(split=split, images=images, height=height, width=width, seed=seed)


def digest_of(dataset, index):
    return dataset.digest(index)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (97, 61), (360, 480)])
def test_scene_has_its_size_and_types(size):
    dataset = scenes(images=2, height=size[0], width=size[1])
    for sample in dataset:
        assert sample.image.shape == (*size, 3)
        assert sample.label.shape == size
        assert sample.image.dtype == sample.label.dtype == np.uint8
        assert set(np.unique(sample.label)) <= {*range(dataset.num_classes), IGNORE_INDEX}
    assert dataset.size(1) == size


def test_every_class_and_void_occur_in_plausible_shares():
    dataset = scenes(images=40, height=128, width=192)
    counts = np.zeros(256)
    present = np.zeros(256)
    for sample in dataset:
        here = np.bincount(sample.label.ravel(), minlength=256)
        counts += here
        present += here > 0
    share = dict(zip(dataset.class_names, counts / counts.sum(), strict=False))
    for name in ("sky", "building", "road"):
        assert 0.05 < share[name] < 0.5, name
    for name in ("pavement", "vegetation"):
        assert 0.03 < share[name] < 0.3, name
    for name in ("pole", "car", "pedestrian"):
        assert 0.003 < share[name] < 0.08, name
    assert 0.02 < counts[IGNORE_INDEX] / counts.sum() < 0.12
    assert (present[: dataset.num_classes] >= 30).all()


def test_poles_are_thin_and_stand_in_front():
    dataset = scenes(images=20, height=128, width=192)
    pole = dataset.class_names.index("pole")
    widths = []
    for sample in dataset:
        for row in sample.label[20:90] == pole:
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
            widths += (edges[1::2] - edges[::2]).tolist()
    assert np.median(widths) <= 3
    assert min(widths) == 1


def test_scenes_look_like_streets():
    dataset = scenes(images=20, height=128, width=192)
    road, sky = dataset.class_names.index("road"), dataset.class_names.index("sky")
    top = np.concatenate([sample.label[:20].ravel() for sample in dataset])
    low = np.concatenate([sample.label[-20:].ravel() for sample in dataset])
    assert not (top == road).any()
    assert not (low == sky).any()
    assert (low == road).mean() > 0.3


def test_colour_alone_does_not_tell_the_class():
    # The most likely class for each colour, from many scenes, must leave a good part unexplained.
    dataset = scenes(images=40, height=128, width=192)
    cells = []
    labels = []
    for sample in dataset:
        valid = sample.label != IGNORE_INDEX
        quantised = (sample.image[valid] // 16).astype(np.int64)
        cells.append(quantised @ np.array([256, 16, 1]))
        labels.append(sample.label[valid])
    table = np.zeros((4096, dataset.num_classes))
    np.add.at(table, (np.concatenate(cells), np.concatenate(labels)), 1)
    best = table.max(axis=1).sum() / table.sum()
    assert best < 0.75


def test_scenes_depend_on_seed_split_and_index_alone():
    dataset = scenes()
    again = scenes(images=3)
    assert dataset_digests(dataset)[:3] == dataset_digests(again)
    everything = [
        *dataset_digests(dataset),
        *dataset_digests(scenes(split="val")),
        *dataset_digests(scenes(seed=1)),
    ]
    assert len(set(everything)) == len(everything)


def test_another_process_draws_the_same_scene():
    dataset = scenes()
    expected = dataset.digest(4)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(digest_of, dataset, 4).result() == expected


def test_digest_is_over_image_then_label():
    dataset = scenes()
    sample = dataset[2]
    data = sample.image.tobytes() + sample.label.tobytes()
    assert dataset.digest(2) == hashlib.sha256(data).hexdigest()


def test_kept_scenes_cannot_be_changed_and_stay_behind_when_pickled():
    dataset = scenes()
    sample = dataset[0]
    assert dataset[0] is sample
    with pytest.raises(ValueError, match="read-only"):
        sample.image[0, 0] = 0
    data = pickle.dumps(dataset)
    assert len(data) < 4096
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy[0].image, sample.image)


def test_window_equals_slicing():
    dataset = scenes()
    part = dataset.read_window(3, slice(5, 40), slice(10, 90))
    np.testing.assert_array_equal(part.image, dataset[3].image[5:40, 10:90])
    np.testing.assert_array_equal(part.label, dataset[3].label[5:40, 10:90])


def test_built_from_the_configuration():
    config = SyntheticData(train_images=5, val_images=3, height=48, width=64, seed=9)
    train, val = build_dataset(config, "train"), build_dataset(config, "val")
    assert (len(train), len(val)) == (5, 3)
    assert train.size(0) == (48, 64)
    assert train.image_ids[0] == "train-000000"
    assert train.identity() != val.identity()
    assert len(train.palette) == train.num_classes
    check_dataset(train)


def test_number_of_scenes_is_no_part_of_the_identity():
    assert scenes(images=3).identity() == scenes(images=6).identity()
    assert scenes(seed=1).identity() != scenes(seed=2).identity()
    assert scenes(height=64).identity() != scenes(height=80).identity()


def test_an_index_beyond_the_end_is_refused():
    dataset = scenes()
    with pytest.raises(IndexError, match="below 6, got 6"):
        dataset[6]
    assert dataset[-1].image_id == "train-000005"


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"data\.seed: expected 0 or more, got -1"):
        scenes(seed=-1)


def test_progress_counts_every_image():
    calls = []
    dataset_digests(scenes(), progress=calls.append)
    assert calls == [1] * 6
    calls.clear()
    check_dataset(scenes(), progress=calls.append)
    assert calls == [1] * 6
