"""Stores of synthetic images as two imagined teachers would leave them; shared by the tests.

Their logits are blurred labels with noise: sure inside of regions, unsure at boundaries, wrong in
places. No network is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rdd_pipeline.data import SegmentationDataset, SyntheticDataset, build_dataset
from rdd_storage import (
    ImageMaps,
    ImageRecord,
    MapSchema,
    MapWriter,
    encode_confidence,
    encode_hardness,
    encode_logits,
)
from tiny import tiny_config

STRIDE = 8


def tiny_dataset() -> SegmentationDataset:
    """The training split of tests/tiny.py."""
    return build_dataset(tiny_config(Path("unused")).data, "train")


def build_store(
    path: Path,
    dataset: SegmentationDataset | None = None,
    *,
    seed: int = 0,
    noise: float = 1.0,
    bits: int = 8,
    extras: bool = True,
) -> Path:
    """Build and publish the maps of a teacher; ``seed`` and ``noise`` are its weights."""
    dataset = tiny_dataset() if dataset is None else dataset
    height, width = dataset.size(0)
    grid = (height // STRIDE + 1, width // STRIDE + 1)
    schema = MapSchema(
        num_classes=dataset.num_classes, class_names=dataset.class_names, height=height,
        width=width, grid_height=grid[0], grid_width=grid[1], output_stride=STRIDE,
        shard_images=2, hardness_bits=bits, aux_hardness=extras, logits=extras,
    )  # fmt: skip
    identity: dict[str, Any] = {
        "data": dataset.identity(),
        "teacher": {"network": {"architecture": "imagined"}, "weights": f"{seed:02d}-{noise}"},
    }
    records = [
        ImageRecord(
            image_id=name, height=height, width=width, grid_height=grid[0], grid_width=grid[1],
            digest=dataset.digest(index),
        )
        for index, name in enumerate(dataset.image_ids)
    ]  # fmt: skip
    writer = MapWriter.create(
        path, schema=schema, images=records, identity=identity,
        palette=[list(colour) for colour in dataset.palette],
    )  # fmt: skip
    for shard in writer.pending_shards():
        rows = writer.shard_rows(shard)
        writer.write_shard(shard, [_maps(dataset, schema, row, seed, noise) for row in rows])
    writer.publish()
    return path


def _maps(
    dataset: SegmentationDataset, schema: MapSchema, index: int, seed: int, noise: float
) -> ImageMaps:
    sample = dataset[index]
    rng = np.random.default_rng([seed, index])
    valid = sample.label != 255
    classes = np.arange(schema.num_classes)[:, None, None]
    onehot = (classes == sample.label).astype(np.float32)
    padded = np.pad(onehot, ((0, 0), (2, 2), (2, 2)), mode="edge")
    shape = sample.label.shape
    blurred = (
        sum(padded[:, i : i + shape[0], j : j + shape[1]] for i in range(5) for j in range(5)) / 25
    )
    heads = []
    for strength in (6.0, 4.0):
        logits = strength * blurred + rng.normal(0, noise * (1 + index / 4), onehot.shape)
        exponents = np.exp(logits - logits.max(0))
        heads.append((exponents / exponents.sum(0)).astype(np.float32))
    main = heads[0]
    rows, columns = (
        np.rint(np.linspace(0, full - 1, points)).astype(int)
        for full, points in zip(shape, (schema.grid_height, schema.grid_width), strict=True)
    )
    main_grid, aux_grid = (p[:, rows][:, :, columns].astype(np.float64) for p in heads)
    discrepancy = (aux_grid * np.log(aux_grid / main_grid)).sum(0)
    label = np.where(valid, sample.label, 0)
    codes = [
        encode_hardness(np.take_along_axis(p, label[None], 0)[0], valid, schema.hardness_bits)
        for p in heads
    ]
    return ImageMaps(
        image_id=sample.image_id,
        discrepancy=np.maximum(discrepancy, 0).astype(np.float32),
        hardness=codes[0],
        aux_hardness=codes[1] if schema.aux_hardness else None,
        prediction=main.argmax(0).astype(np.uint8),
        confidence=encode_confidence(main.max(0)),
        logits=encode_logits(np.log(main_grid).astype(np.float32)) if schema.logits else None,
        label=sample.label,
    )


def many_images(count: int) -> SyntheticDataset:
    """As many tiny images."""
    return SyntheticDataset(split="train", images=count, height=24, width=32, seed=3)
