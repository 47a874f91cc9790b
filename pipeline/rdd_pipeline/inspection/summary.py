"""A few numbers for each image and class of a store, made once and kept in the user's cache.

The counts of a store are exact and large: 38 kB for each image at 19 classes before compression.
One pass over them, a shard at a time, leaves what ranking and overviews need. It is kept in
``$RDD_CACHE/summaries`` (else ``$XDG_CACHE_HOME/rdd-maps``, else ``~/.cache/rdd-maps``) and read
back as memory maps, so that the next look at the store reads only the numbers it shows. Whatever
is there can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.measures import TEMPERATURE, THRESHOLD, hardness_measures
from rdd_storage import MapReader

Progress = Callable[[int], object]
"""Called with the number of images finished since the last call."""

FEWEST_CACHED = 1000
"""Images; smaller stores are read as quickly as a cache."""

_FORMAT = 1
_PER_CLASS = ("mean", "p95", "soft_min", "hard_share")
_MARK = "complete.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Numbers of N images with C classes. In (C + 1, N) the last row is all classes together."""

    pixels: NDArray[np.uint32]
    """(C + 1, N): labelled pixels."""
    correct: NDArray[np.uint32]
    """(C + 1, N): correctly predicted ones of these."""
    mean: NDArray[np.float32]
    """(C + 1, N): as :class:`~rdd_pipeline.inspection.HardnessMeasures`; NaN without pixels."""
    p95: NDArray[np.float32]
    soft_min: NDArray[np.float32]
    """At temperature 0.1."""
    hard_share: NDArray[np.float32]
    """At threshold 0.7."""
    discrepancy: NDArray[np.float32]
    """(N,): mean of d over the output grid, nats."""
    weight: NDArray[np.float32]
    """(N,): mean of exp(-d) over the output grid."""
    class_hardness: NDArray[np.uint64]
    """(C, 2, 251): pixels of all images by class, region (interior, boundary) and code."""
    confusion: NDArray[np.uint64]
    """(C, C): pixels of all images by class and predicted class."""
    outcome_discrepancy: NDArray[np.uint64]
    """(3, 248): grid points by outcome (wrong, correct, ignored) and discrepancy bin."""
    outcome_confidence: NDArray[np.uint64]
    """(2, 255): pixels by outcome (wrong, correct) and confidence code."""

    def error(self) -> NDArray[np.float32]:
        """(C + 1, N): share of labelled pixels predicted wrong; NaN without pixels."""
        result = np.full(self.pixels.shape, np.nan, np.float32)
        np.divide(
            self.pixels - self.correct, self.pixels, out=result, where=self.pixels > 0,
            casting="unsafe",
        )  # fmt: skip
        return result


def read_summary(
    reader: MapReader, *, cache: bool = True, progress: Progress | None = None
) -> Summary:
    """The summary of a published version, from the cache or from the store's counts.

    Args:
        reader: The store.
        cache: Whether to read and write the cache; stores of fewer than 1,000 images never do.
            A cache that cannot be written is no error.
        progress: Called while the counts are read, not where the cache has the summary.

    Raises:
        StoreIncompleteError, StoreDamagedError: See :meth:`rdd_storage.MapReader.iter_statistics`.
    """
    found = cached_summary(reader) if cache else None
    if found is not None:
        return found
    folder = _folder(reader) if cache and len(reader.records) >= FEWEST_CACHED else None
    summary = _compute(reader, progress)
    if folder is not None:
        _save(summary, folder)
    return summary


def cached_summary(reader: MapReader) -> Summary | None:
    """The summary if the cache has it."""
    return _load(_folder(reader)) if len(reader.records) >= FEWEST_CACHED else None


def _compute(reader: MapReader, progress: Progress | None) -> Summary:
    images, classes = len(reader.records), reader.schema.num_classes
    by_class: dict[str, NDArray[Any]] = {
        name: np.empty((classes + 1, images), np.float32 if name in _PER_CLASS else np.uint32)
        for name in ("pixels", "correct", *_PER_CLASS)
    }
    per_image: dict[str, NDArray[Any]] = {
        name: np.empty(images, np.float32) for name in ("discrepancy", "weight")
    }
    totals: dict[str, NDArray[np.uint64]] = {}
    first = 0
    for names, counts in reader.iter_statistics():
        part = slice(first, first + len(names))
        first += len(names)
        hardness = counts["hardness"].sum(axis=2)  # of both regions
        for row, codes in ((slice(classes), hardness), (classes, hardness.sum(axis=1))):
            measures = hardness_measures(codes)
            for name in ("pixels", *_PER_CLASS):
                by_class[name][row, part] = getattr(measures, name).T
        hits = np.diagonal(counts["confusion"], axis1=1, axis2=2)
        by_class["correct"][:classes, part] = hits.T
        by_class["correct"][classes, part] = hits.sum(axis=1)
        points = np.maximum(counts["discrepancy"].sum(axis=(1, 2)), 1)
        for column, name in enumerate(per_image):
            per_image[name][part] = counts["sums"][:, column] / points
        for name in ("hardness", "confusion", "discrepancy", "confidence"):
            total = counts[name].sum(axis=0, dtype=np.uint64)
            totals[name] = totals[name] + total if name in totals else total
        if progress is not None:
            progress(len(names))
    return Summary(
        **by_class,
        **per_image,
        class_hardness=totals["hardness"],
        confusion=totals["confusion"],
        outcome_discrepancy=totals["discrepancy"],
        outcome_confidence=totals["confidence"],
    )


def cache_root() -> Path:
    """Where summaries are kept."""
    if root := os.environ.get("RDD_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rdd-maps"


def _folder(reader: MapReader) -> Path:
    """A folder for the store's place, and in it one for its content."""
    place = reader.path if "://" in reader.path else str(Path(reader.path).resolve())
    content = hashlib.sha256()
    settings = (_FORMAT, THRESHOLD, TEMPERATURE, reader.version, reader.fingerprint)
    content.update(repr(settings).encode())
    content.update("".join(record.digest for record in reader.records).encode())
    where = hashlib.sha256(place.encode()).hexdigest()[:16]
    return cache_root() / "summaries" / where / content.hexdigest()[:16]


def _load(folder: Path) -> Summary | None:
    """What is in the cache; None where it is nothing, or not whole."""
    try:
        shapes: dict[str, Any] = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        arrays = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r")
            for field in fields(Summary)
        }
    except (OSError, ValueError, EOFError):
        return None
    if {name: list(array.shape) for name, array in arrays.items()} != shapes:
        return None
    return Summary(**arrays)


def _save(summary: Summary, folder: Path) -> None:
    """Put the summary in place in one step, and take away those of the store's other versions."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        arrays = {field.name: getattr(summary, field.name) for field in fields(summary)}
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        (partial / _MARK).write_text(json.dumps(shapes), encoding="utf-8")
        for other in folder.parent.iterdir():
            if other != partial and not other.name.startswith("."):
                shutil.rmtree(other, ignore_errors=True)
        partial.rename(folder)
    except OSError:  # a full disk or a home that cannot be written
        shutil.rmtree(partial, ignore_errors=True)
