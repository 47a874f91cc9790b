"""The summary that a version is published with."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rdd_storage import (
    ImageLogits,
    MapAddition,
    MapReader,
    MapWriter,
    StoreDamagedError,
    StoreFormatError,
    Summary,
    remove_version,
    repair_store,
    store_status,
    verify_store,
)
from rdd_storage.manifest import Manifest
from rdd_storage.measures import measure_counts
from rdd_storage.summary import SummaryBuilder

VERSION_1 = Path(__file__).parents[1] / "data" / "store-v1"
FIRST = "versions/000001/summary"
SECOND = "versions/000002/summary"


def summary_of(reader: MapReader) -> Summary:
    stored = reader.summary()
    assert stored is not None
    return stored.read()


def counted(reader: MapReader) -> Summary:
    """The same from the counts of all images."""
    builder = SummaryBuilder(reader.num_images, reader.schema.num_classes)
    first = 0
    for names, counts in reader.iter_statistics():
        builder.add(slice(first, first + len(names)), counts)
        first += len(names)
    return builder.finish()


def assert_same(found: Summary, expected: Summary) -> None:
    for field in fields(Summary):
        values = getattr(found, field.name)
        assert values.dtype == getattr(expected, field.name).dtype
        np.testing.assert_array_equal(values, getattr(expected, field.name), err_msg=field.name)


def grow(building: ModuleType, path: Path) -> MapWriter:
    """Version 2: scene/1 is removed, scene/2 changed, scene/5 is new; shard 2 is as it was."""
    records = building.records(6)
    images = [records[0], replace(records[2], digest="f" * 64), *records[3:]]
    writer = MapWriter.extend(path, images=images)
    rebuild(building, writer)
    return writer


def rebuild(building: ModuleType, writer: MapWriter) -> None:
    for shard in writer.pending_shards():
        writer.write_shard(shard, [building.maps_of(r) for r in writer.shard_records(shard)])
    writer.publish()


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_it_says_what_the_counts_say(building: ModuleType, store: Path, tmp_path: Path) -> None:
    building.build(f"memory://{tmp_path.name}/s.zarr")
    for path in (store, f"memory://{tmp_path.name}/s.zarr"):
        reader = MapReader(path)
        found, statistics = summary_of(reader), reader.statistics()
        np.testing.assert_array_equal(found.class_hardness, statistics.hardness)
        np.testing.assert_array_equal(found.confusion, statistics.confusion)
        np.testing.assert_array_equal(found.pixels[:-1].T, statistics.image_label_pixels)
        np.testing.assert_array_equal(found.correct[:-1].T, statistics.image_intersection)
        expected = measure_counts(statistics.image_hardness.sum(axis=1))
        np.testing.assert_array_equal(found.pixels[-1], expected.pixels)
        np.testing.assert_allclose(found.soft_min[-1], expected.soft_min, rtol=1e-6)
        np.testing.assert_allclose(
            found.weight, statistics.image_weight_sum / statistics.image_grid_points, rtol=1e-6
        )
        stored = reader.summary()
        assert stored is not None
        for index in (None, 0, 2):
            part, whole = stored.of_class(index), found.of_class(index)
            for field in fields(part):
                values = getattr(part, field.name)
                np.testing.assert_array_equal(values, getattr(whole, field.name), field.name)


def test_each_version_has_its_own(building: ModuleType, own_store: Path) -> None:
    before = files(own_store / FIRST)
    counts = own_store / "statistics/hardness/c/2/0/0/0"
    content = counts.read_bytes()
    counts.write_bytes(b"")  # not needed: of all its rows there is a summary
    grow(building, own_store)
    counts.write_bytes(content)
    for version in (1, 2):
        reader = MapReader(own_store, version=version)
        assert_same(summary_of(reader), counted(reader))
    assert files(own_store / FIRST) == before
    assert verify_store(own_store).ok
    everything = store_status(own_store).bytes_on_disk
    assert everything == sum(len(content) for content in files(own_store).values())
    remove_version(own_store, 1)
    assert not files(own_store / FIRST)
    assert_same(summary_of(MapReader(own_store)), counted(MapReader(own_store)))


def test_an_addition_takes_it_over(building: ModuleType, tmp_path: Path) -> None:
    writer = MapWriter.create(
        tmp_path, schema=replace(building.SCHEMA, logits=False), images=building.records(3),
        identity=building.IDENTITY,
    )  # fmt: skip
    for shard in writer.pending_shards():
        maps = [building.maps_of(record) for record in writer.shard_records(shard)]
        writer.write_shard(shard, [replace(item, logits=None) for item in maps])
    writer.publish()
    addition = MapAddition.plan(tmp_path)
    for shard in addition.pending_shards():
        maps = [building.maps_of(record) for record in addition.shard_records(shard)]
        logits = [ImageLogits(image_id=item.image_id, logits=item.logits) for item in maps]
        addition.write_shard(shard, logits)
    shutil.move(tmp_path / "statistics/sums/c", tmp_path / "away")
    addition.publish()
    shutil.move(tmp_path / "away", tmp_path / "statistics/sums/c")
    assert_same(summary_of(MapReader(tmp_path)), counted(MapReader(tmp_path)))
    assert verify_store(tmp_path).ok


def test_damage_is_found_and_repaired(building: ModuleType, own_store: Path) -> None:
    grow(building, own_store)
    sound = files(own_store / "versions")
    measures = own_store / SECOND / "measures/c/0/0/0"
    measures.write_bytes(measures.read_bytes()[::-1])
    (own_store / FIRST / "confusion/c/0/0").unlink()
    (own_store / FIRST / "counts/zarr.json").write_text("{}")
    stored = MapReader(own_store).summary()
    assert stored is not None
    with pytest.raises(StoreDamagedError, match=r"summary: expected readable data.*repair"):
        stored.of_class(0)
    with pytest.raises(StoreDamagedError, match="confusion/c/0/0 is missing"):
        summary_of(MapReader(own_store, version=1))
    report = repair_store(own_store)
    assert {damage.key for damage in report.damages} == {
        f"{SECOND}/measures/c/0/0/0", f"{FIRST}/confusion/c/0/0", f"{FIRST}/counts/zarr.json",
    }  # fmt: skip
    assert report.reopened == ()
    assert f"{FIRST}/zarr.json" in report.restored
    assert files(own_store / "versions") == sound
    assert repair_store(own_store).restored == ()


def test_shards_that_are_built_again_take_it_away_for_so_long(
    building: ModuleType, own_store: Path
) -> None:
    sound = files(own_store)
    writer = MapWriter.open(own_store)
    writer.reopen_shards([1])
    assert MapReader(own_store).summary() is None
    assert repair_store(own_store).restored == ()
    writer.publish()  # the shard is pending
    assert MapReader(own_store).summary() is None
    rebuild(building, writer)
    assert {k: v for k, v in files(own_store).items() if not k.startswith("lease/")} == {
        k: v for k, v in sound.items() if not k.startswith("lease/")
    }


def test_a_store_from_before_there_were_summaries(building: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(VERSION_1, tmp_path / "s.zarr")
    reader = MapReader(tmp_path / "s.zarr")
    assert reader.summary() is None
    assert verify_store(tmp_path / "s.zarr").ok
    assert f"{FIRST}/zarr.json" in repair_store(tmp_path / "s.zarr").restored
    assert_same(summary_of(reader), counted(reader))
    assert verify_store(tmp_path / "s.zarr").ok


def test_that_of_another_plan_counts_for_nothing(own_store: Path) -> None:
    voucher = own_store / FIRST / "zarr.json"
    document = json.loads(voucher.read_text())
    document["attributes"]["rdd_summary"]["manifest_sha256"] = "0" * 64
    voucher.write_text(json.dumps(document))
    assert MapReader(own_store).summary() is None
    assert [damage.key for damage in verify_store(own_store).damages] == [f"{FIRST}/zarr.json"]
    repair_store(own_store)
    assert MapReader(own_store).summary() is not None


def test_counts_that_cannot_be_read_keep_no_version_back(
    building: ModuleType, own_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(own_store / FIRST)
    (own_store / "statistics/sums/c/2/0").unlink()
    with caplog.at_level(logging.WARNING, "rdd.maps"):
        assert grow(building, own_store).complete
    assert "statistics/sums/c/2/0 is missing; verify and repair" in caplog.text
    assert MapReader(own_store).summary() is None


def test_entries_of_a_manifest_are_made_as_they_are_looked_at(
    building: ModuleType, own_store: Path
) -> None:
    manifest = grow(building, own_store)._manifest
    data = (own_store / "versions/000002/zarr.json").read_bytes()
    read = Manifest.decode(data, "here")
    assert read == manifest
    assert read.encode() == data
    assert list(read.entries) == [read.entries[place] for place in range(len(read.entries))]
    assert read.entries[-1].record.image_id == "scene/5"
    assert [entry.last_version for entry in read.retired] == [1, 1]
    document = json.loads(data)
    document["attributes"]["rdd_manifest"]["images"]["height"].pop()
    with pytest.raises(StoreFormatError, match="lists of different lengths"):
        Manifest.decode(json.dumps(document).encode(), "here")
