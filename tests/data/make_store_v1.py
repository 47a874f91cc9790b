"""Makes the committed store of format version 1: ``python make_store_v1.py PATH``.

The content is arithmetic, so that tests can state what must be read for ever. The committed
folder is never made anew: it stands for the stores that users have.
"""

from __future__ import annotations

import sys

import numpy as np

from rdd_storage import ImageMaps, ImageRecord, MapSchema, MapWriter

CLASSES = 4
SIZES = [(16, 24), (12, 24), (16, 20)]
GRID = (2, 3)


def pattern(shape: tuple[int, ...], modulus: int, image: int) -> np.ndarray:
    """Integers 0..modulus-1 that differ from element to element and image to image."""
    return (np.arange(np.prod(shape)).reshape(shape) * 7 + 13 * image) % modulus


def image_maps(index: int) -> ImageMaps:
    """The maps of one image."""
    size = SIZES[index]
    void = pattern(size, 11, index) == 0
    label = np.where(void, 255, pattern(size, CLASSES, index)).astype(np.uint8)
    logits = -pattern((CLASSES, *GRID), 32, index).astype(np.float16) / 8
    return ImageMaps(
        image_id=f"image{index}",
        discrepancy=pattern(GRID, 64, index).astype(np.float16) / 16,
        hardness=np.where(void, 255, pattern(size, 251, index)).astype(np.uint8),
        aux_hardness=np.where(void, 255, pattern(size, 239, index)).astype(np.uint8),
        prediction=pattern(size, 3, index).astype(np.uint8),
        confidence=pattern(size, 255, index).astype(np.uint8),
        logits=logits,
        aux_logits=logits / 2,
        label=label,
    )


def main(path: str) -> None:
    """Write the store."""
    schema = MapSchema(
        num_classes=CLASSES,
        class_names=("sky", "building", "traffic light", "road"),
        height=16,
        width=24,
        grid_height=GRID[0],
        grid_width=GRID[1],
        output_stride=8,
        shard_images=2,
        aux_hardness=True,
        logits=True,
        aux_logits=True,
    )
    images = [
        ImageRecord(
            image_id=f"image{index}",
            height=height,
            width=width,
            grid_height=GRID[0],
            grid_width=GRID[1],
            digest=f"{index:064x}",
        )
        for index, (height, width) in enumerate(SIZES)
    ]
    writer = MapWriter.create(
        path,
        schema=schema,
        images=images,
        identity={"teacher": {"weights": "0123"}, "dataset": "arithmetic", "flip": False},
        palette=[(70, 130, 180), (70, 70, 70), (250, 170, 30), (128, 64, 128)],
        attributes={"title": "Arithmetic maps"},
    )
    for shard in writer.pending_shards():
        writer.write_shard(shard, [image_maps(row) for row in writer.shard_rows(shard)])
    writer.publish()


if __name__ == "__main__":
    main(sys.argv[1])
