"""Logits that are added to a store built without them."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

from rdd_storage import (
    ImageLogits,
    MapAddition,
    MapReader,
    MapWriter,
    ShardDataError,
    StoreIncompleteError,
    StoreLockedError,
    StoreMismatchError,
    UnknownArrayError,
    find_store,
    remove_version,
    repair_store,
    store_status,
    verify_store,
)
from rdd_storage.location import locate
from rdd_storage.schema import ImageRecord, MapSchema


def lean_schema(building: ModuleType) -> MapSchema:
    return replace(building.SCHEMA, logits=False)


def build(building: ModuleType, writer: MapWriter) -> None:
    """Write the pending shards with the maps that the writer's schema has."""
    for shard in writer.pending_shards():
        maps = [building.maps_of(record) for record in writer.shard_records(shard)]
        if not writer.schema.logits:
            maps = [replace(item, logits=None) for item in maps]
        writer.write_shard(shard, maps)
    writer.publish()


def build_lean(building: ModuleType, path: str | Path) -> None:
    build(
        building,
        MapWriter.create(
            path,
            schema=lean_schema(building),
            images=building.records(),
            identity=building.IDENTITY,
        ),
    )


def second(building: ModuleType) -> list[ImageRecord]:
    """Version 2: scene/1 is removed, scene/2 changed, scene/5 to scene/7 are new."""
    records = building.records(8)
    return [records[0], replace(records[2], digest="f" * 64), *records[3:]]


def logits_of(building: ModuleType, writer: MapWriter, shard: int) -> list[ImageLogits]:
    return [
        ImageLogits(image_id=record.image_id, logits=building.maps_of(record).logits)
        for record in writer.shard_records(shard)
    ]


def add(building: ModuleType, path: str | Path, shards: int | None = None) -> MapAddition:
    """Add logits to the next shards, or to all of them, and publish then."""
    writer = MapAddition.plan(path)
    for shard in writer.pending_shards()[:shards]:
        writer.write_shard(shard, logits_of(building, writer, shard))
    if shards is None:
        writer.publish()
    return writer


def objects(path: str | Path) -> dict[str, bytes | None]:
    """Everything but root, manifests and lease."""
    location = locate(path)
    left_out = ("zarr.json", "lease", "versions")
    keys = [key for key, _ in location.list_sizes() if key.split("/")[0] not in left_out]
    return dict(zip(keys, location.get_many(keys), strict=True))


def assert_has_logits(building: ModuleType, reader: MapReader) -> None:
    for record in reader.records:
        np.testing.assert_array_equal(
            reader.read("logits", record.image_id), building.maps_of(record).logits
        )


def test_an_addition_is_the_store_that_had_them_at_once(
    building: ModuleType, place: str, store: Path
) -> None:
    path = f"{place}/added.zarr"
    build_lean(building, path)
    opened_before, before = MapReader(path), objects(path)

    writer = add(building, path, shards=1)
    assert (writer.version, writer.schema.logits, writer.complete) == (2, True, False)
    status = store_status(path)
    assert status.growth is not None
    assert (status.growth.adds, status.growth.images_done) == (("logits",), 2)
    assert (status.version, status.images_done, "logits" in status.arrays) == (1, 5, False)
    assert status.arrays["unfinished"] > 0
    assert verify_store(path).ok, "what is unfinished is no damage"
    assert not MapReader(path).schema.logits

    assert MapAddition.plan(path).pending_shards() == [1, 2]
    assert add(building, path).complete
    after = objects(path)
    assert after == objects(store)
    assert before.items() <= after.items()
    assert_has_logits(building, MapReader(path))
    report = verify_store(path)
    assert report.ok, [str(damage) for damage in report.damages]
    status = store_status(path)
    assert (status.versions, status.growth, status.arrays["logits"] > 0) == ((1, 2), None, True)

    for earlier in (opened_before, MapReader(path, version=1)):
        assert "logits" not in earlier.arrays
        assert not earlier.schema.logits
        assert earlier.read("hardness", "scene/0").shape == (20, 28)
        with pytest.raises(UnknownArrayError):
            earlier.read("logits", "scene/0")
    with pytest.raises(UnknownArrayError, match="a version from 2 on, which added it, got"):
        MapReader(path, version=1).read("logits", "scene/0")
    assert (MapReader(path).images_version, MapReader(path, version=1).images_version) == (1, 1)


def test_what_is_there_is_not_added_again(building: ModuleType, own_store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in own_store.rglob("*")}
    writer = add(building, own_store)
    assert (writer.version, writer.complete, writer.pending_shards()) == (1, True, [])
    assert {file: file.stat().st_mtime_ns for file in own_store.rglob("*")} == before


def test_plain_zarr_sees_logits_once_the_root_is_replaced(
    building: ModuleType, tmp_path: Path
) -> None:
    build_lean(building, tmp_path)
    add(building, tmp_path, shards=2)
    assert "logits" not in zarr.open_group(tmp_path, mode="r")
    add(building, tmp_path)
    logits = zarr.open_group(tmp_path, mode="r")["logits"]
    assert isinstance(logits, zarr.Array)
    assert np.isfinite(logits[0]).all()


def test_killed_additions_resume_to_the_same_bytes(
    building: ModuleType, tmp_path: Path, store: Path
) -> None:
    """Each process gets one change of the store further than the one before it."""
    path = tmp_path / "added.zarr"
    build_lean(building, path)
    script = Path(__file__).with_name("crash_additions.py")
    result = subprocess.run(
        [sys.executable, str(script), str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *killed, last = map(int, result.stdout.split())
    assert set(killed) == {-signal.SIGKILL}
    assert (last, len(killed) > 5) == (0, True)
    assert objects(path) == objects(store)
    assert MapReader(path).summary() is not None
    assert verify_store(path).ok


def test_one_build_at_a_time(building: ModuleType, tmp_path: Path) -> None:
    build_lean(building, tmp_path)
    writer = MapAddition.plan(tmp_path)
    with writer.lease():
        other = MapAddition.plan(tmp_path)
        with pytest.raises(StoreLockedError), other.lease():
            pass
    MapWriter.extend(tmp_path, images=second(building))
    with pytest.raises(StoreMismatchError, match="planned, published or removed"), writer.lease():
        pass
    for shard in writer.pending_shards():
        writer.write_shard(shard, logits_of(building, writer, shard))
    with pytest.raises(StoreMismatchError, match="planned, published or removed"):
        writer.publish()
    assert "logits" not in MapReader(tmp_path).arrays


def test_wrong_logits_are_refused_and_nothing_is_written(
    building: ModuleType, tmp_path: Path
) -> None:
    build_lean(building, tmp_path)
    writer = MapAddition.plan(tmp_path)
    good = logits_of(building, writer, 0)
    for wrong, message in (
        ([good[0]], "missing: .'scene/1'"),
        ([good[0], replace(good[1], logits=good[1].logits[:2])], "scene/1: logits: expected shape"),
        ([good[0], replace(good[1], logits=good[1].logits - np.float16(np.inf))], "finite values"),
    ):
        with pytest.raises(ShardDataError, match=message):
            writer.write_shard(0, wrong)
    assert not (tmp_path / "logits").exists()
    with pytest.raises(StoreIncompleteError, match="0, 1, 2"):
        writer.publish()


def test_an_unfinished_store_is_finished_first(building: ModuleType, tmp_path: Path) -> None:
    MapWriter.create(
        tmp_path, schema=lean_schema(building), images=building.records(), identity={"a": 1}
    )
    with pytest.raises(StoreIncompleteError, match="build the maps to their end first"):
        MapAddition.plan(tmp_path)


@pytest.fixture
def grown(building: ModuleType, tmp_path: Path) -> Path:
    """Two versions without logits; of shards 0 and 1 one row each is retired."""
    path = tmp_path / "grown.zarr"
    build_lean(building, path)
    build(building, MapWriter.extend(path, images=second(building)))
    return path


def test_retired_rows_have_none_and_work_on(building: ModuleType, grown: Path) -> None:
    opened_before = MapReader(grown, version=1)
    add(building, grown)
    assert_has_logits(building, MapReader(grown))
    assert MapReader(grown).images_version == 2
    report = verify_store(grown)
    assert report.ok, [str(damage) for damage in report.damages]
    for reader in (opened_before, MapReader(grown, version=1), MapReader(grown, version=2)):
        assert "logits" not in reader.arrays
        for record in reader.records:
            expected = building.maps_of(record).hardness
            np.testing.assert_array_equal(reader.read("hardness", record.image_id), expected)

    sound = objects(grown)
    for name in ("logits/c/0/0/0/0", "logits/c/3/0/0/0"):  # scene/0 beside the retired scene/1
        content = bytearray((grown / name).read_bytes())
        content[len(content) // 3] ^= 4
        (grown / name).write_bytes(content)
    (grown / "logits/zarr.json").unlink()
    assert {damage.shard for damage in verify_store(grown).damages} == {0, 3, None}
    report_of_repair = repair_store(grown)
    assert (report_of_repair.reopened, report_of_repair.restored) == ((0, 3), ("logits/zarr.json",))
    writer = MapWriter.open(grown)
    assert writer.pending_shards() == [0, 3]
    build(building, writer)
    assert objects(grown) == sound
    assert verify_store(grown).ok

    build(building, MapWriter.extend(grown, images=building.records(9)))
    assert (MapReader(grown).version, MapReader(grown).images_version) == (4, 4)
    assert_has_logits(building, MapReader(grown))
    assert_has_logits(building, MapReader(grown, version=3))
    assert verify_store(grown).ok


def test_growth_in_between_keeps_what_was_added(building: ModuleType, tmp_path: Path) -> None:
    build_lean(building, tmp_path)
    add(building, tmp_path, shards=2)
    kept = (tmp_path / "logits/c/0/0/0/0").read_bytes()
    build(building, MapWriter.extend(tmp_path, images=second(building)))
    assert (MapReader(tmp_path).version, MapReader(tmp_path).schema.logits) == (2, False)
    writer = MapAddition.plan(tmp_path)
    assert (writer.version, writer.pending_shards()) == (3, [2, 3, 4])
    add(building, tmp_path)
    assert (tmp_path / "logits/c/0/0/0/0").read_bytes() == kept
    assert_has_logits(building, MapReader(tmp_path))
    assert verify_store(tmp_path).ok


def test_a_plan_given_up_leaves_its_rows_alone(building: ModuleType, tmp_path: Path) -> None:
    build_lean(building, tmp_path)
    growing = MapWriter.extend(tmp_path, images=building.records(8))
    maps = [building.maps_of(record) for record in growing.shard_records(3)]
    growing.write_shard(3, [replace(item, logits=None) for item in maps])
    add(building, tmp_path)
    assert MapReader(tmp_path).version == 2
    assert verify_store(tmp_path).ok
    again = MapWriter.extend(tmp_path, images=building.records(8))
    assert again.pending_shards()[0] > 3
    build(building, again)
    assert_has_logits(building, MapReader(tmp_path))


def test_removal_takes_the_logits_with_their_version(building: ModuleType, grown: Path) -> None:
    add(building, grown, shards=2)
    remove_version(grown, 1)
    assert MapAddition.plan(grown).pending_shards() == [2, 3, 4], "unfinished work is kept"
    add(building, grown)
    assert remove_version(grown, 3, newest=True) > 0
    assert not list((grown / "logits").rglob("zarr.json"))
    assert not [file for file in (grown / "logits").rglob("*") if file.is_file()]
    reader = MapReader(grown)
    assert (reader.version, reader.schema.logits, "logits" in reader.arrays) == (2, False, False)
    assert verify_store(grown).ok
    assert add(building, grown).version == 4
    assert_has_logits(building, MapReader(grown))
    remove_version(grown, 2)
    assert_has_logits(building, MapReader(grown))
    assert verify_store(grown).ok


def test_a_store_with_the_maps_is_found(building: ModuleType, tmp_path: Path) -> None:
    build_lean(building, tmp_path / "lean.zarr")
    with pytest.raises(StoreMismatchError) as caught:
        find_store(tmp_path, arrays=["hardness", "logits"])
    text = str(caught.value)
    assert "lean.zarr" in text
    assert "expected the maps logits, found none" in text
    assert "'rdd maps build CONFIG --set maps.soft_labels=true' adds logits" in text
    add(building, tmp_path / "lean.zarr", shards=1)
    with pytest.raises(StoreMismatchError):
        find_store(tmp_path, arrays=["logits"])
    building.build(tmp_path / "full.zarr")
    assert find_store(tmp_path, arrays=["logits"]).path.endswith("full.zarr")
