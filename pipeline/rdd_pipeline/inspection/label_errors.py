"""Finding regions whose label is probably wrong, and the class that they should have."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection._regions import Region, suspicious_regions
from rdd_pipeline.inspection.errors import DataNeededError, EmptySelectionError, InspectionError
from rdd_pipeline.inspection.images import SourceImages
from rdd_pipeline.inspection.label_error_list import LabelError, LabelErrors
from rdd_pipeline.inspection.maps import Maps
from rdd_pipeline.inspection.pixels import over_images
from rdd_pipeline.inspection.run_lengths import encode_pixels
from rdd_pipeline.inspection.summary import Progress
from rdd_storage import (
    MapReader,
    RddError,
    confidence_table,
    hardness_codec,
    true_prob_table,
)

# Probability below which the codes of the hardness say nothing: keeps the score finite.
_FLOOR = 1e-3


def find_label_errors(
    maps: Maps,
    *,
    images: Sequence[str] | None = None,
    class_name: str | None = None,
    max_true_prob: float = 0.5,
    min_confidence: float | None = 0.5,
    min_area: int = 20,
    min_depth: int = 2,
    keep: int = 10_000,
    progress: Progress | None = None,
) -> LabelErrors:
    """Find connected regions where the label is improbable and another class is probable.

    A region is ranked by how much more the teacher believes in its own class than in the label's,
    and by its width: along the borders of objects teacher and annotator differ in slivers of any
    length, which are no errors. Both, and the defaults, were chosen by measurement
    (bench/results/label_errors.md).

    Counts in the store rule out images without reading them. The others are spread over threads,
    or over the workers of a Dask client; only regions are kept.

    Args:
        maps: A store, opened with its data set.
        images: Some images; None takes all.
        class_name: Only labels of this class.
        max_true_prob: Most that a pixel may have of its label's class, in [0, 1].
        min_confidence: Least probability of a pixel's predicted class, in [0, 1]. None takes for
            each class the mean probability of that class over the pixels labelled with it, as in
            confident learning (arXiv 1911.00068, section 3.1).
        min_area: Fewest pixels of a region.
        min_depth: Least depth of a region; 2 leaves out what is at most two pixels wide.
        keep: Errors that are kept at most.
        progress: Called with the number of images finished since the last call; None takes
            ``maps.progress``.

    Raises:
        DataNeededError: There is no data set, or no image is as it was when the maps were built.
        UnknownClassError, UnknownImageError: There is no such class or image.
        EmptySelectionError: No images.
        InspectionError: A setting out of its range.
        StoreIncompleteError, StoreDamagedError: The store cannot be read.
    """
    for name, value, high in (
        ("max_true_prob", max_true_prob, 1.0),
        ("min_confidence", 0.0 if min_confidence is None else min_confidence, 1.0),
    ):
        if not 0.0 <= value <= high:
            raise InspectionError(f"{name}: expected a number in [0, 1], got {value!r}")
    for name, count in (("min_area", min_area), ("min_depth", min_depth), ("keep", keep)):
        if count < 1:
            raise InspectionError(f"{name}: expected at least 1, got {count!r}")
    maps.source.require("finding label errors")
    index = None if class_name is None else maps.class_index(class_name)
    chosen = _chosen(maps, images)
    progress = maps.progress if progress is None else progress
    counts = _count(maps.reader, max_true_prob, index)
    thresholds = counts.thresholds if min_confidence is None else min_confidence
    possible = [name for name in chosen if counts.largest[name] >= min_area]
    if progress is not None:
        progress(len(chosen) - len(possible))
    finder = _Finder(
        reader=maps.reader, source=maps.source, label=index, max_true_prob=max_true_prob,
        min_confidence=np.broadcast_to(thresholds, (len(maps.class_names),)),
        min_area=min_area, min_depth=min_depth,
    )  # fmt: skip
    best: list[tuple[float, int, LabelError]] = []
    problems: dict[str, str] = {}
    total = 0
    for part in over_images(finder, possible, progress=progress) if possible else ():
        for name, errors, problem in part:
            if problem:
                problems[name] = problem
            for error in errors:
                # Of equal scores the first that was found stays.
                entry = (error.score, -total, error)
                total += 1
                if len(best) < keep:
                    heapq.heappush(best, entry)
                else:
                    heapq.heappushpop(best, entry)
    if problems and len(problems) == len(possible):
        name, problem = next(iter(problems.items()))
        raise DataNeededError(
            f"{maps.path}: expected labels that are as they were when the maps were built, got "
            f"{len(problems)} images without; the first, {name}: {problem}"
        )
    return LabelErrors(
        errors=tuple(error for *_, error in sorted(best, reverse=True)),
        total=total, images=len(chosen) - len(problems), skipped=len(chosen) - len(possible),
        problems=problems, maps=maps,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """What the statistics of a store say about where there can be regions."""

    thresholds: NDArray[np.float64]
    """(C,) mean probability of each class over the pixels labelled with it; 1 where none is."""
    largest: dict[str, int]
    """Most pixels that a region of an image can have."""


def _count(reader: MapReader, max_true_prob: float, label: int | None) -> _Counts:
    decoded = true_prob_table()[: hardness_codec().max_code + 1]  # what the statistics count
    # By the lower edges of the codes: a store of 16-bit codes knows more than these counts.
    improbable = np.append(decoded[1:], 0.0) <= max_true_prob
    classes = reader.schema.num_classes
    by_class = np.zeros((classes, len(decoded)), np.float64)
    largest: dict[str, int] = {}
    own = np.arange(classes)
    for names, counts in reader.iter_statistics(("hardness", "confusion")):
        hardness = counts["hardness"].sum(axis=2, dtype=np.int64)
        by_class += hardness.sum(axis=0)
        pairs = counts["confusion"].astype(np.int64)
        pairs[:, own, own] = 0
        # A region has one pair of classes, and its pixels are improbable ones of its label.
        most = np.minimum(pairs.max(axis=2), hardness[:, :, improbable].sum(axis=2))
        most = most.max(axis=1) if label is None else most[:, label]
        largest |= dict(zip(names, most.tolist(), strict=True))
    total = by_class.sum(axis=1)
    thresholds = np.ones(classes)
    np.divide(by_class @ decoded, total, out=thresholds, where=total > 0)
    return _Counts(thresholds=thresholds, largest=largest)


@dataclass(frozen=True, kw_only=True)
class _Finder:
    """The errors of one image, and why it could not be looked at. Picklable."""

    reader: MapReader
    source: SourceImages
    label: int | None
    max_true_prob: float
    min_confidence: NDArray[np.float64]
    min_area: int
    min_depth: int

    def __call__(self, image_id: str) -> tuple[str, list[LabelError], str]:
        try:
            label = self.source.sample(image_id).label
        except RddError as error:
            return image_id, [], self.source.problem(image_id) or str(error)
        codes, prediction, confidence = self.reader.read_many(
            [(array, image_id, None) for array in ("hardness", "prediction", "confidence")]
        )
        schema = self.reader.schema
        valid = codes != schema.codec.ignored
        regions = suspicious_regions(
            label, prediction.astype(np.uint8, copy=False),
            true_prob_table(schema.hardness_bits)[codes], confidence_table()[confidence],
            valid=valid if self.label is None else valid & (label == self.label),
            max_true_prob=self.max_true_prob, min_confidence=self.min_confidence,
            min_area=self.min_area, min_depth=self.min_depth,
        )  # fmt: skip
        names = schema.class_names
        size = (int(label.shape[0]), int(label.shape[1]))
        return image_id, [_error(region, image_id, names, size) for region in regions], ""


def _error(
    region: Region, image_id: str, names: Sequence[str], size: tuple[int, int]
) -> LabelError:
    y, x = np.divmod(region.pixels, size[1])
    left, top = int(x.min()), int(y.min())
    return LabelError(
        image_id=image_id,
        label=names[region.label],
        suggestion=names[region.prediction],
        score=float(
            np.log(region.confidence / (region.true_prob + _FLOOR)) * np.log1p(region.depth)
        ),
        true_prob=region.true_prob,
        confidence=region.confidence,
        area=len(region.pixels),
        depth=region.depth,
        bbox=(left, top, int(x.max()) - left + 1, int(y.max()) - top + 1),
        centroid=(float(x.mean()), float(y.mean())),
        size=size,
        counts=encode_pixels(region.pixels, size),
    )


def _chosen(maps: Maps, images: Sequence[str] | None) -> list[str]:
    if images is None:
        return list(maps.image_ids)
    names = [images] if isinstance(images, str) else list(dict.fromkeys(images))
    if not names:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    return [maps[name].image_id for name in names]
