"""Rank correlations of two quantities from their joint histogram, exact in whole numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdd_pipeline.inspection.errors import InspectionError


def spearman_from_counts(joint: ArrayLike) -> float:
    """Spearman's rank correlation, tied values taking their mean rank.

    Args:
        joint: (K, L) counts, whole numbers, both axes in rising order.

    Returns:
        In [-1, 1]; NaN where either quantity takes one value only. Sums are exact however large.

    Raises:
        InspectionError: The counts are not two-dimensional whole numbers >= 0.

    Example:
        >>> spearman_from_counts([[2, 0], [0, 3]])
        1.0
    """
    counts = _whole(joint)
    ranks, sizes = zip(*(_doubled_ranks(counts.sum(axis=axis)) for axis in (1, 0)), strict=True)
    # Twice the distance of the mean rank from its middle: whole numbers.
    covariance = int(ranks[0] @ (counts @ ranks[1]))
    spreads = [int((rank * rank * size).sum()) for rank, size in zip(ranks, sizes, strict=True)]
    if not all(spreads):
        return math.nan
    return _over_root(covariance, spreads[0] * spreads[1])


def kendall_from_counts(joint: ArrayLike) -> float:
    """Kendall's tau-b: concordant minus discordant pairs, over the pairs not tied in either.

    Args:
        joint: (K, L) counts, whole numbers, both axes in rising order.

    Returns:
        In [-1, 1]; NaN where either quantity takes one value only. Sums are exact however large.

    Raises:
        InspectionError: The counts are not two-dimensional whole numbers >= 0.

    Example:
        >>> round(kendall_from_counts([[1, 1], [0, 1]]), 4)
        0.5
    """
    counts = _whole(joint)
    # Everything above and to the left of a cell, and above and to the right: pairs once each.
    above = np.zeros_like(counts)
    above[1:] = np.cumsum(counts, axis=0)[:-1]
    left, right = np.zeros_like(counts), np.zeros_like(counts)
    left[:, 1:] = np.cumsum(above, axis=1)[:, :-1]
    right[:, :-1] = np.cumsum(above[:, ::-1], axis=1)[:, ::-1][:, 1:]
    balance = int((counts * (left - right)).sum())
    total = int(counts.sum())
    pairs = total * (total - 1) // 2
    untied = [
        pairs - sum(int(n) * (int(n) - 1) // 2 for n in counts.sum(axis=axis)) for axis in (1, 0)
    ]
    if not all(untied):
        return math.nan
    return _over_root(balance, untied[0] * untied[1])


def _whole(joint: ArrayLike) -> NDArray[Any]:
    """The counts as Python integers, which do not overflow: pixels squared exceed 64 bits."""
    counts = np.asarray(joint)
    if counts.ndim != 2 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise InspectionError(
            f"joint: expected whole numbers >= 0 in two dimensions, got {counts.dtype} of shape "
            f"{counts.shape}"
        )
    rows, columns = counts.any(axis=1), counts.any(axis=0)
    return counts[np.ix_(rows, columns)].astype(object)


def _doubled_ranks(sizes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Twice the mean rank of each value, minus its middle; and the values' counts."""
    before = np.cumsum(sizes) - sizes
    return 2 * before + sizes - sizes.sum(), sizes


def _over_root(numerator: int, square: int) -> float:
    # isqrt of a scaled square: floats would overflow or lose the last digits.
    scale = 1 << 64
    value = numerator * scale / math.isqrt(square * scale * scale)
    return max(-1.0, min(1.0, value))
