from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rdd_storage import (
    ImageMaps,
    MapReader,
    MapWriter,
    ShardDataError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreWriteError,
    record_use,
    remove_store,
    remove_version,
    repair_store,
    store_status,
    verify_store,
)


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def start(building: ModuleType, path: Path, **changes: Any) -> MapWriter:
    arguments = {
        "schema": building.SCHEMA,
        "images": building.records(),
        "identity": building.IDENTITY,
    }
    return MapWriter.create(path, **(arguments | changes))


def maps_of_shard(building: ModuleType, writer: MapWriter, shard: int) -> list[ImageMaps]:
    return [building.maps_of(writer.records[row]) for row in writer.shard_rows(shard)]


def test_build_publish_and_read_back(building: ModuleType, tmp_path: Path) -> None:
    writer = start(building, tmp_path / "s.zarr")
    assert (writer.num_shards, list(writer.shard_rows(2))) == (3, [4])
    assert writer.pending_shards() == [0, 1, 2]
    for shard in (2, 0, 1):
        writer.write_shard(shard, maps_of_shard(building, writer, shard)[::-1])
    assert writer.pending_shards() == []
    assert not writer.complete
    writer.publish()
    assert writer.complete
    reader = MapReader(tmp_path / "s.zarr")
    assert reader.records == tuple(building.records())
    for record in building.records():
        maps = building.maps_of(record)
        for name in ("hardness", "aux_hardness", "prediction", "confidence", "logits"):
            stored = reader.read(name, record.image_id)
            assert stored.dtype == getattr(maps, name).dtype
            np.testing.assert_array_equal(stored, getattr(maps, name), err_msg=name)
        np.testing.assert_array_equal(
            reader.read("discrepancy", record.image_id), maps.discrepancy.astype(np.float16)
        )


def test_16_bit_codes(building: ModuleType, tmp_path: Path) -> None:
    schema = replace(building.SCHEMA, hardness_bits=16, aux_hardness=False, logits=False)
    writer = start(building, tmp_path / "s.zarr", schema=schema, images=building.records(1))
    maps = replace(building.maps_of(writer.records[0], 16), aux_hardness=None, logits=None)
    writer.write_shard(0, [maps])
    writer.publish()
    reader = MapReader(tmp_path / "s.zarr")
    assert reader.arrays == ("discrepancy", "hardness", "prediction", "confidence")
    np.testing.assert_array_equal(reader.read("hardness", "scene/0"), maps.hardness)


def test_large_images_are_cut_into_even_chunks(building: ModuleType, tmp_path: Path) -> None:
    schema = replace(
        building.SCHEMA, height=1030, width=16, grid_height=130, grid_width=2, logits=False,
        aux_hardness=False,
    )  # fmt: skip
    image = replace(building.records(1)[0], height=1027, width=16, grid_height=129, grid_width=2)
    writer = start(building, tmp_path / "s.zarr", schema=schema, images=[image])
    maps = replace(building.maps_of(image), logits=None, aux_hardness=None)
    writer.write_shard(0, [maps])
    writer.publish()
    reader = MapReader(tmp_path / "s.zarr")
    window = (slice(510, 1027), slice(3, 16))
    np.testing.assert_array_equal(
        reader.read("hardness", image.image_id, window), maps.hardness[window]
    )


def test_a_store_keeps_the_chunks_it_was_made_with(building: ModuleType, tmp_path: Path) -> None:
    path, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    coarse = replace(building.SCHEMA, chunk_height=10, chunk_width=7)
    start(building, path, schema=coarse)
    building.build(path)  # with the usual chunks, as a later version of this library may
    assert MapReader(path).schema == coarse
    extended = MapWriter.extend(path, images=building.records(6), schema=building.SCHEMA)
    for shard in extended.pending_shards():
        extended.write_shard(
            shard, [building.maps_of(record) for record in extended.shard_records(shard)]
        )
    extended.publish()
    assert verify_store(path).ok
    building.build(other, count=6)
    reader, usual = MapReader(path), MapReader(other)
    for array in reader.arrays:
        for image_id in usual.image_ids:
            values = reader.read(array, image_id)
            np.testing.assert_array_equal(values, usual.read(array, image_id))


def test_create_resumes_the_same_store(building: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    first = start(building, path)
    first.write_shard(1, maps_of_shard(building, first, 1))
    before = contents(path)
    again = start(building, path, attributes={"note": "later calls do not change attributes"})
    assert again.pending_shards() == [0, 2]
    assert contents(path) == before


def test_writing_a_shard_again_gives_the_same_bytes(building: ModuleType, own_store: Path) -> None:
    before = contents(own_store)
    writer = MapWriter.open(own_store)
    for shard in range(writer.num_shards):
        writer.write_shard(shard, maps_of_shard(building, writer, shard))
    writer.publish()
    assert contents(own_store) == before


def test_pickled_writers_write_the_same_store(building: ModuleType, tmp_path: Path) -> None:
    writer = start(building, tmp_path / "s.zarr")
    copy = pickle.loads(pickle.dumps(writer))
    copy.write_shard(0, maps_of_shard(building, writer, 0))
    assert writer.pending_shards() == [1, 2]


def test_mismatches_are_listed(building: ModuleType, own_store: Path) -> None:
    other = {"teacher": {"weights": "def", "network": "fpn"}, "data": "arithmetic", "scales": [1.0]}
    with pytest.raises(StoreMismatchError, match=r"teacher\.weights: expected def, found abc"):
        start(building, own_store, identity=other)
    with pytest.raises(StoreMismatchError, match=r"schema\.logits: expected false, found true"):
        start(building, own_store, schema=replace(building.SCHEMA, logits=False))
    images = building.records()
    images[2] = replace(images[2], digest="f" * 64)
    with pytest.raises(StoreMismatchError, match=r"image scene/2: digest: expected f"):
        start(building, own_store, images=images)
    with pytest.raises(StoreMismatchError, match=r"image scene/4: expected nothing, found it"):
        start(building, own_store, images=building.records(4))


def test_foreign_groups_and_missing_stores(building: ModuleType, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.zarr"
    foreign.mkdir()
    (foreign / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    before = contents(foreign)
    with pytest.raises(StoreNotFoundError, match="expected a map store, got something else"):
        start(building, foreign)
    assert contents(foreign) == before
    with pytest.raises(StoreNotFoundError, match="no map store there"):
        MapWriter.open(tmp_path / "nothing")


def test_reserved_attributes_and_bad_palettes(building: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="got rdd"):
        start(building, tmp_path / "s", attributes={"rdd": 1})
    with pytest.raises(StoreFormatError, match="expected 3 RGB colours"):
        start(building, tmp_path / "s", palette=[(0, 0, 0)])
    writer = start(
        building, tmp_path / "s", palette=[(0, 0, i) for i in range(3)], attributes={"title": "x"}
    )
    attributes = MapReader(writer.path).attributes
    assert attributes["palette"] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert attributes["title"] == "x"


def test_publishing_needs_all_shards(building: ModuleType, tmp_path: Path) -> None:
    writer = start(building, tmp_path / "s.zarr")
    writer.write_shard(0, maps_of_shard(building, writer, 0))
    with pytest.raises(StoreIncompleteError, match=r"2 are not \(1, 2\)"):
        writer.publish()
    assert not store_status(writer.path).complete


def change(maps: ImageMaps, name: str, at: tuple[int, ...], value: float) -> ImageMaps:
    array = getattr(maps, name).copy()
    array[at] = value
    return replace(maps, **{name: array})


BAD_MAPS = [
    ("discrepancy", lambda m: change(m, "discrepancy", (0, 0), np.nan), "finite values >= 0"),
    ("discrepancy", lambda m: change(m, "discrepancy", (0, 0), -1), "finite values >= 0"),
    ("discrepancy", lambda m: replace(m, discrepancy=m.discrepancy[:2]), r"shape \(4, 5\)"),
    ("discrepancy", lambda m: replace(m, discrepancy=m.discrepancy.astype("f8")), "dtype float32"),
    ("hardness", lambda m: change(m, "hardness", (9, 9), 254), "0 to 250 or 255, got 254"),
    ("hardness", lambda m: change(m, "hardness", (9, 9), 255), "label is 255"),
    ("hardness", lambda m: replace(m, hardness=m.hardness.astype("u2")), "uint8, got uint16"),
    ("hardness", lambda m: replace(m, hardness=m.hardness.tolist()), "array, got list"),
    ("aux_hardness", lambda m: replace(m, aux_hardness=None), "expected an array, got None"),
    ("aux_logits", lambda m: replace(m, aux_logits=m.logits), "expected None, got an array"),
    ("logits", lambda m: change(m, "logits", (0, 0, 0), np.nan), "finite values <= 0"),
    ("logits", lambda m: change(m, "logits", (0, 0, 0), 1), "finite values <= 0"),
    ("prediction", lambda m: change(m, "prediction", (0, 0), 3), "0 to 2, got 3"),
    ("label", lambda m: change(m, "label", (9, 9), 17), "0 to 2 or 255, got 17"),
    ("confidence", lambda m: change(m, "confidence", (0, 0), 255), "0 to 254, got 255"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_MAPS)
def test_bad_maps_are_refused_by_name(
    building: ModuleType, tmp_path: Path, name: str, spoil: Any, message: str
) -> None:
    writer = start(building, tmp_path / "s.zarr")
    before = contents(tmp_path)
    maps = maps_of_shard(building, writer, 0)
    with pytest.raises(ShardDataError, match=f"image scene/0: {name}: .*{message}") as caught:
        writer.write_shard(0, [spoil(maps[0]), maps[1]])
    assert "shard 0" in caught.value.__notes__[0]
    assert contents(tmp_path) == before


def test_wrong_images_are_refused(building: ModuleType, tmp_path: Path) -> None:
    writer = start(building, tmp_path / "s.zarr")
    maps = maps_of_shard(building, writer, 0)
    foreign = replace(maps[1], image_id="elsewhere")
    with pytest.raises(ShardDataError, match=r"missing: \['scene/1'\].*\['elsewhere'\]"):
        writer.write_shard(0, [maps[0], foreign])
    with pytest.raises(ShardDataError, match="got 3"):
        writer.write_shard(0, [*maps, maps[0]])
    with pytest.raises(IndexError, match="expected 0 to 2, got 3"):
        writer.write_shard(3, maps)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse longer files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_write_that_fails_marks_nothing_done(building: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer = start(building, path)
    writer.write_shard(0, maps_of_shard(building, writer, 0))
    with largest_file(500), pytest.raises(StoreWriteError, match=r"hardness/c/1/0/0") as caught:
        writer.write_shard(1, maps_of_shard(building, writer, 1))
    assert caught.value.errno == errno.EFBIG
    assert "shard 1" in caught.value.__notes__[0]
    assert writer.pending_shards() == [1, 2]
    assert not list(path.rglob("*.partial"))
    writer.write_shard(1, maps_of_shard(building, writer, 1))
    assert writer.pending_shards() == [2]


def test_a_place_that_is_no_folder_cannot_be_written(building: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError, match="cannot be written"):
        start(building, tmp_path / "file" / "s.zarr")


def test_a_root_that_cannot_be_written_publishes_nothing(
    building: ModuleType, own_store: Path
) -> None:
    before = contents(own_store)
    writer = MapWriter.extend(own_store, images=building.records()[1:])
    with writer.lease():
        with largest_file(2000), pytest.raises(StoreWriteError, match=r"zarr\.json") as caught:
            writer.publish()
        assert caught.value.errno == errno.EFBIG
        assert not writer.complete
        assert MapReader(own_store).version == 1
        for name, data in before.items():
            if name.startswith(("hardness/c", "done/c", "versions/000001")):
                assert (own_store / name).read_bytes() == data
        writer.publish()
    assert MapReader(own_store).version == 2
    assert verify_store(own_store).ok


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Without the superuser's right to write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_place_is_read_and_not_written(building: ModuleType) -> None:
    # Not below pytest's own folder, which other users may not enter.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.zarr")
        building.build(path)
        maps = building.maps_of(building.records()[0])
        before = contents(path)
        for place in (Path(folder), *Path(folder).rglob("*")):
            place.chmod(0o555 if place.is_dir() else 0o444)
        with ordinary_user():
            reader = MapReader(path)
            np.testing.assert_array_equal(reader.read("hardness", "scene/0"), maps.hardness)
            assert verify_store(path).ok
            assert start(building, path).complete  # nothing is to be written
            writer = MapWriter.open(path)
            for refused in (
                lambda: start(building, Path(folder, "new.zarr")),
                lambda: writer.write_shard(0, maps_of_shard(building, writer, 0)),
                lambda: MapWriter.extend(path, images=building.records()[1:]),
                lambda: writer.reopen_shards([0]),
                lambda: record_use(path, 1, run="x"),
                lambda: repair_store(path),
                lambda: remove_version(path, 1),
                lambda: remove_store(path),
            ):
                with pytest.raises(StoreWriteError, match="Permission denied"):
                    refused()
        assert contents(path) == before
        for place in (Path(folder), *Path(folder).rglob("*")):
            place.chmod(0o755)
