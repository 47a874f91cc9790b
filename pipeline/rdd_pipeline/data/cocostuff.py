"""COCO-Stuff 164k: 171 classes of things and stuff, 118,287 + 5,000 images.

Caesar, Uijlings, Ferrari, "COCO-Stuff: thing and stuff classes in context", arXiv 1612.03716.
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
from rdd_pipeline.data.palettes import bit_palette
from rdd_pipeline.data.places import Place
from rdd_pipeline.data.reading import IMAGE_SUFFIXES

COCOSTUFF_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
COCOSTUFF_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Numbers from 0 to 181 that COCO gave to things it never annotated."""
COCOSTUFF_PALETTE = bit_palette(len(COCOSTUFF_CLASSES))

_NUMBERS = tuple(number for number in range(182) if number not in COCOSTUFF_UNUSED)
_LABELS = LabelMap(
    {number: index for index, number in enumerate(_NUMBERS)} | {IGNORE_INDEX: IGNORE_INDEX}
)


def open_cocostuff(root: Place, split: str, labels: str = "annotations") -> FileDataset:
    """One split of COCO-Stuff.

    Args:
        root: Folder that holds ``images`` and the folder of labels.
        split: ``train2017`` or ``val2017``.
        labels: Folder below ``root`` that ``stuffthingmaps_trainval2017.zip`` was unpacked to.

    Raises:
        DataError: A folder is missing or holds no images.
    """
    layout = tree(
        (f"images/{split}/000000000139.jpg", "images"),
        (f"{labels}/{split}/000000000139.png", "labels: 0-181, 255 = unlabelled"),
    )
    image_folder, label_folder = root / "images" / split, root / labels / split
    if not label_folder.exists() and image_folder.is_folder():
        layout += (
            "\ndata.labels names the folder that stuffthingmaps_trainval2017.zip was unpacked to."
        )
    require_folders([image_folder, label_folder], layout, root=root, inner="coco")
    files = match_files(
        list_names(image_folder, IMAGE_SUFFIXES),
        # Other programs leave converted labels beside the original ones: <name>_labelTrainIds.png
        [
            pair
            for pair in list_names(label_folder, frozenset({".png"}))
            if not pair[0].endswith("_labelTrainIds")
        ],
        expected_image=lambda name: str(image_folder / f"{name}.jpg"),
        expected_label=lambda name: str(label_folder / f"{name}.png"),
    )
    return FileDataset(
        name="cocostuff",
        split=split,
        class_names=COCOSTUFF_CLASSES,
        palette=COCOSTUFF_PALETTE,
        label_reader=_LABELS,
        files=require_images(files, str(image_folder), layout),
        listings=root.listings,
    )
