"""Built-in street scenes: generated, seeded, the same on every process; nothing to download."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rdd_pipeline.data.base import JSON, Examined, Sample, SegmentationDataset
from rdd_pipeline.data.scenes import CLASS_NAMES, PALETTE, draw_scene
from rdd_pipeline.errors import ConfigError

GENERATOR_VERSION = 1
"""Changes whenever the same seed draws another scene."""

_SPLIT_NUMBERS = {"train": 0, "val": 1}
_KEPT_BYTES = 256 * 2**20


class SyntheticDataset(SegmentationDataset):
    """Street scenes with sky, buildings, road, pavement, vegetation, poles, cars and pedestrians.

    A scene depends on seed, split, index and size alone. Scenes are kept in memory once drawn, up
    to 256 MiB per process.

    Args:
        split: ``train`` and ``val`` share no scene.
        images: Number of scenes.
        height: Height in pixels.
        width: Width in pixels.
        seed: Seed of the scenes, 0 or more.

    Raises:
        ConfigError: The seed is negative.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "val"],
        images: int,
        height: int,
        width: int,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"data.seed: expected 0 or more, got {seed}")
        self.name = "synthetic"
        self.split = split
        self.class_names = CLASS_NAMES
        self.palette = PALETTE
        self.image_ids = tuple(f"{split}-{index:06d}" for index in range(images))
        self._height, self._width, self._seed = height, width, seed
        self._kept: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept, self._lock = {}, threading.Lock()

    def __getitem__(self, index: int) -> Sample:
        index = self._require_index(index)
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        rng = np.random.default_rng([self._seed, _SPLIT_NUMBERS[self.split], index])
        image, label = draw_scene(rng, self._height, self._width)
        image.flags.writeable = label.flags.writeable = False
        sample = Sample(image_id=self.image_ids[index], image=image, label=label)
        with self._lock:
            if (len(self._kept) + 1) * (image.nbytes + label.nbytes) <= _KEPT_BYTES:
                self._kept[index] = sample
        return sample

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, the same for all scenes."""
        self._require_index(index)
        return self._height, self._width

    def digest(self, index: int) -> str:
        """SHA-256, as hex, of the pixels of image and label; draws the scene."""
        sample = self[index]
        return hashlib.sha256(sample.image.tobytes() + sample.label.tobytes()).hexdigest()

    def identity(self) -> dict[str, JSON]:
        """Name, split, classes and what the generator was told; not the number of scenes."""
        return {
            "name": self.name,
            "split": self.split,
            "classes": list(self.class_names),
            "generator": GENERATOR_VERSION,
            "seed": self._seed,
            "size": [self._height, self._width],
        }

    def examine(self, index: int) -> Examined:
        """Draw a scene; there is nothing to be wrong with it."""
        return Examined(size=self.size(index), label=self[index].label)

    def _image_problems(self, index: int) -> Sequence[str]:
        return ()  # drawn, not read: a check before a run need not draw it
