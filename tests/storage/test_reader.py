from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_storage import (
    MapReader,
    MapWriter,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    UnknownArrayError,
    UnknownImageError,
    WindowError,
)
from rdd_storage.reader import Window


@pytest.fixture(scope="module")
def reader(store: Path) -> MapReader:
    return MapReader(store)


@given(data=st.data())
def test_windows_equal_crops_of_the_whole_map(reader: MapReader, data: st.DataObject) -> None:
    image_id = data.draw(st.sampled_from(reader.image_ids))
    requests: list[tuple[str, str, Window | None]] = []
    for array in reader.arrays:
        height, width = reader.read(array, image_id).shape[-2:]
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        bottom = data.draw(st.integers(top + 1, height))
        right = data.draw(st.integers(left + 1, width))
        requests.append((array, image_id, (slice(top, bottom), slice(left, right))))
    for (array, _, window), crop in zip(requests, reader.read_many(requests), strict=True):
        assert window is not None
        np.testing.assert_array_equal(crop, reader.read(array, image_id)[(..., *window)])
        assert crop.flags.writeable


def test_what_a_store_says_about_itself(building: ModuleType, reader: MapReader) -> None:
    assert (reader.version, reader.complete) == (1, True)
    assert reader.schema == building.SCHEMA
    assert reader.identity == building.IDENTITY
    assert reader.image_ids == tuple(r.image_id for r in building.records())
    assert reader.row("scene/3") == 3
    assert reader.record("scene/3") == building.records()[3]
    assert set(reader.arrays) == {
        "discrepancy", "hardness", "aux_hardness", "prediction", "confidence", "logits",
    }  # fmt: skip


@pytest.mark.parametrize(
    "window",
    [
        (slice(0, 21), slice(0, 4)),
        (slice(-3, 4), slice(0, 4)),
        (slice(3, 3), slice(0, 4)),
        (slice(0, 4, 2), slice(0, 4)),
        (slice(0, 4), slice(0, 4), slice(0, 4)),
        (3, slice(0, 4)),
    ],
)
def test_windows_outside_the_image_are_refused(reader: MapReader, window: Window) -> None:
    with pytest.raises(WindowError, match=r"hardness of image scene/0: .* inside 20 x 28"):
        reader.read("hardness", "scene/0", window)


def test_padding_is_outside_the_image(reader: MapReader) -> None:
    assert reader.read("hardness", "scene/2").shape == (18, 28)
    with pytest.raises(WindowError, match="inside 18 x 28"):
        reader.read("hardness", "scene/2", (slice(0, 20), slice(0, 28)))


def test_unknown_names_are_refused(reader: MapReader) -> None:
    with pytest.raises(UnknownImageError, match="one of the store's 5 images, got 'scene/9'"):
        reader.read("hardness", "scene/9")
    with pytest.raises(UnknownArrayError, match=r"discrepancy, hardness.*got 'aux_logits'"):
        reader.read("aux_logits", "scene/0")
    with pytest.raises(StoreNotFoundError, match="no map store"):
        MapReader("/nowhere/at/all")


def test_check_compares_identity_and_digests(building: ModuleType, reader: MapReader) -> None:
    digests = {record.image_id: record.digest for record in building.records()}
    reader.check(building.IDENTITY, digests)
    reader.check(building.IDENTITY, {"scene/1": digests["scene/1"]})
    changed = digests | {"scene/1": "e" * 64, "scene/9": "0" * 64}
    with pytest.raises(StoreMismatchError) as caught:
        reader.check(building.IDENTITY | {"data": "other"}, changed)
    message = str(caught.value)
    assert "data: expected other, found arithmetic" in message
    assert "image scene/1: digest: expected eeeeeeeeeeee…" in message
    assert "image scene/9: expected in the store, found nothing" in message


def test_unfinished_images_are_refused(building: ModuleType, tmp_path: Path) -> None:
    writer = MapWriter.create(
        tmp_path / "s.zarr",
        schema=building.SCHEMA,
        images=building.records(),
        identity=building.IDENTITY,
    )
    reader = MapReader(writer.path)
    assert not reader.complete
    with pytest.raises(StoreIncompleteError, match="image scene/1: expected it to be done"):
        reader.read("hardness", "scene/1")
    writer.write_shard(0, [building.maps_of(record) for record in building.records(2)])
    np.testing.assert_array_equal(
        reader.read("hardness", "scene/1"), building.maps_of(building.records()[1]).hardness
    )
    assert not reader.is_done("scene/2")
    for call in (reader.statistics, lambda: reader.check(building.IDENTITY, {})):
        with pytest.raises(StoreIncompleteError, match="still being built"):
            call()


def test_missing_and_damaged_shards_are_errors(own_store: Path) -> None:
    shard = own_store / "hardness" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    (own_store / "logits" / "c" / "1" / "0" / "0" / "0").unlink()
    (own_store / "statistics" / "confusion" / "c" / "0" / "0" / "0").write_bytes(b"no zstd frame")
    reader = MapReader(own_store)
    with pytest.raises(StoreDamagedError, match="hardness of image scene/0"):
        reader.read("hardness", "scene/0")
    with pytest.raises(StoreDamagedError, match="logits of image scene/2"):
        reader.read("logits", "scene/2")
    with pytest.raises(StoreDamagedError, match="statistics/confusion of shard 0"):
        reader.statistics()
    assert reader.read("logits", "scene/0").shape == (3, 4, 5)


def test_a_damaged_manifest_is_refused(own_store: Path) -> None:
    manifest = own_store / "versions" / "000001" / "zarr.json"
    manifest.write_text(manifest.read_text().replace("scene/1", "scene/8"))
    with pytest.raises(StoreFormatError, match="expected SHA-256"):
        MapReader(own_store)
    manifest.unlink()
    with pytest.raises(StoreFormatError, match="expected the manifest of version 1, got nothing"):
        MapReader(own_store)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_other_start_methods_read(reader: MapReader, method: str) -> None:
    expected = reader.read("hardness", "scene/1")  # the parent's threads are running now
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(reader.read, "hardness", "scene/1").result(timeout=120)
    np.testing.assert_array_equal(found, expected)


FORK = """
import os, sys
from rdd_storage import ForkedProcessError, MapReader
reader, other = MapReader(sys.argv[1]), MapReader(sys.argv[1])
reader.read("hardness", "scene/0")
child = os.fork()
if child == 0:
    status = 1
    for used in (reader, other):
        try:
            used.read("hardness", "scene/0")
        except ForkedProcessError as error:
            status = 0 if "forkserver" in str(error) else 2
        else:
            status = 3
        if status:
            break
    os._exit(status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_gets_a_clear_error(store: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FORK, str(store)], timeout=120, check=False)
    assert result.returncode == 0


def test_fork_before_the_first_read_works(store: Path) -> None:
    script = FORK.replace('reader.read("hardness", "scene/0")\n', "", 1)
    result = subprocess.run([sys.executable, "-c", script, str(store)], timeout=120, check=False)
    assert result.returncode == 3  # the child has read


def test_a_pickled_reader_holds_no_handles(reader: MapReader) -> None:
    reader.read("hardness", "scene/0")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._tensors == {}
    np.testing.assert_array_equal(
        copy.read("hardness", "scene/0"), reader.read("hardness", "scene/0")
    )


def test_relative_paths_follow_the_working_directory(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    relative = MapReader(store.name)
    assert relative.read("hardness", "scene/0").shape == (20, 28)
    assert os.fspath(relative.path) == store.name


def test_preloaded_maps_are_read_from_memory(own_store: Path) -> None:
    reader, plain = MapReader(own_store), MapReader(own_store)
    size = sum(2 * r.grid_height * r.grid_width for r in reader.records)
    assert not reader.preload("discrepancy", budget=size - 1)
    assert reader.preload("discrepancy", budget=size)
    expected = [plain.read("discrepancy", name) for name in plain.image_ids]
    (own_store / "discrepancy" / "c" / "0" / "0" / "0").unlink()
    for name, values in zip(reader.image_ids, expected, strict=True):
        np.testing.assert_array_equal(reader.read("discrepancy", name), values)
        crop = reader.read("discrepancy", name, (slice(1, 3), slice(2, 5)))
        np.testing.assert_array_equal(crop, values[1:3, 2:5])
        crop[...] = 0  # a copy: what is kept does not change
        np.testing.assert_array_equal(reader.read("discrepancy", name), values)
    with pytest.raises(WindowError):
        reader.read("discrepancy", "scene/0", (slice(0, 5), slice(0, 5)))
    with pytest.raises(UnknownArrayError):
        reader.preload("depth", budget=size)


def test_a_lazy_preload_reads_each_map_once_and_travels(own_store: Path) -> None:
    reader = MapReader(own_store)
    classes = reader.schema.num_classes
    size = sum(2 * classes * r.grid_height * r.grid_width for r in reader.records)
    assert not reader.preload("logits", budget=size - 1, lazy=True)
    assert reader.preload("logits", budget=size, lazy=True)
    copy: MapReader = pickle.loads(pickle.dumps(reader))
    for used in (reader, copy):
        first = used.read("logits", "scene/1", (slice(0, 2), slice(0, 2)))
        assert first.shape == (classes, 2, 2)
    (own_store / "logits" / "c" / "0" / "0" / "0" / "0").unlink()
    for used in (reader, copy):
        assert used.read("logits", "scene/1").shape == (classes, 3, 5)
        with pytest.raises(StoreDamagedError):
            used.read("logits", "scene/0")


def test_shards_in_order(reader: MapReader) -> None:
    shards = list(reader.iter_shards())
    assert [shard.shard for shard in shards] == [0, 1, 2]
    assert [name for shard in shards for name in shard.image_ids] == list(reader.image_ids)
    for shard in shards:
        assert tuple(shard.maps) == reader.arrays
        for array, maps in shard.maps.items():
            for name, values in zip(shard.image_ids, maps, strict=True):
                np.testing.assert_array_equal(values, reader.read(array, name))
    assert [tuple(shard.maps) for shard in reader.iter_shards(["hardness"])] == [("hardness",)] * 3
    with pytest.raises(UnknownArrayError):
        next(reader.iter_shards(["depth"]))
