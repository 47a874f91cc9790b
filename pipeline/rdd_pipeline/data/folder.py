"""Any folders of images and labels of the same names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

from rdd_pipeline.config import FolderData
from rdd_pipeline.data.label_maps import ColourMap, LabelMap
from rdd_pipeline.data.pairs import FileDataset, FilePairs, list_names, match_files
from rdd_pipeline.data.palettes import Palette, bit_palette
from rdd_pipeline.data.places import Place, open_place
from rdd_pipeline.data.reading import IMAGE_SUFFIXES, LABEL_SUFFIXES, read_palette, source_of
from rdd_pipeline.errors import DataError, ImageReadError

_EXAMPLES = 3


def open_folder(config: FolderData, split: Literal["train", "val"]) -> FileDataset:
    """One split of a data set of image and label files.

    An image and a label belong together if they have the same name: the path below the part of
    the pattern that has no wildcard, without the suffix, and without ``image_suffix`` or
    ``label_suffix``.

    Args:
        config: The ``data`` section.
        split: Which of its two splits.

    Raises:
        DataError: There are no images or no labels, or none belong together.
    """
    where = config.train if split == "train" else config.val
    root = open_place(config.root)
    found = {
        "images": _Files(root, where.images, IMAGE_SUFFIXES, config.image_suffix),
        "labels": _Files(root, where.labels, LABEL_SUFFIXES, config.label_suffix),
    }
    for key, files in found.items():
        if not files.files:
            raise DataError(f"data.{split}.{key}: {files.why_none()}")
    pairs = match_files(
        found["images"].files,
        found["labels"].files,
        expected_image=found["images"].expected,
        expected_label=found["labels"].expected,
    )
    if len(pairs.unlabelled) == len(pairs.image_ids):
        raise DataError(_no_match(split, pairs, [name for name, _ in found["labels"].files]))
    colours = config.label_format == "colours"
    palette = config.palette
    if palette is None:
        first = next(i for i, name in enumerate(pairs.image_ids) if name not in pairs.unlabelled)
        palette = _palette_of(pairs.labels[first], config)
    return FileDataset(
        name=config.name,
        split=split,
        class_names=config.classes,
        palette=palette,
        label_reader=ColourMap(palette, config.ignore_colours)
        if colours
        else LabelMap(config.label_values()),
        files=pairs,
        listings=root.listings,
    )


class _Files:
    """The files that a folder or pattern of the configuration means."""

    def __init__(self, root: Place, pattern: str, suffixes: frozenset[str], ending: str) -> None:
        self._suffixes, self._ending = suffixes, ending
        self._whole = whole = root / pattern
        # Names begin after the part without wildcards, so that they stay when data is moved.
        scheme, separator, path = pattern.rpartition("://")
        parts = PurePath(path).parts
        fixed = next((i for i, part in enumerate(parts) if _is_wild(part)), len(parts))
        if whole.is_folder():
            self._base = whole
            self.files = list_names(whole, suffixes, ending)
            return
        fixed = min(fixed, len(parts) - 1)  # a pattern that names one file
        self._base = root / f"{scheme}{separator}{PurePath(*parts[:fixed])}"
        start = len(str(self._base / "x")) - 1
        self.files = [
            (name.removesuffix(ending), path)
            for path in self._base.glob(str(PurePath(*parts[fixed:])))
            for stem, dot, suffix in (path.rpartition("."),)
            for name in (stem[start:].replace(os.sep, "/"),)
            if dot + suffix.lower() in suffixes
            and name.endswith(ending)
            and not name.rpartition("/")[2].startswith(".")
        ]

    def expected(self, name: str) -> str:
        suffix = PurePath(self.files[0][1]).suffix if self.files else ".png"
        return f"{self._base / (name + self._ending)}{suffix}"

    def why_none(self) -> str:
        ending = f" whose names end with '{self._ending}'" if self._ending else ""
        if not self._base.is_folder():
            return f"no folder {self._base}; expected a folder of files, or a pattern such as *.png"
        return (
            f"{self._whole} matches no files{ending} with the suffixes "
            f"{' '.join(sorted(self._suffixes))}; correct the folder or pattern"
        )


def _is_wild(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _no_match(split: str, pairs: FilePairs, labels: Sequence[str]) -> str:
    def some(names: Sequence[str]) -> str:
        shown = ", ".join(names[:_EXAMPLES])
        return f"{shown}, ..." if len(names) > _EXAMPLES else shown

    return (
        f"data.{split}: none of {len(pairs.image_ids)} images has a label of the same name\n"
        f"  images: {some(pairs.image_ids)}\n  labels: {some(labels)}\n"
        "Set data.image_suffix and data.label_suffix to what their names end with, or correct "
        "the patterns."
    )


def _palette_of(label: str, config: FolderData) -> Palette:
    """Colours of a palette image, if it has different ones for all classes; else made ones."""
    made = bit_palette(len(config.classes))
    numbers = {index: n for n, index in reversed(config.label_values().items())}
    try:
        stored = read_palette(source_of(label))
    except ImageReadError:  # damage is named by the check of the files
        return made
    colours = [
        tuple((stored or [])[3 * numbers[index] : 3 * numbers[index] + 3])
        for index in range(len(config.classes))
        if index in numbers
    ]
    grey = all(len(set(colour)) == 1 for colour in colours)
    if len(set(colours)) < len(config.classes) or () in colours or grey:
        return made
    return tuple((r, g, b) for r, g, b in colours)
