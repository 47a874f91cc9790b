"""The report's section about the map store: what it takes, and its hardest images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.config import parse_config
from rdd_pipeline.data import Sample, SegmentationDataset, build_dataset
from rdd_pipeline.report.panels import Panel, image_panels
from rdd_storage import (
    MapReader,
    MapStatistics,
    RddError,
    StoreStatus,
    hardness_table,
    store_status,
    true_prob_table,
)

HARDEST_IMAGES = 8
"""Images shown; each takes about 300 kB of the page at most."""

THRESHOLD = 0.7
"""A pixel counts as hard up to this true-class probability, the published threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayBytes:
    """Storage of one array, or of everything that is no map."""

    name: str
    bytes_per_image: float
    share: float
    """Of all bytes of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardImage:
    """One of the hardest images."""

    image_id: str
    mean_hardness: float
    """Of its labelled pixels."""
    hard_share: float
    """Of its labelled pixels with a true-class probability of at most 0.7."""
    pixel_accuracy: float
    """Of the teacher."""
    mean_weight: float
    """Of exp(-D) over the output grid."""
    panels: tuple[Panel, ...]
    note: str
    """Why image and label are missing; empty when they are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSection:
    """Everything the report says about the store; ``problem`` says why it can say nothing."""

    path: str
    """Relative to the run's folder where the store lies in it."""
    problem: str = ""
    fingerprint: str = ""
    format_version: int = 0
    images: int = 0
    bytes_on_disk: int = 0
    bytes_per_image: float = 0.0
    arrays: tuple[ArrayBytes, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    """Empty when the store was built without colours."""
    hardest: tuple[HardImage, ...] = ()


def store_section(results: dict[str, Any], run_dir: Path) -> StoreSection:
    """Read what the report shows from the run's store and data set.

    A store or data set that is no longer there makes the section shorter, not the report fail.

    Args:
        results: The content of ``results.json``.
        run_dir: The folder that holds it.
    """
    path = _find_store(str(results["maps"]["path"]), run_dir)
    shown = _relative(path, run_dir)
    try:
        status = store_status(path)
        reader = MapReader(path)
        dataset, problem = _open_dataset(results["config"])
        palette = _palette(reader, dataset)
        return StoreSection(
            path=shown,
            fingerprint=status.fingerprint,
            format_version=status.format_version,
            images=status.images,
            bytes_on_disk=status.bytes_on_disk,
            bytes_per_image=status.bytes_per_image,
            arrays=_arrays(status, reader.arrays),
            palette=palette,
            hardest=_hardest(reader, dataset, problem, palette),
        )
    except RddError as error:
        return StoreSection(path=shown, problem=str(error))


def _arrays(status: StoreStatus, maps: Sequence[str]) -> tuple[ArrayBytes, ...]:
    sizes = {name: status.arrays[name] for name in (*maps, "statistics")}
    sizes["names, sizes and metadata"] = status.bytes_on_disk - sum(sizes.values())
    return tuple(
        ArrayBytes(
            name=name,
            bytes_per_image=size / max(status.images_done, 1),
            share=size / max(status.bytes_on_disk, 1),
        )
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )


def rank_by_mean_hardness(statistics: MapStatistics) -> NDArray[np.intp]:
    """Indices of the images with labelled pixels, the hardest first; ties keep their order."""
    pixels, mean, _ = _hardness_figures(statistics)
    order = np.argsort(-mean, kind="stable")
    return order[pixels[order] > 0]


def _hardness_figures(
    statistics: MapStatistics,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Labelled pixels, mean hardness and share of hard pixels of each image, (N,) each."""
    counts = statistics.image_hardness.sum(axis=1, dtype=np.float64)
    codes = slice(counts.shape[1])
    hardness = hardness_table(8)[codes].astype(np.float64)
    # float32(0.7) is an edge of the codes, so the codes decide exactly.
    hard = true_prob_table(8)[codes] <= np.float32(THRESHOLD)
    pixels = counts.sum(axis=1)
    some = np.maximum(pixels, 1.0)
    return pixels, counts @ hardness / some, counts @ hard / some


def _hardest(
    reader: MapReader,
    dataset: SegmentationDataset | None,
    problem: str,
    palette: tuple[tuple[int, int, int], ...],
) -> tuple[HardImage, ...]:
    statistics = reader.statistics()
    _, mean, hard = _hardness_figures(statistics)
    index_of = {} if dataset is None else {name: i for i, name in enumerate(dataset.image_ids)}
    images = []
    for row in rank_by_mean_hardness(statistics)[:HARDEST_IMAGES].tolist():
        image_id = statistics.image_ids[row]
        sample, note = None, problem
        if dataset is not None:
            sample, note = _read_sample(reader, dataset, index_of.get(image_id), image_id)
        prediction, discrepancy, hardness = reader.read_many(
            [(array, image_id, None) for array in ("prediction", "discrepancy", "hardness")]
        )
        labelled = statistics.image_label_pixels[row].sum()
        images.append(
            HardImage(
                image_id=image_id,
                mean_hardness=float(mean[row]),
                hard_share=float(hard[row]),
                pixel_accuracy=float(statistics.image_intersection[row].sum() / labelled),
                mean_weight=float(
                    statistics.image_weight_sum[row] / statistics.image_grid_points[row]
                ),
                panels=image_panels(
                    image=None if sample is None else sample.image,
                    label=None if sample is None else sample.label,
                    prediction=prediction.astype(np.uint8, copy=False),
                    discrepancy=discrepancy.astype(np.float16, copy=False),
                    hardness=_eight_bit(hardness, reader.schema.hardness_bits),
                    palette=palette or _grey_levels(reader.schema.num_classes),
                ),
                note=note,
            )
        )
    return tuple(images)


def _eight_bit(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The high byte of a 16-bit hardness code is the 8-bit code."""
    return (codes >> (bits - 8)).astype(np.uint8)


def _read_sample(
    reader: MapReader, dataset: SegmentationDataset, index: int | None, image_id: str
) -> tuple[Sample | None, str]:
    """The image that the maps were made from, or why it is not shown."""
    if index is None:
        return None, "the data set has no image of this name any more"
    try:
        if dataset.digest(index) != reader.record(image_id).digest:
            return None, "the image or its label has changed since the maps were built"
        return dataset[index], ""
    except RddError as error:
        return None, str(error)


def _open_dataset(config: dict[str, Any]) -> tuple[SegmentationDataset | None, str]:
    try:
        return build_dataset(parse_config(config, source="results.json").data, "train"), ""
    except RddError as error:
        return None, str(error)


def _palette(
    reader: MapReader, dataset: SegmentationDataset | None
) -> tuple[tuple[int, int, int], ...]:
    stored: Sequence[Sequence[int]] = reader.attributes.get("palette") or ()
    if stored:
        return tuple((int(r), int(g), int(b)) for r, g, b in stored)
    return () if dataset is None else dataset.palette


def _grey_levels(num_classes: int) -> list[tuple[int, int, int]]:
    levels = np.linspace(30, 225, num_classes).astype(int).tolist()
    return [(level, level, level) for level in levels]


def _find_store(path: str, run_dir: Path) -> str:
    """The store's path; the run may have been moved, or be read from another folder."""
    moved = run_dir / "maps" / Path(path).name
    if "://" not in path and not Path(path).exists() and moved.exists():
        return str(moved)
    return path


def _relative(path: str, run_dir: Path) -> str:
    if "://" in path:
        return path
    try:
        return str(Path(path).resolve().relative_to(run_dir.resolve()))
    except ValueError:
        return path
