"""Our reading of shards against zarr-python's, and what is refused of other arrays."""

from __future__ import annotations

import json
from itertools import count
from math import ceil

import numpy as np
import pytest
import zarr
import zarr.storage
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype

from rdd_storage.chunks import ChunkError, ChunkLayout
from rdd_storage.layout import ArraySpec, array_metadata, encode_objects, object_key
from rdd_storage.location import locate
from rdd_storage.ranged import RangedArray

_numbers = count()


def spec_of(rows: int, inner: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> ArraySpec:
    return ArraySpec(
        name="maps",
        dtype=dtype,
        shape=(rows, *inner),
        dims=("image", *"zyx"[-len(inner) :]),
        chunks=(1, *chunks),
        shards=(rows, *(ceil(n / c) * c for n, c in zip(inner, chunks, strict=True))),
        fill=7,
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_zarr_and_the_ranged_reader_read_the_same(data: st.DataObject) -> None:
    inner = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in inner)
    rows = data.draw(st.integers(1, 4))
    spec = spec_of(rows, inner, chunks, data.draw(st.sampled_from(["uint8", "float16"])))
    present = np.array([data.draw(st.booleans()) for _ in range(rows)])
    written = data.draw(st.integers(1, rows))
    values = np.random.default_rng(0).integers(0, 100, (written, *inner)).astype(spec.dtype)
    metadata, key = array_metadata(spec), object_key(spec, 0)
    shard = encode_objects(spec, values, present=present[:written]).get(key)
    if shard is None:  # nothing is present
        return
    buffer = default_buffer_prototype().buffer
    objects = {"maps/zarr.json": buffer.from_bytes(metadata), key: buffer.from_bytes(shard)}
    expected = np.full(spec.shape, 7, spec.dtype)
    expected[:written][present[:written]] = values[present[:written]]
    array = zarr.open_array(zarr.storage.MemoryStore(objects), path="maps", mode="r")
    np.testing.assert_array_equal(array[...], expected)

    location = locate(f"memory://chunks/{next(_numbers)}")
    location.put(key, shard)
    ranged = RangedArray(location, "maps", json.loads(metadata))
    row = data.draw(st.integers(0, rows - 1))
    window = []
    for n in inner:
        start = data.draw(st.integers(0, n - 1))
        window.append(slice(start, data.draw(st.integers(start + 1, n))))
    pending = ranged.read((slice(row, row + 1), *window))
    if row < written and present[row]:
        np.testing.assert_array_equal(pending.result()[0], expected[(row, *window)])
    else:
        with pytest.raises(ChunkError, match="missing"):
            pending.result()


def metadata_of(**options: object) -> dict[str, object]:
    objects: dict[str, object] = {}
    arguments = {"shape": (4, 8), "dtype": "uint8", "chunks": (1, 8), "shards": (2, 8)} | options
    zarr.create_array(zarr.storage.MemoryStore(objects), name="a", **arguments)
    document: dict[str, object] = json.loads(objects["a/zarr.json"].to_bytes())
    return document


def test_arrays_of_other_kinds_are_refused() -> None:
    zstd = ZstdCodec(level=3, checksum=True)
    assert ChunkLayout.from_metadata(metadata_of(compressors=zstd)).shards == (2, 8)
    for options in (
        {"compressors": None},
        {"compressors": zstd, "dtype": "complex64"},
        {"compressors": zarr.codecs.GzipCodec()},
    ):
        with pytest.raises(ChunkError, match="expected zstd of a plain number type"):
            ChunkLayout.from_metadata(metadata_of(**options))
    with pytest.raises(ChunkError, match="not understood"):
        ChunkLayout.from_metadata({"data_type": "uint8"})


def test_indices_and_chunks_are_checked() -> None:
    spec, other = (spec_of(2, (n,), (n,), "uint8") for n in (8, 4))
    layout = ChunkLayout.from_metadata(json.loads(array_metadata(spec)))
    (shard,) = encode_objects(spec, np.ones((2, 8), np.uint8)).values()
    index = shard[-layout.index_size :]
    assert len(layout.decode_index(index)) == 2
    with pytest.raises(ChunkError, match="checksum of the shard index"):
        layout.decode_index(bytes([index[0] ^ 1]) + index[1:])
    with pytest.raises(ChunkError, match="expected a shard index of 36 bytes, got 35"):
        layout.decode_index(index[1:])
    (short,) = encode_objects(other, np.ones((2, 4), np.uint8)).values()
    offset, length = layout.decode_index(short[-layout.index_size :])[0]
    with pytest.raises(ChunkError, match="has 4 bytes"):
        layout.decode_chunk(short[offset : offset + length])
