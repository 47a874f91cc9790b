"""Builds a tiny store of arithmetic maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rdd_storage import (
    ImageMaps,
    ImageRecord,
    MapSchema,
    MapWriter,
    encode_confidence,
    encode_hardness,
    encode_logits,
)

NUM_CLASSES = 3
IDENTITY = {"teacher": {"weights": "abc", "network": "fpn"}, "data": "arithmetic", "scales": [1.0]}
SCHEMA = MapSchema(
    num_classes=NUM_CLASSES,
    class_names=("road", "side walk", "sky"),
    height=20,
    width=28,
    grid_height=4,
    grid_width=5,
    output_stride=8,
    shard_images=2,
    aux_hardness=True,
    logits=True,
)


def records(count: int = 5) -> list[ImageRecord]:
    """Images of different sizes; the first has the largest."""
    return [
        ImageRecord(
            image_id=f"scene/{index}",
            height=20 - index % 3,
            width=28 - 2 * (index % 2),
            grid_height=4 - index % 2,
            grid_width=5,
            digest=f"{index:064x}",
        )
        for index in range(count)
    ]


def true_prob(record: ImageRecord, seed: int) -> np.ndarray:
    """float32 (H, W) in [0, 1], with many values near 1."""
    rng = np.random.default_rng([seed, int(record.digest, 16)])
    return (1 - rng.random((record.height, record.width), dtype=np.float32) ** 4).astype(np.float32)


def label_of(record: ImageRecord) -> np.ndarray:
    """uint8 (H, W) with classes and a void corner."""
    y, x = np.indices((record.height, record.width))
    label = ((y // 6 + x // 9) % NUM_CLASSES).astype(np.uint8)
    label[:3, :4] = 255
    return label


def maps_of(record: ImageRecord, bits: int = 8) -> ImageMaps:
    """The same maps for the same record."""
    rng = np.random.default_rng([7, int(record.digest, 16)])
    label = label_of(record)
    grid = (record.grid_height, record.grid_width)
    wrong = rng.random(label.shape) < 0.2
    return ImageMaps(
        image_id=record.image_id,
        discrepancy=rng.exponential(0.3, grid).astype(np.float32),
        hardness=encode_hardness(true_prob(record, 1), label != 255, bits),
        aux_hardness=encode_hardness(true_prob(record, 2), label != 255, bits),
        prediction=np.where(wrong | (label == 255), 0, label).astype(np.uint8),
        confidence=encode_confidence(rng.random(label.shape, dtype=np.float32)),
        logits=encode_logits(rng.normal(size=(NUM_CLASSES, *grid)).astype(np.float32)),
        label=label,
    )


def build(path: Path, count: int = 5, schema: MapSchema = SCHEMA) -> None:
    """Build what is missing and publish."""
    writer = MapWriter.create(path, schema=schema, images=records(count), identity=IDENTITY)
    for shard in writer.pending_shards():
        rows = writer.shard_rows(shard)
        writer.write_shard(
            shard, [maps_of(writer.records[row], schema.hardness_bits) for row in rows]
        )
    writer.publish()
