from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    StoreDamagedError,
    StoreLockedError,
    StoreNotFoundError,
    StoreRemovalError,
    UnknownVersionError,
    remove_store,
    remove_version,
    repair_store,
    store_status,
    verify_store,
)

FLIPS = 300
KILLED_REPAIRS = 8
SUMMARY = "versions/000001/summary"


def contents(path: Path) -> dict[str, bytes]:
    return {
        name: file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not (name := file.relative_to(path).as_posix()).startswith("lease/")
    }


def second(building: ModuleType) -> list[ImageRecord]:
    """Version 2: scene/1 is removed, scene/2 changed, scene/5 to scene/7 are new."""
    records = building.records(8)
    return [records[0], replace(records[2], digest="f" * 64), *records[3:]]


def rebuild(building: ModuleType, writer: MapWriter) -> list[int]:
    pending = writer.pending_shards()
    with writer.lease():
        for shard in pending:
            writer.write_shard(shard, [building.maps_of(r) for r in writer.shard_records(shard)])
        writer.publish()
    return pending


def damaged_keys(path: Path) -> set[str]:
    return {damage.key for damage in verify_store(path).damages}


@pytest.fixture
def grown(building: ModuleType, own_store: Path) -> Path:
    """Shards 0 and 1 with two rows each, one of them retired; 2 with one; 3 and 4 are new."""
    rebuild(building, MapWriter.extend(own_store, images=second(building)))
    return own_store


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def spoil(file: Path) -> None:
    flip(file, 8 * (file.stat().st_size // 3))


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Everything that plain Zarr reads of the objects of a store."""
    group = zarr.open_group(path, mode="r")
    arrays = dict(group.arrays()) | {
        f"statistics/{name}": array for name, array in group["statistics"].arrays()
    }
    return {name: array[...] for name, array in arrays.items()}


def test_flipped_bits_are_found_or_harmless(grown: Path) -> None:
    """One bit in each data file, again and again, so that one look judges many flips."""
    rng = random.Random(5)
    files = sorted(f for f in grown.rglob("*") if f.is_file() and "/c/" in f.as_posix())
    sound, expected = contents(grown), decoded(grown)
    found = harmless = 0
    while found + harmless < FLIPS:
        for file in files:
            flip(file, rng.randrange(8 * file.stat().st_size))
        damaged = {damage.key for damage in verify_store(grown).damages}
        found += len(damaged)
        for file in files:
            name = file.relative_to(grown).as_posix()
            if name in damaged:
                file.write_bytes(sound[name])
        # What was not reported is all that is left of the damage: it must decode the same.
        harmless += len(files) - len(damaged)
        now = decoded(grown)
        for name, values in expected.items():
            np.testing.assert_array_equal(now[name], values, err_msg=name)
        for file in files:
            file.write_bytes(sound[file.relative_to(grown).as_posix()])
    assert found > 0.95 * FLIPS


def test_only_bad_shards_are_built_again(building: ModuleType, grown: Path) -> None:
    sound = contents(grown)
    spoil(grown / "hardness/c/3/0/0")
    (grown / "statistics/confusion/c/2/0/0").unlink()
    spoil(grown / "done/c/4")
    spoil(grown / "image/c/0")
    (grown / "last_version/c/0").unlink()
    (grown / "confidence/zarr.json").write_text("{}")
    document = json.loads((grown / "zarr.json").read_bytes())
    document["consolidated_metadata"]["metadata"]["hardness"]["shape"][0] = 3
    (grown / "zarr.json").write_text(json.dumps(document))
    report = repair_store(grown)
    assert report.reopened == (2, 3, 4)
    assert (report.lost, report.bytes_freed, len(report.damages)) == ((), 0, 7)
    assert set(report.restored) == {
        "image/c/0",
        "last_version/c/0",
        "confidence/zarr.json",
        "zarr.json",
    }
    # Still published: what is not damaged is read as before.
    reader = MapReader(grown)
    assert reader.read("hardness", "scene/0").shape == (20, 28)
    with pytest.raises(StoreDamagedError, match="verify the store"):
        reader.read("hardness", "scene/2")
    status = store_status(grown)
    assert (status.complete, status.shards, status.shards_done) == (True, 5, 2)
    times = {name: (grown / name).stat().st_mtime_ns for name in contents(grown)}
    assert rebuild(building, MapWriter.open(grown)) == [2, 3, 4]
    assert contents(grown) == sound
    rewritten = {n for n, time in times.items() if (grown / n).stat().st_mtime_ns != time}
    assert {name.split("/c/")[1].split("/")[0] for name in rewritten} == {"2", "3", "4"}
    assert repair_store(grown).damages == ()


def test_a_repair_keeps_the_images_of_earlier_versions(building: ModuleType, grown: Path) -> None:
    sound = contents(grown)
    shard = grown / "prediction/c/0/0/0"  # scene/0 and, of version 1 alone, scene/1
    flip(shard, 8 * 20)  # in the chunk of scene/0
    assert repair_store(grown).reopened == (0,)
    assert rebuild(building, MapWriter.open(grown)) == [0]
    assert contents(grown) == sound


def test_what_no_build_can_make_again_is_not_handed_out(building: ModuleType, grown: Path) -> None:
    shard = grown / "prediction/c/0/0/0"
    index = np.frombuffer(shard.read_bytes()[-36:-4], "<u8")
    flip(shard, 8 * int(index[2]) + 8 * int(index[3]) - 1)  # at the end of the chunk of scene/1
    spoil(grown / "statistics/hardness/c/1/0/0/0")  # of scene/2, which has changed, and scene/3
    with pytest.raises(StoreDamagedError):
        MapReader(grown, version=1).read("prediction", "scene/1")
    assert repair_store(grown).reopened == (0, 1)
    assert rebuild(building, MapWriter.open(grown)) == [0, 1]
    assert verify_store(grown).ok
    earlier = MapReader(grown, version=1)
    with pytest.raises(StoreDamagedError):
        earlier.read("prediction", "scene/1")
    np.testing.assert_array_equal(
        earlier.read("hardness", "scene/1"), building.maps_of(building.records()[1]).hardness
    )
    with pytest.raises(StoreDamagedError, match="read a newer version"):
        earlier.statistics()
    reader = MapReader(grown)
    assert [len(part.image_ids) for part in reader.iter_shards()] == [1, 1, 1, 2, 2]
    assert len(reader.statistics().image_ids) == 7
    # Building the shards once more changes nothing.
    sound = contents(grown)
    MapWriter.open(grown).reopen_shards([0, 1])
    assert rebuild(building, MapWriter.open(grown)) == [0, 1]
    assert contents(grown) == sound


def test_a_shard_of_earlier_versions_alone_is_lost(building: ModuleType, own_store: Path) -> None:
    rebuild(building, MapWriter.extend(own_store, images=building.records()[2:]))
    spoil(own_store / "hardness/c/0/0/0")
    report = repair_store(own_store)
    assert (report.lost, report.reopened) == ((0,), ())
    assert MapWriter.open(own_store).pending_shards() == []
    remove_version(own_store, 1)
    assert verify_store(own_store).ok


def test_an_unfinished_store_is_repaired(building: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer = MapWriter.create(
        path, schema=building.SCHEMA, images=building.records(), identity=building.IDENTITY
    )
    writer.write_shard(0, [building.maps_of(record) for record in writer.shard_records(0)])
    spoil(path / "logits/c/0/0/0/0")
    (path / "done/zarr.json").unlink()
    report = repair_store(path)
    assert (report.version, report.reopened) == (0, (0,))
    assert report.restored == ("done/zarr.json",)
    assert rebuild(building, MapWriter.open(path)) == [0, 1, 2]
    assert verify_store(path).ok


def test_names_of_the_classes_are_restored_from_the_schema(own_store: Path) -> None:
    sound = (own_store / "zarr.json").read_bytes()
    document = json.loads(sound)
    document["attributes"]["class_names"][0] = "rood"
    (own_store / "zarr.json").write_text(json.dumps(document))
    assert "class_names" in verify_store(own_store).damages[0].problem
    assert repair_store(own_store).restored == ("zarr.json",)
    assert json.loads((own_store / "zarr.json").read_bytes()) == json.loads(sound)
    assert verify_store(own_store).ok


def damage_much(path: Path) -> None:
    """Something of each kind that a repair restores, reopens or deletes."""
    for key in ("hardness/c/3/0/0", "done/c/4", "image/c/0", f"{SUMMARY}/counts/c/0/0/0"):
        spoil(path / key)
    (path / "statistics/confusion/c/3/0/0").unlink()
    (path / "confidence/zarr.json").write_text("{}")
    document = json.loads((path / "zarr.json").read_bytes())
    document["consolidated_metadata"]["metadata"]["hardness"]["shape"][0] = 3
    (path / "zarr.json").write_text(json.dumps(document))
    for unused in ("hardness/c/9/0/0", "done/c/9"):  # left by a removal that was interrupted
        (path / unused).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / unused.replace("9", "0"), path / unused)


def test_a_killed_repair_is_finished_by_the_next(grown: Path) -> None:
    sound_summary = MapReader(grown, version=1).summary()
    assert sound_summary is not None
    pixels = sound_summary.read().pixels
    damage_much(grown)
    damaged, before = contents(grown), damaged_keys(grown)
    copies = [grown.with_name(f"{place}.zarr") for place in range(KILLED_REPAIRS + 1)]
    for path in copies:
        shutil.copytree(grown, path)
    assert repair_store(grown).reopened == (3, 4)
    repaired, after = contents(grown), damaged_keys(grown)

    script = [sys.executable, str(Path(__file__).with_name("crash_repairs.py")), *map(str, copies)]
    ended = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    # The last one comes to its end before it would die: no part of a repair is left out.
    statuses = [int(status) for status in ended.stdout.split()]
    assert statuses == [-signal.SIGKILL] * KILLED_REPAIRS + [0]
    seen = set()
    for path in copies:
        now = {key: data for key, data in contents(path).items() if not key.endswith(".partial")}
        for key in now.keys() | damaged.keys() | repaired.keys():
            whole = {damaged.get(key), repaired.get(key)}
            if key.startswith(SUMMARY):
                whole.add(None)  # deleted before it is made anew
            assert now.get(key) in whole, key
        has_summary = f"{SUMMARY}/zarr.json" in now
        # Found is what has not been repaired yet, and the shards that have been reopened.
        left = {
            key
            for key in before
            if now.get(key) == damaged.get(key) and (has_summary or not key.startswith(SUMMARY))
        }
        left |= {key for key in after if now.get(key) == repaired.get(key)}
        assert damaged_keys(path) == left
        seen.add(frozenset(left))
        summary = MapReader(path, version=1).summary()
        assert (summary is not None) == has_summary
        if summary is not None and f"{SUMMARY}/counts/c/0/0/0" not in left:
            np.testing.assert_array_equal(summary.read().pixels, pixels)
        repair_store(path)
        assert contents(path) == repaired
    assert len(seen) >= 4  # killed before, between and after the steps


def test_repair_waits_for_no_build(building: ModuleType, grown: Path) -> None:
    with MapWriter.open(grown).lease():
        for refused in (
            lambda: repair_store(grown),
            lambda: remove_version(grown, 1),
            lambda: remove_store(grown),
        ):
            with pytest.raises(StoreLockedError):
                refused()
    with pytest.raises(IndexError, match="expected 0 to 4, got 5"):
        MapWriter.open(grown).reopen_shards([5])


def test_a_repair_that_waits_goes_by_what_was_published(building: ModuleType, grown: Path) -> None:
    writer = MapWriter.extend(grown, images=building.records(9))
    with ThreadPoolExecutor(1) as pool, writer.lease():
        repair = pool.submit(repair_store, grown, wait=60)
        time.sleep(0.5)  # for it to have looked and to be waiting
        for shard in writer.pending_shards():
            writer.write_shard(shard, [building.maps_of(r) for r in writer.shard_records(shard)])
        writer.publish()
    report = repair.result()
    assert (report.version, report.damages, report.restored) == (3, (), ())
    assert verify_store(grown).ok


def test_an_old_version_is_removed_with_its_shards(building: ModuleType, own_store: Path) -> None:
    images = building.records(7)[2:]  # nothing of shard 0 is left
    rebuild(building, MapWriter.extend(own_store, images=images))
    opened = MapReader(own_store)
    before = store_status(own_store).bytes_on_disk
    freed = remove_version(own_store, 1)
    status = store_status(own_store)
    assert (status.versions, status.rows_retired) == ((2,), 0)
    assert freed > 0
    assert before - status.bytes_on_disk - freed + 200 > 0  # the root is a little shorter
    assert not (own_store / "hardness/c/0/0/0").exists()
    assert not (own_store / "versions/000001/zarr.json").exists()
    for reader in (opened, MapReader(own_store)):
        for record in images:
            np.testing.assert_array_equal(
                reader.read("hardness", record.image_id), building.maps_of(record).hardness
            )
    with pytest.raises(UnknownVersionError, match=r"versions \(2\), got 1"):
        MapReader(own_store, version=1)
    assert verify_store(own_store).ok
    rebuild(building, MapWriter.extend(own_store, images=building.records(8)))
    assert verify_store(own_store).ok
    assert MapReader(own_store).version == 3


def test_the_newest_version_is_removed_on_demand(building: ModuleType, grown: Path) -> None:
    first = building.records()
    with pytest.raises(StoreRemovalError, match="say that the newest"):
        remove_version(grown, 2)
    assert remove_version(grown, 2, newest=True) > 0
    reader = MapReader(grown)
    assert (reader.version, reader.records) == (1, tuple(first))
    assert not (grown / "hardness/c/3/0/0").exists()
    assert verify_store(grown).ok
    with pytest.raises(StoreRemovalError, match="remove the store as a whole"):
        remove_version(grown, 1, newest=True)
    with pytest.raises(UnknownVersionError):
        remove_version(grown, 2)
    # Neither the number nor the rows of the version removed are used again.
    writer = MapWriter.extend(grown, images=second(building))
    assert (writer.version, writer.pending_shards()) == (3, [5, 6])
    rebuild(building, writer)
    assert verify_store(grown).ok
    group = zarr.open_group(grown, mode="r")
    first_version, last_version = group["first_version"], group["last_version"]
    assert isinstance(first_version, zarr.Array)
    assert isinstance(last_version, zarr.Array)
    for version, images in ((1, first), (3, second(building))):
        rows = (first_version[:] <= version) & (version <= last_version[:])
        assert rows.nonzero()[0].tolist() == list(MapReader(grown, version=version)._manifest.rows)
        assert rows.sum() == len(images)


def test_an_extension_under_way_survives_a_removal(building: ModuleType, grown: Path) -> None:
    images = [*second(building), building.records(9)[8]]
    writer = MapWriter.extend(grown, images=images)
    remove_version(grown, 1)
    assert rebuild(building, writer) == [5]
    assert verify_store(grown).ok
    writer = MapWriter.extend(grown, images=building.records(10))
    remove_version(grown, 3, newest=True)
    assert store_status(grown).growth is None
    assert MapReader(grown).version == 2
    assert verify_store(grown).ok


def test_a_store_is_removed(building: ModuleType, grown: Path) -> None:
    (grown / "hardness" / "left.partial").write_bytes(b"by a killed writer")
    assert remove_store(grown) > 10_000
    assert not grown.exists()
    with pytest.raises(StoreNotFoundError):
        remove_store(grown)
    grown.mkdir()
    (grown / "notes.txt").write_text("no store")
    with pytest.raises(StoreNotFoundError):
        remove_store(grown)
    (grown / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreNotFoundError):
        remove_store(grown)
    with pytest.raises(StoreNotFoundError):
        remove_version(grown, 1)
    assert sorted(file.name for file in grown.iterdir()) == ["notes.txt", "zarr.json"]


def test_a_store_in_a_bucket_is_removed(building: ModuleType, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/s.zarr"
    building.build(url)
    rebuild(building, MapWriter.extend(url, images=second(building)))
    assert remove_version(url, 1) > 0
    assert verify_store(url).ok
    assert remove_store(url) > 0
    with pytest.raises(StoreNotFoundError):
        store_status(url)
    building.build(url)
    assert MapReader(url).complete
