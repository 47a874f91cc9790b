"""How an array lies in its objects: the parts of Zarr v3 that the store format allows.

Enough to fetch and decode single chunks (docs/store-format.md, section 3.3): chunks compressed by
zstd with its checksum, alone or in shards whose index stands at the end with its own checksum.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

_CHECKSUM = 4  # bytes
_MISSING = 2**64 - 1  # offset and length of a chunk that a shard does not have
_DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int32", "float16", "float32", "float64",
)  # fmt: skip
_zstd = Zstd()

Slices = tuple[slice, ...]


class ChunkError(ValueError):
    """Stored bytes are missing, or are not what the array's metadata promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One chunk's share of a selection."""

    unit: tuple[int, ...]
    """Coordinates of the stored object."""
    number: int
    """Number of the chunk in its shard; 0 without shards."""
    inside: Slices
    """What to take of the decoded chunk."""
    outside: Slices
    """Where it belongs in the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkLayout:
    """Shapes and codecs of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    """The unit of compression."""
    shards: tuple[int, ...] | None
    """The unit of storage where it holds several chunks."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChunkLayout:
        """The layout from the array's ``zarr.json``.

        Raises:
            ChunkError: The metadata is not of the kind that the store format allows.
        """
        try:
            name = metadata["data_type"]
            units = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            codecs = metadata["codecs"]
            chunks, shards = units, None
            if codecs[0]["name"] == "sharding_indexed":
                sharding = codecs[0]["configuration"]
                index_codecs = [codec["name"] for codec in sharding["index_codecs"]]
                location = sharding.get("index_location", "end")
                if len(codecs) > 1 or location != "end" or index_codecs != ["bytes", "crc32c"]:
                    raise ChunkError(f"shards of another kind: {sharding!r}")
                chunks, shards, codecs = tuple(sharding["chunk_shape"]), units, sharding["codecs"]
            names = [codec["name"] for codec in codecs]
            endian = codecs[0].get("configuration", {}).get("endian", "little")
            if names != ["bytes", "zstd"] or endian != "little" or name not in _DTYPES:
                raise ChunkError(f"expected zstd of a plain number type, got {names} of {name!r}")
            return cls(
                shape=tuple(metadata["shape"]),
                dtype=np.dtype(name).newbyteorder("<"),
                chunks=chunks,
                shards=shards,
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ChunkError(f"array metadata that is not understood: {error!r}") from error

    @property
    def index_size(self) -> int:
        """Bytes of a shard's index."""
        return 16 * self.chunks_per_unit + _CHECKSUM

    @property
    def chunks_per_unit(self) -> int:
        """Chunks in one stored object."""
        return math.prod(self._chunks_per_axis)

    def only_chunk(self, data: bytes) -> bytes:
        """The chunk of an object that holds one.

        Raises:
            ChunkError: See :meth:`decode_index`.
        """
        if self.shards is None:
            return data
        offset, length = chunk_range(self.decode_index(data[-self.index_size :]), 0)
        return data[offset : offset + length]

    def decode_index(self, data: bytes) -> list[tuple[int, int]]:
        """Offset and length of each chunk of a shard.

        Raises:
            ChunkError: Wrong length or checksum.
        """
        if len(data) != self.index_size:
            raise ChunkError(f"expected a shard index of {self.index_size} bytes, got {len(data)}")
        content, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if struct.pack("<I", google_crc32c.value(content)) != checksum:
            raise ChunkError("the checksum of the shard index fails")
        return list(struct.iter_unpack("<QQ", content))

    def decode_chunk(self, data: bytes | memoryview) -> npt.NDArray[Any]:
        """One chunk, in its full shape; read-only.

        Raises:
            ChunkError: Its checksum fails, or it has another size.
        """
        try:
            content = _zstd.decode(data)
        except (RuntimeError, ValueError) as error:
            raise ChunkError(f"a chunk cannot be decompressed: {error}") from error
        if len(content) != math.prod(self.chunks) * self.dtype.itemsize:
            raise ChunkError(f"a chunk of {self.chunks} {self.dtype} has {len(content)} bytes")
        return np.frombuffer(content, self.dtype).reshape(self.chunks)

    def decode_object(self, data: bytes) -> npt.NDArray[Any]:
        """All chunks of a stored object, in its full shape.

        Raises:
            ChunkError: One is missing, or see :meth:`decode_chunk`.
        """
        if self.shards is None:
            return self.decode_chunk(data)
        index = self.decode_index(data[-self.index_size :])
        result = np.empty(self.shards, self.dtype)
        whole = tuple(slice(0, length) for length in self.shards)
        for part in (part for parts in self.parts(whole).values() for part in parts):
            offset, length = chunk_range(index, part.number)
            result[part.outside] = self.decode_chunk(data[offset : offset + length])[part.inside]
        return result

    def parts(self, selection: Slices) -> dict[tuple[int, ...], list[Part]]:
        """The chunks that a selection touches, by the object they lie in.

        Args:
            selection: One slice of step 1 within the shape for each axis.
        """
        per_unit = self._chunks_per_axis
        axes = [
            [
                (
                    index,
                    slice(max(part.start - index * size, 0), min(part.stop - index * size, size)),
                    slice(
                        max(index * size - part.start, 0),
                        min((index + 1) * size, part.stop) - part.start,
                    ),
                )
                for index in range(part.start // size, -(-part.stop // size))
            ]
            for part, size in zip(selection, self.chunks, strict=True)
        ]
        found: dict[tuple[int, ...], list[Part]] = {}
        for chunk in product(*axes):
            unit = tuple(at // n for (at, _, _), n in zip(chunk, per_unit, strict=True))
            number = 0
            for (at, _, _), n in zip(chunk, per_unit, strict=True):
                number = number * n + at % n
            part = Part(
                unit=unit,
                number=number,
                inside=tuple(inside for _, inside, _ in chunk),
                outside=tuple(outside for _, _, outside in chunk),
            )
            found.setdefault(unit, []).append(part)
        return found

    @property
    def _chunks_per_axis(self) -> tuple[int, ...]:
        units = self.shards or self.chunks
        return tuple(unit // chunk for unit, chunk in zip(units, self.chunks, strict=True))


def chunk_range(index: list[tuple[int, int]], number: int) -> tuple[int, int]:
    """Offset and length of a chunk.

    Raises:
        ChunkError: The shard does not have it.
    """
    offset, length = index[number]
    if offset == _MISSING:
        raise ChunkError(f"chunk {number} of the shard is missing")
    return offset, length
