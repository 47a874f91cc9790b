import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import CamVidData, JitterConfig
from rdd_pipeline.data import build_dataset, dataset_digests
from rdd_pipeline.data.geometry import (
    IMAGE_FILL,
    CropWindow,
    covered_points,
    random_crop,
    source_coordinates,
)
from rdd_pipeline.errors import ConfigError, DataError, ImageReadError
from rdd_pipeline.loader import make_loader
from rdd_pipeline.signals import expand_weight
from rdd_pipeline.stream import MapStream, shard_order
from rdd_storage import MapReader, StoreMismatchError, UnknownArrayError
from scene_store import GRID, IMAGES, SIZE, build_store, scenes

_NEEDS = ("weight", "true_prob", "aux_true_prob", "logits")
_JITTER = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(str(tmp_path_factory.mktemp("stream") / "maps.zarr"), scenes())


def stream_of(store=None, **changes):
    settings = {
        "dataset": scenes(),
        "reader": None if store is None else MapReader(store),
        "crop_size": (24, 40),
        "scale": (0.5, 2.0),
        "flip": 0.5,
        "seed": 3,
        "length": 40,
        "needs": () if store is None else _NEEDS,
        "grid_size": (3, 5),
    }
    return MapStream(**settings | changes)


def weight_of(sample):
    return expand_weight(torch.utils.data.default_collate([sample]))[0]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_keys_shapes_and_types(store):
    sample = stream_of(store)[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "image": (torch.uint8, (3, 24, 40)),
        "label": (torch.uint8, (24, 40)),
        "index": (torch.int64, ()),
        "weight_field": (torch.float32, (5, 7)),
        "weight_rows": (torch.float64, (24,)),
        "weight_columns": (torch.float64, (40,)),
        "true_prob_code": (torch.uint8, (24, 40)),
        "aux_true_prob_code": (torch.uint8, (24, 40)),
        "logits": (torch.float16, (8, 3, 5)),
        "logits_valid": (torch.bool, (3, 5)),
    }


def test_supervised_training_needs_no_store(store):
    plain, mapped = stream_of(), stream_of(store)
    assert set(plain[0]) == {"image", "label", "index"}
    for k in range(20):
        for key in plain[k]:
            assert torch.equal(plain[k][key], mapped[k][key])


def test_codes_follow_the_label_pixel_by_pixel(store):
    stream = stream_of(store)
    seen = set()
    for k in range(40):
        sample = stream[k]
        assert torch.equal(sample["true_prob_code"], sample["label"])
        assert torch.equal(sample["aux_true_prob_code"], sample["label"])
        seen |= set(sample["label"].unique().tolist())
    assert len(seen) > 5


def test_weight_lies_where_the_image_lies(store):
    stream = stream_of(store)
    for index in range(IMAGES):
        window = random_crop(
            np.random.default_rng(index),
            source_size=SIZE,
            crop_size=(24, 40),
            scale=(0.5, 2.0),
            flip=0.5,
        )
        weight = weight_of(stream.sample(index, window)).numpy()
        rows, _ = source_coordinates(window, 0)
        columns, _ = source_coordinates(window, 1)
        expected = (
            0.2 + 0.3 * rows[:, None] / (SIZE[0] - 1) + 0.4 * columns / (SIZE[1] - 1) + 0.01 * index
        )
        covered = covered_points(window)
        # The store keeps the discrepancy as float16.
        np.testing.assert_allclose(weight[covered], expected[covered], atol=1e-3)
        assert (weight[~covered] == 1.0).all()


def test_logits_are_the_stored_ones_at_the_grid_points(store):
    stream = stream_of(store, crop_size=SIZE, grid_size=GRID)
    stored = MapReader(store).read("logits", scenes().image_ids[2])
    for flip in (False, True):
        window = CropWindow(
            source_size=SIZE, scaled_size=SIZE, offset=(0, 0), crop_size=SIZE, flip=flip
        )
        sample = stream.sample(2, window)
        expected = stored[..., ::-1] if flip else stored
        np.testing.assert_allclose(sample["logits"].numpy(), expected, atol=2e-3)
        assert sample["logits_valid"].all()


def test_padding_is_ignored_in_every_term(store):
    stream = stream_of(store, crop_size=(48, 64), scale=(0.5, 0.5), flip=0.0, grid_size=(7, 9))
    sample = stream[5]
    padded = torch.ones(48, 64, dtype=torch.bool)
    padded[:16, :24] = False
    for key in ("label", "true_prob_code", "aux_true_prob_code"):
        assert (sample[key][padded] == 255).all()
        assert not (sample[key][~padded] == 255).all()
    assert (weight_of(sample)[padded] == 1.0).all()
    assert torch.isfinite(sample["logits"]).all()
    rows = torch.arange(7) * 47 / 6 <= 15
    columns = torch.arange(9) * 63 / 8 <= 23
    assert torch.equal(sample["logits_valid"], rows[:, None] & columns)


def test_16_bit_codes(tmp_path):
    path = build_store(str(tmp_path / "deep.zarr"), scenes(), bits=16)
    stream = stream_of(path, crop_size=(40, 64), needs=("true_prob",))
    batch = next(iter(make_loader(stream, batch_size=4)))
    assert batch["true_prob_code"].dtype == torch.uint16
    expected = batch["label"].int()
    expected[expected == 255] = 65535
    assert torch.equal(batch["true_prob_code"].int(), expected)


def test_memory_for_maps_changes_nothing(store):
    kept, windowed = stream_of(store), stream_of(store, ram_budget=0)
    for k in range(12):
        assert_same(kept[k], windowed[k])
    for k in range(12):  # now from memory
        assert_same(kept[k], windowed[k])


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    stream = stream_of(length=6 * IMAGES)
    order = [int(stream[k]["index"]) for k in range(len(stream))]
    epochs = [tuple(order[e * IMAGES : (e + 1) * IMAGES]) for e in range(6)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len(set(epochs)) > 3
    other = stream_of(length=6 * IMAGES, seed=4)
    assert order != [other.image_index(k) for k in range(len(other))]


def test_shards_come_one_after_another_through_a_buffer():
    shards = np.repeat(np.random.default_rng(1).permutation(60), 5)  # 300 images, rows in any order
    for buffer in (1, 20):
        order = shard_order(np.random.default_rng(0), shards, buffer)
        np.testing.assert_array_equal(np.sort(order), np.arange(300))
        met = shards[order]
        touched = [len(set(met[first : first + 50])) for first in range(251)]
        assert max(touched) <= -(-(50 + 2 * buffer) // 5) + 1
        runs = 1 + np.count_nonzero(np.diff(met))
        assert runs == 60 if buffer == 1 else runs > 200
    other = shard_order(np.random.default_rng(2), shards, 20)
    assert list(dict.fromkeys(shards[other])) != list(dict.fromkeys(met))
    everywhere = shard_order(np.random.default_rng(0), shards, 10_000)
    assert len(set(shards[everywhere][:50])) > 25


def test_epochs_by_shards_show_every_image_once(store):
    settings = {"shuffle": "shards", "shuffle_buffer": 1, "length": 5 * IMAGES}
    stream = stream_of(store, **settings)  # shards of 4 and 2 images
    plain = stream_of(shard_images=4, **settings)
    epochs = set()
    for epoch in range(5):
        order = [stream.image_index(epoch * IMAGES + place) for place in range(IMAGES)]
        assert sorted(order) == list(range(IMAGES))
        assert np.count_nonzero(np.diff([index // 4 for index in order])) == 1
        # Students with and without maps meet the images in the same order.
        assert order == [plain.image_index(epoch * IMAGES + place) for place in range(IMAGES)]
        epochs.add(tuple(order))
    assert len(epochs) == 5


def test_jitter_changes_the_image_inside_and_nothing_else(store):
    settings = {"crop_size": (40, 64), "scale": (0.5, 1.5)}
    plain, jittered = stream_of(store, **settings), stream_of(store, jitter=_JITTER, **settings)
    again = stream_of(store, jitter=_JITTER, **settings)
    neutral = stream_of(store, jitter=JitterConfig(), **settings)
    fill = torch.tensor(IMAGE_FILL, dtype=torch.uint8)[:, None]
    differences = set()
    for k in (7, 0, 3, 12):
        before, after = plain[k], jittered[k]
        assert_same(after, again[k])
        assert_same(before, neutral[k])
        change = after["image"].int() - before["image"].int()
        differences.add(float(change.float().mean()))
        padding = (before["image"] == fill[..., None]).all(0)
        assert (after["image"][:, padding] == fill).all()
        assert change[:, ~padding].abs().float().mean() > 2
        assert_same(before | {"image": after["image"]}, after)
    assert len(differences) == 4


def test_an_image_is_cropped_anew_in_each_epoch():
    stream = stream_of(dataset=scenes(images=1))
    images = [stream[k]["image"].numpy().tobytes() for k in range(8)]
    assert len(set(images)) == 8


def test_samples_depend_on_the_position_alone(store):
    in_order = stream_of(store)
    samples = [in_order[k] for k in range(20)]
    jumping = stream_of(store)
    for k in (13, 2, 19, 0):
        assert_same(jumping[k], samples[k])


def test_workers_and_the_start_change_nothing(store):
    stream = stream_of(store, jitter=_JITTER, shuffle="shards", shuffle_buffer=2)
    state = torch.get_rng_state()
    plain = list(make_loader(stream, batch_size=4))
    parallel = list(make_loader(stream, batch_size=4, workers=2))
    resumed = list(make_loader(stream, batch_size=4, start=24, workers=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(plain) == len(parallel) == 10
    assert len(resumed) == 4
    for first, second in zip(plain, parallel, strict=True):
        assert_same(first, second)
    for first, second in zip(plain[6:], resumed, strict=True):
        assert_same(first, second)
    assert plain[0]["image"].shape == (4, 3, 24, 40)
    assert plain[0]["image"].is_contiguous()
    assert plain[0]["index"].dtype == torch.int64


def test_processes_share_the_batches_of_one(store):
    stream = stream_of(store, length=26)
    whole = list(make_loader(stream, batch_size=4, start=2))
    parts = [
        list(make_loader(stream, batch_size=2, start=2, rank=rank, processes=2)) for rank in (0, 1)
    ]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 6
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = {key: torch.cat([first[key], second[key]]) for key in first}
        assert_same(batch, joined)


def test_an_incomplete_last_batch_is_left_out():
    assert len(make_loader(stream_of(length=11), batch_size=4)) == 2
    assert len(make_loader(stream_of(length=11), batch_size=4, start=9)) == 0


def test_pickling_leaves_caches_behind(store):
    stream = stream_of(store)
    expected = stream[3]
    size = len(pickle.dumps(stream))
    for k in range(12):
        stream[k]
    assert len(pickle.dumps(stream)) == size
    assert_same(pickle.loads(pickle.dumps(stream))[3], expected)


def test_a_store_of_other_images_is_refused(store):
    with pytest.raises(StoreMismatchError, match=r"data\.seed.*(\n.*)*train-000005"):
        stream_of(store, dataset=scenes(seed=1))


def test_images_without_maps_are_left_out_only_if_asked(store):
    more = scenes(images=IMAGES + 30)
    with pytest.raises(StoreMismatchError) as caught:
        stream_of(store, dataset=more)
    message = str(caught.value)
    assert "all 36 images" in message
    assert "found none of these 30:" in message
    assert message.count("\n  train-") == 20
    assert "... and 10 more" in message
    assert "rdd maps build CONFIG" in message
    assert "student.allow_missing: true" in message
    stream = stream_of(store, dataset=more, allow_missing=True, length=3 * IMAGES)
    assert stream.images == IMAGES
    whole = stream_of(store, length=3 * IMAGES)
    for k in range(3 * IMAGES):
        assert_same(stream[k], whole[k])
    changed = ["0" * 64, *dataset_digests(more)[1:]]
    with pytest.raises(StoreMismatchError, match=r"train-000000.*has changed"):
        stream_of(store, dataset=more, allow_missing=True, digests=changed)


def test_a_part_of_the_stored_images_may_be_used(store):
    assert weight_of(stream_of(store, dataset=scenes(images=2))[0]).shape == (24, 40)


def test_an_expected_identity_is_compared(store):
    identity = MapReader(store).identity
    stream_of(store, identity=identity)
    with pytest.raises(StoreMismatchError, match="teacher"):
        stream_of(store, identity={**identity, "teacher": "b"})


def test_known_digests_are_not_computed_again(store):
    dataset = scenes()
    digests = dataset_digests(dataset)
    calls = []
    stream_of(store, progress=calls.append)
    assert calls == [1] * IMAGES
    calls.clear()
    stream_of(store, digests=digests, progress=calls.append)
    assert calls == []
    with pytest.raises(StoreMismatchError, match="train-000000"):
        stream_of(store, digests=["0" * 64, *digests[1:]])


def test_missing_arrays_say_how_to_add_them(tmp_path):
    path = build_store(str(tmp_path / "lean.zarr"), scenes(), logits=False, aux=False)
    with pytest.raises(UnknownArrayError) as caught:
        stream_of(path)
    message = str(caught.value)
    assert "aux_hardness, logits" in message
    assert "maps.aux_hardness: true and maps.soft_labels: true" in message
    assert set(stream_of(path, needs=("weight",))[0]) == {
        *("image", "label", "index"),
        *("weight_field", "weight_rows", "weight_columns"),
    }


def test_contradictory_arguments_are_refused(store):
    with pytest.raises(ValueError, match=r"reader: needed for weight, .* got None"):
        stream_of(needs=_NEEDS)
    with pytest.raises(ValueError, match="grid_size"):
        stream_of(store, grid_size=None)
    with pytest.raises(ValueError, match="needs: expected some of weight"):
        stream_of(store, needs=("hardness",))
    with pytest.raises(ConfigError, match="seed"):
        stream_of(seed=-1)
    with pytest.raises(ValueError, match="rank"):
        make_loader(stream_of(), batch_size=2, rank=1)
    with pytest.raises(DataError, match="no images"):
        stream_of(dataset=scenes(images=0))
    with pytest.raises(IndexError, match="below 40, got 40"):
        stream_of()[40]


def test_files_of_different_sizes_and_one_that_changes(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = tmp_path / "train", tmp_path / "trainannot"
    images.mkdir()
    labels.mkdir()
    for name, size in (("a", (20, 30)), ("b", (41, 26))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(images / f"{name}.png")
        Image.fromarray(rng.integers(0, 11, size, np.uint8)).save(labels / f"{name}.png")
    dataset = build_dataset(CamVidData(root=tmp_path), "train")
    stream = stream_of(dataset=dataset, flip=0.0)
    batch = next(iter(make_loader(stream, batch_size=4)))
    assert batch["image"].shape == (4, 3, 24, 40)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / f"{name}.png")
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(labels / f"{name}.png")
    with pytest.raises(ImageReadError, match="has changed") as caught:
        stream[4]
    assert "position 4" in caught.value.__notes__[0]
