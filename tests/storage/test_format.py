from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr
import zarr.storage

from rdd_storage import (
    FORMAT_VERSION,
    MapReader,
    MapWriter,
    StoreFormatError,
    StoreNotFoundError,
    list_stores,
    store_status,
    verify_store,
)
from rdd_storage.layout import decode_object, map_specs

VERSION_1 = Path(__file__).parents[1] / "data" / "store-v1"


def pattern(shape: tuple[int, ...], modulus: int, image: int) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) * 7 + 13 * image) % modulus


def test_the_committed_store_of_version_1_is_read() -> None:
    reader = MapReader(VERSION_1)
    assert reader.version == 1
    assert reader.schema.class_names == ("sky", "building", "traffic light", "road")
    assert reader.fingerprint == (
        "d24d156728e9bb73e33eadfde35149c016bee2d8efb6b2a99b2f353f5b52b67c"
    )
    assert reader.attributes["palette"][3] == [128, 64, 128]
    assert reader.image_ids == ("image0", "image1", "image2")
    for index, size in enumerate([(16, 24), (12, 24), (16, 20)]):
        name = f"image{index}"
        void = pattern(size, 11, index) == 0
        logits = -pattern((4, 2, 3), 32, index) / 8
        expected = {
            "discrepancy": pattern((2, 3), 64, index) / 16,
            "hardness": np.where(void, 255, pattern(size, 251, index)),
            "aux_hardness": np.where(void, 255, pattern(size, 239, index)),
            "prediction": pattern(size, 3, index),
            "confidence": pattern(size, 255, index),
            "logits": logits,
            "aux_logits": logits / 2,
        }
        assert set(reader.arrays) == set(expected)
        for array, values in expected.items():
            np.testing.assert_array_equal(reader.read(array, name), values, err_msg=array)
        assert reader.record(name).digest == f"{index:064x}"
    statistics = reader.statistics()
    labelled = sum(
        (pattern(s, 11, i) != 0).sum() for i, s in enumerate([(16, 24), (12, 24), (16, 20)])
    )
    assert statistics.confusion.sum() == statistics.hardness.sum() == labelled


def test_the_committed_store_is_sound() -> None:
    report = verify_store(VERSION_1)
    assert report.ok, [str(damage) for damage in report.damages]
    assert report.version == 1


def test_a_newer_version_asks_for_an_upgrade(own_store: Path) -> None:
    root = own_store / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["rdd"]["format_version"] = FORMAT_VERSION + 1
    root.write_text(json.dumps(document))
    for use in (MapReader, MapWriter.open, store_status, verify_store):
        with pytest.raises(
            StoreFormatError, match="expected format version 1, got 2; upgrade rdd-maps"
        ):
            use(own_store)


@pytest.mark.parametrize("content", ["no json", "[1]", '{"attributes": {"rdd": 3}}', "{}"])
def test_something_else_is_no_store(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreNotFoundError, match="expected a map store, got something else"):
        MapReader(tmp_path)


def test_an_incomplete_root_is_refused(own_store: Path) -> None:
    root = own_store / "zarr.json"
    document = json.loads(root.read_text())
    del document["attributes"]["rdd"]["schema"]
    root.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="without 'schema'"):
        MapReader(own_store)


def test_nothing_is_visible_before_publication(building: ModuleType, tmp_path: Path) -> None:
    writer = MapWriter.create(
        tmp_path / "s.zarr",
        schema=building.SCHEMA,
        images=building.records(),
        identity=building.IDENTITY,
    )
    writer.write_shard(0, [building.maps_of(record) for record in building.records(2)])
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert group.attrs["rdd"]["version"] == 0
    assert list(group.array_keys()) == []


def test_plain_zarr_knows_every_object(store: Path) -> None:
    """Warnings are errors here; an object that Zarr does not recognise would warn."""
    group = zarr.open_group(store, mode="r", use_consolidated=False)
    names = {name for name, _ in group.members(max_depth=None)}
    assert {"hardness", "statistics/confusion", "versions/000001/summary/counts"} <= names
    hardness = group["hardness"]
    assert isinstance(hardness, zarr.Array)
    assert hardness.shards == (2, 20, 28)
    assert hardness.chunks == (1, 20, 28)
    assert hardness.fill_value == 254
    np.testing.assert_array_equal(hardness[2, 18:], 255)  # padding


def test_plain_zarr_reads_what_the_reader_reads(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    reader = MapReader(store)
    for array in reader.arrays:
        values = reader.read(array, "scene/0")
        stored = group[array]
        assert isinstance(stored, zarr.Array)
        np.testing.assert_array_equal(stored[0], values)


PLAIN = """
import sys, warnings
sys.modules["rdd_storage"] = None  # any import of it fails
warnings.simplefilter("error")
import numpy as np, xarray
ds = xarray.open_zarr(sys.argv[1])
assert "tensorstore" not in sys.modules
assert dict(ds.sizes) == {"image": 3, "y": 16, "x": 24, "grid_y": 2, "grid_x": 3, "class": 4}
assert set(ds.coords) == {
    "image", "class", "height", "width", "grid_height", "grid_width", "digest", "done"}
one = ds.sel(image="image1")
codes = (np.arange(12 * 24).reshape(12, 24) * 7 + 13)
void = codes % 11 == 0
hardness = one.hardness.values
np.testing.assert_array_equal(np.isnan(hardness[:12]), void)
assert np.isnan(hardness[12:]).all() and np.isnan(one.confidence.values[12:]).all()
np.testing.assert_allclose(
    hardness[:12][~void], (codes % 251)[~void] * np.sqrt(0.3) / 137, rtol=1e-6)
np.testing.assert_allclose(one.confidence.values[:12], codes % 255 / 254, rtol=1e-6)
np.testing.assert_array_equal(one.prediction.values[:12], codes % 3)
assert list(ds["class"].values) == ["sky", "building", "traffic light", "road"]
assert int(one.height) == 12 and bool(ds.done.all())
assert ds.attrs["rdd"]["version"] == 1 and ds.hardness.attrs["units"] == "1"
whole = xarray.open_zarr(sys.argv[1], chunks={"image": 2, "y": -1, "x": -1}, consolidated=False)
assert whole.hardness.chunks[0] == (2, 1)
tree = xarray.open_datatree(sys.argv[1], engine="zarr")
statistics = tree["statistics"].to_dataset()
assert list(statistics.region.values) == ["interior", "boundary"]
assert int(statistics.confusion.sum()) == int(statistics.hardness.sum()) > 0
"""


def test_xarray_opens_a_store_without_this_package() -> None:
    command = [sys.executable, "-c", PLAIN, str(VERSION_1)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


SPLITS = """
import sys, warnings
sys.modules["rdd_storage"] = None
warnings.simplefilter("error")
import xarray
tree = xarray.DataTree.from_dict(
    {"train": xarray.open_zarr(sys.argv[1]), "val": xarray.open_zarr(sys.argv[2])})
assert {name: node.sizes["image"] for name, node in tree.items()} == {"train": 5, "val": 3}
image = tree["train"].to_dataset().sel(image="scene/4")
assert float(image.hardness[10, 10]) >= 0 and int(image.height) == 19
assert tree["val/confidence"].sel(image="image2").attrs["units"] == "1"
ds = xarray.open_zarr(sys.argv[1], group="versions/000001/summary", consolidated=False)
assert dict(ds.sizes) == {
    "count": 2, "class_or_all": 4, "place": 5, "measure": 4, "quantity": 2, "class": 3,
    "region": 2, "hardness_code": 251, "predicted_class": 3, "outcome": 3,
    "discrepancy_bin": 248, "correct": 2, "confidence_code": 255}
assert ds.measures.attrs["names"] == ["mean", "p95", "soft_min", "hard_share"]
mean = tree["train"].to_dataset().hardness.mean(["y", "x"])
assert abs(ds.measures[0, -1].values - mean.values).max() < 1e-5
assert int(ds.confusion.sum()) == int(ds.counts[0, -1].sum())
xarray.open_datatree(sys.argv[1], engine="zarr", consolidated=False)
"""


def test_xarray_opens_several_splits_as_a_tree(store: Path) -> None:
    command = [sys.executable, "-c", SPLITS, str(store), str(VERSION_1)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_status_and_list(building: ModuleType, own_store: Path, tmp_path: Path) -> None:
    status = store_status(own_store)
    assert (status.images, status.images_done, status.shards, status.shards_done) == (5, 5, 3, 3)
    assert status.complete
    files = [file for file in own_store.rglob("*") if file.is_file()]
    assert status.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert status.bytes_on_disk == sum(status.arrays.values())
    hardness = sum(
        f.stat().st_size for f in (own_store / "hardness" / "c").rglob("*") if f.is_file()
    )
    assert status.arrays["hardness"] == hardness
    assert status.bytes_per_image * 5 == sum(status.arrays.values()) - status.arrays["metadata"]

    unfinished = MapWriter.create(
        tmp_path / "young.zarr",
        schema=building.SCHEMA,
        images=building.records(),
        identity=building.IDENTITY,
    )
    unfinished.write_shard(2, [building.maps_of(building.records()[4])])
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text(
        '{"attributes": {"rdd": {"format_version": 9}}}'
    )
    (tmp_path / "no store").mkdir()
    listed = {Path(item.path).name: item for item in list_stores(tmp_path)}
    assert list(listed) == ["broken.zarr", "own.zarr", "young.zarr"]
    assert "upgrade rdd-maps" in listed["broken.zarr"].problem
    young = listed["young.zarr"].status
    assert young is not None
    assert (young.complete, young.version) == (False, 0)
    assert (young.shards_done, young.images_done) == (1, 1)
    assert list_stores(tmp_path / "nothing") == []


def test_verify_names_each_damaged_object(own_store: Path) -> None:
    def shard(name: str, index: int, dims: int) -> Path:
        return own_store / name / "c" / "/".join([str(index), *["0"] * (dims - 1)])

    flipped = shard("aux_hardness", 1, 3)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 16
    flipped.write_bytes(content)
    shard("discrepancy", 0, 3).unlink()
    truncated = shard("logits", 2, 4)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    shard("done", 0, 1).write_bytes(b"")
    (own_store / "confidence" / "zarr.json").write_text("{}")
    calls: list[tuple[int, int]] = []
    report = verify_store(own_store, progress=lambda done, total: calls.append((done, total)))
    assert not report.ok
    assert {(damage.array, damage.shard) for damage in report.damages} == {
        ("aux_hardness", 1),
        ("discrepancy", 0),
        ("logits", 2),
        ("done", 0),
        ("metadata", None),
    }
    assert report.bad_shards == (0, 1, 2)
    assert "discrepancy, shard 0 (discrepancy/c/0/0/0): missing" in map(str, report.damages)
    assert calls[-1] == (report.objects, report.objects)


def test_verify_finds_contradictions(building: ModuleType, own_store: Path) -> None:
    other = own_store.parent / "other.zarr"
    building.build(other, count=4)
    names = own_store / "image" / "c" / "0"
    names.write_bytes((other / "digest" / "c" / "0").read_bytes())
    assert [damage.problem for damage in verify_store(own_store).damages] == [
        "contradicts the manifest"
    ]


def test_a_flipped_bit_anywhere_in_a_shard_is_found_or_harmless(store: Path) -> None:
    """Every third bit of one object; harmless is only the bit that zstd defines as unused."""
    spec = map_specs(MapReader(store).schema, 5)["discrepancy"]
    content = (store / "discrepancy" / "c" / "2" / "0" / "0").read_bytes()
    expected = decode_object(spec, content, 1)
    unused_bit = 8 * 4 + 4  # in the descriptor after the magic number (RFC 8878, 3.1.1.1.1)
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit == unused_bit:
            np.testing.assert_array_equal(decode_object(spec, bytes(flipped), 1), expected)
        else:
            with pytest.raises((ValueError, RuntimeError)):
                decode_object(spec, bytes(flipped), 1)
