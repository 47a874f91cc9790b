"""Connected regions that another class than the label's explains better; one image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """Adjacent pixels of one label class with one prediction."""

    label: int
    prediction: int
    pixels: NDArray[np.intp]
    """Places in the flattened image, rising."""
    true_prob: float
    """Mean probability of the label's class."""
    confidence: float
    """Mean probability of the predicted class."""
    depth: int
    """Pixels from its innermost pixel to its edge, diagonals counting 1; a line has 1. The border
    of the image is no edge."""


def connected_regions(
    labels: NDArray[np.integer[Any]], candidates: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.int32], int]:
    """Regions of equal values among some pixels, joined at their sides.

    Args:
        labels: Values (H, W) that are equal within a region.
        candidates: bool (H, W), the pixels that may belong to one.

    Returns:
        Places of the candidates in the flattened image, the number of the region of each, and how
        many regions there are.

    Example:
        >>> values = np.array([[1, 1, 2], [3, 1, 2]])
        >>> connected_regions(values, values != 3)[1].tolist()
        [0, 0, 1, 0, 1]
    """
    places = np.flatnonzero(candidates)
    number = np.zeros(candidates.shape, np.int32)
    number.reshape(-1)[places] = np.arange(len(places))
    pairs = []
    for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        joined = candidates[here] & candidates[there] & (labels[here] == labels[there])
        pairs.append((number[here][joined], number[there][joined]))
    rows, columns = (np.concatenate(part) for part in zip(*pairs, strict=True))
    shape = (len(places), len(places))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=shape)
    count, members = connected_components(graph, directed=False)
    return places, members, int(count)


def suspicious_regions(
    label: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    true_prob: NDArray[np.float32],
    confidence: NDArray[np.float32],
    *,
    valid: NDArray[np.bool_],
    max_true_prob: float,
    min_confidence: NDArray[np.floating[Any]],
    min_area: int,
    min_depth: int,
) -> list[Region]:
    """Regions where the label is improbable and another class is confidently predicted.

    Args:
        label: Classes (H, W).
        prediction: Most probable classes (H, W).
        true_prob: Probability of the label's class (H, W).
        confidence: Probability of the predicted class (H, W).
        valid: bool (H, W), False at ignored pixels.
        max_true_prob: Most that a pixel may have of its label's class.
        min_confidence: (C,) least that a pixel must have, by its predicted class.
        min_area: Pixels of a region.
        min_depth: Depth of a region.
    """
    lowest = np.full(256, np.inf, np.float32)
    lowest[: len(min_confidence)] = min_confidence
    candidates = (
        valid & (prediction != label) & (true_prob <= max_true_prob)
        & (confidence >= lowest[prediction])
    )  # fmt: skip
    pair = label.astype(np.uint16) << 8 | prediction
    places, members, count = connected_regions(pair, candidates)
    areas = np.bincount(members, minlength=count)
    large = areas[members] >= min_area
    if not large.any():
        return []
    places, members = places[large], members[large]
    regions = np.zeros(label.shape, np.int32)
    regions.reshape(-1)[places] = members + 1
    depths = ndimage.maximum(_depth(regions), regions, np.arange(1, count + 1))
    found = []
    order = np.argsort(members, kind="stable")
    starts = np.flatnonzero(np.diff(members[order], prepend=-1))
    for pixels in np.split(places[order], starts[1:]):
        depth = int(depths[regions.reshape(-1)[pixels[0]] - 1])
        if depth >= min_depth:
            found.append(
                Region(
                    label=int(label.reshape(-1)[pixels[0]]),
                    prediction=int(prediction.reshape(-1)[pixels[0]]),
                    pixels=pixels,
                    true_prob=float(true_prob.reshape(-1)[pixels].mean(dtype=np.float64)),
                    confidence=float(confidence.reshape(-1)[pixels].mean(dtype=np.float64)),
                    depth=depth,
                )
            )
    return found


def _depth(regions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Pixels to the nearest one of another region, or of none, for each pixel."""
    at_edge = np.zeros(regions.shape, bool)
    for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        differ = regions[here] != regions[there]
        at_edge[here] |= differ
        at_edge[there] |= differ
    if not at_edge.any():  # one region is the whole image
        return np.full(regions.shape, max(regions.shape), np.int32)
    distance: NDArray[np.int32] = ndimage.distance_transform_cdt(~at_edge, "chessboard")
    return distance + 1
