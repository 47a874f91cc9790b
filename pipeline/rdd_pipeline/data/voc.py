"""Pascal VOC 2012 segmentation, augmented with the Semantic Boundaries Dataset: 21 classes.

Everingham et al., "The Pascal visual object classes challenge: a retrospective" (IJCV, 2015);
Hariharan et al., "Semantic contours from inverse detectors" (ICCV 2011).
"""

from __future__ import annotations

from pathlib import PurePath

from rdd_pipeline.data.base import IGNORE_INDEX
from rdd_pipeline.data.label_maps import LabelMap
from rdd_pipeline.data.pairs import FileDataset, FilePairs, require_folders, require_images, tree
from rdd_pipeline.data.palettes import bit_palette
from rdd_pipeline.data.places import Place
from rdd_pipeline.errors import DataError
from rdd_storage import RddError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOC_PALETTE = bit_palette(len(VOC_CLASSES), first=0)

_LISTS = "ImageSets/Segmentation"
_PLAIN, _AUGMENTED = "SegmentationClass", "SegmentationClassAug"
_LABELS = LabelMap({n: n for n in range(len(VOC_CLASSES))} | {IGNORE_INDEX: IGNORE_INDEX})


def open_voc(root: Place, split: str) -> FileDataset:
    """One split of VOC 2012: the images that a list names.

    Args:
        root: The folder ``VOCdevkit/VOC2012``.
        split: Name of the list in ``ImageSets/Segmentation``. Lists whose names end with ``aug``
            take their labels from ``SegmentationClassAug``, others from ``SegmentationClass``.

    Raises:
        DataError: The list or a folder is missing, or the list names no images.
    """
    augmented = split.endswith("aug")
    images, listed = root / "JPEGImages", root / _LISTS / f"{split}.txt"
    labels = root / (_AUGMENTED if augmented else _PLAIN)
    layout = tree(
        ("JPEGImages/2007_000032.jpg", "images"),
        (f"{labels.name}/2007_000032.png", "labels: 0-20, 255 = ignored"),
        (f"{_LISTS}/{split}.txt", "one name a line: 2007_000032"),
    )
    if augmented and images.is_folder() and not (listed.exists() and labels.is_folder()):
        layout += (
            f"\n{listed.name} and {_AUGMENTED} are no part of VOC 2012: they add the labels of the "
            "Semantic\nBoundaries Dataset (10,582 training images). Put them there, or train on "
            "the 1,464 images of\nVOC 2012 itself with data.train_split: train."
        )
    require_folders([images, labels, listed], layout, root=root, inner="VOCdevkit/VOC2012")
    return FileDataset(
        name="voc",
        split=split,
        class_names=VOC_CLASSES,
        palette=VOC_PALETTE,
        label_reader=_LABELS,
        files=require_images(_listed(listed, images, labels), str(listed), layout),
        listings=root.listings,
    )


def _listed(listed: Place, images: Place, labels: Place) -> FilePairs:
    try:
        lines = listed.read_text().split("\n")
    except RddError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed}: cannot be read as a list of names ({error})") from error
    # Some copies of the augmented list name the two files: /JPEGImages/x.jpg /Segmentation.../x.png
    first = [words[0] for line in lines if (words := line.split())]
    named = [PurePath(word).name.removesuffix(".jpg") for word in first]
    names = tuple(dict.fromkeys(named))
    return FilePairs(
        image_ids=names,
        images=tuple(f"{images}/{name}.jpg" for name in names),
        labels=tuple(f"{labels}/{name}.png" for name in names),
        problems=(f"{listed}: {len(named) - len(names)} name(s) stand twice; remove one of each",)
        if len(named) > len(names)
        else (),
    )
