"""A data set of Cityscapes' kind with its map store, for the benchmarks of loading and training.

Images are drawn regions with the grain of a photograph; the maps are those of bench/_maps.py. What
they show does not change the work; how well they compress does, and it is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from _maps import Setting, drawn_label, maps_for, smooth_noise
from rdd_pipeline.config import FolderData
from rdd_pipeline.data import SegmentationDataset, build_dataset, dataset_digests
from rdd_pipeline.data.packed import from_pack, pack_dataset
from rdd_pipeline.progress import Reporter
from rdd_storage import MapWriter

CLASSES = 19
_GRAIN = 2.0  # standard deviation, in grey levels: PNG files then take as much as Cityscapes'


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Files of one image format, and the store of maps for them."""

    folder: Path
    setting: Setting
    suffix: str
    """``png`` or ``jpg``."""

    @property
    def section(self) -> dict[str, Any]:
        """The section ``data`` of a configuration."""
        split = {"images": f"images-{self.suffix}", "labels": "labels"}
        return {
            "type": "folder",
            "name": f"bench-{self.suffix}",
            "root": str(self.folder),
            "train": split,
            "val": split,
            "classes": [f"class {index}" for index in range(CLASSES)],
            "packed_root": str(self.folder / "packed"),
        }

    @property
    def store(self) -> Path:
        """The map store."""
        return self.folder / f"maps-{self.suffix}.zarr"

    def dataset(self, *, packed: bool) -> SegmentationDataset:
        """The training split, read from its files or from its pack."""
        config = FolderData.model_validate(
            self.section | {"packed": "always" if packed else "never"}
        )
        files = build_dataset(config, "train")
        return from_pack(
            files, config, digests=lambda: dataset_digests(files), say=lambda line: None
        )

    def pack(self) -> str:
        """Pack the training split; returns where the pack is."""
        return pack_dataset(
            self.dataset(packed=False),
            self.section["packed_root"],
            reporter=Reporter(quiet=True),
        ).path

    def bytes_an_image(self, folder: str) -> float:
        """Mean size of the files below a folder, for each image."""
        files = [path for path in (self.folder / folder).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / self.setting.images


def draw_images(folder: Path, setting: Setting) -> None:
    """Write labels, and images as PNG and as JPEG."""
    for name in ("images-png", "images-jpg", "labels"):
        (folder / name).mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.float32)
    size = (setting.height, setting.width)
    for index in range(setting.images):
        rng = np.random.default_rng(index)
        label = drawn_label(setting, rng)
        shade = 12.0 * smooth_noise(rng, *size, 16) + 6.0 * smooth_noise(rng, *size, 4)
        pixels = colours[label] + shade[..., None]
        pixels += _GRAIN * rng.standard_normal(pixels.shape, np.float32)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        name = setting.record(index).image_id
        image.save(folder / "images-png" / f"{name}.png")
        image.save(folder / "images-jpg" / f"{name}.jpg", quality=95)
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")


def write_maps(data: TrainingData) -> None:
    """Write the maps that a run with default settings would: soft labels and both heads."""
    setting, dataset = data.setting, data.dataset(packed=False)
    schema = replace(
        setting.schema(logits=True), class_names=dataset.class_names, aux_hardness=True
    )
    records = [
        replace(setting.record(index), image_id=image_id, digest=digest)
        for index, (image_id, digest) in enumerate(
            zip(dataset.image_ids, dataset_digests(dataset), strict=True)
        )
    ]
    writer = MapWriter.create(
        data.store,
        schema=schema,
        images=records,
        identity={"data": dataset.identity(), "teacher": {"weights": "drawn"}},
    )
    for shard in writer.pending_shards():
        shard_maps = []
        for index in writer.shard_rows(shard):
            rng = np.random.default_rng([1, index])
            maps = maps_for(setting, index, dataset[index].label, rng).maps
            shard_maps.append(
                replace(maps, image_id=records[index].image_id, aux_hardness=maps.hardness)
            )
        writer.write_shard(shard, shard_maps)
    writer.publish()
