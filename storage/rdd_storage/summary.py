"""A few numbers for each image and class of a version, made from its counts.

The counts of a store are exact and large: 38 kB for each image at 19 classes before compression.
One pass over them leaves what rankings and overviews need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdd_storage.layout import (
    NUM_CONFIDENCE_BINS,
    NUM_DISCREPANCY_BINS,
    NUM_HARDNESS_BINS,
    OUTCOMES,
    REGIONS,
)
from rdd_storage.measures import measure_counts

COUNTED = ("pixels", "correct")
"""What is counted for each class and image."""
MEASURED = ("mean", "p95", "soft_min", "hard_share")
"""What is measured for each class and image."""
OF_IMAGE = ("discrepancy", "weight")
"""What is measured for each image, in the order of the ``sums`` that it comes from."""

_TOTALS = {
    "class_hardness": "hardness",
    "confusion": "confusion",
    "outcome_discrepancy": "discrepancy",
    "outcome_confidence": "confidence",
}  # and the counts that they are the sums of

Places = slice | NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class _ImageNumbers:
    """Numbers of N images, (..., N): of one set of their pixels, or of several."""

    pixels: NDArray[np.uint32]
    """(..., N): labelled pixels."""
    correct: NDArray[np.uint32]
    """(..., N): correctly predicted ones of these."""
    mean: NDArray[np.float32]
    """(..., N): as :class:`~rdd_storage.measures.HardnessMeasures`; NaN without pixels."""
    p95: NDArray[np.float32]
    soft_min: NDArray[np.float32]
    """At temperature 0.1."""
    hard_share: NDArray[np.float32]
    """At threshold 0.7."""
    discrepancy: NDArray[np.float32]
    """(N,): mean of d over the output grid of the whole image, nats."""
    weight: NDArray[np.float32]
    """(N,): mean of exp(-d) over the output grid of the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ImageMeasures(_ImageNumbers):
    """Numbers of N images, (N,): of their pixels of one class or of all labelled ones."""

    def __repr__(self) -> str:
        return f"ImageMeasures({len(self.pixels)} images)"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Summary(_ImageNumbers):
    """Numbers of N images with C classes, (C + 1, N): the last row is all classes together."""

    class_hardness: NDArray[np.uint64]
    """(C, 2, 251): pixels of all images by class, region (interior, boundary) and code."""
    confusion: NDArray[np.uint64]
    """(C, C): pixels of all images by class and predicted class."""
    outcome_discrepancy: NDArray[np.uint64]
    """(3, 248): grid points by outcome (wrong, correct, ignored) and discrepancy bin."""
    outcome_confidence: NDArray[np.uint64]
    """(2, 255): pixels by outcome (wrong, correct) and confidence code."""

    def of_class(self, index: int | None) -> ImageMeasures:
        """The numbers of one class, or of all labelled pixels."""
        row = len(self.pixels) - 1 if index is None else index
        of_class = {name: np.asarray(getattr(self, name)[row]) for name in (*COUNTED, *MEASURED)}
        return ImageMeasures(
            **of_class, **{name: np.asarray(getattr(self, name)) for name in OF_IMAGE}
        )

    def error(self) -> NDArray[np.float32]:
        """(C + 1, N): share of labelled pixels predicted wrong; NaN without pixels."""
        result = np.full(self.pixels.shape, np.nan, np.float32)
        np.divide(
            self.pixels - self.correct, self.pixels, out=result, where=self.pixels > 0,
            casting="unsafe",
        )  # fmt: skip
        return result

    def __repr__(self) -> str:
        classes, images = self.pixels.shape
        return f"Summary({images} images, {classes - 1} classes)"


class SummaryBuilder:
    """Makes the summary of N images with C classes from counts, some images at a time.

    Args:
        images: N.
        classes: C.
    """

    def __init__(self, images: int, classes: int) -> None:
        shape = (classes + 1, images)
        self._classes = classes
        self._of_class: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, np.uint32) for name in COUNTED
        } | {name: np.full(shape, np.nan, np.float32) for name in MEASURED}
        self._of_image: dict[str, NDArray[Any]] = {
            name: np.full(images, np.nan, np.float32) for name in OF_IMAGE
        }
        self._totals: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, np.uint64) for name, shape in total_shapes(classes).items()
        }

    def add(self, places: Places, counts: Mapping[str, NDArray[Any]]) -> None:
        """Take in n images.

        Args:
            places: Their places among the N.
            counts: (n, ...) as :meth:`rdd_storage.MapReader.iter_statistics` yields them.
        """
        of_class, classes = self._of_class, self._classes
        hardness = counts["hardness"].sum(axis=2)  # of both regions
        for row, codes in ((slice(classes), hardness), (classes, hardness.sum(axis=1))):
            measures = measure_counts(codes)
            for name in ("pixels", *MEASURED):
                of_class[name][row, places] = getattr(measures, name).T
        hits = np.diagonal(counts["confusion"], axis1=1, axis2=2)
        of_class["correct"][:classes, places] = hits.T
        of_class["correct"][classes, places] = hits.sum(axis=1)
        points = np.maximum(counts["discrepancy"].sum(axis=(1, 2)), 1)
        for column, name in enumerate(OF_IMAGE):
            self._of_image[name][places] = counts["sums"][:, column] / points
        for name, source in _TOTALS.items():
            self._totals[name] += counts[source].sum(axis=0, dtype=np.uint64)

    def copy(self, other: Summary, places: Places, others: Places) -> None:
        """Take over another summary: its totals, and the images at ``others`` as ``places``."""
        for name, values in self._of_class.items():
            values[:, places] = getattr(other, name)[:, others]
        for name, values in self._of_image.items():
            values[places] = getattr(other, name)[others]
        for name, total in self._totals.items():
            total += getattr(other, name)

    def take_out(self, counts: Mapping[str, NDArray[Any]]) -> None:
        """Take images that were copied out of the totals again."""
        for name, source in _TOTALS.items():
            self._totals[name] -= counts[source].sum(axis=0, dtype=np.uint64)

    def finish(self) -> Summary:
        """The summary of what was added and copied."""
        return Summary(**self._of_class, **self._of_image, **self._totals)


def total_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums over all images."""
    return {
        "class_hardness": (classes, len(REGIONS), NUM_HARDNESS_BINS),
        "confusion": (classes, classes),
        "outcome_discrepancy": (len(OUTCOMES), NUM_DISCREPANCY_BINS),
        "outcome_confidence": (2, NUM_CONFIDENCE_BINS),
    }
