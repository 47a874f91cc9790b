"""A data set with known label errors, as files, and the maps of a teacher for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from _label_faults import inject
from rdd_pipeline.build import build_maps
from rdd_pipeline.config import FolderData, MapsConfig, SmpConfig
from rdd_pipeline.data import SegmentationDataset, build_dataset
from rdd_pipeline.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class FaultyData:
    """Images with labels of which some regions are wrong; half of the images have none."""

    folder: Path

    @classmethod
    def write(
        cls, folder: Path, dataset: SegmentationDataset, *, seed: int, images: int
    ) -> FaultyData:
        """Write evenly spread images, and change one to three regions in every second one."""
        data = cls(folder=folder)
        for name in ("images", "labels", "faults"):
            (folder / name).mkdir(parents=True)
        images = min(images, len(dataset))
        faults = []
        for place in range(images):
            sample = dataset[place * len(dataset) // images]
            rng = np.random.default_rng([seed, place])
            count = int(rng.integers(1, 4)) if place % 2 else 0
            label, found = inject(sample.label, rng, count=count)
            numbers = np.zeros(label.shape, np.uint8)
            for number, fault in enumerate(found, start=1):
                numbers[fault.mask] = number
            name = f"{place:04d}"
            Image.fromarray(sample.image).save(folder / "images" / f"{name}.png")
            Image.fromarray(label).save(folder / "labels" / f"{name}.png")
            Image.fromarray(numbers).save(folder / "faults" / f"{name}.png")
            faults += [
                {"image": name, "number": number, "kind": f.kind, "pixels": int(f.mask.sum()),
                 "true": f.true_class, "given": f.given_class}
                for number, f in enumerate(found, start=1)
            ]  # fmt: skip
        (folder / "faults.json").write_text(json.dumps(faults))
        (folder / "classes.json").write_text(
            json.dumps({"classes": dataset.class_names, "palette": dataset.palette})
        )
        return data

    @property
    def section(self) -> dict[str, Any]:
        """The section ``data`` of a configuration."""
        split = {"images": "images", "labels": "labels"}
        about = json.loads((self.folder / "classes.json").read_text())
        return {
            "type": "folder", "name": "faulty", "root": str(self.folder), "train": split,
            "val": split, **about,
        }  # fmt: skip

    def dataset(self) -> SegmentationDataset:
        """The images with the wrong labels."""
        return build_dataset(FolderData.model_validate(self.section), "train")

    def faults(self) -> list[dict[str, Any]]:
        """``image``, ``number``, ``kind``, ``pixels``, ``true`` and ``given`` class of each."""
        found: list[dict[str, Any]] = json.loads((self.folder / "faults.json").read_text())
        return found

    def numbers(self, image_id: str) -> NDArray[np.uint8]:
        """Number of the changed region of each pixel (H, W), 0 where the label is as it was."""
        with Image.open(self.folder / "faults" / f"{image_id}.png") as image:
            return np.asarray(image)

    def build_store(self, network: SmpConfig, weights: Path) -> Path:
        """The teacher's maps on the wrong labels, with soft labels."""
        built = build_maps(
            self.dataset(), network, weights, maps=MapsConfig(workers=0, shard_images=16),
            root=self.folder / "maps", device="cpu", reporter=Reporter(quiet=True),
        )  # fmt: skip
        return Path(built.path)
