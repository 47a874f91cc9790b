"""What a data set holds: sizes of the images, shares of the classes, and everything wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data.base import (
    IGNORE_INDEX,
    NO_IMAGES,
    Progress,
    SegmentationDataset,
    in_threads,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassShare:
    """How much of a split one class takes."""

    name: str
    pixels: int
    images: int
    """Images with at least one pixel of the class."""
    share: float
    """Of the labelled pixels; 0 where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """One split, as it was found."""

    name: str
    split: str
    images: int
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each image whose header could be read, sorted, each size once."""
    classes: tuple[ClassShare, ...]
    """In index order, over the labels that could be read."""
    ignored: float
    """Share of the pixels of those labels that have no class."""
    problems: tuple[str, ...]
    """One line each, naming the file."""


def survey_dataset(dataset: SegmentationDataset, progress: Progress | None = None) -> Survey:
    """Read every file of a split once, in several threads, and say what it holds.

    Args:
        dataset: The split.
        progress: Called with the number of images read since the last call.
    """

    def one(index: int) -> tuple[tuple[str, ...], tuple[int, int] | None, NDArray[np.int64] | None]:
        examined = dataset.examine(index)
        counts = None
        if examined.label is not None:  # counted here, so that no label is kept
            counts = np.bincount(examined.label.ravel(), minlength=IGNORE_INDEX + 1)
        return examined.problems, examined.size, counts

    problems = list(dataset.layout_problems())
    if not len(dataset):
        problems.append(NO_IMAGES)
    sizes: set[tuple[int, int]] = set()
    pixels = np.zeros(IGNORE_INDEX + 1, np.int64)
    images = np.zeros(IGNORE_INDEX + 1, np.int64)
    for lines, size, counts in in_threads(one, len(dataset), progress, dataset.over_network):
        problems += lines
        if size is not None:
            sizes.add(size)
        if counts is not None:
            pixels += counts
            images += counts > 0
    labelled = int(pixels[: dataset.num_classes].sum())
    return Survey(
        name=dataset.name,
        split=dataset.split,
        images=len(dataset),
        sizes=tuple(sorted(sizes)),
        classes=tuple(
            ClassShare(
                name=name,
                pixels=int(pixels[index]),
                images=int(images[index]),
                share=int(pixels[index]) / max(labelled, 1),
            )
            for index, name in enumerate(dataset.class_names)
        ),
        ignored=int(pixels[IGNORE_INDEX]) / max(int(pixels.sum()), 1),
        problems=tuple(problems),
    )
