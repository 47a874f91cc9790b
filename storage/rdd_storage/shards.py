"""The content of one shard, array by array."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rdd_storage.chunks import ChunkLayout, chunk_range
from rdd_storage.errors import ShardDataError
from rdd_storage.layout import (
    ArraySpec,
    array_metadata,
    decode_object,
    encode_objects,
    map_specs,
    object_key,
    statistics_specs,
)
from rdd_storage.manifest import Head
from rdd_storage.maps import IGNORE_LABEL, ImageMaps, check_maps
from rdd_storage.packs import PackedImage, check_packed
from rdd_storage.quantise import PREDICTION_UNWRITTEN, encode_discrepancy
from rdd_storage.rows import RowEntry
from rdd_storage.schema import ImageRecord, MapSchema, PackSchema, Schema
from rdd_storage.statistics import image_statistics

Content: TypeAlias = ImageMaps | PackedImage
"""What is stored of one image."""


def check_content(item: Content, record: ImageRecord, schema: Schema) -> None:
    """Refuse what does not fit the schema or the image's record.

    Raises:
        ShardDataError: Of another kind, or of a wrong shape, dtype or value.
    """
    if isinstance(item, ImageMaps) and isinstance(schema, MapSchema):
        check_maps(item, record, schema)
    elif isinstance(item, PackedImage) and isinstance(schema, PackSchema):
        check_packed(item, record, schema)
    else:
        wanted = PackedImage if isinstance(schema, PackSchema) else ImageMaps
        raise ShardDataError(
            f"image {record.image_id}: expected {wanted.__name__}, got {type(item).__name__}"
        )


class ShardContent:
    """What is to be stored in one shard: of current images, and what retired rows have."""

    def __init__(self, head: Head, schema: Schema, shard: int) -> None:
        self._head = head
        self._schema = schema
        self._shard = shard
        self._items: list[tuple[int, ImageRecord, Content]] = []
        self._discrepancies: dict[int, npt.NDArray[np.float16]] = {}
        self._kept: list[tuple[int, RowEntry]] = []
        self.done = np.zeros(schema.shard_images, np.bool_)
        """Rows that are complete, counted from the shard's first; settled by :meth:`encode`."""

    def add(self, entries: Sequence[RowEntry], items: Sequence[Content]) -> None:
        """Add the checked content of current images."""
        for entry, item in zip(entries, items, strict=True):
            offset = entry.row % self._schema.shard_images
            self._items.append((offset, entry.record, item))
            if isinstance(item, ImageMaps):
                self._discrepancies[offset] = encode_discrepancy(item.discrepancy)
            self.done[offset] = True

    def keep(self, entries: Sequence[RowEntry]) -> None:
        """Keep what is stored of rows whose image is no longer current.

        What cannot be read is left out, and the row is not marked as done: nothing can make it
        again.
        """
        for entry in entries:
            offset = entry.row % self._schema.shard_images
            self._kept.append((offset, entry))
            self.done[offset] = True

    def encode(self) -> Iterator[dict[str, bytes]]:
        """Key and content of the shard's objects, one array at a time.

        So the memory of a shard is that of its largest array.
        """
        offsets = [offset for offset, *_ in self._items] + [offset for offset, _ in self._kept]
        length = max(offsets) + 1
        for name, spec in map_specs(self._schema, self._schema.shard_images).items():
            batch = self._batch(name, spec, length)
            present = np.zeros(length, np.bool_)
            present[[offset for offset, *_ in self._items]] = True
            for offset, row in self._stored_rows(spec).items():
                if row is None:
                    self.done[offset] = False
                else:
                    batch[offset], present[offset] = row, True
            yield encode_objects(spec, batch, first=self._shard, present=present)
        if isinstance(self._schema, MapSchema):
            yield from self._encode_statistics(self._schema, length)

    def _encode_statistics(self, schema: MapSchema, length: int) -> Iterator[dict[str, bytes]]:
        specs = statistics_specs(schema, schema.shard_images)
        stored = {name: self._stored_rows(spec) for name, spec in specs.items()}
        lost = [
            offset
            for offset, _ in self._kept
            if any(rows[offset] is None for rows in stored.values())
        ]
        self.done[lost] = False
        counts = [
            (offset, image_statistics(item, self._discrepancies[offset], schema))
            for offset, _, item in self._items
            if isinstance(item, ImageMaps)
        ]
        for name, spec in specs.items():
            batch = np.zeros((length, *spec.shape[1:]), spec.numpy_dtype)
            for offset, item_counts in counts:
                batch[offset] = item_counts[name.removeprefix("statistics/")]
            for offset, row in stored[name].items():
                if offset not in lost and row is not None:
                    batch[offset] = row
            if name == "statistics/sums":
                batch[lost] = np.nan  # says that the counts of these rows mean nothing
            yield encode_objects(spec, batch, first=self._shard)

    def _batch(self, name: str, spec: ArraySpec, length: int) -> npt.NDArray[np.generic]:
        paddings = {"prediction": PREDICTION_UNWRITTEN, "label": IGNORE_LABEL}
        if isinstance(self._schema, MapSchema):
            ignored = self._schema.codec.ignored
            paddings |= {"hardness": ignored, "aux_hardness": ignored}
        batch = np.full(
            (length, *spec.shape[1:]), paddings.get(name, spec.fill), dtype=spec.numpy_dtype
        )
        for offset, record, item in self._items:
            # As it is stored, and not as it was handed in.
            encoded = self._discrepancies.get(offset) if name == "discrepancy" else None
            array = getattr(item, name) if encoded is None else encoded
            batch[offset][spec.inside(record)] = array
        return batch

    def _stored_rows(self, spec: ArraySpec) -> dict[int, npt.NDArray[np.generic] | None]:
        """What is stored of the rows to keep, by offset; None where it cannot be read."""
        if not self._kept:
            return {}
        content = self._head.location.get(object_key(spec, self._shard))
        return {
            offset: None if content is None else _decode_row(spec, content, offset, entry)
            for offset, entry in self._kept
            if self._head.has(spec.name, entry)
        }


def has_unwritten(spec: ArraySpec, row: npt.NDArray[np.generic], entry: RowEntry) -> bool:
    """Whether one row of a map has fill values inside the image, or its statistics mean nothing.

    All values of ``rgb`` may be written: of it a missing chunk alone says that it was not.
    """
    if spec.dims[-1] not in ("x", "grid_x"):
        return spec.name == "statistics/sums" and bool(np.isnan(row).any())
    inside = row[spec.inside(entry.record)]
    fill = np.isnan(inside) if spec.fill != spec.fill else inside == spec.fill
    return bool(np.any(fill))


def _decode_row(
    spec: ArraySpec, content: bytes, offset: int, entry: RowEntry
) -> npt.NDArray[np.generic] | None:
    """One row of a stored object; None where it cannot be read or was never written."""
    try:
        if spec.shards is not None:
            layout = ChunkLayout.from_metadata(json.loads(array_metadata(spec)))
            index = layout.decode_index(content[-layout.index_size :])
            per_row = len(index) // spec.shards[0]
            for number in range(offset * per_row, (offset + 1) * per_row):
                chunk_range(index, number)  # else a missing chunk would be decoded as fill
        rows = decode_object(spec, content, offset + 1, slice(offset, offset + 1))
    except (ValueError, RuntimeError, OSError, IndexError, TypeError):
        return None
    return None if has_unwritten(spec, rows[0], entry) else rows[0]
