from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

from rdd_storage import (
    ImageRecord,
    MapReader,
    MapWriter,
    ShardDataError,
    StoreDamagedError,
    StoreFormatError,
    StoreMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
    merge_statistics,
    store_status,
    verify_store,
)
from rdd_storage.location import locate

MAPS = ("discrepancy", "hardness", "aux_hardness", "prediction", "confidence", "logits")


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "s.zarr")
    return f"memory://{tmp_path.name}/s.zarr"


def changed(record: ImageRecord) -> ImageRecord:
    return replace(record, digest=f"{1000 + int(record.digest, 16):064x}")


def second(building: ModuleType) -> list[ImageRecord]:
    """Version 2: scene/1 is removed, scene/2 changed, scene/5 to scene/7 are new."""
    records = building.records(8)
    return [records[0], changed(records[2]), *records[3:]]


def grow(
    building: ModuleType, path: str | Path, images: Sequence[ImageRecord], *, publish: bool = True
) -> MapWriter:
    writer = MapWriter.extend(path, images=images, identity=building.IDENTITY)
    with writer.lease():
        for shard in writer.pending_shards():
            write(building, writer, shard)
        if publish:
            writer.publish()
    return writer


def write(building: ModuleType, writer: MapWriter, shard: int) -> None:
    writer.write_shard(shard, [building.maps_of(record) for record in writer.shard_records(shard)])


def assert_reads(building: ModuleType, reader: MapReader, images: Sequence[ImageRecord]) -> None:
    """The reader has these images and no others, with the maps that belong to each."""
    assert {record.image_id: record for record in reader.records} == {
        record.image_id: record for record in images
    }
    whole = {
        (name, image_id): values
        for shard in reader.iter_shards()
        for name, arrays in shard.maps.items()
        for image_id, values in zip(shard.image_ids, arrays, strict=True)
    }
    for record in images:
        maps = building.maps_of(record)
        for name in MAPS:
            expected = getattr(maps, name)
            if name == "discrepancy":
                expected = expected.astype(np.float16)
            np.testing.assert_array_equal(reader.read(name, record.image_id), expected)
            np.testing.assert_array_equal(whole[name, record.image_id], expected)


def map_objects(path: str) -> dict[str, bytes | None]:
    location = locate(path)
    keys = [
        key
        for name in (*MAPS, "done", "statistics/confusion", "statistics/sums")
        for key, _ in location.list_sizes(f"{name}/c")
    ]
    return dict(zip(keys, location.get_many(keys), strict=True))


def test_a_new_version_keeps_what_has_not_changed(building: ModuleType, place: str) -> None:
    building.build(place)
    first = building.records()
    before, opened_before = map_objects(place), MapReader(place)
    writer = MapWriter.extend(place, images=second(building))
    assert writer.growth is not None
    assert str(writer.growth) == "3 added, 1 changed, 1 removed, 3 kept"
    assert writer.growth.added == ("scene/5", "scene/6", "scene/7")
    assert (writer.growth.changed, writer.growth.removed) == (("scene/2",), ("scene/1",))
    assert (writer.version, writer.complete) == (2, False)
    # Five rows of version 1 end in shard 2; the new ones begin with shard 3.
    assert writer.pending_shards() == [3, 4]
    assert [r.image_id for r in writer.shard_records(3)] == ["scene/2", "scene/5"]
    assert writer.shard_records(0) == (first[0],)
    write(building, writer, 3)
    status = store_status(place)
    assert (status.version, status.images, status.images_done) == (1, 5, 5)
    assert status.growth is not None
    assert (status.growth.version, status.growth.images, status.growth.images_done) == (2, 7, 5)
    assert MapReader(place).version == 1
    write(building, writer, 4)
    writer.publish()
    assert writer.complete

    assert before.items() <= map_objects(place).items()
    assert_reads(building, MapReader(place), second(building))
    assert_reads(building, opened_before, first)
    assert_reads(building, MapReader(place, version=1), first)
    assert (opened_before.version, MapReader(place).version) == (1, 2)
    status = store_status(place)
    assert (status.version, status.versions, status.rows_retired) == (2, (1, 2), 2)
    assert (status.images, status.images_done, status.growth) == (7, 7, None)
    report = verify_store(place)
    assert report.ok, [str(damage) for damage in report.damages]


def test_plain_zarr_sees_one_version_until_the_root_is_replaced(
    building: ModuleType, own_store: Path
) -> None:
    opened_before = zarr.open_group(own_store, mode="r")
    root = (own_store / "zarr.json").read_bytes()
    grow(building, own_store, second(building), publish=False)
    group = zarr.open_group(own_store, mode="r")
    assert group["hardness"].shape[0] == group["image"].shape[0] == 5
    assert group.attrs["rdd"]["version"] == 1
    # Whoever does not use the consolidated metadata sees no more than that either.
    assert zarr.open_array(own_store, path="hardness", mode="r").shape[0] == 5
    grow(building, own_store, second(building))
    assert (own_store / "zarr.json").read_bytes() != root
    group = zarr.open_group(own_store, mode="r")
    assert group["hardness"].shape[0] == group["image"].shape[0] == 10
    hardness = opened_before["hardness"]
    assert isinstance(hardness, zarr.Array)
    assert hardness.shape[0] == 5
    first = building.maps_of(building.records()[2])
    np.testing.assert_array_equal(hardness[2, :18], first.hardness)
    image = opened_before["image"]
    assert isinstance(image, zarr.Array)
    assert list(image[:]) == [record.image_id for record in building.records()]


def test_statistics_are_those_of_the_version(building: ModuleType, tmp_path: Path) -> None:
    path, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    building.build(path)
    grow(building, path, second(building))
    fresh = MapWriter.create(
        other, schema=building.SCHEMA, images=second(building), identity=building.IDENTITY
    )
    for shard in fresh.pending_shards():
        write(building, fresh, shard)
    fresh.publish()
    grown, direct = MapReader(path).statistics(), MapReader(other).statistics()
    np.testing.assert_array_equal(grown.hardness, direct.hardness)
    np.testing.assert_array_equal(grown.confusion, direct.confusion)
    by_name = dict(zip(grown.image_ids, grown.image_weight_sum, strict=True))
    assert by_name == dict(zip(direct.image_ids, direct.image_weight_sum, strict=True))
    first = MapReader(path, version=1).statistics()
    assert merge_statistics([first, grown]).confusion.sum() == (
        first.confusion.sum() + grown.confusion.sum()
    )


@pytest.mark.parametrize("order", [1, -1])
def test_without_a_change_nothing_is_written(
    building: ModuleType, own_store: Path, order: int
) -> None:
    before = {file: file.stat().st_mtime_ns for file in own_store.rglob("*")}
    writer = MapWriter.extend(own_store, images=building.records()[::order])
    assert writer.growth is not None
    assert writer.growth.empty
    assert str(writer.growth) == "no change (5 images)"
    assert (writer.version, writer.complete, writer.pending_shards()) == (1, True, [])
    writer.publish()
    assert {file: file.stat().st_mtime_ns for file in own_store.rglob("*")} == before


def test_an_interrupted_extension_resumes(building: ModuleType, own_store: Path) -> None:
    writer = MapWriter.extend(own_store, images=second(building))
    write(building, writer, 4)
    before = {file: file.read_bytes() for file in own_store.rglob("*") if file.is_file()}
    again = MapWriter.extend(own_store, images=second(building))
    assert {f: f.read_bytes() for f in own_store.rglob("*") if f.is_file()} == before
    assert again.pending_shards() == [3]
    write(building, again, 3)
    again.publish()
    assert_reads(building, MapReader(own_store), second(building))


def test_a_new_plan_keeps_what_an_interrupted_one_finished(
    building: ModuleType, own_store: Path
) -> None:
    writer = MapWriter.extend(own_store, images=second(building))
    write(building, writer, 3)  # scene/2 and scene/5
    # Meanwhile scene/6 is gone, scene/7 has changed, scene/1 is back and scene/8 is new.
    images = [r for r in second(building) if r.image_id not in ("scene/6", "scene/7")]
    images += [building.records(9)[1], changed(building.records(9)[7]), building.records(9)[8]]
    again = MapWriter.extend(own_store, images=images)
    assert again.pending_shards() == [5]
    assert again.shard_records(4) == ()
    assert [r.image_id for r in again.shard_records(5)] == ["scene/7", "scene/8"]
    with pytest.raises(StoreMismatchError, match="extend the store again"), writer.lease():
        pass
    write(building, writer, 4)
    with pytest.raises(StoreMismatchError, match="extend the store again"):
        writer.publish()
    with pytest.raises(ShardDataError, match="earlier versions alone"):
        again.write_shard(4, [])
    write(building, again, 5)
    again.publish()
    assert_reads(building, MapReader(own_store), images)
    assert_reads(building, MapReader(own_store, version=1), building.records())
    assert verify_store(own_store).ok


def test_a_row_never_changes_its_image(building: ModuleType, own_store: Path) -> None:
    """Also where plans are given up, damaged or follow each other."""
    rng = np.random.default_rng(3)
    pool = building.records(12)
    pool += [changed(record) for record in pool]
    images_of: dict[int, ImageRecord] = {}
    for attempt in range(16):
        chosen = rng.permutation(len(pool))[: rng.integers(1, 10)]
        images = list({pool[index].image_id: pool[index] for index in chosen}.values())
        writer = MapWriter.extend(own_store, images=images)
        publish = attempt % 3 == 2
        for shard in writer.pending_shards():
            if publish or rng.random() < 0.7:
                write(building, writer, shard)
        for entry in writer._manifest.entries:
            if entry.row // 2 not in writer.pending_shards():
                assert images_of.setdefault(entry.row, entry.record) == entry.record
        if publish:
            writer.publish()
            assert_reads(building, MapReader(own_store), images)
        elif attempt % 4 == 3:
            draft = own_store / f"versions/{writer.version:06d}/zarr.json"
            draft.write_bytes(draft.read_bytes()[:-7])
    assert verify_store(own_store).ok
    assert_reads(building, MapReader(own_store, version=1), building.records())


def test_an_unfinished_store_takes_another_list(building: ModuleType, place: str) -> None:
    writer = MapWriter.create(
        place, schema=building.SCHEMA, images=building.records(), identity=building.IDENTITY
    )
    write(building, writer, 0)
    images = building.records(7)[1:]
    writer = MapWriter.extend(place, images=images)
    assert (writer.version, writer.pending_shards()) == (1, [1, 2, 3])
    write(building, writer, 3)
    reader = MapReader(place)
    assert not reader.complete
    np.testing.assert_array_equal(
        reader.read("hardness", "scene/6"), building.maps_of(images[-1]).hardness
    )
    grow(building, place, images)
    assert_reads(building, MapReader(place), images)
    assert MapReader(place).version == 1
    assert verify_store(place).ok


def test_create_grows_where_it_may(building: ModuleType, own_store: Path) -> None:
    def create(images: list[ImageRecord], **changes: object) -> MapWriter:
        arguments = {"schema": building.SCHEMA, "identity": building.IDENTITY, "grow": True}
        return MapWriter.create(own_store, images=images, **(arguments | changes))

    assert create(building.records()).complete
    assert create(building.records()[::-1]).complete
    # The largest image has left the data set: the arrays keep their size.
    images = [record for record in building.records() if record.height < 20]
    writer = create(images, schema=replace(building.SCHEMA, height=19))
    assert writer.version == 2
    writer.publish()
    assert MapReader(own_store).image_ids == ("scene/1", "scene/2", "scene/4")
    with pytest.raises(StoreMismatchError, match=r"schema\.logits"):
        create(second(building), schema=replace(building.SCHEMA, logits=False))
    with pytest.raises(StoreMismatchError, match="data: expected other, found arithmetic"):
        create(second(building), identity=building.IDENTITY | {"data": "other"})


def test_what_cannot_grow(building: ModuleType, own_store: Path, tmp_path: Path) -> None:
    larger = replace(building.records(6)[5], height=21)
    with pytest.raises(StoreFormatError, match=r"image scene/5: height: .*got 21") as caught:
        MapWriter.extend(own_store, images=[*building.records(), larger])
    assert "build a new one" in caught.value.__notes__[0]
    with pytest.raises(StoreFormatError, match="used twice"):
        MapWriter.extend(own_store, images=building.records() * 2)
    with pytest.raises(StoreFormatError, match="at least one image"):
        MapWriter.extend(own_store, images=[])
    with pytest.raises(StoreMismatchError, match="data: expected x, found arithmetic"):
        MapWriter.extend(own_store, images=second(building), identity={"data": "x"})
    with pytest.raises(StoreNotFoundError):
        MapWriter.extend(tmp_path / "nothing", images=second(building))
    assert not (tmp_path / "nothing").exists()
    assert store_status(own_store).growth is None


def test_versions_are_checked(building: ModuleType, own_store: Path) -> None:
    with pytest.raises(UnknownVersionError, match=r"versions \(1\), got 2"):
        MapReader(own_store, version=2)
    MapWriter.extend(own_store, images=second(building))
    with pytest.raises(UnknownVersionError, match="still being built"):
        MapReader(own_store, version=2)
    grow(building, own_store, second(building))
    manifest = own_store / "versions/000001/zarr.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"scene/3", b"scene/9"))
    with pytest.raises(StoreFormatError, match="expected SHA-256"):
        MapReader(own_store, version=1)
    assert_reads(building, MapReader(own_store), second(building))
    damages = verify_store(own_store).damages
    assert [damage.key for damage in damages] == ["versions/000001/zarr.json"]


def test_a_plan_that_changed_on_the_disk_is_not_published(
    building: ModuleType, own_store: Path
) -> None:
    writer = grow(building, own_store, second(building), publish=False)
    draft = own_store / "versions/000002/zarr.json"
    draft.write_bytes(draft.read_bytes().replace(b"scene/3", b"scene/9"))
    with pytest.raises(StoreDamagedError, match="versions/000002"):
        writer.publish()
    assert MapReader(own_store).version == 1


PLAIN = """
import sys, warnings
sys.modules["rdd_storage"] = None  # any import of it fails
warnings.simplefilter("error")
import xarray
for version, expected in ((1, sys.argv[2]), (2, sys.argv[3])):
    ds = xarray.open_zarr(sys.argv[1], chunks={"image": 2, "y": -1, "x": -1})
    assert ds.attrs["rdd"]["version"] == 2 and ds.sizes["image"] == 10
    current = (ds.first_version <= version) & (version <= ds.last_version)
    ds = ds.isel(image=current.values)
    assert ",".join(ds.image.values) == expected, list(ds.image.values)
    assert bool(ds.done.all()) and (ds.height.values > 0).all()
    assert float(ds.hardness.sel(image="scene/2").mean()) > 0
"""


def test_xarray_tells_the_rows_of_each_version(building: ModuleType, own_store: Path) -> None:
    grow(building, own_store, second(building))
    rows = {
        version: ",".join(MapReader(own_store, version=version).image_ids) for version in (1, 2)
    }
    command = [sys.executable, "-c", PLAIN, str(own_store), rows[1], rows[2]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_readers_of_coordinates_find_old_chunks_where_they_were(
    building: ModuleType, own_store: Path
) -> None:
    """So a reader may fetch a shard's index before and a chunk after a publication."""
    before = {
        name: (own_store / name / "c" / "0").read_bytes()
        for name in ("image", "digest", "height", "first_version")
    }
    grow(building, own_store, second(building))
    for name, content in before.items():
        index = 16 * 256 + 4
        chunks = content[:-index]
        assert len(chunks) > 0
        assert (own_store / name / "c" / "0").read_bytes().startswith(chunks)
