import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import CamVidData
from rdd_pipeline.data import SyntheticDataset, build_dataset, dataset_digests
from rdd_pipeline.data.geometry import CropWindow, covered_points, random_crop, source_coordinates
from rdd_pipeline.errors import ConfigError, DataError, ImageReadError
from rdd_pipeline.stream import MapStream, make_loader
from rdd_storage import (
    ImageMaps,
    ImageRecord,
    MapReader,
    MapSchema,
    MapWriter,
    StoreMismatchError,
    UnknownArrayError,
    encode_logits,
)

_SIZE = (32, 48)
_GRID = (5, 7)
_IMAGES = 6
_NEEDS = ("weight", "true_prob", "aux_true_prob", "logits")


def scenes(images=_IMAGES, seed=0):
    return SyntheticDataset(
        split="train", images=images, height=_SIZE[0], width=_SIZE[1], seed=seed
    )


def plane(index):
    """A weight that is linear in both axes, so that interpolation gives it back exactly."""
    rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in _GRID), indexing="ij")
    return 0.2 + 0.3 * rows + 0.4 * columns + 0.01 * index


def maps_of(dataset, index, *, logits=True, aux=True, dtype=np.uint8):
    """Maps that can be recognised: the codes are the label, the weight is a plane."""
    sample = dataset[index]
    codes = sample.label.astype(dtype)
    codes[sample.label == 255] = np.iinfo(dtype).max
    rng = np.random.default_rng(index)
    return ImageMaps(
        image_id=sample.image_id,
        discrepancy=-np.log(plane(index)).astype(np.float32),
        hardness=codes,
        aux_hardness=codes if aux else None,
        prediction=np.zeros_like(sample.label),
        confidence=np.zeros_like(sample.label),
        logits=encode_logits(rng.normal(size=(8, *_GRID)).astype(np.float32)) if logits else None,
        label=sample.label,
    )


def build_store(path, dataset, *, logits=True, aux=True, bits=8):
    records = [
        ImageRecord(
            image_id=image_id,
            height=_SIZE[0],
            width=_SIZE[1],
            grid_height=_GRID[0],
            grid_width=_GRID[1],
            digest=digest,
        )
        for image_id, digest in zip(dataset.image_ids, dataset_digests(dataset), strict=True)
    ]
    schema = MapSchema(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        height=_SIZE[0],
        width=_SIZE[1],
        grid_height=_GRID[0],
        grid_width=_GRID[1],
        output_stride=8,
        shard_images=4,
        hardness_bits=bits,
        aux_hardness=aux,
        logits=logits,
    )
    identity = {"data": dataset.identity(), "teacher": "a"}
    writer = MapWriter.create(path, schema=schema, images=records, identity=identity)
    dtype = np.uint8 if bits == 8 else np.uint16
    for shard in writer.pending_shards():
        rows = writer.shard_rows(shard)
        writer.write_shard(
            shard,
            [maps_of(dataset, row, logits=logits, aux=aux, dtype=dtype) for row in rows],
        )
    writer.publish()
    return path


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
        "weight": (torch.float32, (24, 40)),
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
    for index in range(_IMAGES):
        window = random_crop(
            np.random.default_rng(index),
            source_size=_SIZE,
            crop_size=(24, 40),
            scale=(0.5, 2.0),
            flip=0.5,
        )
        weight = stream.sample(index, window)["weight"].numpy()
        rows, _ = source_coordinates(window, 0)
        columns, _ = source_coordinates(window, 1)
        expected = (
            0.2
            + 0.3 * rows[:, None] / (_SIZE[0] - 1)
            + 0.4 * columns / (_SIZE[1] - 1)
            + 0.01 * index
        )
        covered = covered_points(window)
        # The store keeps the discrepancy as float16.
        np.testing.assert_allclose(weight[covered], expected[covered], atol=1e-3)
        assert (weight[~covered] == 1.0).all()


def test_logits_are_the_stored_ones_at_the_grid_points(store):
    stream = stream_of(store, crop_size=_SIZE, grid_size=_GRID)
    stored = MapReader(store).read("logits", scenes().image_ids[2])
    for flip in (False, True):
        window = CropWindow(
            source_size=_SIZE, scaled_size=_SIZE, offset=(0, 0), crop_size=_SIZE, flip=flip
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
    assert (sample["weight"][padded] == 1.0).all()
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
    stream = stream_of(length=6 * _IMAGES)
    order = [int(stream[k]["index"]) for k in range(len(stream))]
    epochs = [tuple(order[e * _IMAGES : (e + 1) * _IMAGES]) for e in range(6)]
    assert all(sorted(epoch) == list(range(_IMAGES)) for epoch in epochs)
    assert len(set(epochs)) > 3
    other = stream_of(length=6 * _IMAGES, seed=4)
    assert order != [other.image_index(k) for k in range(len(other))]


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
    stream = stream_of(store)
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


def test_images_that_the_store_lacks_are_listed(store):
    with pytest.raises(StoreMismatchError) as caught:
        stream_of(store, dataset=scenes(images=_IMAGES + 2))
    assert "train-000006" in str(caught.value)
    assert "train-000007" in str(caught.value)
    assert "train-000005" not in str(caught.value)


def test_a_part_of_the_stored_images_may_be_used(store):
    assert stream_of(store, dataset=scenes(images=2))[0]["weight"].shape == (24, 40)


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
    assert calls == [1] * _IMAGES
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
    assert set(stream_of(path, needs=("weight",))[0]) == {"image", "label", "index", "weight"}


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
