"""Data sets in buckets: what is asked of the server, and what is said when it does not answer."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import CamVidData, FolderData, RunConfig, parse_config
from rdd_pipeline.data import (
    PackedDataset,
    build_dataset,
    check_dataset,
    dataset_digests,
    from_pack,
    pack_dataset,
    survey_dataset,
)
from rdd_pipeline.data.places import open_place
from rdd_pipeline.errors import DataError, ImageReadError
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import forget_digests
from rdd_pipeline.stages import run_maps, run_student
from rdd_storage import LocationError, MapReader, StoreAccessError, StoreUnavailableError
from tiny import tiny_tree

QUIET = Reporter(quiet=True)


def write(folder: Path, split: str, count: int, size: tuple[int, int] = (48, 80)) -> None:
    """Images and labels of CamVid's layout."""
    rng = np.random.default_rng(count)
    for part, shape, high in ((split, (*size, 3), 256), (f"{split}annot", size, 11)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, high, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number:03}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images for training and one for validation."""
    write(tmp_path / "data", "train", 4)
    write(tmp_path / "data", "val", 1)
    return tmp_path / "data"


def opened(url: str | Path, **settings: Any) -> Any:
    return build_dataset(CamVidData(root=url, **settings), "train")


def test_files_are_listed_at_once_and_read_by_one_request_each(bucket: Any, folder: Path) -> None:
    dataset = opened(bucket.upload(folder))
    assert bucket.requests() == {"list": 4}, "two folders, each looked for and then listed"
    bucket.forget()
    expected = opened(folder)
    for sample, local in zip(dataset, expected, strict=True):
        np.testing.assert_array_equal(sample.image, local.image)
        np.testing.assert_array_equal(sample.label, local.label)
    assert bucket.requests() == {"get": 8}
    bucket.forget()
    assert dataset_digests(dataset) == dataset_digests(expected)
    assert [dataset.size(index) for index in range(4)] == [(48, 80)] * 4
    assert bucket.requests() == {"get": 8}, "digests and sizes of one reading"
    bucket.forget()
    check_dataset(dataset)
    assert survey_dataset(dataset) == survey_dataset(expected)
    assert bucket.requests() == {"get": 16}
    bucket.forget()
    check_dataset(opened(bucket.url))
    assert bucket.requests() == {"list": 4}, "what was in order is not read again"
    survey_dataset(dataset)
    assert bucket.requests() == {"get": 8, "list": 4}, "unless that is asked for"


def test_unchanged_objects_are_not_read_again(
    bucket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(folder)
    first = dataset_digests(opened(url))
    bucket.forget()
    again = opened(url)
    assert dataset_digests(again) == first
    assert [again.size(index) for index in range(4)] == [(48, 80)] * 4
    assert bucket.requests() == {"list": 4}

    write(folder, "train", 5, size=(48, 96))
    bucket.put("train/002.png", (folder / "train/002.png").read_bytes())
    bucket.put("train/004.png", (folder / "train/004.png").read_bytes())
    bucket.put("trainannot/004.png", (folder / "trainannot/004.png").read_bytes())
    bucket.forget()
    changed = opened(url)
    found = dataset_digests(changed)
    assert [old == new for old, new in zip(first, found, strict=False)] == [1, 1, 0, 1]
    assert changed.size(2) == changed.size(4) == (48, 96)
    assert bucket.requests() == {"get": 4, "list": 4}

    bucket.forget()
    assert dataset_digests(opened(url, read_all=True)) == found
    assert bucket.requests() == {"get": 10, "list": 4}
    # What one server's bucket holds says nothing about another's of that name.
    elsewhere = bucket.server.endpoint.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("AWS_ENDPOINT_URL", elsewhere)
    bucket.forget()
    assert dataset_digests(opened(url)) == found
    assert bucket.requests() == {"get": 10, "list": 4}


def test_names_that_urls_would_have_to_quote(bucket: Any, tmp_path: Path) -> None:
    names = ["a b", "p%20q", "h#1?", "[s]", "ü"]
    write(tmp_path, "train", len(names))
    for kind in ("train", "trainannot"):
        for number, name in enumerate(names):
            (tmp_path / kind / f"{number:03}.png").rename(tmp_path / kind / f"{name}.png")
    dataset = opened(bucket.upload(tmp_path))
    local = opened(tmp_path)
    assert dataset.image_ids == local.image_ids
    assert dataset_digests(dataset) == dataset_digests(local)


def test_patterns_and_folders_of_other_places(bucket: Any, tmp_path: Path) -> None:
    for scene in ("x", "y/z"):
        write(tmp_path / scene, "train", 2)
    url = bucket.upload(tmp_path)

    def split(images: str, labels: str, root: str | Path) -> tuple[str, ...]:
        where = {"images": images, "labels": labels}
        config = FolderData(
            root=root, train=where, val=where, classes=tuple("abcdefghijk"), ignore=(255,)
        )
        dataset = build_dataset(config, "train")
        check_dataset(dataset)
        assert dataset.over_network
        return dataset.image_ids

    both = ("x/train/000", "x/train/001", "y/z/train/000", "y/z/train/001")
    annot = tmp_path / "annot"
    for name in both:
        label = tmp_path / f"{name.replace('train', 'trainannot')}.png"
        (annot / name).parent.mkdir(parents=True, exist_ok=True)
        label.rename(annot / f"{name}.png")
    assert split("**/train/*.png", f"{annot}/**/*.png", url) == both
    assert split(f"{url}/**/train/*.png", "annot/**/*.png", tmp_path) == both
    assert split("y/z/train", str(annot / "y/z/train"), url) == ("000", "001")
    assert open_place(url).glob("*/train/00?.png") == [f"{url}/x/train/00{n}.png" for n in (0, 1)]
    with pytest.raises(DataError, match=r"data\.train\.images: s3://maps/.*/gone matches no files"):
        split("gone", "gone", url)
    with pytest.raises(DataError, match=r"without '\.\.'"):
        split("../x", "y", url)


def test_a_passing_fault_is_waited_out(bucket: Any, faults: Any, folder: Path) -> None:
    url = bucket.upload(folder)
    bucket.server.fault = once = faults.Once(500, 503, "cut", "short", methods=("GET",))
    dataset = opened(url)
    assert dataset_digests(dataset) == dataset_digests(opened(folder))
    assert once.count > 8


def test_what_is_not_there_is_named(
    bucket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(folder)
    with pytest.raises(LocationError, match="s3://nowhere/x/train: there is no bucket 'nowhere'"):
        opened("s3://nowhere/x")
    with pytest.raises(DataError, match=f"data.root: no folder {url}/a/train and .*expected\n"):
        opened(f"{url}/a")
    bucket.delete("trainannot/001.png")
    with pytest.raises(DataError) as caught:
        check_dataset(opened(url))
    assert (
        f"{url}/train/001.png: image without a label; expected {url}/trainannot/001.png"
    ) in str(caught.value)

    bucket.put("trainannot/001.png", (folder / "trainannot/001.png").read_bytes())
    dataset, every_file = opened(url), opened(url, read_all=True)
    bucket.delete("train/002.png")
    gone = f"{url}/train/002.png: no such object"
    for attempt in (lambda: dataset[2], lambda: dataset_digests(dataset), lambda: dataset.size(2)):
        with pytest.raises(ImageReadError, match=gone):
            attempt()
    assert every_file.problems() == [gone]
    bucket.forget()
    with pytest.raises(ImageReadError):
        dataset_digests(dataset)
    read = [request.path for request in bucket.server.requests]
    assert not any("/000.png" in path for path in read), "what had been read is known"

    bucket.server.fault = lambda request: 503 if "/train/001" in request.path else None
    for attempt in (lambda: dataset[1], every_file.problems):
        with pytest.raises(StoreUnavailableError, match=f"{url}/train/001.png: cannot be read"):
            attempt()
    bucket.server.fault = lambda request: 403
    with pytest.raises(StoreAccessError, match=f"{url}/train: access refused .*credentials"):
        opened(url)
    with pytest.raises(StoreAccessError, match=f"{url}/train/001.png: access refused"):
        dataset[1]
    bucket.server.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailableError, match=f"{url}/train: cannot be read"):
        opened(url)


def test_a_pack_is_read_instead(bucket: Any, folder: Path, tmp_path: Path) -> None:
    config = CamVidData(root=bucket.upload(folder), packed_root=f"{bucket.url}/packed")
    packing = pack_dataset(build_dataset(config, "train"), config.packed_root, reporter=QUIET)
    assert packing.images_packed == 4
    files = build_dataset(config, "train")
    said: list[str] = []
    packed = from_pack(files, config, digests=files.digests, say=said.append)
    assert isinstance(packed, PackedDataset)
    expected = opened(folder)
    bucket.forget()
    for index in range(4):
        part = packed.read_window(index, slice(3, 20), slice(5, 40))
        np.testing.assert_array_equal(part.image, expected[index].image[3:20, 5:40])
    assert not any("/train" in request.path for request in bucket.server.requests)


def run_of(root: str | Path, output: Path, workers: int) -> RunConfig:
    tree = tiny_tree(output)
    tree["data"] = {"type": "camvid", "root": str(root)}
    tree["student"]["training"] |= {"iterations": 2, "workers": workers}
    return parse_config(tree)


def test_maps_and_students_are_those_of_the_folder(
    bucket: Any, folder: Path, tmp_path: Path
) -> None:
    """With loader processes, which get the data set by pickle and open the bucket themselves."""
    weights = tmp_path / "teacher.safetensors"
    configs = [
        run_of(folder, tmp_path / "local", workers=0),
        run_of(bucket.upload(folder), tmp_path / "bucket", workers=1),
    ]
    save_weights(build_network(configs[0].teacher.network, 11, seed=3), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})
    stores, students = [], []
    for config in configs:
        forget_digests()
        built = run_maps(config, teacher, QUIET)
        stores.append(MapReader(built.path))
        student = next(item for item in config.students if item.name == "rdd")
        students.append(run_student(config, student, built.path, QUIET))
    first, second = stores
    assert first.fingerprint == second.fingerprint
    assert [dataclasses.asdict(record) for record in first.records] == [
        dataclasses.asdict(record) for record in second.records
    ]
    for name in first.image_ids:
        np.testing.assert_array_equal(first.read("hardness", name), second.read("hardness", name))
    assert students[0].weights.read_bytes() == students[1].weights.read_bytes()


def test_pickles_are_small_and_hold_no_credentials(bucket: Any, folder: Path) -> None:
    dataset = opened(bucket.upload(folder))
    dataset_digests(dataset)
    data = pickle.dumps(dataset)
    assert b"example-secret" not in data
    assert len(data) < 70_000, "the table of labels, without listings"
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy[3].image, dataset[3].image)
    assert copy.digests() == dataset.digests()


def test_stores_in_memory_are_not_remembered(tmp_path: Path, caplog: Any) -> None:
    """Their ETags are numbers that begin anew in each process."""
    from rdd_storage.objects import object_location

    write(tmp_path, "train", 1)
    place = object_location("memory://data-objects/x")
    for path in tmp_path.rglob("*.png"):
        place.put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    caplog.set_level(logging.DEBUG, "rdd.data")
    for _ in range(2):
        assert dataset_digests(opened(place.url)) == dataset_digests(opened(tmp_path))
    assert caplog.messages.count("1 of 1 images are read for their digests") >= 2
