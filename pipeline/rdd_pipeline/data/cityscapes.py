"""Cityscapes, fine annotations: 19 classes, 2,975 + 500 images of 2048x1024.

Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", arXiv 1604.01685.
"""

from __future__ import annotations

from rdd_pipeline.data.base import IGNORE_INDEX
from rdd_pipeline.data.label_maps import LabelMap
from rdd_pipeline.data.pairs import (
    FileDataset,
    list_names,
    match_files,
    require_folders,
    require_images,
    tree,
)
from rdd_pipeline.data.places import Place

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
CITYSCAPES_CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023, 0.9539, 0.9843,
    1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip
"""Weights in the cross-entropy that published code for Cityscapes shares."""
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Number of each class in ``labelIds`` files; 0 to 33 not named here are no classes."""

_HIGHEST_ID = 33
_IMAGE, _LABEL = "_leftImg8bit", "_gtFine_labelIds"
# 255 stands for licence plates, -1 in the official table, where a tool has drawn them.
_LABELS = LabelMap(
    dict.fromkeys((*range(_HIGHEST_ID + 1), IGNORE_INDEX), IGNORE_INDEX)
    | {number: index for index, number in enumerate(CITYSCAPES_IDS)}
)


def open_cityscapes(root: Place, split: str) -> FileDataset:
    """One split of Cityscapes.

    Args:
        root: Folder that holds ``leftImg8bit`` and ``gtFine``.
        split: ``train`` or ``val``; the labels of ``test`` are not public.

    Raises:
        DataError: A folder is missing or holds no images.
    """
    layout = tree(
        (f"leftImg8bit/{split}/<city>/<name>{_IMAGE}.png", "images"),
        (f"gtFine/{split}/<city>/<name>{_LABEL}.png", "labels: the official ids 0-33"),
    )
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    require_folders([images, labels], layout, root=root, inner="cityscapes")
    png = frozenset({".png"})
    files = match_files(
        [pair for city in images.folders() for pair in list_names(images / city, png, _IMAGE)],
        [pair for city in labels.folders() for pair in list_names(labels / city, png, _LABEL)],
        expected_image=lambda name: str(images / _city(name) / f"{name}{_IMAGE}.png"),
        expected_label=lambda name: str(labels / _city(name) / f"{name}{_LABEL}.png"),
    )
    return FileDataset(
        name="cityscapes",
        split=split,
        class_names=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        class_weights=CITYSCAPES_CLASS_WEIGHTS,
        label_reader=_LABELS,
        files=require_images(files, f"{images}/*", layout),
        listings=root.listings,
    )


def _city(name: str) -> str:
    """``aachen`` of ``aachen_000000_000019``."""
    return name.rsplit("_", 2)[0]
