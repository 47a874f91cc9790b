from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zarr

from rdd_storage import (
    MapWriter,
    StoreFormatError,
    StoreMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
    disk_usage,
    find_store,
    find_stores,
    fingerprint,
    record_use,
    store_status,
    uses,
)

RESNET: dict[str, Any] = {
    "teacher": {"network": {"name": "deeplab", "encoder": "resnet101"}, "weights": "3f2a91c0de"},
    "data": {"name": "camvid", "split": "train"},
    "evaluation": {"scales": [1.0], "flip": False},
}
MOBILE = RESNET | {"teacher": {"network": {"name": "deeplab"}, "weights": "77aa01beef"}}
SCALES = RESNET | {"evaluation": {"scales": [0.5, 1.0], "flip": False}}


@pytest.fixture
def root(building: ModuleType, tmp_path: Path) -> Path:
    for name, identity in (("a", RESNET), ("b", MOBILE), ("c", SCALES)):
        writer = MapWriter.create(
            tmp_path / f"{name}.zarr",
            schema=building.SCHEMA,
            images=building.records(1),
            identity=identity,
        )
        if name != "c":
            writer.write_shard(0, [building.maps_of(building.records(1)[0])])
            writer.publish()
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text(
        '{"attributes": {"rdd": {"format_version": 9}}}'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, "abc"),
        ({"teacher": "3f2a91"}, "ac"),
        ({"teacher": "3f2a"}, ""),
        ({"teacher": "resnet101"}, "ac"),
        ({"teacher": {"weights": "77aa01beef"}}, "b"),
        ({"teacher": {"network.encoder": "resnet101"}}, "ac"),
        ({"data": "camvid", "complete": True}, "ab"),
        ({"data": {"split": "val"}}, ""),
        ({"settings": {"evaluation.scales": [1.0]}}, "ab"),
        ({"settings": {"evaluation": {"scales": [0.5, 1.0], "flip": False}}}, "c"),
        ({"settings": {"evaluation.flip": False, "evaluation": {"scales": [1.0]}}}, "ab"),
        ({"settings": {"evaluation.flip": 0}}, ""),
        ({"settings": {"nothing.such": 1}}, ""),
        ({"teacher": "3f2a91c0de", "settings": {"evaluation.scales": [1.0]}}, "a"),
    ],
)
def test_stores_are_found(root: Path, wanted: dict[str, Any], names: str) -> None:
    found = find_stores(root, **wanted)
    assert [Path(status.path).stem for status in found] == list(names)


def test_the_one_that_fits(root: Path) -> None:
    status = find_store(root, teacher="3f2a91c0de", settings={"evaluation.scales": [1.0]})
    assert status.fingerprint == fingerprint(RESNET)
    with pytest.raises(StoreMismatchError, match="expected one store that fits, got 2") as caught:
        find_store(root, data="camvid")
    assert "a.zarr" in str(caught.value)
    with pytest.raises(StoreMismatchError) as caught:
        find_store(root, teacher="77aa01beef", settings={"evaluation.scales": [2.0]})
    text = str(caught.value)
    assert "teacher: expected '77aa01beef', found deeplab, resnet101, 3f2a91c0de" in text
    assert "evaluation.scales.0: expected 2.0, found 1.0" in text
    assert "expected a published version, found an unfinished build" in text
    with pytest.raises(StoreNotFoundError, match="no map store below it"):
        find_store(root / "a.zarr")


def test_disk_usage(root: Path) -> None:
    usage = disk_usage(root)
    assert usage.total == sum(usage.stores.values())
    assert {Path(path).stem for path in usage.stores} == {"a", "b", "c"}
    assert list(usage.stores.values()) == sorted(usage.stores.values(), reverse=True)
    path = root / "a.zarr"
    assert usage.stores[str(path)] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


@pytest.mark.parametrize("place", ["local", "memory"])
def test_runs_record_what_they_used(building: ModuleType, tmp_path: Path, place: str) -> None:
    url = str(tmp_path / "s.zarr") if place == "local" else f"memory://{tmp_path.name}/s.zarr"
    building.build(url)
    assert uses(url) == []
    first = record_use(url, 1, run="runs/nightly 7", details={"student": {"lr": 0.02}})
    again = record_use(url, 1, run="runs/nightly 7", details={"student": {"lr": 0.01}})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: record_use(url, 1, run=f"runs/parallel-{n}"), range(8)))
    found = uses(url)
    assert len(found) == 9
    assert found[0] == again
    assert again.at >= first.at
    assert found[0].details == {"student": {"lr": 0.01}}
    assert len(found[0].manifest_sha256) == 64
    assert uses(url, version=2) == []
    assert store_status(url).complete
    with pytest.raises(UnknownVersionError, match=r"versions \(1\), got 2"):
        record_use(url, 2, run="x")
    with pytest.raises(StoreFormatError, match="details"):
        record_use(url, 1, run="x", details={"loss": float("nan")})


def test_plain_zarr_knows_the_records(own_store: Path) -> None:
    """Warnings are errors here."""
    record_use(own_store, 1, run="runs/a")
    (damaged,) = [file for file in (own_store / "uses").iterdir() if file.is_dir()]
    record_use(own_store, 1, run="runs/b")
    names = {name for name, _ in zarr.open_group(own_store, use_consolidated=False).members()}
    assert "uses" in names
    assert "uses" not in dict(zarr.open_group(own_store).members())
    (damaged / "zarr.json").write_bytes(b"{}")
    assert [use.run for use in uses(own_store)] == ["runs/b"]
