"""CamVid in the SegNet layout: 11 classes, 367 + 101 + 233 frames of 480x360.

Brostow, Fauqueur, Cipolla, "Semantic object classes in video" (Pattern Recognition Letters, 2009);
reduced to 11 classes by Badrinarayanan et al., "SegNet", arXiv 1511.00561.
"""

from __future__ import annotations

from rdd_pipeline.data.base import IGNORE_INDEX
from rdd_pipeline.data.label_maps import LabelMap
from rdd_pipeline.data.pairs import (
    FileDataset,
    match_folders,
    require_folders,
    require_images,
    tree,
)
from rdd_pipeline.data.places import Place

CAMVID_CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car",
    "Pedestrian", "Bicyclist",
)  # fmt: skip
CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
CAMVID_UNLABELLED = 11

_LABELS = LabelMap(
    {number: number for number in range(len(CAMVID_CLASSES))}
    | {CAMVID_UNLABELLED: IGNORE_INDEX, IGNORE_INDEX: IGNORE_INDEX}
)


def open_camvid(root: Place, split: str) -> FileDataset:
    """One split of CamVid: a folder of images and, beside it, one of labels of the same names.

    Args:
        root: Folder that holds ``<split>`` and ``<split>annot``.
        split: Name of the folder of images.

    Raises:
        DataError: A folder is missing or holds no images.
    """
    layout = tree(
        (f"{split}/0001TP_006690.png", "images, any format"),
        (
            f"{split}annot/0001TP_006690.png",
            f"labels: 0-{len(CAMVID_CLASSES) - 1}, {CAMVID_UNLABELLED} = unlabelled",
        ),
    )
    images, labels = root / split, root / f"{split}annot"
    require_folders([images, labels], layout, root=root)
    return FileDataset(
        name="camvid",
        split=split,
        class_names=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        label_reader=_LABELS,
        files=require_images(match_folders(images, labels), str(images), layout),
        listings=root.listings,
    )
