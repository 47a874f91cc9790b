"""What one number says of an image: measures of hardness, from counts by code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import InspectionError
from rdd_storage import discrepancy_bin_edges
from rdd_storage.measures import (
    HARDNESS,
    TEMPERATURE,
    THRESHOLD,
    TRUE_PROB,
    Array,
    HardnessMeasures,
    measure_counts,
)

__all__ = [
    "EASY_ABOVE",
    "HARDNESS",
    "MEASURES",
    "TEMPERATURE",
    "THRESHOLD",
    "TRUE_PROB",
    "Array",
    "HardnessMeasures",
    "check_measure",
    "check_settings",
    "discrepancy_centres",
    "hardness_measures",
]

COLDEST = 0.002
"""Least temperature: below it the weights of easy pixels are too small for float64."""

MEASURES: Mapping[str, str] = {
    "mean": "mean hardness",
    "p95": "95th percentile of the hardness",
    "soft_min": "soft minimum of p",
    "hard_share": "share of hard pixels",
    "error": "share of pixels predicted wrong",
    "discrepancy": "mean discrepancy, nats",
}
"""What images are ranked by, and what it is called; ``discrepancy`` has no classes."""
EASY_ABOVE = frozenset({"soft_min"})
"""Measures that are low for difficult images."""


def hardness_measures(
    counts: NDArray[np.generic], *, threshold: float = THRESHOLD, temperature: float = TEMPERATURE
) -> HardnessMeasures:
    """Measures from pixel counts.

    Args:
        counts: (..., 251) pixels by 8-bit hardness code.
        threshold: True-class probability up to which a pixel is hard, in [0, 1].
        temperature: T of the soft minimum, at least 0.002.

    Returns:
        Arrays of the leading axes' shape.

    Raises:
        InspectionError: A setting is out of its range.
    """
    check_settings(threshold, temperature)
    return measure_counts(counts, threshold=threshold, temperature=temperature)


def check_settings(threshold: float, temperature: float) -> None:
    """Refuse settings that no measure has.

    Raises:
        InspectionError: The threshold is no probability, or the temperature is too low.
    """
    if not 0.0 <= threshold <= 1.0:
        raise InspectionError(f"threshold: expected a probability in [0, 1], got {threshold!r}")
    if not temperature >= COLDEST:
        raise InspectionError(f"temperature: expected at least {COLDEST}, got {temperature!r}")


def check_measure(by: str, *, of_class: bool) -> None:
    """Refuse a measure that does not exist, or has no classes.

    Raises:
        InspectionError: The message lists the measures.
    """
    if by not in MEASURES:
        raise InspectionError(f"by: expected one of {', '.join(MEASURES)}, got {by!r}")
    if of_class and by == "discrepancy":
        raise InspectionError(
            "by: expected another measure than 'discrepancy' for a class: the discrepancy is made "
            "without labels; leave the class out, or rank by hardness"
        )


def discrepancy_centres() -> Array:
    """(248,): middle of each bin of the discrepancy histogram, nats."""
    edges = discrepancy_bin_edges().astype(np.float64)
    edges[-1] = np.finfo(np.float16).max  # stored discrepancies are finite
    centres: Array = (edges[:-1] + edges[1:]) / 2
    return centres
