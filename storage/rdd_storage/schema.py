"""What a store holds, maps or decoded images: the arrays it has, their sizes, and its images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

from rdd_storage.errors import StoreFormatError
from rdd_storage.quantise import HardnessCodec, hardness_codec

MAX_CLASSES = 255
"""Predictions are uint8 and 255 means none."""

MAX_PACKED_CLASSES = 254
"""Labels are uint8; 254 means unwritten and 255 ignored."""

PUBLISHED_DISCREPANCY = "KL(aux || main)"
"""How d is obtained unless a store says otherwise."""

_CHUNK = {"chunk_height": 1024, "chunk_width": 2048}


@dataclass(frozen=True, kw_only=True, slots=True)
class MapSchema:
    """Sizes and options that decide the arrays of a store of maps."""

    kind: ClassVar[str] = "maps"
    """What a store of this schema holds."""
    made_by: ClassVar[str] = "maps, as 'rdd maps build' makes them"
    """The same for messages."""
    sizes: ClassVar[tuple[str, ...]] = ("height", "width", "grid_height", "grid_width")
    """Fields of the largest image, and of each image's record."""
    remedy: ClassVar[str] = "build the maps again"
    """How a store of this schema is finished or mended."""

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
        _check_common(self, ("output_stride",), MAX_CLASSES, "predictions are stored in one byte")
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
        # A store keeps the chunks it was made with; this is what they were before they were named.
        return _from_json(cls, dict(_CHUNK) | dict(data))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSchema:
    """Sizes that decide the arrays of a pack: decoded images and labels."""

    kind: ClassVar[str] = "pack"
    """What a store of this schema holds."""
    made_by: ClassVar[str] = "images and labels, as 'rdd data pack' makes them"
    """The same for messages."""
    sizes: ClassVar[tuple[str, ...]] = ("height", "width")
    """Fields of the largest image, and of each image's record."""
    remedy: ClassVar[str] = "pack the data again with 'rdd data pack CONFIG'"
    """How a store of this schema is finished or mended."""

    num_classes: int
    """C, the number of classes: 1 to 254."""
    class_names: tuple[str, ...]
    """One name for each class."""
    height: int
    """Height of the largest image, in pixels; smaller images are padded."""
    width: int
    """Width of the largest image, in pixels."""
    shard_images: int = 8
    """K, images per shard; half of the maps', since an image takes four times their bytes."""
    # Measured at 1024 x 2048 on photographs, crops of 512 x 1024 at scales of 0.5 to 2: images are
    # large after compression, so what is decoded beyond the crop costs more than in maps; smaller
    # chunks gain no more.
    chunk_height: int = 128
    """Most rows of pixels in one compressed chunk."""
    chunk_width: int = 256
    """Most columns of pixels in one compressed chunk."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        _check_common(
            self, (), MAX_PACKED_CLASSES, "254 and 255 mean unwritten and ignored in labels"
        )

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON values."""
        return {"kind": self.kind} | asdict(self) | {"class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PackSchema:
        """The schema from :meth:`to_json`; keys that this version does not know are skipped.

        Raises:
            StoreFormatError: A field is missing or has a value that makes no sense.
        """
        return _from_json(cls, data)


Schema: TypeAlias = MapSchema | PackSchema
"""What a store may hold."""

SchemaT = TypeVar("SchemaT", bound=Schema)


def schema_from_json(data: Mapping[str, Any]) -> Schema:
    """The schema of a store of any kind.

    Raises:
        StoreFormatError: The kind is unknown, or a field is missing or makes no sense.
    """
    kind = data.get("kind", MapSchema.kind)  # maps do not say so: they were there first
    if kind == MapSchema.kind:
        return MapSchema.from_json(data)
    if kind == PackSchema.kind:
        return PackSchema.from_json(data)
    raise StoreFormatError(
        f"schema.kind: expected {MapSchema.kind} or {PackSchema.kind}, got {kind!r}; upgrade "
        "rdd-maps to read this store"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image of a store."""

    image_id: str
    """Name of the image, unique in the data set split."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    grid_height: int = 0
    """Height of the teacher's logits for this image; 0 in a pack, which has none."""
    grid_width: int = 0
    """Width of the teacher's logits for this image; 0 in a pack."""
    digest: str
    """SHA-256, in hex, over the bytes of the image and its label."""


def with_arrays(schema: SchemaT, arrays: Collection[str], *, present: bool = True) -> SchemaT:
    """The schema with some optional arrays, or without; names it does not know are skipped."""
    changes: dict[str, Any] = {name: present for name in arrays if hasattr(schema, name)}
    return replace(schema, **changes) if changes else schema


def check_images(schema: Schema, images: tuple[ImageRecord, ...]) -> None:
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
        for name in MapSchema.sizes:
            value, limit = getattr(record, name), getattr(schema, name, 0)
            if not min(1, limit) <= value <= limit:
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


def _check_common(schema: Schema, counts: Sequence[str], most_classes: int, why: str) -> None:
    for name in (*schema.sizes, *counts, *_CHUNK, "shard_images", "num_classes"):
        _expect_count(name, getattr(schema, name))
    if schema.num_classes > most_classes:
        raise StoreFormatError(
            f"schema.num_classes: expected at most {most_classes}, got {schema.num_classes}; {why}"
        )
    if len(schema.class_names) != schema.num_classes:
        raise StoreFormatError(
            f"schema.class_names: expected {schema.num_classes} names, one for each class, "
            f"got {len(schema.class_names)}"
        )


def _from_json(cls: type[SchemaT], data: Mapping[str, Any]) -> SchemaT:
    known = {field.name for field in fields(cls)}
    try:
        return cls(**{key: value for key, value in data.items() if key in known})
    except TypeError as error:
        raise StoreFormatError(f"schema: {error}") from error


def _expect_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StoreFormatError(f"schema.{name}: expected an integer of at least 1, got {value!r}")
