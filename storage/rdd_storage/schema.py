"""What a store holds: the arrays it has, their sizes, and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rdd_storage.errors import StoreFormatError
from rdd_storage.quantise import HardnessCodec, hardness_codec

MAX_CLASSES = 255
"""Predictions are uint8 and 255 means none."""

PUBLISHED_DISCREPANCY = "KL(aux || main)"
"""How d is obtained unless a store says otherwise."""

_CHUNK = {"chunk_height": 1024, "chunk_width": 2048}


@dataclass(frozen=True, kw_only=True, slots=True)
class MapSchema:
    """Sizes and options that decide the arrays of a store."""

    num_classes: int
    """C, the number of classes: 1 to 255."""
    class_names: tuple[str, ...]
    """One name for each class."""
    height: int
    """Height of the largest image, in pixels; smaller images are padded."""
    width: int
    """Width of the largest image, in pixels."""
    grid_height: int
    """Height of the largest output grid of the teacher."""
    grid_width: int
    """Width of the largest output grid of the teacher."""
    output_stride: int
    """Pixels per grid step of the teacher's output."""
    shard_images: int = 16
    """K, images per shard; one shard is one unit of work and one object per array."""
    hardness_bits: int = 8
    """Width of the hardness codes: 8 or 16."""
    aux_hardness: bool = False
    """Whether the hardness under the auxiliary head is stored."""
    logits: bool = False
    """Whether the main head's logits are stored (soft labels)."""
    aux_logits: bool = False
    """Whether the auxiliary head's logits are stored."""
    discrepancy: str = PUBLISHED_DISCREPANCY
    """How the discrepancy is obtained, in words."""
    # Measured at 1024 x 2048 (bench/store.py) against whole images: crops of a quarter of the
    # image in 0.6 of the time, 1.4% more bytes; smaller chunks gain no more. An object store still
    # gets one request a crop, since an image's chunks lie side by side in the shard.
    chunk_height: int = 256
    """Most rows of pixels or grid points in one compressed chunk."""
    chunk_width: int = 512
    """Most columns of pixels or grid points in one compressed chunk."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for name in ("height", "width", "grid_height", "grid_width", "output_stride", *_CHUNK):
            _expect_count(name, getattr(self, name))
        _expect_count("shard_images", self.shard_images)
        _expect_count("num_classes", self.num_classes)
        if self.num_classes > MAX_CLASSES:
            raise StoreFormatError(
                f"schema.num_classes: expected at most {MAX_CLASSES}, got {self.num_classes}; "
                "predictions are stored in one byte"
            )
        if len(self.class_names) != self.num_classes:
            raise StoreFormatError(
                f"schema.class_names: expected {self.num_classes} names, one for each class, "
                f"got {len(self.class_names)}"
            )
        if self.hardness_bits not in (8, 16):
            raise StoreFormatError(
                f"schema.hardness_bits: expected 8 or 16, got {self.hardness_bits!r}"
            )

    @property
    def codec(self) -> HardnessCodec:
        """Constants of the hardness codes."""
        return hardness_codec(self.hardness_bits)

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON values."""
        return asdict(self) | {"class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MapSchema:
        """The schema from :meth:`to_json`; keys that this version does not know are skipped.

        Raises:
            StoreFormatError: A field is missing or has a value that makes no sense.
        """
        known = {field.name for field in fields(cls)}
        # A store keeps the chunks it was made with; this is what they were before they were named.
        values = dict(_CHUNK) | dict(data)
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except TypeError as error:
            raise StoreFormatError(f"schema: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image of a store."""

    image_id: str
    """Name of the image, unique in the data set split."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    grid_height: int
    """Height of the teacher's logits for this image."""
    grid_width: int
    """Width of the teacher's logits for this image."""
    digest: str
    """SHA-256, in hex, over the bytes of the image and its label."""


def check_images(schema: MapSchema, images: tuple[ImageRecord, ...]) -> None:
    """Refuse an image list that the schema cannot hold.

    Raises:
        StoreFormatError: No image, an empty or repeated name, or a size beyond the schema's.
    """
    if not images:
        raise StoreFormatError("images: expected at least one image, got none")
    seen: set[str] = set()
    for record in images:
        if not record.image_id or record.image_id in seen:
            problem = "is used twice" if record.image_id else "is empty"
            raise StoreFormatError(
                f"images: the name {record.image_id!r} {problem}; give each image its own name"
            )
        seen.add(record.image_id)
        for name in ("height", "width", "grid_height", "grid_width"):
            value, limit = getattr(record, name), getattr(schema, name)
            if not 1 <= value <= limit:
                raise StoreFormatError(
                    f"image {record.image_id}: {name}: expected 1 to {limit} (the schema's "
                    f"largest), got {value}"
                )


def record_differences(expected: Sequence[ImageRecord], found: Sequence[ImageRecord]) -> list[str]:
    """Readable differences between two lists of images, one line each."""
    by_id = {record.image_id: record for record in found}
    lines = []
    for record in expected:
        other = by_id.pop(record.image_id, None)
        if other is None:
            lines.append(f"image {record.image_id}: expected in the store, found nothing")
            continue
        for field in fields(record):
            wanted, got = getattr(record, field.name), getattr(other, field.name)
            if wanted != got:
                lines.append(
                    f"image {record.image_id}: {field.name}: expected {wanted}, found {got}"
                )
    lines += [f"image {name}: expected nothing, found it in the store" for name in by_id]
    if not lines and [r.image_id for r in expected] != [r.image_id for r in found]:
        lines.append("images: expected another order than the store's")
    return lines


def _expect_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StoreFormatError(f"schema.{name}: expected an integer of at least 1, got {value!r}")
