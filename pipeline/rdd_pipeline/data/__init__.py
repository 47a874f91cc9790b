"""Data sets, and the geometry of the crops that training takes from them."""

from __future__ import annotations

from typing import Literal

from rdd_pipeline.config import CamVidData, DataConfig
from rdd_pipeline.data.base import (
    IGNORE_INDEX,
    JSON,
    Progress,
    Sample,
    SegmentationDataset,
    check_dataset,
    dataset_digests,
)
from rdd_pipeline.data.camvid import CamVidDataset
from rdd_pipeline.data.synthetic import SyntheticDataset


def build_dataset(config: DataConfig, split: Literal["train", "val"]) -> SegmentationDataset:
    """Open the training or validation split of the configured data set.

    Only the layout is looked at; :func:`check_dataset` reads the files.

    Args:
        config: The ``data`` section.
        split: Which of its two splits.

    Raises:
        DataError: Folders or all images are missing; the message shows the expected layout.
    """
    if isinstance(config, CamVidData):
        folder = config.train_split if split == "train" else config.val_split
        return CamVidDataset(config.root, folder)
    return SyntheticDataset(
        split=split,
        images=config.train_images if split == "train" else config.val_images,
        height=config.height,
        width=config.width,
        seed=config.seed,
    )


__all__ = [
    "IGNORE_INDEX",
    "JSON",
    "CamVidDataset",
    "Progress",
    "Sample",
    "SegmentationDataset",
    "SyntheticDataset",
    "build_dataset",
    "check_dataset",
    "dataset_digests",
]
