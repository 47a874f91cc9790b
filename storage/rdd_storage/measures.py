"""What one number says of an image: measures of hardness, from counts by code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdd_storage.layout import NUM_HARDNESS_BINS
from rdd_storage.quantise import hardness_table, true_prob_table

Array = NDArray[np.float64]

HARDNESS = hardness_table(8)[:NUM_HARDNESS_BINS].astype(np.float64)
"""(251,): hardness of each 8-bit code."""
TRUE_PROB = true_prob_table(8)[:NUM_HARDNESS_BINS].astype(np.float64)
"""(251,): true-class probability of each 8-bit code, its upper edge."""

THRESHOLD = 0.7
"""True-class probability up to which a pixel is hard, as published (arXiv 2407.03719)."""
TEMPERATURE = 0.1
"""Of the soft minimum, as in arXiv 2307.05080."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardnessMeasures:
    """Measures of sets of labelled pixels, one for each leading axis of the counts; NaN for none.

    Codes stand for intervals of p: the figures are those of the decoded codes, see
    :func:`rdd_storage.hardness_table` and :func:`rdd_storage.true_prob_table`.
    """

    pixels: NDArray[np.int64]
    """Labelled pixels."""
    mean: Array
    """Mean hardness, in [0, 1]."""
    p95: Array
    """Least hardness that at least 95% of the pixels do not exceed."""
    soft_min: Array
    """``sum p exp((1 - p) / T) / sum exp((1 - p) / T)`` over the pixels, p the true-class
    probability: near its least values for a small T, its mean for a large one. The label quality
    of an image in arXiv 2307.05080 ("softmin"), where low means a difficult image or a
    wrong label."""
    hard_share: Array
    """Share of pixels with p of at most the threshold; exact where that is an edge of the codes,
    as 0.7 is, and for the next edge below it elsewhere."""


def measure_counts(
    counts: NDArray[np.generic], *, threshold: float = THRESHOLD, temperature: float = TEMPERATURE
) -> HardnessMeasures:
    """Measures from pixel counts.

    Args:
        counts: (..., 251) pixels by 8-bit hardness code.
        threshold: True-class probability up to which a pixel is hard, in [0, 1].
        temperature: T of the soft minimum, at least 0.002: below it the weights of easy pixels are
            too small for float64.

    Returns:
        Arrays of the leading axes' shape.
    """
    shape = counts.shape[:-1]
    flat = counts.reshape(-1, counts.shape[-1])
    pixels = flat.sum(axis=1, dtype=np.int64)
    some = np.flatnonzero(pixels)  # most classes are in few images
    chosen = flat[some]
    # Relative to the lowest exponent, so that nothing overflows; the factor cancels.
    strength = np.exp((TRUE_PROB.min() - TRUE_PROB) / temperature)
    hard = np.less_equal(TRUE_PROB, np.float32(threshold))
    columns = np.stack([HARDNESS, hard, strength, strength * TRUE_PROB], axis=1)
    hardness, hard_pixels, weight, weighted = (chosen.astype(np.float64) @ columns).T
    count = pixels[some]
    place = np.argmax(np.cumsum(chosen, axis=1, dtype=np.int64) * 20 >= 19 * count[:, None], axis=1)

    def spread(values: Array) -> Array:
        result = np.full(len(flat), np.nan)
        result[some] = values
        return result.reshape(shape)

    return HardnessMeasures(
        pixels=pixels.reshape(shape),
        mean=spread(hardness / count),
        p95=spread(HARDNESS[place]),
        soft_min=spread(weighted / weight),
        hard_share=spread(hard_pixels / count),
    )
