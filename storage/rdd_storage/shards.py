"""The content of one shard, array by array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rdd_storage.layout import (
    ArraySpec,
    decode_object,
    encode_objects,
    map_specs,
    object_key,
    statistics_specs,
)
from rdd_storage.location import Location
from rdd_storage.manifest import RowEntry
from rdd_storage.maps import ImageMaps
from rdd_storage.quantise import PREDICTION_UNWRITTEN, encode_discrepancy
from rdd_storage.schema import MapSchema
from rdd_storage.statistics import image_statistics


class ShardContent:
    """What is to be stored in one shard: maps of current images, and what retired rows have."""

    def __init__(self, location: Location, schema: MapSchema, shard: int) -> None:
        self._location = location
        self._schema = schema
        self._shard = shard
        self._maps: list[tuple[int, ImageMaps, npt.NDArray[np.float16]]] = []
        self._kept: list[tuple[int, RowEntry]] = []
        self.done = np.zeros(schema.shard_images, np.bool_)
        """Rows that are complete, counted from the shard's first; settled by :meth:`encode`."""

    def add(self, entries: Sequence[RowEntry], maps: Sequence[ImageMaps]) -> None:
        """Add the checked maps of current images."""
        for entry, item in zip(entries, maps, strict=True):
            offset = entry.row % self._schema.shard_images
            self._maps.append((offset, item, encode_discrepancy(item.discrepancy)))
            self.done[offset] = True

    def keep(self, entries: Sequence[RowEntry]) -> None:
        """Keep what is stored of rows whose image is no longer current.

        What cannot be read is left out, and the row is not marked as done: nothing can make its
        maps again.
        """
        for entry in entries:
            offset = entry.row % self._schema.shard_images
            self._kept.append((offset, entry))
            self.done[offset] = True

    def encode(self) -> Iterator[dict[str, bytes]]:
        """Key and content of the shard's objects, one array at a time.

        So the memory of a shard is that of its largest array.
        """
        offsets = [offset for offset, _, _ in self._maps] + [offset for offset, _ in self._kept]
        length = max(offsets) + 1
        for name, spec in map_specs(self._schema, self._schema.shard_images).items():
            batch = self._map_batch(name, spec, length)
            present = np.zeros(length, np.bool_)
            present[[offset for offset, _, _ in self._maps]] = True
            for offset, row in self._stored_rows(spec).items():
                if row is None:
                    self.done[offset] = False
                else:
                    batch[offset], present[offset] = row, True
            yield encode_objects(spec, batch, first=self._shard, present=present)
        yield from self._encode_statistics(length)

    def _encode_statistics(self, length: int) -> Iterator[dict[str, bytes]]:
        specs = statistics_specs(self._schema, self._schema.shard_images)
        stored = {name: self._stored_rows(spec) for name, spec in specs.items()}
        lost = [
            offset
            for offset, _ in self._kept
            if any(rows[offset] is None for rows in stored.values())
        ]
        self.done[lost] = False
        counts = [
            (offset, image_statistics(item, discrepancy, self._schema))
            for offset, item, discrepancy in self._maps
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

    def _map_batch(self, name: str, spec: ArraySpec, length: int) -> npt.NDArray[np.generic]:
        codec = self._schema.codec
        paddings = {
            "hardness": codec.ignored,
            "aux_hardness": codec.ignored,
            "prediction": PREDICTION_UNWRITTEN,
        }
        batch = np.full(
            (length, *spec.shape[1:]), paddings.get(name, spec.fill), dtype=spec.numpy_dtype
        )
        for offset, item, discrepancy in self._maps:
            array = discrepancy if name == "discrepancy" else getattr(item, name)
            batch[offset, ..., : array.shape[-2], : array.shape[-1]] = array
        return batch

    def _stored_rows(self, spec: ArraySpec) -> dict[int, npt.NDArray[np.generic] | None]:
        """What is stored of the rows to keep, by offset; None where it cannot be read."""
        if not self._kept:
            return {}
        content = self._location.get(object_key(spec, self._shard))
        return {
            offset: None if content is None else _decode_row(spec, content, offset, entry)
            for offset, entry in self._kept
        }


def has_unwritten(spec: ArraySpec, row: npt.NDArray[np.generic], entry: RowEntry) -> bool:
    """Whether one row of a map has fill values inside the image, or its statistics mean nothing."""
    if spec.dims[-1] not in ("x", "grid_x"):
        return spec.name == "statistics/sums" and bool(np.isnan(row).any())
    record = entry.record
    height, width = record.height, record.width
    if spec.dims[-1] == "grid_x":
        height, width = record.grid_height, record.grid_width
    inside = row[..., :height, :width]
    fill = np.isnan(inside) if spec.fill != spec.fill else inside == spec.fill
    return bool(np.any(fill))


def _decode_row(
    spec: ArraySpec, content: bytes, offset: int, entry: RowEntry
) -> npt.NDArray[np.generic] | None:
    """One row of a stored object; None where it cannot be read or was never written."""
    try:
        rows = decode_object(spec, content, offset + 1, slice(offset, offset + 1))
    except (ValueError, RuntimeError, OSError, IndexError, TypeError):
        return None
    return None if has_unwritten(spec, rows[0], entry) else rows[0]
