"""The images of a run, as they were at its start."""

from __future__ import annotations

import functools
import hashlib
from typing import Literal

from pydantic import TypeAdapter

from rdd_pipeline.config import DataConfig, RunConfig
from rdd_pipeline.data import (
    SegmentationDataset,
    build_dataset,
    check_dataset,
    dataset_digests,
    from_pack,
)
from rdd_pipeline.progress import Reporter


def check_data(config: RunConfig, reporter: Reporter) -> None:
    """Check both splits before anything long starts.

    Raises:
        DataError: With every problem found in either split.
    """
    for split in ("train", "val"):
        dataset = open_split(config.data, split)
        with reporter.bar(f"check {split}", len(dataset)) as bar:
            check_dataset(dataset, progress=bar.advance)


@functools.lru_cache(maxsize=8)
def _cached_split(data_json: str, split: Literal["train", "val"]) -> SegmentationDataset:
    config: DataConfig = TypeAdapter(DataConfig).validate_json(data_json)
    return build_dataset(config, split)


@functools.lru_cache(maxsize=8)
def _cached_digests(data_json: str, split: Literal["train", "val"]) -> tuple[str, ...]:
    return dataset_digests(_cached_split(data_json, split))


def open_split(data: DataConfig, split: Literal["train", "val"]) -> SegmentationDataset:
    """A split, listed once per process: all stages of a run take the images that were there at its
    start, those that :func:`image_digests` has."""
    return _cached_split(data.model_dump_json(), split)


def image_digests(data: DataConfig, split: Literal["train", "val"] = "train") -> tuple[str, ...]:
    """Digests of a split's images and labels, asked for once per process: a run takes its data as
    they were at its start."""
    return _cached_digests(data.model_dump_json(), split)


def images_digest(data: DataConfig) -> str:
    """One digest over the content of all training images and labels (hex)."""
    return hashlib.sha256("\n".join(image_digests(data)).encode()).hexdigest()


def forget_digests() -> None:
    """List the data and look for changes anew at the next question, as a later run would."""
    _cached_split.cache_clear()
    _cached_digests.cache_clear()


def packed_split(
    config: RunConfig,
    dataset: SegmentationDataset,
    split: Literal["train", "val"],
    reporter: Reporter,
) -> SegmentationDataset:
    """A split that is about to be read many times, from its pack as far as that fits."""
    return from_pack(
        dataset,
        config.data,
        digests=lambda: image_digests(config.data, split),
        say=reporter.say,
    )
