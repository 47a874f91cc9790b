"""A data set of scenes and a store of maps for it that can be recognised; shared by the tests."""

import numpy as np

from rdd_pipeline.data import SyntheticDataset, dataset_digests
from rdd_storage import ImageMaps, ImageRecord, MapSchema, MapWriter, encode_logits

SIZE = (32, 48)
GRID = (5, 7)
IMAGES = 6


def scenes(images=IMAGES, seed=0):
    return SyntheticDataset(split="train", images=images, height=SIZE[0], width=SIZE[1], seed=seed)


def plane(index):
    """A weight that is linear in both axes, so that interpolation gives it back exactly."""
    rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in GRID), indexing="ij")
    return 0.2 + 0.3 * rows + 0.4 * columns + 0.01 * index


def maps_of(dataset, index, *, logits=True, aux=True, dtype=np.uint8):
    """Maps that can be recognised: the codes are the label, the weight is a plane."""
    sample = dataset[index]
    codes = sample.label.astype(dtype)
    codes[sample.label == 255] = np.iinfo(dtype).max
    rng = np.random.default_rng(index)
    return ImageMaps(
        image_id=sample.image_id,
        discrepancy=-np.log(plane(index)).astype(np.float32),
        hardness=codes,
        aux_hardness=codes if aux else None,
        prediction=np.zeros_like(sample.label),
        confidence=np.zeros_like(sample.label),
        logits=encode_logits(rng.normal(size=(8, *GRID)).astype(np.float32)) if logits else None,
        label=sample.label,
    )


def build_store(path, dataset, *, logits=True, aux=True, bits=8):
    records = [
        ImageRecord(
            image_id=image_id,
            height=SIZE[0],
            width=SIZE[1],
            grid_height=GRID[0],
            grid_width=GRID[1],
            digest=digest,
        )
        for image_id, digest in zip(dataset.image_ids, dataset_digests(dataset), strict=True)
    ]
    schema = MapSchema(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        height=SIZE[0],
        width=SIZE[1],
        grid_height=GRID[0],
        grid_width=GRID[1],
        output_stride=8,
        shard_images=4,
        hardness_bits=bits,
        aux_hardness=aux,
        logits=logits,
    )
    identity = {"data": dataset.identity(), "teacher": "a"}
    writer = MapWriter.create(path, schema=schema, images=records, identity=identity)
    dtype = np.uint8 if bits == 8 else np.uint16
    for shard in writer.pending_shards():
        rows = writer.shard_rows(shard)
        writer.write_shard(
            shard,
            [maps_of(dataset, row, logits=logits, aux=aux, dtype=dtype) for row in rows],
        )
    writer.publish()
    return path
