"""A few numbers for each image and class of a store: what rankings and overviews need.

A store has them since its publication. Of one from before there were summaries they are made by a
pass over its counts, a shard at a time, and kept in ``$RDD_CACHE/summaries`` (else
``$XDG_CACHE_HOME/rdd-maps``, else ``~/.cache/rdd-maps``). They are read back as memory maps, so
that the next look at the store reads only the numbers it shows. Whatever is there can be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rdd_pipeline.files import cache_folder
from rdd_pipeline.inspection.measures import TEMPERATURE, THRESHOLD
from rdd_storage import MapReader
from rdd_storage.summary import ImageMeasures, Summary, SummaryBuilder

__all__ = ["ImageMeasures", "Progress", "Summary", "cached_summary", "read_summary"]

Progress = Callable[[int], object]
"""Called with the number of images finished since the last call."""

FEWEST_CACHED = 1000
"""Images; smaller stores are read as quickly as a cache."""

_FORMAT = 2
_MARK = "complete.json"


def read_summary(
    reader: MapReader, *, cache: bool = True, progress: Progress | None = None
) -> Summary:
    """The summary of a published version: the store's, or from the cache or the store's counts.

    Args:
        reader: The store.
        cache: Whether to read and write the cache; stores of fewer than 1,000 images never do.
            A cache that cannot be written is no error.
        progress: Called while the counts are read, not where there is a summary.

    Raises:
        StoreIncompleteError, StoreDamagedError: See :meth:`rdd_storage.MapReader.iter_statistics`.
    """
    if (stored := reader.summary()) is not None:
        return stored.read()
    found = cached_summary(reader) if cache else None
    if found is not None:
        return found
    folder = _folder(reader) if cache else None
    summary = _compute(reader, progress)
    if folder is not None:
        _save(summary, folder)
    return summary


def cached_summary(reader: MapReader) -> Summary | None:
    """The summary if the cache has it."""
    folder = _folder(reader)
    return None if folder is None else _load(folder)


def _compute(reader: MapReader, progress: Progress | None) -> Summary:
    builder = SummaryBuilder(reader.num_images, reader.schema.num_classes)
    first = 0
    for names, counts in reader.iter_statistics():
        builder.add(slice(first, first + len(names)), counts)
        first += len(names)
        if progress is not None:
            progress(len(names))
    return builder.finish()


def _folder(reader: MapReader) -> Path | None:
    """A folder for the store's place, and in it one for its content; None for small stores."""
    root = cache_folder()
    if root is None or reader.num_images < FEWEST_CACHED:
        return None
    place = reader.path if "://" in reader.path else str(Path(reader.path).resolve())
    settings = (_FORMAT, THRESHOLD, TEMPERATURE, reader.fingerprint, reader.manifest_digest)
    content, where = (
        hashlib.sha256(text.encode()).hexdigest()[:16] for text in (repr(settings), place)
    )
    return root / "summaries" / where / content


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
