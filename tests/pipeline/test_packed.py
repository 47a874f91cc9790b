"""Packs give the pixels of the files, for as long as the files are what was packed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rdd_pipeline.config import FolderData, RunConfig, parse_config
from rdd_pipeline.data import (
    PackedDataset,
    PackResult,
    SegmentationDataset,
    build_dataset,
    dataset_digests,
    from_pack,
    pack_dataset,
)
from rdd_pipeline.errors import DataError, ImageReadError
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import forget_digests
from rdd_pipeline.stages import run_teacher
from rdd_storage import PackWriter, StoreFormatError, StoreIncompleteError, verify_store
from tiny import tiny_tree

SIZES = ((37, 53), (37, 53), (1, 1), (24, 61), (40, 7))
QUIET = Reporter(quiet=True)


def write_image(root: Path, index: int, seed: int, size: tuple[int, int]) -> None:
    """An image, every other one as JPEG, and its label."""
    rng = np.random.default_rng(seed)
    suffix = "jpg" if index % 2 else "png"
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(root / "images" / f"{index:02}.{suffix}")
    label = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
    Image.fromarray(label).save(root / "labels" / f"{index:02}.png")


def folder(root: Path, packed: Literal["auto", "never", "always"] = "auto") -> FolderData:
    split = {"images": "images", "labels": "labels"}
    return FolderData(
        root=root,
        train=split,
        val=split,
        classes=("road", "tree", "sky"),
        packed=packed,
        packed_root=str(root / "packed"),
    )


def write_images(root: Path) -> FolderData:
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for index, size in enumerate(SIZES):
        write_image(root, index, index, size)
    return folder(root)


def pack(config: FolderData) -> PackResult:
    return pack_dataset(build_dataset(config, "train"), config.packed_root, reporter=QUIET)


def opened(config: FolderData, said: list[str] | None = None) -> SegmentationDataset:
    files = build_dataset(config, "train")
    notices = [] if said is None else said
    return from_pack(files, config, digests=lambda: dataset_digests(files), say=notices.append)


def assert_same(found: Any, expected: Any) -> None:
    assert found.image_id == expected.image_id
    assert found.image.dtype == found.label.dtype == np.uint8
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.label, expected.label)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentationDataset, PackedDataset]:
    """Images of odd sizes, read from files and from a pack."""
    config = write_images(tmp_path_factory.mktemp("images"))
    pack(config)
    packed = opened(config)
    assert isinstance(packed, PackedDataset)
    assert len(packed.packed) == len(SIZES)
    return packed.files, packed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_window_is_that_of_the_files(
    both: tuple[SegmentationDataset, PackedDataset], data: st.DataObject
) -> None:
    files, packed = both
    index = data.draw(st.integers(0, len(SIZES) - 1))
    # Slicing cuts off what is beyond the image, and may leave nothing.
    rows, columns = (
        slice(start, start + data.draw(st.integers(1, length + 2)))
        for length in SIZES[index]
        for start in [data.draw(st.integers(0, length))]
    )
    assert_same(packed.read_window(index, rows, columns), files.read_window(index, rows, columns))


def test_all_else_is_that_of_the_files(
    both: tuple[SegmentationDataset, PackedDataset],
) -> None:
    files, packed = both
    copy = pickle.loads(pickle.dumps(packed))  # which has read already
    for index in range(-1, len(SIZES)):
        assert_same(copy[index], files[index])
        assert copy.size(index) == files.size(index)
        assert copy.digest(index) == files.digest(index)
        assert copy.examine(index).size == files.examine(index).size
    assert copy.identity() == files.identity()
    assert (copy.class_names, copy.palette, copy.image_ids, copy.split) == (
        files.class_names,
        files.palette,
        files.image_ids,
        files.split,
    )
    assert copy.problems() == []
    with pytest.raises(IndexError):
        packed[len(SIZES)]


def test_files_are_not_read_again(tmp_path: Path) -> None:
    config = write_images(tmp_path)
    pack(config)
    files = build_dataset(config, "train")
    whole = [files[index] for index in range(len(SIZES))]
    packed = opened(config)
    for file in tmp_path.glob("images/*"):
        file.unlink()
    for index, expected in enumerate(whole):
        assert_same(packed[index], expected)
        assert packed.size(index) == expected.label.shape
    with pytest.raises(ImageReadError):
        files[0]


def test_without_a_pack_files_are_read(tmp_path: Path) -> None:
    config = write_images(tmp_path)
    said: list[str] = []
    assert not isinstance(opened(config, said), PackedDataset)
    assert said == []
    with pytest.raises(DataError, match=r"packed: always: folder train: no pack at .*'rdd data"):
        opened(folder(tmp_path, "always"))
    pack(config)
    assert not isinstance(opened(folder(tmp_path, "never"), said), PackedDataset)
    assert isinstance(opened(folder(tmp_path, "always")), PackedDataset)
    assert said == []


def test_changed_images_are_read_from_their_files(tmp_path: Path) -> None:
    config = write_images(tmp_path)
    pack(config)
    write_image(tmp_path, 1, 77, SIZES[1])
    write_image(tmp_path, 3, 78, (30, 30))
    write_image(tmp_path, 5, 79, (12, 12))
    said: list[str] = []
    packed = opened(config, said)
    assert isinstance(packed, PackedDataset)
    assert sorted(packed.packed) == [0, 2, 4]
    files = build_dataset(config, "train")
    for index in range(6):
        assert_same(packed[index], files[index])
        window = (slice(0, 1), slice(0, 1))
        assert_same(packed.read_window(index, *window), files.read_window(index, *window))
        assert packed.size(index) == files.size(index)
    (notice,) = said
    assert "3 of 6 images are new or have changed" in notice
    assert "'rdd data pack CONFIG'" in notice
    with pytest.raises(DataError, match="3 of 6 images are new or have changed"):
        opened(folder(tmp_path, "always"))


def test_a_pack_grows_with_the_data(tmp_path: Path) -> None:
    config = write_images(tmp_path)
    first = pack(config)
    assert (first.images, first.images_packed, first.version) == (5, 5, 1)
    again = pack(config)
    assert (again.images_packed, again.version, again.path) == (0, 1, first.path)
    write_image(tmp_path, 1, 77, SIZES[1])
    write_image(tmp_path, 5, 79, (12, 12))
    grown = pack(config)
    assert (grown.images_packed, grown.version, grown.path) == (2, 2, first.path)
    assert verify_store(grown.path).ok
    packed = opened(folder(tmp_path, "always"))
    files = build_dataset(config, "train")
    for index in range(6):
        assert_same(packed[index], files[index])
    write_image(tmp_path, 6, 80, (41, 12))
    with pytest.raises(StoreFormatError, match="height: expected 1 to 40") as failure:
        pack(config)
    assert f"to pack anew: rdd maps remove {first.path}" in failure.value.__notes__


def test_an_image_that_cannot_be_read_keeps_the_rest(tmp_path: Path) -> None:
    config = write_images(tmp_path)
    for index in range(5, 20):
        write_image(tmp_path, index, index, (30, 30))
    broken = tmp_path / "images" / "19.jpg"
    whole = broken.read_bytes()
    # The header is there: it is only found when the image is decoded, in the last shard.
    broken.write_bytes(whole[:-40])
    said: list[str] = []
    with pytest.raises(ImageReadError, match=r"19\.jpg"):
        pack(config)
    assert not isinstance(opened(config, said), PackedDataset)
    assert "is unfinished" in said[0]
    with pytest.raises(DataError, match="is unfinished"):
        opened(folder(tmp_path, "always"))
    with pytest.raises(StoreIncompleteError):
        PackWriter.open(next((tmp_path / "packed").iterdir())).publish()
    broken.write_bytes(whole)
    assert pack(config).images_packed <= 8
    assert isinstance(opened(config), PackedDataset)


def trained(config: RunConfig, said: list[str]) -> TrainedNetwork:
    reporter = Reporter(quiet=True)
    reporter.say = said.append  # type: ignore[method-assign]
    forget_digests()
    return run_teacher(config, reporter)


def test_training_from_a_pack_gives_the_same_weights(tmp_path: Path) -> None:
    """With loader processes, too, which get the pack by pickle and open it themselves."""
    tree = tiny_tree(tmp_path / "packed run")
    tree["data"]["packed_root"] = str(tmp_path / "packed")
    tree["teacher"]["training"] |= {"iterations": 3, "workers": 1}
    config = parse_config(tree)
    for split in ("train", "val"):
        pack_dataset(build_dataset(config.data, split), config.data.packed_root, reporter=QUIET)
    said: list[str] = []
    from_packs = trained(config, said)
    assert sum("images are read from the pack" in line for line in said) == 2
    said.clear()
    tree = tiny_tree(tmp_path / "files run")
    tree["teacher"]["training"]["iterations"] = 3
    from_files = trained(parse_config(tree), said)
    assert not any("pack" in line for line in said)
    assert from_packs.weights.read_bytes() == from_files.weights.read_bytes()
    assert from_packs.result["metrics"] == from_files.result["metrics"]
    # Nor does it change what decides whether a result is used again.
    assert from_packs.result["settings"] == from_files.result["settings"]
