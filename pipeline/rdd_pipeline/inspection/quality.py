"""How well a score finds the wrong pixels: exact figures from counts, ties in closed form.

A score orders pixels from "surely right" to "surely wrong". Everything here takes the pixels
counted by score bin and by whether the prediction is wrong; pixels of one bin are tied. No pixel
is kept, so that the figures of any number of images cost the same.

Shape suffixes: K bins of the score in rising order, R resamples, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError, InspectionError

Array = NDArray[np.float64]

FEWEST_IMAGES = 5
"""Below it there are no intervals: so few images say too little of how images differ."""
SCORE_NAMES = ("auroc", "average_precision", "augrc", "aurc", "e_aurc", "ause")
"""The figures of :class:`Scores`, in its order."""
LARGER_IS_BETTER = frozenset({"auroc", "average_precision"})

_PERCENTILES = (2.5, 97.5)
_TABLE = 64  # harmonic numbers below it are tabulated


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Figures of one score, each an array () or one for each leading axis of the counts.

    NaN where a figure is not defined: all of them without pixels, the first two also where all
    pixels are right or all are wrong, and ``ause`` where all are right.
    """

    auroc: Array
    """Probability that a wrong pixel has the higher score, ties counting half. 0.5 is chance."""
    average_precision: Array
    """Sum of precision times gained recall over the bins, from the highest score down, wrong
    pixels being the positives. The error rate is chance."""
    augrc: Array
    """Area under the generalised risk-coverage curve, the error rate of accepting the pixels of
    lowest score over *all* pixels: ``(1 - auroc) a (1 - a) + (1 - a)^2 / 2``, a the accuracy
    (arXiv 2407.01032)."""
    aurc: Array
    """Mean over k of the error rate among the k pixels of lowest score, its expectation where
    ties leave the order open (arXiv 1805.08206)."""
    e_aurc: Array
    """``aurc`` minus that of an order with all right pixels first."""
    ause: Array
    """Area between the sparsification curves of the score and of that order, both divided by the
    error rate (arXiv 1802.07095): ``e_aurc`` over the error rate, errors being 0 or
    1."""
    error_rate: Array
    """Share of wrong pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """One figure and its 95% interval over resampled images."""

    value: float | None
    """None where it is not defined."""
    low: float | None = None
    """None below five images, or where some resample leaves the figure undefined."""
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def scores_from_counts(correct: ArrayLike, wrong: ArrayLike) -> Scores:
    """Figures of a score from pixel counts.

    Args:
        correct: (..., K) right pixels in each bin, bins in rising order of the score.
        wrong: (..., K) wrong pixels in each bin.

    Returns:
        Arrays of the leading axes' shape.

    Raises:
        InspectionError: The shapes differ, or counts are negative.

    Example:
        >>> scores = scores_from_counts([3, 1], [0, 2])
        >>> round(float(scores.auroc), 4), round(float(scores.e_aurc), 4)
        (0.875, 0.0389)
    """
    right, bad = np.asarray(correct, np.float64), np.asarray(wrong, np.float64)
    if right.shape != bad.shape or right.ndim < 1:
        raise InspectionError(
            f"wrong: expected the shape of correct {right.shape}, got {bad.shape}; give both "
            "counts over the same bins"
        )
    if (right < 0).any() or (bad < 0).any():
        raise InspectionError("correct, wrong: expected counts >= 0, got negative ones")
    size = right + bad
    right_all, bad_all, total = right.sum(-1), bad.sum(-1), size.sum(-1)
    right_below, bad_below = np.cumsum(right, -1) - right, np.cumsum(bad, -1) - bad
    below = right_below + bad_below

    auroc = _ratio((bad * (right_below + right / 2)).sum(-1), right_all * bad_all)
    bad_from, from_here = bad_all[..., None] - bad_below, total[..., None] - below
    precision = (bad * _ratio(bad_from, from_here, empty=0.0)).sum(-1)
    average_precision = np.where(right_all > 0, _ratio(precision, bad_all), np.nan)

    # The j-th pixel of a bin finds below_errors + j * share errors among below + j pixels; summed
    # over j that is size * share + (below_errors - share * below) * (H(below + size) - H(below)).
    share = _ratio(bad, size, empty=0.0)
    spread = _harmonic(below + size) - _harmonic(below)
    risks = (size * share + (bad_below - share * below) * spread).sum(-1)
    aurc = _ratio(risks, total)
    best = _ratio(bad_all - right_all * (_harmonic(total) - _harmonic(right_all)), total)
    error_rate = _ratio(bad_all, total)
    e_aurc = aurc - best
    accuracy = 1.0 - error_rate
    # Where all pixels are alike the order has no say, and the first term is 0.
    misordered = np.where(right_all * bad_all > 0, 1.0 - auroc, 0.0) * accuracy * error_rate
    return Scores(
        auroc=auroc,
        average_precision=average_precision,
        augrc=misordered + error_rate**2 / 2,
        aurc=aurc,
        e_aurc=e_aurc,
        ause=_ratio(e_aurc, error_rate),
        error_rate=error_rate,
    )


def ece_from_counts(correct: ArrayLike, wrong: ArrayLike, bins: int = 15) -> Array:
    """Expected calibration error of a confidence: mean over the pixels of |accuracy - confidence|.

    Confidences are sorted into equal bins, closed below; the last one holds 1 too, as in
    torchmetrics (arXiv 1706.04599, section 2).

    Args:
        correct: (..., K) right pixels by confidence, the K values evenly spaced from 0 to 1.
        wrong: (..., K) wrong pixels.
        bins: How many bins.

    Returns:
        Array of the leading axes' shape, in [0, 1]; NaN without pixels.

    Raises:
        InspectionError: Fewer than one bin.

    Example:
        >>> float(ece_from_counts([0, 0, 9], [0, 0, 1]))
        0.1
    """
    if bins < 1:
        raise InspectionError(f"bins: expected at least 1, got {bins}")
    right, bad = np.asarray(correct, np.float64), np.asarray(wrong, np.float64)
    codes = np.arange(right.shape[-1])
    last = max(right.shape[-1] - 1, 1)
    members = np.minimum(codes * bins // last, bins - 1)  # in whole numbers: no edge is missed
    size = right + bad
    gaps = [
        np.abs((right - size * (codes / last))[..., members == number].sum(-1))
        for number in range(bins)
    ]
    return _ratio(np.sum(gaps, axis=0), size.sum(-1))


def risk_coverage(correct: ArrayLike, wrong: ArrayLike) -> tuple[Array, Array]:
    """The curve that ``aurc`` is the area under, at the borders of the bins.

    Args:
        correct: (K,) right pixels by score, rising.
        wrong: (K,) wrong pixels.

    Returns:
        Coverage (M,), rising to 1, and the error rate among the pixels covered (M,); bins without
        pixels have no point.

    Raises:
        EmptySelectionError: There are no pixels.
    """
    right, bad = np.asarray(correct, np.float64), np.asarray(wrong, np.float64)
    size = right + bad
    if not size.sum():
        raise EmptySelectionError("counts: expected some pixels, got none; choose other images")
    covered, errors = np.cumsum(size)[size > 0], np.cumsum(bad)[size > 0]
    return covered / covered[-1], errors / covered


class ImageBootstrap:
    """Sums of counts over all images, and over each of R draws of as many images from them.

    Images come in parts of any size and none is kept: how many of a resample's images are drawn
    from a part is binomial given what is left, so that the draws are those of a bootstrap over
    all N images at once. All counts given together are drawn together, so that their differences
    have intervals too.

    Args:
        images: N, how many images will be added.
        resamples: R; 0 makes none. Below five images there are none.
        seed: Of the draws.
    """

    def __init__(self, images: int, *, resamples: int = 1000, seed: int = 0) -> None:
        if images < 1:
            raise EmptySelectionError("images: expected at least one, got none; choose some")
        if resamples < 0:
            raise InspectionError(f"resamples: expected 0 or more, got {resamples}")
        self.images = images
        self.resamples = resamples if images >= FEWEST_IMAGES else 0
        self._random = np.random.default_rng(seed)
        self._left = images
        self._to_draw = np.full(self.resamples, images)
        self._sums: dict[str, Array] = {}

    def add(self, counts: Mapping[str, NDArray[np.generic]]) -> None:
        """Take in some images, (n, ...) under each name; always the same names.

        Raises:
            InspectionError: More images than were announced.
        """
        number = len(next(iter(counts.values())))
        if number > self._left:
            raise InspectionError(
                f"counts: expected at most {self._left} images more, got {number}; announce all"
            )
        drawn_R = self._random.binomial(self._to_draw, number / self._left)
        self._to_draw = self._to_draw - drawn_R
        self._left -= number
        resample = np.repeat(np.arange(self.resamples), drawn_R)
        image = self._random.integers(number, size=resample.size)
        times_RN = np.bincount(resample * number + image, minlength=self.resamples * number)
        # Half the time of float64; single precision is plenty for what is drawn, not for the sums.
        times_RN = times_RN.reshape(self.resamples, number).astype(np.float32)
        for name, values in counts.items():
            flat = values.reshape(number, -1)
            sums = np.empty((1 + self.resamples, flat.shape[1]))
            sums[0] = flat.sum(axis=0, dtype=np.float64)
            sums[1:] = times_RN @ flat.astype(np.float32)
            shaped = sums.reshape(-1, *values.shape[1:])
            self._sums[name] = self._sums[name] + shaped if name in self._sums else shaped

    def totals(self, name: str) -> Array:
        """(1 + R, ...): the sum over all images, then that of each resample.

        Raises:
            EmptySelectionError: Fewer images than announced were added.
        """
        if self._left:
            raise EmptySelectionError(
                f"expected {self.images} images, got {self._left} fewer; add all of them"
            )
        return self._sums[name]


def interval(values: Array) -> Interval:
    """The first value with the 95% interval of the others.

    Args:
        values: (1 + R,), as :meth:`ImageBootstrap.totals` orders them.
    """
    value, drawn = values[0], values[1:]
    if not np.isfinite(value):
        return Interval(value=None)
    if not drawn.size or not np.isfinite(drawn).all():
        return Interval(value=float(value))
    low, high = np.percentile(drawn, _PERCENTILES)
    return Interval(value=float(value), low=float(low), high=float(high))


def _ratio(numerator: Array, denominator: Array, *, empty: float = np.nan) -> Array:
    result: Array = np.full(np.broadcast(numerator, denominator).shape, empty)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def _harmonic(n: Array) -> Array:
    """``1 + 1/2 + ... + 1/n`` of whole numbers; for large ones by its asymptotic series."""
    table = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, _TABLE))])
    large = np.maximum(n, _TABLE)
    inverse = 1.0 / (large * large)
    series = np.log(large) + np.euler_gamma + 0.5 / large
    series -= inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
    small = np.minimum(n, _TABLE - 1).astype(np.intp)
    result: Array = np.where(n < _TABLE, table[small], series)
    return result
