"""Maps as a real teacher would give them, from labels that are drawn or taken from CamVid.

The teacher here is a fake with the properties that decide sizes: its logits live on a grid of
stride 8, are sure inside of regions and unsure at their borders, err in places, and carry noise
both smooth and fine. Probabilities are those of the logits interpolated to the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from rdd_storage import (
    ImageMaps,
    ImageRecord,
    MapSchema,
    encode_confidence,
    encode_discrepancy,
    encode_hardness,
    encode_logits,
)

STRIDE = 8
_SURE = 8.0  # logit of a class where the whole neighbourhood belongs to it
_SMOOTH_NOISE, _FINE_NOISE = 1.1, 0.12  # in logits
_BAND = 64  # image rows at a time
_CAMVID_UNLABELLED = 11

Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """A data set that the benchmark imitates."""

    name: str
    height: int
    width: int
    num_classes: int
    crop: tuple[int, int]
    images: int
    shard_images: int

    @property
    def grid(self) -> tuple[int, int]:
        """Size of the teacher's output."""
        return self.height // STRIDE + 1, self.width // STRIDE + 1

    def schema(self, *, logits: bool = False, shard_images: int = 0) -> MapSchema:
        """Schema of a map store for it."""
        return MapSchema(
            num_classes=self.num_classes,
            class_names=tuple(f"class {index}" for index in range(self.num_classes)),
            height=self.height,
            width=self.width,
            grid_height=self.grid[0],
            grid_width=self.grid[1],
            output_stride=STRIDE,
            shard_images=shard_images or self.shard_images,
            logits=logits,
        )

    def record(self, index: int) -> ImageRecord:
        """Record of one image."""
        return ImageRecord(
            image_id=f"{index:04d}",
            height=self.height,
            width=self.width,
            grid_height=self.grid[0],
            grid_width=self.grid[1],
            digest=f"{index:064x}",
        )


@dataclass(frozen=True)
class TeacherMaps:
    """What the teacher says of one image."""

    p_true: Field
    """float32 (H, W)."""
    discrepancy: Field
    """float32 (h, w)."""
    maps: ImageMaps
    """The same as codes, with the rest of what a store holds."""


def make_maps(setting: Setting, index: int, labels: Path | None = None) -> TeacherMaps:
    """Maps of image ``index``; its label is drawn, or read from a folder of CamVid labels."""
    rng = np.random.default_rng(index)
    label = drawn_label(setting, rng) if labels is None else _camvid_label(labels, index)
    return maps_for(setting, index, label, rng)


def maps_for(
    setting: Setting, index: int, label: npt.NDArray[np.uint8], rng: np.random.Generator
) -> TeacherMaps:
    """Maps of image ``index`` whose label, uint8 (H, W), is known."""
    classes, (height, width), grid = setting.num_classes, label.shape, setting.grid
    share = _class_shares(label, classes, grid)
    main, aux = (_teacher_logits(share, rng, sharpness) for sharpness in (1.0, 0.8))
    p_main, p_aux = _softmax(main), _softmax(aux)
    discrepancy = (p_main * (np.log(p_main) - np.log(p_aux))).sum(axis=0).clip(0)
    p_true = np.empty((height, width), np.float32)
    confidence = np.empty((height, width), np.float32)
    prediction = np.empty((height, width), np.uint8)
    for top in range(0, height, _BAND):
        rows = slice(top, min(top + _BAND, height))
        p = _softmax(_resize(main, height, width, rows))
        known = np.where(label[rows] == 255, 0, label[rows])
        p_true[rows] = np.take_along_axis(p, known[None].astype(np.intp), axis=0)[0]
        prediction[rows] = p.argmax(axis=0)
        confidence[rows] = p.max(axis=0)
    return TeacherMaps(
        p_true=p_true,
        discrepancy=discrepancy.astype(np.float32),
        maps=ImageMaps(
            image_id=setting.record(index).image_id,
            discrepancy=encode_discrepancy(discrepancy.astype(np.float32)),
            hardness=encode_hardness(p_true, label != 255),
            prediction=prediction,
            confidence=encode_confidence(confidence.clip(0, 1)),
            logits=encode_logits(main),
            label=label,
        ),
    )


def drawn_label(setting: Setting, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Regions of all sizes, objects in them, and unlabelled patches."""
    height, width = setting.height, setting.width
    label = np.zeros((height, width), np.uint8)
    for rank, classes in enumerate(np.array_split(rng.permutation(setting.num_classes), 3)):
        step = max(height // (2 << rank), 8)
        fields = [smooth_noise(rng, height, width, step) for _ in classes]
        rough = 0.08 * smooth_noise(rng, height, width, max(step // 8, 4))
        best = np.argmax(fields, axis=0)
        # Later ranks are objects on top of what is there.
        on_top = np.max(fields, axis=0) + rough > (-np.inf if rank == 0 else 1.4 + 0.5 * rank)
        label = np.where(on_top, classes[best], label).astype(np.uint8)
    label[smooth_noise(rng, height, width, height // 4) > 1.3] = 255
    return label


def _camvid_label(folder: Path, index: int) -> npt.NDArray[np.uint8]:
    files = sorted(folder.glob("*.png"))
    label = np.asarray(Image.open(files[index % len(files)])).astype(np.uint8)
    return np.where(label == _CAMVID_UNLABELLED, 255, label).astype(np.uint8)


def _class_shares(label: npt.NDArray[np.uint8], classes: int, grid: tuple[int, int]) -> Field:
    """Share of each class in the neighbourhood of each grid point, (C, h, w)."""
    rows, columns = (
        np.clip(np.arange(n)[:, None] * STRIDE + np.arange(-6, 6)[None], 0, size - 1)
        for n, size in zip(grid, label.shape, strict=True)
    )
    share = np.empty((classes, *grid), np.float32)
    for index in range(classes):
        inside = (label == index).astype(np.float32)
        share[index] = inside[rows].mean(axis=1)[:, columns].mean(axis=2)
    return share


def _teacher_logits(share: Field, rng: np.random.Generator, sharpness: float) -> Field:
    classes, height, width = share.shape
    smooth = np.stack([smooth_noise(rng, height, width, 12) for _ in range(classes)])
    fine = rng.standard_normal(share.shape, np.float32)
    logits = sharpness * _SURE * np.sqrt(share) + _SMOOTH_NOISE * smooth + _FINE_NOISE * fine
    return logits.astype(np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, step: int) -> Field:
    """Normal noise, smooth over ``step`` pixels."""
    coarse = rng.standard_normal((1, height // step + 3, width // step + 3), np.float32)
    return _resize(coarse, height, width, slice(0, height))[0]


def _resize(field: Field, height: int, width: int, rows: slice) -> Field:
    """Rows of a bilinear interpolation with aligned corners, (C, rows, W)."""

    def taps(points: int, size: int, part: slice) -> tuple[npt.NDArray[np.intp], Field]:
        at = np.arange(part.start, part.stop) * ((points - 1) / max(size - 1, 1))
        low = np.minimum(at.astype(np.intp), max(points - 2, 0))
        return low, (at - low).astype(np.float32)

    low, share = taps(field.shape[1], height, rows)
    field = field[:, low] * (1 - share)[:, None] + field[:, low + 1] * share[:, None]
    low, share = taps(field.shape[2], width, slice(0, width))
    return field[:, :, low] * (1 - share) + field[:, :, low + 1] * share


def _softmax(logits: Field) -> Field:
    power = np.exp(logits - logits.max(axis=0))
    return power / power.sum(axis=0)
