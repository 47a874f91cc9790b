from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdd_storage import MapReader, UnknownArrayError


def test_counts_come_shard_by_shard_and_add_up(store: Path) -> None:
    reader = MapReader(store)
    whole = reader.statistics()
    parts = list(reader.iter_statistics())
    assert [len(names) for names, _ in parts] == [2, 2, 1]
    assert tuple(name for names, _ in parts for name in names) == whole.image_ids
    hardness = np.concatenate([counts["hardness"] for _, counts in parts])
    assert np.array_equal(hardness.sum(axis=0, dtype=np.uint64), whole.hardness)
    assert np.array_equal(hardness.sum(axis=1), whole.image_hardness)


def test_only_what_is_asked_for_is_read(store: Path) -> None:
    reader = MapReader(store)
    for _, counts in reader.iter_statistics(("confidence",)):
        assert set(counts) == {"confidence", "sums"}
    with pytest.raises(UnknownArrayError, match="expected some of hardness"):
        next(reader.iter_statistics(("depth",)))
