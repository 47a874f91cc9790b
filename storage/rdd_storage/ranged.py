"""Arrays in object stores, read chunk by chunk with range requests.

One range request for a shard's index, once in a process, and one for the chunks of a read; a shard
of one chunk is fetched whole. All requests go through :class:`~rdd_storage.location.Location`,
which knows the credentials, time limits and retries. Bytes that fail their checksum are fetched
again before they count as damage: a response may be cut short, or an index older than the shard.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rdd_storage.chunks import ChunkError, ChunkLayout, Part, Slices, chunk_range
from rdd_storage.location import Location
from rdd_storage.processes import check_process, request_pool

_T = TypeVar("_T")
FETCHES = 3
"""Of one object before what it holds counts as damaged."""


class RangedArray:
    """One array, read in the threads of :func:`~rdd_storage.processes.request_pool`."""

    def __init__(self, location: Location, name: str, metadata: dict[str, Any] | None) -> None:
        """Open an array.

        Args:
            location: The store.
            name: Name of the array.
            metadata: Its metadata; None reads it from the store.

        Raises:
            ChunkError: There is no such array, or it is not of the store format.
        """
        if metadata is None:
            content = location.get(f"{name}/zarr.json")
            if content is None:
                raise ChunkError(f"there is no array '{name}'")
            metadata = json.loads(content)
        self._location = location
        self._prefix = f"{name}/c/"
        self._layout = ChunkLayout.from_metadata(metadata)
        self._indices: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def read(self, selection: Slices) -> Future[npt.NDArray[Any]]:
        """Start to read; the future may raise :class:`ChunkError`."""
        check_process()
        return request_pool().submit(self._read, selection)

    def _read(self, selection: Slices) -> npt.NDArray[Any]:
        shape = tuple(part.stop - part.start for part in selection)
        result = np.empty(shape, self._layout.dtype.newbyteorder("="))
        for unit, parts in self._layout.parts(selection).items():
            for fetches_left in reversed(range(FETCHES)):
                try:
                    self._read_unit(unit, parts, result)
                    break
                except ChunkError:
                    self._indices.pop(unit, None)
                    if not fetches_left:
                        raise
        return result

    def _read_unit(
        self, unit: tuple[int, ...], parts: list[Part], result: npt.NDArray[Any]
    ) -> None:
        key = self._prefix + "/".join(map(str, unit))
        if self._layout.chunks_per_unit == 1:  # one request; the index comes with the chunk
            content = self._found(key, self._location.get(key))
            contents = [self._layout.only_chunk(content)]
        else:
            index = self._index(unit, key)
            ranges = [chunk_range(index, part.number) for part in parts]
            contents = self._found(key, self._location.get_ranges(key, ranges))
        for part, content in zip(parts, contents, strict=True):
            result[part.outside] = self._layout.decode_chunk(content)[part.inside]

    def _index(self, unit: tuple[int, ...], key: str) -> list[tuple[int, int]]:
        index = self._indices.get(unit)
        if index is None:
            tail = self._found(key, self._location.get_tail(key, self._layout.index_size))
            index = self._indices[unit] = self._layout.decode_index(tail)
        return index

    def _found(self, key: str, content: _T | None) -> _T:
        if content is None:
            raise ChunkError(f"{key} is missing")
        return content
