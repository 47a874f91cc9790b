"""Counts made while the maps are written, so that looking at a large store takes seconds.

Everything is a count or a sum per image: statistics of any set of images are the sums of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rdd_storage.layout import (
    NUM_CONFIDENCE_BINS,
    NUM_DISCREPANCY_BINS,
    NUM_HARDNESS_BINS,
    OUTCOMES,
    QUANTITIES,
)
from rdd_storage.maps import IGNORE_LABEL, ImageMaps
from rdd_storage.schema import MapSchema

Counts = npt.NDArray[np.uint32]
_BLOCK = 1 << 16  # pixels whose 64-bit bin numbers stay in cache
_FLOAT16_DROP = 7  # lowest bits of the float16 pattern that a discrepancy bin spans


@dataclass(frozen=True, kw_only=True, slots=True)
class MapStatistics:
    """Statistics of N images with C classes, over labelled pixels unless said otherwise."""

    image_ids: tuple[str, ...]
    """Names of the N images, in the order of the first axis below."""
    hardness: npt.NDArray[np.uint64]
    """(C, 2, 251): pixels of all images by class, region (interior, boundary) and 8-bit code."""
    confusion: npt.NDArray[np.uint64]
    """(C, C): pixels of all images by class and predicted class."""
    image_hardness: Counts
    """(N, 2, 251): pixels by region and code."""
    image_intersection: Counts
    """(N, C): correctly predicted pixels of each class."""
    image_label_pixels: Counts
    """(N, C): pixels labelled with each class."""
    image_predicted_pixels: Counts
    """(N, C): labelled pixels predicted as each class."""
    image_confidence: Counts
    """(N, 2, 255): pixels by outcome (wrong, correct) and confidence code."""
    image_discrepancy: Counts
    """(N, 3, 248): grid points by outcome at the nearest pixel (wrong, correct, ignored) and bin
    of :func:`discrepancy_bin_edges`."""
    image_grid_points: Counts
    """(N,): grid points of the image."""
    image_discrepancy_sum: npt.NDArray[np.float64]
    """(N,): sum of d over all grid points, nats."""
    image_weight_sum: npt.NDArray[np.float64]
    """(N,): sum of exp(-d) over all grid points."""


def merge_statistics(parts: Sequence[MapStatistics]) -> MapStatistics:
    """Statistics of all images of several parts: counts added, images one after another.

    Raises:
        ValueError: No parts, or parts with different numbers of classes.
    """
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    if len({part.confusion.shape for part in parts}) > 1:
        raise ValueError("parts: expected the same classes everywhere, got different numbers")

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    per_image = [name for name in MapStatistics.__slots__ if name.startswith("image_")]
    return MapStatistics(
        image_ids=tuple(name for part in parts for name in part.image_ids),
        hardness=np.sum([part.hardness for part in parts], axis=0),
        confusion=np.sum([part.confusion for part in parts], axis=0),
        **{name: joined(name) for name in per_image if name != "image_ids"},
    )


def discrepancy_bin_edges() -> npt.NDArray[np.float32]:
    """Edges of the discrepancy histogram: float32 (249,), bin b holds edges[b] <= d < edges[b+1].

    The bins follow the float16 bit pattern: eight for each doubling, so that the width of a bin is
    at most an eighth of its lower edge (above 6e-5).
    """
    patterns = (np.arange(NUM_DISCREPANCY_BINS + 1) << _FLOAT16_DROP).astype(np.uint16)
    return patterns.view(np.float16).astype(np.float32)


def image_statistics(
    maps: ImageMaps, discrepancy: npt.NDArray[np.float16], schema: MapSchema
) -> dict[str, npt.NDArray[np.generic]]:
    """Counts of one image, keyed like the arrays of the ``statistics`` group.

    Args:
        maps: Checked maps.
        discrepancy: float16 (h, w), as it is stored.
        schema: The store's schema.

    Returns:
        ``hardness`` uint32 (C, 2, 251), ``discrepancy`` uint32 (3, 248), ``confidence`` uint32
        (2, 255), ``confusion`` uint32 (C, C), ``sums`` float64 (2,).
    """
    label, prediction = maps.label, maps.prediction
    classes = schema.num_classes
    codes = maps.hardness
    codes8 = codes if codes.dtype == np.uint8 else (codes >> 8).astype(np.uint8)
    boundary = label_boundary(label)
    correct = (label == prediction).view(np.uint8)
    # Ignored pixels get a class of their own, which is dropped in the end: the tables stay small.
    hardness = np.zeros((classes + 1, 2, 256), np.int64)
    confusion = np.zeros((classes + 1, 256), np.int64)
    confidence = np.zeros((4, 256), np.int64)
    pixels = (label, boundary, codes8, prediction, correct, maps.confidence)
    flat: list[npt.NDArray[Any]] = [np.ascontiguousarray(a).reshape(-1) for a in pixels]
    for start in range(0, label.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        of_label, of_boundary, of_code, of_prediction, of_correct, of_confidence = (
            array[part] for array in flat
        )
        row = np.minimum(of_label, np.uint8(classes))
        _count(confusion, row, of_prediction)
        _count(hardness[:, 0], row, of_code)
        near = np.flatnonzero(of_boundary)  # few: counted once more, and taken off in the end
        _count(hardness[:, 1], row[near], of_code[near])
        ignored = (of_label == IGNORE_LABEL).view(np.uint8)
        _count(confidence, ignored << 1 | of_correct, of_confidence)
    hardness[:, 0] -= hardness[:, 1]

    return {
        "hardness": hardness[:classes, :, :NUM_HARDNESS_BINS].astype(np.uint32),
        "confusion": confusion[:classes, :classes].astype(np.uint32),
        "confidence": confidence[:2, :NUM_CONFIDENCE_BINS].astype(np.uint32),
        "discrepancy": _discrepancy_histogram(discrepancy, label, correct),
        "sums": _sums(discrepancy),
    }


def label_boundary(label: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Pixels with another label directly above, below, left or right; 255 counts as a label.

    Args:
        label: uint8 (H, W).

    Returns:
        bool (H, W).
    """
    boundary = np.zeros(label.shape, np.bool_)
    across = label[:, 1:] != label[:, :-1]
    boundary[:, 1:] |= across
    boundary[:, :-1] |= across
    down = label[1:] != label[:-1]
    boundary[1:] |= down
    boundary[:-1] |= down
    return boundary


def nearest_pixels(points: int, pixels: int) -> npt.NDArray[np.intp]:
    """Pixel index nearest to each grid point, corners aligned: ``round(i * (H-1) / (h-1))``."""
    if points == 1:
        return np.zeros(1, np.intp)
    step = (pixels - 1) / (points - 1)
    return np.array([round(index * step) for index in range(points)], np.intp)


def _count(
    table: npt.NDArray[np.int64], row: npt.NDArray[np.uint8], column: npt.NDArray[np.uint8]
) -> None:
    """Add the pairs of row and column to a table of 256 columns."""
    # Pairs of bytes, taken as numbers of 16 bits: made in a quarter of the time of arithmetic.
    pairs = np.empty((row.size, 2), np.uint8)
    pairs[:, 0], pairs[:, 1] = column, row
    counts = np.bincount(pairs.reshape(-1).view("<u2"), minlength=256 * len(table))
    table += counts.reshape(-1, 256)


def _discrepancy_histogram(
    discrepancy: npt.NDArray[np.float16],
    label: npt.NDArray[np.uint8],
    correct: npt.NDArray[np.uint8],
) -> Counts:
    rows = nearest_pixels(discrepancy.shape[0], label.shape[0])
    columns = nearest_pixels(discrepancy.shape[1], label.shape[1])
    at = np.ix_(rows, columns)
    outcome = np.where(label[at] == IGNORE_LABEL, 2, correct[at]).astype(np.intp)
    bins = discrepancy.view(np.uint16) >> _FLOAT16_DROP
    counts = np.bincount(
        (outcome * NUM_DISCREPANCY_BINS + bins).reshape(-1),
        minlength=len(OUTCOMES) * NUM_DISCREPANCY_BINS,
    )
    return counts.reshape(len(OUTCOMES), NUM_DISCREPANCY_BINS).astype(np.uint32)


def _sums(discrepancy: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    d = discrepancy.astype(np.float32)
    sums = {"discrepancy_sum": d.sum(dtype=np.float64)}
    sums["weight_sum"] = np.exp(-d).sum(dtype=np.float64)
    return np.array([sums[name] for name in QUANTITIES])


def assemble_statistics(
    image_ids: Sequence[str], arrays: dict[str, npt.NDArray[np.generic]]
) -> MapStatistics:
    """Statistics from rows of the ``statistics`` group, keyed like :func:`image_statistics`."""
    hardness, confusion = arrays["hardness"], arrays["confusion"]
    discrepancy, sums = arrays["discrepancy"], arrays["sums"]

    def uint32(counts: npt.NDArray[np.generic]) -> Counts:
        return counts.astype(np.uint32)

    return MapStatistics(
        image_ids=tuple(image_ids),
        hardness=hardness.sum(axis=0, dtype=np.uint64),
        confusion=confusion.sum(axis=0, dtype=np.uint64),
        image_hardness=uint32(hardness.sum(axis=1)),
        image_intersection=uint32(np.diagonal(confusion, axis1=1, axis2=2)),
        image_label_pixels=uint32(confusion.sum(axis=2)),
        image_predicted_pixels=uint32(confusion.sum(axis=1)),
        image_confidence=uint32(arrays["confidence"]),
        image_discrepancy=uint32(discrepancy),
        image_grid_points=uint32(discrepancy.sum(axis=(1, 2))),
        image_discrepancy_sum=sums[:, QUANTITIES.index("discrepancy_sum")].astype(np.float64),
        image_weight_sum=sums[:, QUANTITIES.index("weight_sum")].astype(np.float64),
    )
