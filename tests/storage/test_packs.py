"""Packs are stores like those of maps: built, resumed, grown, verified and mended alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from rdd_storage import (
    ImageRecord,
    MapReader,
    MapWriter,
    PackedImage,
    PackReader,
    PackSchema,
    PackWriter,
    ShardDataError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    UnknownArrayError,
    find_store,
    find_stores,
    list_stores,
    remove_store,
    remove_version,
    repair_store,
    store_status,
    verify_store,
)
from rdd_storage.location import locate

# Chunks that cut the images into uneven parts, the last of them padded.
SCHEMA = PackSchema(
    num_classes=3,
    class_names=("road", "side walk", "sky"),
    height=21,
    width=29,
    shard_images=2,
    chunk_height=12,
    chunk_width=16,
)
IDENTITY = {"data": "arithmetic"}


def records(count: int = 5) -> list[ImageRecord]:
    """Images of different sizes; the first has the largest."""
    return [
        ImageRecord(
            image_id=f"scene/{i}", height=21 - i % 3, width=29 - 3 * (i % 2), digest=f"{i:064x}"
        )
        for i in range(count)
    ]


def image_of(record: ImageRecord) -> PackedImage:
    """The same image for the same record; every value of a byte occurs."""
    rng = np.random.default_rng(int(record.digest, 16))
    label = rng.integers(0, 4, (record.height, record.width), dtype=np.uint8)
    return PackedImage(
        image_id=record.image_id,
        rgb=rng.integers(0, 256, (record.height, record.width, 3), dtype=np.uint8),
        label=np.where(label == 3, 255, label).astype(np.uint8),
    )


def plan(path: str | Path, images: list[ImageRecord], **options: Any) -> PackWriter:
    return PackWriter.create(path, schema=SCHEMA, images=images, identity=IDENTITY, **options)


def build(path: str | Path, images: list[ImageRecord] | None = None) -> PackWriter:
    """Build or extend what is missing and publish."""
    writer = plan(path, records() if images is None else images, grow=True)
    for shard in writer.pending_shards():
        writer.write_shard(shard, [image_of(r) for r in writer.shard_records(shard)])
    writer.publish()
    return writer


def contents(path: str) -> dict[str, bytes | None]:
    location = locate(path)
    return {key: location.get(key) for key, _ in location.list_sizes() if "lease" not in key}


def assert_holds(path: str | Path, images: list[ImageRecord]) -> None:
    reader = PackReader(path)
    assert sorted(reader.image_ids) == sorted(record.image_id for record in images)
    for record in images:
        image = image_of(record)
        rows, columns = slice(3, 18), slice(5, 26)
        for array, values in (("rgb", image.rgb), ("label", image.label)):
            read, part = reader.read_many(
                [(array, image.image_id, None), (array, image.image_id, (rows, columns))]
            )
            np.testing.assert_array_equal(read, values)
            np.testing.assert_array_equal(part, values[rows, columns])
            assert part.flags.c_contiguous
    for shard in reader.iter_shards(["rgb"]):
        for name, values in zip(shard.image_ids, shard.maps["rgb"], strict=True):
            np.testing.assert_array_equal(values, reader.read("rgb", name))


class TestContract:
    def test_a_pack_is_the_same_everywhere(self, place: str, tmp_path: Path) -> None:
        path = f"{place}/p.zarr"
        build(path)
        build(tmp_path / "local.zarr")
        assert_holds(path, records())
        assert contents(path) == contents(str(tmp_path / "local.zarr"))
        assert verify_store(path).ok
        status = store_status(path)
        assert (status.kind, status.images_done, status.shards_done) == ("pack", 5, 3)
        assert {"rgb", "label"} < set(status.arrays)
        assert "statistics" not in status.arrays
        assert [item.path for item in list_stores(place)] == [path]
        assert remove_store(path) > 0
        assert list_stores(place) == []

    def test_an_interrupted_build_goes_on(self, place: str) -> None:
        path = f"{place}/p.zarr"
        first = plan(path, records())
        first.write_shard(1, [image_of(record) for record in first.shard_records(1)])
        reader = PackReader(path)
        np.testing.assert_array_equal(reader.read("rgb", "scene/2"), image_of(records()[2]).rgb)
        with pytest.raises(StoreIncompleteError, match="'rdd data pack CONFIG'"):
            reader.read("rgb", "scene/0")
        assert plan(path, records()).pending_shards() == [0, 2]
        build(path)
        assert_holds(path, records())

    def test_images_are_added_changed_and_removed(self, place: str) -> None:
        path = f"{place}/p.zarr"
        build(path)
        shard = locate(path).get("rgb/c/0/0/0/0")
        grown = records(7)
        grown[3] = replace(grown[3], digest=f"{99:064x}")
        del grown[1]
        writer = build(path, grown)
        assert writer.version == 2
        assert verify_store(path).ok
        assert locate(path).get("rgb/c/0/0/0/0") == shard
        np.testing.assert_array_equal(
            PackReader(path, version=1).read("label", "scene/3"), image_of(records()[3]).label
        )
        remove_version(path, 1)
        assert_holds(path, grown)

    def test_damage_is_found_and_mended(self, place: str) -> None:
        path = f"{place}/p.zarr"
        build(path)
        location = locate(path)
        sound = contents(path)
        data = bytearray(location.get("rgb/c/1/0/0/0") or b"")
        data[len(data) // 3] ^= 4
        location.put("rgb/c/1/0/0/0", bytes(data))
        location.delete("label/c/2/0/0")
        assert {(d.array, d.shard) for d in verify_store(path).damages} == {
            ("rgb", 1),
            ("label", 2),
        }
        with pytest.raises(StoreDamagedError, match="label of image scene/4"):
            PackReader(path).read("label", "scene/4")
        assert repair_store(path).reopened == (1, 2)
        assert PackReader(path).read("rgb", "scene/0").shape == (21, 29, 3)
        build(path)
        assert contents(path) == sound


def test_a_lost_image_of_an_earlier_version_stays_lost(tmp_path: Path) -> None:
    """All values of a byte are pixels: that an image was never written must be told otherwise."""
    path = tmp_path / "p.zarr"
    build(path)
    build(path, [replace(records()[0], digest=f"{99:064x}"), *records()[1:]])
    shard = path / "rgb" / "c" / "0" / "0" / "0" / "0"
    for _ in range(2):  # the second time, the chunks that are missing are not taken for black
        content = bytearray(shard.read_bytes())
        content[20] ^= 1
        shard.write_bytes(content)
        assert repair_store(path).reopened == (0,)
        build(path, [replace(records()[0], digest=f"{99:064x}"), *records()[1:]])
        assert PackReader(path).read("rgb", "scene/1").shape == (20, 26, 3)
        with pytest.raises(StoreDamagedError, match="rgb of image scene/0"):
            PackReader(path, version=1).read("rgb", "scene/0")


def test_stores_of_maps_and_packs_are_told_apart(
    building: ModuleType, own_store: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "p.zarr"
    build(pack)
    for use in (MapReader, MapWriter.open):
        with pytest.raises(StoreMismatchError, match=r"expected a store of maps.*rdd data pack"):
            use(pack)
    for use in (PackReader, PackWriter.open):
        with pytest.raises(StoreMismatchError, match=r"expected a store of images.*rdd maps build"):
            use(own_store)
    with pytest.raises(StoreMismatchError, match="expected a store of maps"):
        MapWriter.create(pack, schema=building.SCHEMA, images=building.records(), identity=IDENTITY)
    assert find_store(tmp_path).path == str(own_store)
    assert [store.path for store in find_stores(tmp_path, kind="pack")] == [str(pack)]
    assert len(find_stores(tmp_path, kind=None)) == 2
    remove_store(own_store)
    with pytest.raises(StoreNotFoundError, match="no map store below it"):
        find_store(tmp_path)


def test_a_kind_of_later_versions_asks_for_an_upgrade(tmp_path: Path) -> None:
    build(tmp_path / "p.zarr")
    root = tmp_path / "p.zarr" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["rdd"]["schema"]["kind"] = "features"
    root.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="got 'features'; upgrade rdd-maps"):
        PackReader(tmp_path / "p.zarr")


def test_what_does_not_fit_is_refused(building: ModuleType, tmp_path: Path) -> None:
    writer = plan(tmp_path / "p.zarr", records())
    good = [image_of(record) for record in writer.shard_records(0)]
    wrong = {
        r"rgb: expected shape \(21, 29, 3\)": replace(good[0], rgb=good[0].rgb[1:]),
        "rgb: expected dtype uint8": replace(good[0], rgb=good[0].rgb.astype(np.float32)),
        "label: expected values 0 to 2 or 255, got 3": replace(
            good[0], label=np.full_like(good[0].label, 3)
        ),
        "expected PackedImage, got ImageMaps": building.maps_of(building.records()[0]),
    }
    for message, item in wrong.items():
        with pytest.raises(ShardDataError, match=f"image scene/0: {message}"):
            writer.write_shard(0, [item, good[1]])
    assert writer.pending_shards() == [0, 1, 2]
    with pytest.raises(StoreFormatError, match="width: expected 1 to 29"):
        plan(tmp_path / "q.zarr", [replace(records()[0], width=30)])
    with pytest.raises(StoreFormatError, match="at most 254"):
        replace(SCHEMA, num_classes=255, class_names=("x",) * 255)
    build(tmp_path / "p.zarr")
    with pytest.raises(UnknownArrayError, match="expected one of rgb, label"):
        PackReader(tmp_path / "p.zarr").read("hardness", "scene/0")


def test_plain_zarr_and_xarray_show_the_images(tmp_path: Path) -> None:
    """Warnings are errors here; an object that Zarr does not recognise would warn."""
    build(tmp_path / "p.zarr")
    group = zarr.open_group(tmp_path / "p.zarr", mode="r", use_consolidated=False)
    assert {"rgb", "label", "done", "versions/000001"} <= {n for n, _ in group.members(None)}
    dataset = xarray.open_zarr(tmp_path / "p.zarr")
    assert set(dataset.data_vars) == {"rgb", "label"}
    image = dataset.sel(image="scene/4")
    assert image.rgb.dims == ("y", "x", "channel")
    np.testing.assert_array_equal(
        image.rgb.values[: int(image.height), : int(image.width)], image_of(records()[4]).rgb
    )
    assert (image.label.values[int(image.height) :] == 255).all()
