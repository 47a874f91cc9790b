"""Comparing a store with its live teacher, image by image."""

# Shape suffixes: C classes, h w output grid.

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rdd_pipeline.build import pass_options, store_identity
from rdd_pipeline.config import MapsConfig, NetworkConfig, without_pretrained
from rdd_pipeline.data import SegmentationDataset
from rdd_pipeline.networks import build_network, load_weights, weights_hash
from rdd_pipeline.progress import Reporter
from rdd_pipeline.teacher_pass import batch_maps
from rdd_storage import (
    MapReader,
    StoreMismatchError,
    confidence_table,
    fingerprint,
    hardness_table,
    identity_difference,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherDifference:
    """Largest differences between a store and its live teacher over some images."""

    array: str
    unit: str
    largest: float
    """Largest absolute difference of any pixel, in ``unit``."""
    mean: float
    """Mean absolute difference over all pixels."""
    image_id: str
    """Image with the largest difference."""


def compare_with_teacher(
    store: str,
    dataset: SegmentationDataset,
    network_config: NetworkConfig,
    weights: Path,
    *,
    maps: MapsConfig,
    images: int,
    device: str,
    reporter: Reporter,
    seed: int = 0,
) -> list[TeacherDifference]:
    """Run the teacher again over random images of a store and compare every map.

    Weights ``exp(-d)``, hardness and confidence are compared in their own units, predictions as
    the share of pixels whose class differs, soft labels as probabilities. On the device and with
    the library versions of the build all differences are 0; elsewhere arithmetic rounds otherwise.

    Args:
        store: Path of the store.
        dataset: The data set it was built from.
        network_config: The teacher's network.
        weights: The teacher's weights.
        maps: The settings it was built with.
        images: How many images to draw; all, if there are fewer.
        device: Torch device of the teacher.
        reporter: Where progress is shown.
        seed: Seed of the draw.

    Raises:
        StoreMismatchError: The store was built by another teacher, from other data or settings.
    """
    reader = MapReader(store)
    network = build_network(without_pretrained(network_config), dataset.num_classes)
    load_weights(network, weights)
    identity = store_identity(dataset, network_config, weights_hash(network), maps)
    if fingerprint(identity) != reader.fingerprint:
        lines = identity_difference(identity, reader.identity)
        raise StoreMismatchError(
            "\n".join([f"{store}: built by another teacher or with other settings", *lines])
        )
    network.to(device).eval()
    stored_ids = set(reader.image_ids)
    known = [i for i, image_id in enumerate(dataset.image_ids) if image_id in stored_ids]
    options = replace(pass_options(maps), soft_labels=reader.schema.logits)
    chosen = np.random.default_rng(seed).permutation(known)[:images].tolist()
    found: dict[str, list[tuple[float, float, str]]] = {}
    with reporter.bar("compare with teacher", len(chosen)) as bar:
        for index in chosen:
            [live] = batch_maps(network, [dataset[index]], options, torch.device(device))
            for array in reader.arrays:
                stored = reader.read(array, live.image_id)
                again = getattr(live, array)
                difference = _difference(array, stored, again)
                found.setdefault(array, []).append(
                    (float(difference.max()), float(difference.mean()), live.image_id)
                )
            bar.advance()
    return [
        TeacherDifference(
            array=array,
            unit=_UNITS[array.removeprefix("aux_")],
            largest=max(rows)[0],
            mean=float(np.mean([row[1] for row in rows])),
            image_id=max(rows)[2],
        )
        for array, rows in found.items()
    ]


_UNITS = {
    "discrepancy": "exp(-d)",
    "hardness": "sqrt(1 - p)",
    "prediction": "class differs",
    "confidence": "probability",
    "logits": "probability",
}


def _difference(
    array: str, stored: NDArray[np.generic], again: NDArray[np.generic]
) -> NDArray[np.float32]:
    kind = array.removeprefix("aux_")
    if kind == "prediction":
        return np.asarray(stored != again, np.float32)
    if kind == "logits":
        first, second = (torch.from_numpy(a.astype(np.float32)) for a in (stored, again))
        apart = (first.softmax(dim=0) - second.softmax(dim=0)).abs()
        return np.asarray(apart.numpy(), np.float32)
    if kind == "discrepancy":
        first_weight, second_weight = (np.exp(-a.astype(np.float32)) for a in (stored, again))
        return np.asarray(np.abs(first_weight - second_weight), np.float32)
    table = confidence_table() if kind == "confidence" else hardness_table(8 * stored.itemsize)
    difference: NDArray[np.float32] = np.abs(table[stored] - table[again])
    # Ignored pixels decode to NaN in both.
    return np.asarray(np.nan_to_num(difference, nan=0.0), np.float32)
