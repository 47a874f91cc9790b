"""Is a map any good? How well the scores of a store find the pixels that are predicted wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data import IGNORE_INDEX
from rdd_pipeline.inspection.errors import CircularScoreError, InspectionError
from rdd_pipeline.inspection.images import SourceImages
from rdd_pipeline.inspection.pixels import FARTHEST, city_block_distance, over_images
from rdd_pipeline.inspection.quality import (
    SCORE_NAMES,
    Array,
    ImageBootstrap,
    Interval,
    ece_from_counts,
    interval,
    scores_from_counts,
)
from rdd_pipeline.inspection.summary import Progress
from rdd_pipeline.inspection.text import text_table
from rdd_storage import MapReader, StoreMismatchError, label_boundary
from rdd_storage.statistics import nearest_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ScoreName = Literal[
    "discrepancy", "hardness", "confidence", "predicted_boundary", "label_boundary", "random"
]
Counts: TypeAlias = NDArray[np.generic]
Predict: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Classes (H, W) of an RGB image (H, W, 3), such as :meth:`TrainedModel.predict`."""

BASELINES = frozenset({"confidence", "predicted_boundary", "label_boundary", "random"})
_FROM_STATISTICS: tuple[ScoreName, ...] = ("discrepancy", "confidence")
_OF_LABELS = frozenset({"hardness", "label_boundary"})
_TITLES: Mapping[str, str] = {
    "discrepancy": "discrepancy",
    "hardness": "hardness",
    "confidence": "1 - confidence",
    "predicted_boundary": "nearness to a predicted boundary",
    "label_boundary": "nearness to a label's boundary",
    "random": "random",
}
_BINS: Mapping[str, int] = {
    "discrepancy": 248, "hardness": 251, "confidence": 255,
    "predicted_boundary": FARTHEST + 1, "label_boundary": FARTHEST + 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreQuality:
    """One row of the table. Intervals are 95%, by bootstrap over the images."""

    name: ScoreName
    title: str
    baseline: bool
    """Whether it is there to be beaten."""
    circular: bool
    """Whether the score knows the errors it is tested on: such figures say nothing."""
    uses_labels: bool
    """Whether the score is made with the labels, and so cannot be had for new images."""
    over: Literal["grid points", "pixels"]
    """What is counted: labelled pixels, or those nearest to the points of the output grid."""
    count: int
    """How many of these."""
    figures: Mapping[str, Interval]
    """By the names of :data:`SCORE_NAMES`, and ``error_rate``."""
    ece: Interval | None
    """Expected calibration error in 15 bins; of the confidence alone."""
    auroc_gain: Interval
    """AUROC minus that of 1 - confidence, over the same resamples."""
    correct: NDArray[np.float64] = field(repr=False)
    """(K,) right pixels by bin of the score, rising."""
    wrong: NDArray[np.float64] = field(repr=False)
    """(K,) wrong pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    """How well each score finds the wrong pixels."""

    store: str
    errors_of: str
    """Whose wrong pixels are to be found."""
    images: int
    resamples: int
    """Of the intervals; 0 where there are none."""
    rows: tuple[ScoreQuality, ...]

    def __repr__(self) -> str:
        title = (
            f"QualityReport: {self.store}, finding the wrong pixels of {self.errors_of}, "
            f"{self.images} images"
        )
        columns = ("auroc", "average_precision", "aurc", "augrc")
        rows = [
            {"score": f"{row.title} (circular)" if row.circular else row.title, "over": row.over}
            | {name: str(row.figures[name]) for name in columns}
            for row in self.rows
        ]
        return text_table(title, rows, ("score", "over", *columns), total=len(rows))

    def __getitem__(self, name: str) -> ScoreQuality:
        for row in self.rows:
            if row.name == name:
                return row
        raise InspectionError(
            f"expected one of {', '.join(row.name for row in self.rows)}, got {name!r}"
        )

    def _repr_html_(self) -> str:
        from rdd_pipeline.inspection.html import quality_html

        return quality_html(self)

    def table(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers for each row; for CSV files and data frames."""
        rows = []
        for row in self.rows:
            cells: dict[str, Any] = {
                "score": row.title, "baseline": row.baseline, "circular": row.circular,
                "uses_labels": row.uses_labels, "over": row.over, "count": row.count,
            }  # fmt: skip
            shown = {**row.figures, "auroc_gain": row.auroc_gain}
            if row.ece is not None:
                shown["ece"] = row.ece
            for name in (*SCORE_NAMES, "error_rate", "auroc_gain", "ece"):
                found = shown.get(name, Interval(value=None))
                cells |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(cells)
        return rows

    def figure(self) -> Figure:
        """AUROC with intervals, and the risk-coverage curves."""
        from rdd_pipeline.inspection.figures import quality_figure

        return quality_figure(self)


def assess(
    reader: MapReader,
    source: SourceImages,
    *,
    scores: Sequence[ScoreName] | None = None,
    errors: MapReader | Predict | None = None,
    images: Sequence[str] | None = None,
    allow_circular: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> QualityReport:
    """How well the scores of a store find wrong pixels; see :meth:`Maps.quality`."""
    own = errors is None or (isinstance(errors, MapReader) and _same_teacher(reader, errors))
    if scores is None:
        more: tuple[ScoreName, ...] = ("predicted_boundary", "label_boundary")
        scores = _FROM_STATISTICS + (() if source.dataset is None else more)
    wanted: list[ScoreName] = [name for name in dict.fromkeys(scores) if name != "random"]
    if "confidence" not in wanted:
        wanted.append("confidence")  # what the others are compared with
    if unknown := [name for name in wanted if name not in _BINS]:
        raise InspectionError(
            f"scores: expected some of {', '.join(get_args(ScoreName))}, got {unknown[0]!r}"
        )
    if own and "hardness" in wanted and not allow_circular:
        raise CircularScoreError(
            "scores: expected a score that does not know the errors, got the hardness: it is made "
            "from the label, and wherever it is low the same teacher's prediction is right by "
            "construction. Test the discrepancy, which needs no label, or the hardness on another "
            "network's errors (errors=); allow_circular=True computes it and marks the row"
        )
    needs_pixels = errors is not None or not set(wanted) <= set(_FROM_STATISTICS)
    chosen = _choose(reader, images)
    bootstrap = ImageBootstrap(len(chosen), resamples=resamples, seed=seed)
    if needs_pixels:
        source.require("finding the pixels that are predicted wrong")
        if isinstance(errors, MapReader):
            _check_same_images(reader, errors, chosen)
        count = _PixelCounter(reader, source, tuple(wanted), errors)
        for part in over_images(count, chosen, progress=progress):
            bootstrap.add({name: np.stack([one[name] for one in part]) for name in wanted})
    else:
        for counted in _stored_counts(reader, frozenset(chosen)):
            bootstrap.add({name: counted[name] for name in wanted})
            if progress is not None:
                progress(len(counted["confidence"]))
    whose = "its teacher"
    if errors is not None:
        whose = errors.path if isinstance(errors, MapReader) else "a network that was given"
    return QualityReport(
        store=reader.path,
        errors_of=whose,
        images=len(chosen),
        resamples=bootstrap.resamples,
        rows=_rows(wanted, bootstrap, own=own),
    )


def _rows(
    wanted: Sequence[ScoreName], bootstrap: ImageBootstrap, *, own: bool
) -> tuple[ScoreQuality, ...]:
    totals: dict[ScoreName, Array] = {name: bootstrap.totals(name) for name in wanted}
    # One bin for everything: any order is as good as another.
    totals["random"] = totals["confidence"].sum(axis=-1, keepdims=True)
    scores = {name: scores_from_counts(part[:, 1], part[:, 0]) for name, part in totals.items()}
    rows = []
    for name, part in totals.items():
        ece = None
        if name == "confidence":
            # The bins rise with 1 - confidence.
            ece = interval(ece_from_counts(part[:, 1, ::-1], part[:, 0, ::-1]))
        rows.append(
            ScoreQuality(
                name=name,
                title=_TITLES[name],
                baseline=name in BASELINES,
                circular=own and name == "hardness",
                uses_labels=name in _OF_LABELS,
                over="grid points" if name == "discrepancy" else "pixels",
                count=int(part[0].sum()),
                figures={
                    figure: interval(getattr(scores[name], figure))
                    for figure in (*SCORE_NAMES, "error_rate")
                },
                ece=ece,
                auroc_gain=interval(scores[name].auroc - scores["confidence"].auroc),
                correct=part[0, 1],
                wrong=part[0, 0],
            )
        )
    return tuple(sorted(rows, key=lambda row: row.baseline))


def _stored_counts(reader: MapReader, chosen: Set[str]) -> Iterator[dict[str, Counts]]:
    """(n, 2, K) for each score, outcomes wrong and correct, a shard at a time."""
    for names, counts in reader.iter_statistics(("discrepancy", "confidence")):
        rows = [row for row, name in enumerate(names) if name in chosen]
        if rows:
            yield {
                "discrepancy": counts["discrepancy"][rows, :2],
                "confidence": counts["confidence"][rows][:, :, ::-1],
            }


@dataclass(frozen=True)
class _PixelCounter:
    """Counts of one image, by reading its maps and its label. Picklable if ``errors`` is."""

    reader: MapReader
    source: SourceImages
    scores: tuple[ScoreName, ...]
    errors: MapReader | Predict | None

    def __call__(self, image_id: str) -> dict[str, Counts]:
        sample = self.source.sample(image_id)
        label = sample.label
        if self.errors is None or isinstance(self.errors, MapReader):
            teacher = self.reader if self.errors is None else self.errors
            prediction = teacher.read("prediction", image_id)
        else:
            prediction = self.errors(sample.image)
        outcome = np.where(label == IGNORE_INDEX, 2, prediction == label)
        return {name: self._counts(name, image_id, label, outcome) for name in self.scores}

    def _counts(
        self,
        name: ScoreName,
        image_id: str,
        label: NDArray[np.uint8],
        outcome: NDArray[np.integer[Any]],
    ) -> Counts:
        """uint32 (2, K): wrong and right pixels by the score's bin."""
        if name == "discrepancy":
            field = self.reader.read("discrepancy", image_id)
            bins = field.view(np.uint16) >> 7
            rows, columns = (
                nearest_pixels(points, pixels)
                for points, pixels in zip(field.shape, label.shape, strict=True)
            )
            outcome = outcome[np.ix_(rows, columns)]
        elif name == "hardness":
            codes: NDArray[Any] = self.reader.read("hardness", image_id)
            bins = codes >> (self.reader.schema.hardness_bits - 8)
        elif name == "confidence":
            bins = 254 - self.reader.read("confidence", image_id).astype(np.int64)
        else:
            of_label = name == "label_boundary"
            regions = label if of_label else self.reader.read("prediction", image_id)
            bins = FARTHEST - city_block_distance(label_boundary(regions.astype(np.uint8)))
        size = _BINS[name]
        known = outcome < 2
        places = outcome[known] * size + bins[known]
        return np.bincount(places, minlength=2 * size).reshape(2, size).astype(np.uint32)


def _choose(reader: MapReader, images: Sequence[str] | None) -> list[str]:
    if images is None:
        return list(reader.image_ids)
    for image_id in images:
        reader.record(image_id)
    return list(dict.fromkeys(images))


def _same_teacher(reader: MapReader, other: MapReader) -> bool:
    return bool(reader.identity.get("teacher") == other.identity.get("teacher"))


def _check_same_images(reader: MapReader, other: MapReader, images: Sequence[str]) -> None:
    for image_id in images:
        if reader.record(image_id).digest != other.record(image_id).digest:
            raise StoreMismatchError(
                f"{other.path}: image {image_id}: expected the digest that {reader.path} has, got "
                "another: the two were built from different files; choose images that both share"
            )
