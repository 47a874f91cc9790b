"""Stores are built and read alike in every place, under faults too."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rdd_storage import (
    MapReader,
    MapWriter,
    StoreDamagedError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreUnavailableError,
    StoreWriteError,
    list_stores,
    store_status,
    verify_store,
)
from rdd_storage.location import locate


def contents(path: str) -> dict[str, bytes | None]:
    location = locate(path)
    return {key: location.get(key) for key, _ in location.list_sizes() if "lease" not in key}


def assert_same_maps(path: str, local: Path, cropped: str = "scene/3") -> None:
    reader, expected = MapReader(path), MapReader(local)
    everything = [(array, name, None) for array in reader.arrays for name in reader.image_ids]
    for request, found in zip(everything, reader.read_many(everything), strict=True):
        np.testing.assert_array_equal(found, expected.read(*request), err_msg=str(request))
    window = (slice(1, 3), slice(1, 5))
    for array in reader.arrays:
        np.testing.assert_array_equal(
            reader.read(array, cropped, window), expected.read(array, cropped, window)
        )
    found_statistics, expected_statistics = reader.statistics(), expected.statistics()
    assert found_statistics.image_ids == expected_statistics.image_ids
    np.testing.assert_array_equal(found_statistics.hardness, expected_statistics.hardness)
    np.testing.assert_array_equal(
        found_statistics.image_weight_sum, expected_statistics.image_weight_sum
    )


class TestContract:
    def test_a_store_is_the_same_everywhere(
        self, building: ModuleType, place: str, store: Path
    ) -> None:
        path = f"{place}/s.zarr"
        building.build(path)
        assert_same_maps(path, store)
        assert contents(path) == contents(str(store))
        assert verify_store(path).ok
        status = store_status(path)
        assert (status.images_done, status.shards_done, status.complete) == (5, 3, True)
        assert [item.path for item in list_stores(place)] == [path]

    def test_an_interrupted_build_goes_on(self, building: ModuleType, place: str) -> None:
        path = f"{place}/s.zarr"
        with pytest.raises(StoreNotFoundError, match="no map store"):
            MapReader(path)
        make = {"schema": building.SCHEMA, "images": building.records(), "identity": {"a": 1}}
        writer = MapWriter.create(path, **make)
        writer.write_shard(1, [building.maps_of(record) for record in building.records()[2:4]])
        assert writer.pending_shards() == [0, 2]
        again = pickle.loads(pickle.dumps(MapWriter.create(path, **make)))
        assert again.pending_shards() == [0, 2]
        reader = MapReader(path)
        assert reader.read("hardness", "scene/3").shape == (20, 26)
        with pytest.raises(StoreIncompleteError, match="image scene/0"):
            reader.read("hardness", "scene/0")
        with pytest.raises(StoreIncompleteError, match="image scene/0"):
            next(reader.iter_shards(["hardness"]))
        with pytest.raises(StoreIncompleteError):
            writer.publish()
        with pytest.raises(StoreMismatchError, match="a: expected 2, found 1"):
            MapWriter.create(path, **(make | {"identity": {"a": 2}}))

    def test_missing_and_damaged_objects_are_errors(self, building: ModuleType, place: str) -> None:
        path = f"{place}/s.zarr"
        building.build(path)
        location = locate(path)
        for key, change in {
            "hardness/c/0/0/0": lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:],
            "prediction/c/0/0/0": lambda data: data[: len(data) // 2],
            "confidence/c/0/0/0": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        }.items():
            location.put(key, change(location.get(key)))
        location.delete("logits/c/1/0/0/0")
        location.put("statistics/confusion/c/0/0/0", b"no zstd frame")
        reader = MapReader(path)
        for array, image in {
            "hardness": "scene/0",
            "prediction": "scene/1",
            "confidence": "scene/0",
            "logits": "scene/2",
        }.items():
            with pytest.raises(StoreDamagedError, match=f"{array} of image {image}"):
                reader.read(array, image)
        with pytest.raises(StoreDamagedError, match="statistics/confusion of shard 0"):
            reader.statistics()
        assert reader.read("logits", "scene/0").shape == (3, 4, 5)
        assert verify_store(path).bad_shards == (0, 1)

    @pytest.mark.parametrize("shard_images", [1, 16])
    def test_shards_of_one_and_of_many_images(
        self, building: ModuleType, place: str, store: Path, shard_images: int
    ) -> None:
        path = f"{place}/s.zarr"
        building.build(path, schema=replace(building.SCHEMA, shard_images=shard_images))
        assert_same_maps(path, store)

    def test_windows_of_images_of_several_chunks(self, building: ModuleType, place: str) -> None:
        path = f"{place}/s.zarr"
        records = [
            replace(record, height=300, width=530, grid_height=4, grid_width=5)
            for record in building.records(2)
        ]
        schema = replace(building.SCHEMA, height=300, width=530)
        writer = MapWriter.create(path, schema=schema, images=records, identity={"a": 1})
        maps = [building.maps_of(record) for record in records]
        writer.write_shard(0, maps)
        writer.publish()
        reader = MapReader(path)
        rng = np.random.default_rng(0)
        for _ in range(8):
            index = int(rng.integers(2))
            top, left = int(rng.integers(299)), int(rng.integers(529))
            bottom, right = int(rng.integers(top, 300)) + 1, int(rng.integers(left, 530)) + 1
            window = (slice(top, bottom), slice(left, right))
            np.testing.assert_array_equal(
                reader.read("hardness", f"scene/{index}", window), maps[index].hardness[window]
            )
        (shard,) = reader.iter_shards(["prediction"])
        for found, expected in zip(shard.maps["prediction"], maps, strict=True):
            np.testing.assert_array_equal(found, expected.prediction)


@pytest.mark.parametrize("kind", ["local", "s3"])  # a memory store belongs to its process
def test_readers_open_anew_in_other_processes(
    building: ModuleType, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    place = tmp_path if kind == "local" else request.getfixturevalue("place_on_s3")
    building.build(f"{place}/s.zarr")
    reader = MapReader(f"{place}/s.zarr")
    expected = reader.read("hardness", "scene/1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(reader.read, "hardness", "scene/1").result(timeout=120)
    np.testing.assert_array_equal(found, expected)


class TestFaults:
    def test_a_build_survives_faults_at_every_object(
        self,
        building: ModuleType,
        s3: ModuleType,
        faults: ModuleType,
        place_on_s3: str,
        tmp_path: Path,
    ) -> None:
        """The first PUT of each object fails, and its first GET in one of four ways.

        All but the metadata of the arrays, to save time.
        """
        building.build(tmp_path / "s.zarr", count=3)
        path = f"{place_on_s3}/s.zarr"
        writing = faults.Once(500, 503, methods=("PUT",))
        reading = faults.Once(500, 503, "cut", "short", methods=("GET",))
        s3.fault = lambda request: (
            (writing(request) or reading(request))
            if re.search(r"/c/|s\.zarr/zarr|versions|lease|list-type", request.path)
            else None
        )
        building.build(path, count=3)
        assert_same_maps(path, tmp_path / "s.zarr", "scene/1")
        assert writing.count > 30
        assert reading.count > 20
        assert contents(path) == contents(str(tmp_path / "s.zarr"))

    def test_objects_cut_short_for_good_are_never_taken_for_whole(
        self, building: ModuleType, s3: ModuleType, place_on_s3: str
    ) -> None:
        path = f"{place_on_s3}/s.zarr"
        building.build(path)
        reader = MapReader(path)
        s3.fault = lambda request: "short" if request.method == "GET" else None
        with pytest.raises(StoreUnavailableError, match="cut short"):
            MapReader(path)
        with pytest.raises(StoreUnavailableError, match="cut short") as caught:
            reader.read("hardness", "scene/0")
        assert caught.value.__notes__ == ["while reading hardness of image scene/0"]
        with pytest.raises(StoreUnavailableError, match="cut short"):
            reader.statistics()

    def test_a_build_that_cannot_write_says_so_and_goes_on_later(
        self, building: ModuleType, s3: ModuleType, place_on_s3: str, store: Path
    ) -> None:
        path = f"{place_on_s3}/s.zarr"
        s3.fault = lambda request: (
            503 if request.method == "PUT" and "confidence/c/1" in request.path else None
        )
        with pytest.raises(StoreWriteError, match=r"confidence/c/1/0/0: cannot be written .*503"):
            building.build(path)
        s3.reset()
        assert MapWriter.open(path).pending_shards() == [1, 2]
        building.build(path)
        assert contents(path) == contents(str(store))

    def test_reads_overlap(self, building: ModuleType, s3: ModuleType, place_on_s3: str) -> None:
        """Six reads are answered only once all six requests are there."""
        path = f"{place_on_s3}/s.zarr"
        building.build(path)
        reader = MapReader(path)
        requests = [(array, "scene/0", None) for array in reader.arrays]
        assert len(requests) == 6
        barrier = threading.Barrier(6)

        def wait_for_all(request: object) -> None:
            if re.search("/c/0", request.path):  # type: ignore[attr-defined]
                barrier.wait(timeout=60)

        s3.fault = wait_for_all
        s3.reset_requests()
        first = reader.read_many(requests)  # a round of shard indices, a round of chunks
        assert len(s3.requests) == 12
        s3.reset_requests()
        second = reader.read_many(requests)
        assert len(s3.requests) == 6
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_whole_shard_is_one_request(
        self, building: ModuleType, s3: ModuleType, place_on_s3: str
    ) -> None:
        path = f"{place_on_s3}/s.zarr"
        building.build(path)
        reader = MapReader(path)
        assert reader.preload("discrepancy", budget=1000)
        s3.reset_requests()
        for name in reader.image_ids:
            reader.read("discrepancy", name)
        assert s3.requests == []
        shards = list(reader.iter_shards(["prediction"]))
        assert [len(shard.image_ids) for shard in shards] == [2, 2, 1]
        assert len(s3.requests) == 6  # an index and a range of chunks for each
        s3.reset_requests()
        summary = reader.summary()
        assert summary is not None
        assert summary.of_class(0).pixels.shape == (5,)
        assert len(s3.requests) == 6  # what vouches, two indices, two ranges, one whole object
