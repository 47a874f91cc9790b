"""The completion marks of a store that is being built."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from rdd_storage.chunks import ChunkError, ChunkLayout
from rdd_storage.layout import ArraySpec, array_metadata, object_key
from rdd_storage.location import Location


def read_done(location: Location, spec: ArraySpec) -> npt.NDArray[np.bool_]:
    """Which rows are done, bool (N,); rows whose mark is missing or unreadable are not."""
    layout = ChunkLayout.from_metadata(json.loads(array_metadata(spec)))
    rows, count = spec.chunks[0], spec.shape[0]
    done = np.zeros(count, np.bool_)
    keys = [object_key(spec, chunk) for chunk in range(-(-count // rows))]
    for start, content in zip(range(0, count, rows), location.get_many(keys), strict=True):
        if content is not None:
            try:
                done[start : start + rows] = layout.decode_chunk(content)[: count - start]
            except ChunkError:
                continue  # damaged: its shard is to be written again
    return done
