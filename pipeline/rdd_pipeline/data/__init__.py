"""Data sets, and the geometry of the crops that training takes from them."""

from __future__ import annotations

from typing import Literal

from rdd_pipeline.config import (
    ADE20KData,
    CamVidData,
    CityscapesData,
    COCOStuffData,
    DataConfig,
    FolderData,
    HuggingFaceData,
    SyntheticData,
    VOCData,
)
from rdd_pipeline.data.ade20k import open_ade20k
from rdd_pipeline.data.base import (
    IGNORE_INDEX,
    JSON,
    Examined,
    Progress,
    Sample,
    SegmentationDataset,
    check_dataset,
    dataset_digests,
)
from rdd_pipeline.data.camvid import open_camvid
from rdd_pipeline.data.cityscapes import open_cityscapes
from rdd_pipeline.data.cocostuff import open_cocostuff
from rdd_pipeline.data.folder import open_folder
from rdd_pipeline.data.huggingface import HuggingFaceDataset
from rdd_pipeline.data.packed import PackedDataset, PackResult, from_pack, pack_dataset, pack_path
from rdd_pipeline.data.pairs import FileDataset
from rdd_pipeline.data.places import open_place
from rdd_pipeline.data.survey import ClassShare, Survey, survey_dataset
from rdd_pipeline.data.synthetic import SyntheticDataset
from rdd_pipeline.data.voc import open_voc


def build_dataset(config: DataConfig, split: Literal["train", "val"]) -> SegmentationDataset:
    """Open the training or validation split of the configured data set.

    Only the layout is looked at; :func:`check_dataset` reads the files, and :func:`from_pack`
    takes the pixels from a pack.

    Args:
        config: The ``data`` section.
        split: Which of its two splits.

    Raises:
        DataError: Folders or all images are missing; the message shows the expected layout.
        LocationError: There is no such bucket.
        StoreUnavailableError, StoreAccessError: The object store does not answer or refuses.
        ConfigError: The data set needs a package that is not installed.
    """
    match config:
        case SyntheticData():
            return SyntheticDataset(
                split=split,
                images=config.train_images if split == "train" else config.val_images,
                height=config.height,
                width=config.width,
                seed=config.seed,
            )
        case HuggingFaceData():
            return HuggingFaceDataset(config, split)
        case FolderData():
            dataset = open_folder(config, split)
        case _:
            dataset = _open_layout(config, split)
    dataset.read_all = config.read_all
    return dataset


def _open_layout(
    config: CamVidData | CityscapesData | VOCData | ADE20KData | COCOStuffData,
    split: Literal["train", "val"],
) -> FileDataset:
    """One split of a public data set."""
    root = open_place(config.root)
    name = config.train_split if split == "train" else config.val_split
    match config:
        case CamVidData():
            return open_camvid(root, name)
        case CityscapesData():
            return open_cityscapes(root, name)
        case VOCData():
            return open_voc(root, name)
        case ADE20KData():
            return open_ade20k(root, name)
        case COCOStuffData():
            return open_cocostuff(root, name, config.labels)


__all__ = [
    "IGNORE_INDEX",
    "JSON",
    "ClassShare",
    "Examined",
    "FileDataset",
    "HuggingFaceDataset",
    "PackResult",
    "PackedDataset",
    "Progress",
    "Sample",
    "SegmentationDataset",
    "Survey",
    "SyntheticDataset",
    "build_dataset",
    "check_dataset",
    "dataset_digests",
    "from_pack",
    "pack_dataset",
    "pack_path",
    "survey_dataset",
]
