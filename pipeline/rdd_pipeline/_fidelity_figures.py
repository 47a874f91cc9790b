"""Figures of how far two estimates of the teacher's signals are apart, from sums over crops.

No pixel is kept: each crop leaves a few sums, each range of scales some histograms. Every figure
is a function of the sums over all crops, so that its interval comes from drawing crops anew.
Public names are imported from :mod:`rdd_pipeline.fidelity`.

Shape suffixes: B crops of a batch, C classes, H W pixels, h w grid, N crops in all, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.data import IGNORE_INDEX
from rdd_pipeline.difficulty import hard_mask
from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.losses import TeacherSignals

Live = Literal["on_crop", "whole"]
LIVE: tuple[Live, Live] = ("on_crop", "whole")
Field = Literal["weight", "true_prob", "aux_true_prob"]
FIELDS: tuple[Field, ...] = ("weight", "true_prob", "aux_true_prob")

SCALE_EDGES = (0.75, 1.0, 1.5)
"""Where ranges of scales begin and end, besides the ends of the augmentation's own range."""
ERROR_EDGES = np.concatenate([[0.0], np.logspace(-7, 0, 701)])
"""Bins of absolute errors: 2.3% wide, from 1e-7 on."""
JOINT_BINS = 100
"""Bins of the joint histogram of two weights, each way over [0, 1]."""

_RESAMPLES = 1000
_FEWEST_CROPS = 5  # fewer say too little of how crops differ
_PERCENTILES = (2.5, 97.5)

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure over all crops."""

    value: float | None
    """None where there is nothing to compute it from."""
    low: float | None = None
    """Lower end of its 95% interval, by bootstrap over the crops; None below five crops."""
    high: float | None = None
    """Upper end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldError:
    """How far two maps of values in [0, 1] are apart, over labelled pixels."""

    mean_absolute: Figure
    root_mean_square: Figure
    percentile_95: Figure
    """Of the absolute error; to 2.3%, above 1e-7, and without an interval."""
    bias: Figure
    """Mean of stored minus live."""
    correlation: Figure
    """Pearson's; None where either map is constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskDifference:
    """How two hard masks differ, as shares of the labelled pixels."""

    flipped: Figure
    """Share of pixels that are hard under one of the two alone."""
    hard_stored: Figure
    hard_live: Figure
    iou: Figure
    """Intersection over union of the hard pixels; None where both masks are empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitError:
    """How far two sets of logits are apart, over the grid positions outside padding."""

    divergence: Figure
    """Mean of ``KL(softmax(live) || softmax(stored))`` per position, in nats."""
    agreement: Figure
    """Share of positions with the same class on top."""
    mean_absolute: Figure
    """Mean absolute difference of the probabilities, over positions and classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Stored signals against a live estimate of them; what the store does not hold is None."""

    weight: FieldError
    true_prob: FieldError
    hard_mask: MaskDifference
    aux_true_prob: FieldError | None
    aux_hard_mask: MaskDifference | None
    logits: LogitError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Quality of one estimate's logits against the labels, at the grid positions."""

    accuracy: Figure
    """Share of labelled positions whose top class is the label's."""
    miou: float
    """Mean intersection over union of the classes that occur."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qualities:
    """Which estimate is better on average."""

    stored: Quality
    on_crop: Quality
    whole: Quality
    """Evaluated on the whole image, not quantised."""
    stored_minus_on_crop: Figure
    """Difference of the accuracies; positive where the stored logits are the better ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRange:
    """Stored against on-the-crop for the crops whose scale lies in a part of the range."""

    low: float
    high: float
    crops: int
    approximation: Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityFigures:
    """All figures of a measurement."""

    crops: int
    labelled_pixels: int
    approximation: Comparison
    """Stored against the teacher on the crop: what storing maps of whole images changes."""
    storage: Comparison
    """Stored against the teacher on the whole image, resampled alike: what quantisation costs."""
    quality: Qualities | None
    """None where the store holds no logits."""
    by_scale: tuple[ScaleRange, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CropFigures:
    """Stored against on-the-crop for each crop, for charts; NaN where nothing is labelled."""

    weight: Array
    """(N,), mean absolute error of the weight."""
    flipped: Array
    """(N,), share of labelled pixels that change sides in the hard mask."""
    divergence: Array | None
    """(N,), mean divergence of the logits in nats."""


class FidelityTally:
    """Adds up batches of crops, and computes the figures.

    Args:
        class_names: Names of the C classes.
        threshold: Of the hard masks, see :func:`rdd_pipeline.difficulty.hard_mask`.
        min_kept: Of the hard masks, which are those of a batch.
        scale: Range of the augmentation's scale.
    """

    def __init__(
        self,
        *,
        class_names: tuple[str, ...],
        threshold: float,
        min_kept: int | float,
        scale: tuple[float, float],
    ) -> None:
        self._class_names = class_names
        self._threshold, self._min_kept = threshold, min_kept
        inner = [edge for edge in SCALE_EDGES if scale[0] < edge < scale[1]]
        self.scale_edges = (scale[0], *inner, scale[1])
        self._ranges: list[int] = []
        self._sums: dict[tuple[str, str], list[Array]] = {}
        self._errors: dict[tuple[str, str], NDArray[np.int64]] = {}
        self._confusion: dict[str, NDArray[np.int64]] = {}
        self.joint_weight = np.zeros((JOINT_BINS, JOINT_BINS), np.int64)
        """Labelled pixels by stored weight (rows) and weight on the crop (columns)."""

    def add(
        self,
        labels_BHW: Tensor,
        *,
        stored: TeacherSignals,
        on_crop: TeacherSignals,
        whole: TeacherSignals,
        scales: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """Take in one batch, as large as those of the training.

        Args:
            labels_BHW: (B, H, W), 255 where ignored; those pixels count nowhere, except that the
                fraction ``min_kept`` is one of all pixels, as in the loss.
            stored: Decoded from the store.
            on_crop: Of the teacher on the crops.
            whole: Of the teacher on the whole images, resampled as the stored ones are.
            scales: The augmentation's scale of each crop.

        Returns:
            The main head's hard masks (B, H, W), stored and on the crop.
        """
        valid_BHW = labels_BHW != IGNORE_INDEX
        ranges = np.digitize(scales, self.scale_edges[1:-1]).tolist()
        self._ranges += ranges
        masks: list[tuple[Tensor, Tensor]] = []
        for name, live in zip(LIVE, (on_crop, whole), strict=True):
            for field in FIELDS:
                first, second = getattr(stored, field), getattr(live, field)
                if first is None or second is None:
                    continue
                self._note(name, field, _field_sums(first, second, valid_BHW))
                self._note_errors(name, field, (first - second).abs(), valid_BHW, ranges)
                if field != "weight":
                    masks.append((self._hard(first, valid_BHW), self._hard(second, valid_BHW)))
                    self._note(name, f"{field} mask", _mask_sums(*masks[-1], valid_BHW))
            if stored.logits is not None and live.logits is not None:
                sums = _logit_sums(stored.logits, live.logits, stored.logits_valid)
                self._note(name, "logits", sums)
        if stored.weight is not None and on_crop.weight is not None:
            self._note_joint(stored.weight[valid_BHW], on_crop.weight[valid_BHW])
        if stored.logits is not None:
            self._note_quality(labels_BHW, stored, on_crop, whole)
        return masks[0]

    def crop_figures(self) -> CropFigures:
        """The key figures of each crop, in the order they were added."""
        weight = self._columns("on_crop", "weight")
        mask = self._columns("on_crop", "true_prob mask")
        logits = self._columns("on_crop", "logits")
        return CropFigures(
            weight=_ratio(weight[:, _ABSOLUTE], weight[:, 0]),
            flipped=_ratio(mask[:, 1] + mask[:, 2] - 2 * mask[:, 3], mask[:, 0]),
            divergence=_ratio(logits[:, 1], logits[:, 0]) if logits.size else None,
        )

    def error_counts(self, live: Live, field: Field) -> NDArray[np.int64]:
        """Labelled pixels by absolute error, in the bins of :data:`ERROR_EDGES`."""
        counts: NDArray[np.int64] = self._errors[live, field].sum(axis=0)
        return counts

    def figures(self) -> FidelityFigures:
        """The figures over everything that was added."""
        ranges = np.array(self._ranges)
        every = np.arange(len(ranges))
        by_scale = []
        for number, (low, high) in enumerate(
            zip(self.scale_edges[:-1], self.scale_edges[1:], strict=True)
        ):
            crops = np.flatnonzero(ranges == number)
            comparison = self._comparison("on_crop", crops, [number])
            by_scale.append(
                ScaleRange(low=low, high=high, crops=len(crops), approximation=comparison)
            )
        numbers = list(range(len(by_scale)))
        return FidelityFigures(
            crops=len(every),
            labelled_pixels=int(self._columns("on_crop", "weight")[:, 0].sum()),
            approximation=self._comparison("on_crop", every, numbers),
            storage=self._comparison("whole", every, numbers),
            quality=self._qualities(every) if self._confusion else None,
            by_scale=tuple(by_scale),
        )

    def _hard(self, prob_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        return hard_mask(prob_BHW, valid_BHW, self._threshold, self._min_kept)

    def _note(self, live: str, name: str, sums_Bk: Tensor) -> None:
        self._sums.setdefault((live, name), []).append(sums_Bk.double().cpu().numpy())

    def _note_errors(
        self, live: Live, field: Field, error_BHW: Tensor, valid_BHW: Tensor, ranges: Sequence[int]
    ) -> None:
        size = len(ERROR_EDGES) - 1
        inner = torch.from_numpy(ERROR_EDGES[1:-1]).to(error_BHW)
        shape = (len(self.scale_edges) - 1, size)
        counts = self._errors.setdefault((live, field), np.zeros(shape, np.int64))
        for error_HW, valid_HW, number in zip(error_BHW, valid_BHW, ranges, strict=True):
            bins = torch.bucketize(error_HW[valid_HW], inner)
            counts[number] += torch.bincount(bins, minlength=size).cpu().numpy()

    def _note_joint(self, stored: Tensor, on_crop: Tensor) -> None:
        rows, columns = ((w * JOINT_BINS).long().clamp_(0, JOINT_BINS - 1)
                         for w in (stored, on_crop))  # fmt: skip
        counts = torch.bincount(rows * JOINT_BINS + columns, minlength=JOINT_BINS**2)
        self.joint_weight += counts.cpu().numpy().reshape(self.joint_weight.shape)

    def _note_quality(self, labels_BHW: Tensor, *estimates: TeacherSignals) -> None:
        logits = [estimate.logits for estimate in estimates]
        correct = []
        for name, logits_BChw in zip(("stored", *LIVE), logits, strict=True):
            if logits_BChw is None:
                return
            labels_Bhw = grid_labels(labels_BHW, (logits_BChw.shape[2], logits_BChw.shape[3]))
            valid_Bhw = labels_Bhw != IGNORE_INDEX
            top_Bhw = logits_BChw.float().argmax(dim=1)
            correct.append((top_Bhw == labels_Bhw) & valid_Bhw)
            classes = len(self._class_names)
            places = labels_Bhw[valid_Bhw] * classes + top_Bhw[valid_Bhw]
            counts = torch.bincount(places, minlength=classes**2).cpu().numpy()
            confusion = self._confusion.setdefault(name, np.zeros((classes, classes), np.int64))
            confusion += counts.reshape(classes, classes)
        sums = [valid_Bhw, *correct]
        self._note("labels", "accuracy", torch.stack([s.flatten(1).sum(1) for s in sums], dim=1))

    def _columns(self, live: str, name: str) -> Array:
        parts = self._sums.get((live, name), [])
        return np.concatenate(parts) if parts else np.zeros((0, 0))

    def _totals(self, live: str, name: str, crops: NDArray[np.intp]) -> Array | None:
        """Sums over the crops, then over each resample of them: (k, 1 + R)."""
        columns = self._columns(live, name)
        if not columns.size:
            return None
        chosen = columns[crops]
        return (_resample_counts(len(crops)) @ chosen).T

    def _comparison(self, live: Live, crops: NDArray[np.intp], ranges: Sequence[int]) -> Comparison:
        fields: dict[Field, FieldError | None] = {}
        masks: dict[Field, MaskDifference | None] = {}
        for field in FIELDS:
            totals = self._totals(live, field, crops)
            fields[field] = None
            if totals is not None:
                counts = self._errors[live, field][list(ranges)].sum(axis=0)
                fields[field] = _field_error(totals, counts)
            totals = self._totals(live, f"{field} mask", crops)
            masks[field] = None if totals is None else _mask_difference(totals)
        logits = self._totals(live, "logits", crops)
        weight, true_prob, mask = fields["weight"], fields["true_prob"], masks["true_prob"]
        if weight is None or true_prob is None or mask is None:
            raise ValueError("expected weights and true-class probabilities, got none; add() them")
        return Comparison(
            weight=weight,
            true_prob=true_prob,
            hard_mask=mask,
            aux_true_prob=fields["aux_true_prob"],
            aux_hard_mask=masks["aux_true_prob"],
            logits=None if logits is None else _logit_error(logits),
        )

    def _qualities(self, crops: NDArray[np.intp]) -> Qualities:
        totals = self._totals("labels", "accuracy", crops)
        if totals is None:
            raise ValueError("expected logits of all estimates, got none; add() them")
        accuracies = _ratio(totals[1:], totals[0])
        stored, on_crop, whole = (
            Quality(
                accuracy=_figure(accuracies[i]),
                miou=Metrics.from_confusion(self._confusion[name], self._class_names).miou,
            )
            for i, name in enumerate(("stored", *LIVE))
        )
        return Qualities(
            stored=stored,
            on_crop=on_crop,
            whole=whole,
            stored_minus_on_crop=_figure(accuracies[0] - accuracies[1]),
        )


def grid_labels(labels_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The label nearest to each position of a grid that spans the crop corner to corner.

    Args:
        labels_BHW: (B, H, W).
        size: h and w of the grid.

    Returns:
        (B, h, w) int64.

    Example:
        >>> grid_labels(torch.tensor([[[1, 2, 3, 4, 5]]]), (1, 3)).tolist()
        [[[1, 3, 5]]]
    """
    places = []
    for length, points in zip(labels_BHW.shape[1:], size, strict=True):
        index = torch.arange(points, device=labels_BHW.device)
        gaps = points - 1
        # In whole numbers: index * (length - 1) / gaps, halves rounded up; one point: the middle.
        places.append(
            (2 * index * (length - 1) + gaps) // (2 * gaps) if gaps else index + (length - 1) // 2
        )
    return labels_BHW[:, places[0]][:, :, places[1]].long()


_ABSOLUTE = 6  # place of the sum of absolute errors in the sums below


def _field_sums(stored_BHW: Tensor, live_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """(B, 8): pixels; x; y; xx; yy; xy; |x - y|; (x - y)^2 with x stored, y live."""
    valid = valid_BHW.flatten(1)
    # Selected, not multiplied: what stands at ignored pixels may be anything.
    x, y = (torch.where(valid, a.flatten(1).double(), 0.0) for a in (stored_BHW, live_BHW))
    gap = x - y
    terms = (valid, x, y, x * x, y * y, x * y, gap.abs(), gap * gap)
    return torch.stack([term.sum(dim=1, dtype=torch.float64) for term in terms], dim=1)


def _mask_sums(stored_BHW: Tensor, live_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """(B, 4): pixels; hard stored; hard live; both."""
    terms = (valid_BHW, stored_BHW, live_BHW, stored_BHW & live_BHW)
    return torch.stack([term.flatten(1).sum(dim=1) for term in terms], dim=1)


def _logit_sums(stored_BChw: Tensor, live_BChw: Tensor, valid_Bhw: Tensor | None) -> Tensor:
    """(B, 4): positions; divergence; same top class; absolute difference, mean over classes."""
    log_q, log_p = (F.log_softmax(z.double(), dim=1) for z in (stored_BChw, live_BChw))
    p, q = log_p.exp(), log_q.exp()
    same = stored_BChw.float().argmax(dim=1) == live_BChw.float().argmax(dim=1)
    valid = torch.ones_like(same) if valid_Bhw is None else valid_Bhw
    terms = (valid, (p * (log_p - log_q)).sum(dim=1), same, (p - q).abs().mean(dim=1))
    return torch.stack(
        [torch.where(valid, term.double(), 0.0).flatten(1).sum(dim=1) for term in terms], dim=1
    )


def _resample_counts(crops: int) -> Array:
    """(1 + R, N): how often each crop counts; once in the first row, drawn anew in the others."""
    once = np.ones((1, crops))
    if crops < _FEWEST_CROPS:
        return once
    drawn = np.random.default_rng(0).multinomial(crops, np.full(crops, 1 / crops), _RESAMPLES)
    return np.concatenate([once, drawn])


def _figure(values: Array) -> Figure:
    """From the figure over the crops, followed by that of each resample."""
    value, drawn = values[0], values[1:]
    if not np.isfinite(value):
        return Figure(value=None)
    if not drawn.size or not np.isfinite(drawn).all():
        return Figure(value=float(value))
    low, high = np.percentile(drawn, _PERCENTILES)
    return Figure(value=float(value), low=float(low), high=float(high))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """NaN where the denominator is 0."""
    result: Array = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def _field_error(totals: Array, counts: NDArray[np.int64]) -> FieldError:
    n, x, y, xx, yy, xy, absolute, square = totals
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    # What rounding leaves of a constant's variance is none.
    varies = (spread_x > 1e-12 * n * xx) & (spread_y > 1e-12 * n * yy)
    scale = np.sqrt(np.where(varies, spread_x * spread_y, 0.0))
    return FieldError(
        mean_absolute=_figure(_ratio(absolute, n)),
        root_mean_square=_figure(np.sqrt(_ratio(square, n))),
        percentile_95=Figure(value=_percentile(counts, 0.95)),
        bias=_figure(_ratio(x - y, n)),
        correlation=_figure(_ratio(n * xy - x * y, scale)),
    )


def _percentile(counts: NDArray[np.int64], share: float) -> float | None:
    total = counts.sum()
    if not total:
        return None
    below = np.concatenate([[0.0], np.cumsum(counts) / total])
    place = int(np.searchsorted(below, share))
    (low, high), (left, right) = below[place - 1 : place + 1], ERROR_EDGES[place - 1 : place + 1]
    return float(left + (right - left) * (share - low) / (high - low))


def _mask_difference(totals: Array) -> MaskDifference:
    n, stored, live, both = totals
    return MaskDifference(
        flipped=_figure(_ratio(stored + live - 2 * both, n)),
        hard_stored=_figure(_ratio(stored, n)),
        hard_live=_figure(_ratio(live, n)),
        iou=_figure(_ratio(both, stored + live - both)),
    )


def _logit_error(totals: Array) -> LogitError:
    n, divergence, same, absolute = totals
    return LogitError(
        divergence=_figure(_ratio(divergence, n)),
        agreement=_figure(_ratio(same, n)),
        mean_absolute=_figure(_ratio(absolute, n)),
    )
