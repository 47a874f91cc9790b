"""CamVid in the SegNet layout: 11 classes, 367 + 101 + 233 frames of 480x360.

Brostow, Fauqueur, Cipolla, "Semantic object classes in video" (Pattern Recognition Letters, 2009);
reduced to 11 classes by Badrinarayanan et al., "SegNet", arXiv 1511.00561.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from rdd_pipeline.data.base import IGNORE_INDEX, JSON, Sample, SegmentationDataset
from rdd_pipeline.data.reading import (
    IMAGE_SUFFIXES,
    LabelMap,
    image_size,
    label_size,
    read_image,
    read_label,
)
from rdd_pipeline.errors import DataError, ImageReadError

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


class CamVidDataset(SegmentationDataset):
    """One split of CamVid: a folder of images and, beside it, one of labels of the same names.

    Args:
        root: Folder that holds ``<split>`` and ``<split>annot``.
        split: Name of the folder of images.

    Raises:
        DataError: A folder is missing or holds no images.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.name = "camvid"
        self.split = split
        self.class_names = CAMVID_CLASSES
        self.palette = CAMVID_PALETTE
        self._root = Path(root)
        images, labels = self._root / split, self._root / f"{split}annot"
        missing = [path for path in (images, labels) if not path.is_dir()]
        if missing:
            raise DataError(
                f"data.root: no folder {' and no '.join(map(str, missing))}; expected\n"
                f"{_layout(split)}\nSet data.root to the folder that holds them."
            )
        self._images: dict[str, Path] = {}
        self._layout_notes: list[str] = []
        for path in sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            other = self._images.setdefault(path.stem, path)
            if other is not path:
                self._layout_notes.append(
                    f"{path}: has the same name as {other.name}; keep one of them"
                )
        if not self._images:
            raise DataError(
                f"data.root: no images in {images}; expected\n{_layout(split)}\n"
                "Set data.root to the folder that holds them."
            )
        self.image_ids = tuple(self._images)
        self._paths = tuple(self._images.values())
        self._labels = {p.stem: p for p in sorted(labels.iterdir()) if p.suffix.lower() == ".png"}
        self._label_folder = labels

    def __getitem__(self, index: int) -> Sample:
        index = self._require_index(index)
        label_path = self._label_path(index)
        image = read_image(self._paths[index])
        label = _LABELS.apply(read_label(label_path), label_path)
        if image.shape[:2] != label.shape:
            raise DataError(_size_problem(label_path, label.shape, image.shape))
        return Sample(image_id=self.image_ids[index], image=image, label=label)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header alone."""
        return image_size(self._paths[self._require_index(index)])

    def digest(self, index: int) -> str:
        """SHA-256, as hex, of the image file's bytes followed by the label file's bytes."""
        index = self._require_index(index)
        digest = hashlib.sha256()
        for path in (self._paths[index], self._label_path(index)):
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise ImageReadError(f"{path}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def identity(self) -> dict[str, JSON]:
        """Name, split, classes and label mapping; not where the files lie."""
        return {
            "name": self.name,
            "split": self.split,
            "classes": list(self.class_names),
            "label_mapping": {str(n): c for n, c in _LABELS.mapping.items() if n != c},
        }

    def _label_path(self, index: int) -> Path:
        image_id = self.image_ids[index]
        return self._labels.get(image_id, self._label_folder / f"{image_id}.png")

    def _layout_problems(self) -> list[str]:
        strays = [
            f"{path}: label without an image; expected {self._root / self.split / name}.*"
            for name, path in self._labels.items()
            if name not in self._images
        ]
        return [*self._layout_notes, *strays]

    def _image_problems(self, index: int) -> list[str]:
        image_path, label_path = self._paths[index], self._label_path(index)
        found: list[str] = []
        image_header = label_header = None
        try:
            image_header = image_size(image_path)
        except ImageReadError as error:
            found.append(str(error))
        if self.image_ids[index] not in self._labels:
            found.append(f"{image_path}: image without a label; expected {label_path}")
        else:
            try:
                label_header = label_size(label_path)
            except ImageReadError as error:
                found.append(str(error))
        if image_header and label_header and image_header != label_header:
            found.append(_size_problem(label_path, label_header, image_header))
        # A file whose header is damaged has been named already; decode the others to the end.
        if image_header:
            try:
                read_image(image_path)
            except ImageReadError as error:
                found.append(str(error))
        if label_header:
            try:
                _LABELS.apply(read_label(label_path), label_path)
            except (ImageReadError, DataError) as error:
                found.append(str(error))
        return found


def _size_problem(path: Path, label: tuple[int, ...], image: tuple[int, ...]) -> str:
    return (
        f"{path}: expected the size of its image, {image[0]}x{image[1]} (height x width), "
        f"got {label[0]}x{label[1]}"
    )


def _layout(split: str) -> str:
    return "\n".join(
        [
            "  <data.root>/",
            f"    {split + '/':<14}0001TP_006690.png ...   images, any format",
            f"    {split + 'annot/':<14}0001TP_006690.png ...   labels, uint8: "
            f"0-{len(CAMVID_CLASSES) - 1}, {CAMVID_UNLABELLED} = unlabelled",
        ]
    )
