from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from rdd_storage import (
    ImageMaps,
    MapReader,
    discrepancy_bin_edges,
    encode_discrepancy,
    label_boundary,
    merge_statistics,
)
from rdd_storage.statistics import image_statistics


def slow_boundary(label: np.ndarray) -> np.ndarray:
    height, width = label.shape
    result = np.zeros(label.shape, bool)
    for y in range(height):
        for x in range(width):
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < height and 0 <= u < width and label[v, u] != label[y, x]:
                    result[y, x] = True
    return result


def slow_statistics(maps: ImageMaps, classes: int) -> dict[str, np.ndarray]:
    """The definitions, pixel by pixel."""
    counts = {
        "hardness": np.zeros((classes, 2, 251), int),
        "confusion": np.zeros((classes, classes), int),
        "confidence": np.zeros((2, 255), int),
        "discrepancy": np.zeros((3, 248), int),
    }
    boundary = slow_boundary(maps.label)
    shift = 8 if maps.hardness.dtype == np.uint16 else 0
    for at in np.ndindex(*maps.label.shape):
        label, prediction = int(maps.label[at]), int(maps.prediction[at])
        if label == 255:
            continue
        counts["hardness"][label, int(boundary[at]), int(maps.hardness[at]) >> shift] += 1
        counts["confusion"][label, prediction] += 1
        counts["confidence"][int(label == prediction), maps.confidence[at]] += 1
    edges = discrepancy_bin_edges()
    stored = encode_discrepancy(maps.discrepancy)
    (grid_h, grid_w), (height, width) = stored.shape, maps.label.shape
    for i, j in np.ndindex(grid_h, grid_w):
        at = (round(i * (height - 1) / (grid_h - 1)), round(j * (width - 1) / (grid_w - 1)))
        outcome = 2 if maps.label[at] == 255 else int(maps.label[at] == maps.prediction[at])
        counts["discrepancy"][outcome, np.searchsorted(edges, stored[i, j], side="right") - 1] += 1
    d = stored.astype(np.float64)
    return counts | {"sums": np.array([d.sum(), np.exp(-d).sum()])}


@pytest.mark.parametrize("bits", [8, 16])
def test_counts_equal_the_definitions(building: ModuleType, bits: int) -> None:
    for record in building.records(3):
        maps = building.maps_of(record, bits)
        expected = slow_statistics(maps, building.NUM_CLASSES)
        counts = image_statistics(maps, encode_discrepancy(maps.discrepancy), building.SCHEMA)
        for name in ("hardness", "confusion", "confidence", "discrepancy"):
            np.testing.assert_array_equal(counts[name], expected[name], err_msg=name)
        np.testing.assert_allclose(counts["sums"], expected["sums"], rtol=1e-6)


def test_every_float16_discrepancy_falls_into_its_bin() -> None:
    edges = discrepancy_bin_edges()
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    bins = values.view(np.uint16) >> 7
    assert (edges[bins] <= values).all()
    assert (values < edges[bins + 1]).all()
    assert (np.diff(edges) > 0).all()


def test_boundary_of_a_single_row() -> None:
    label = np.array([[1, 1, 2, 2, 255]], np.uint8)
    np.testing.assert_array_equal(label_boundary(label), slow_boundary(label))
    np.testing.assert_array_equal(label_boundary(label), [[False, True, True, True, True]])


def test_reader_sums_what_the_writer_counted(building: ModuleType, store: str) -> None:
    reader = MapReader(store)
    statistics = reader.statistics()
    all_maps = [building.maps_of(record) for record in building.records()]
    parts = [slow_statistics(maps, building.NUM_CLASSES) for maps in all_maps]
    assert statistics.image_ids == reader.image_ids
    np.testing.assert_array_equal(statistics.hardness, sum(p["hardness"] for p in parts))
    np.testing.assert_array_equal(statistics.confusion, sum(p["confusion"] for p in parts))
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(
            statistics.image_hardness[index], part["hardness"].sum(axis=0)
        )
        np.testing.assert_array_equal(
            statistics.image_intersection[index], np.diagonal(part["confusion"])
        )
        np.testing.assert_array_equal(
            statistics.image_label_pixels[index], part["confusion"].sum(axis=1)
        )
        np.testing.assert_array_equal(
            statistics.image_predicted_pixels[index], part["confusion"].sum(axis=0)
        )
        np.testing.assert_array_equal(statistics.image_confidence[index], part["confidence"])
        np.testing.assert_array_equal(statistics.image_discrepancy[index], part["discrepancy"])
        assert statistics.image_grid_points[index] == all_maps[index].discrepancy.size
        np.testing.assert_allclose(
            [statistics.image_discrepancy_sum[index], statistics.image_weight_sum[index]],
            part["sums"],
            rtol=1e-6,
        )


def test_merging_adds_counts_and_joins_images(store: str) -> None:
    one = MapReader(store).statistics()
    both = merge_statistics([one, one])
    assert both.image_ids == one.image_ids * 2
    np.testing.assert_array_equal(both.hardness, 2 * one.hardness)
    np.testing.assert_array_equal(both.confusion, 2 * one.confusion)
    assert both.image_weight_sum.shape == (2 * len(one.image_ids),)
    with pytest.raises(ValueError, match="at least one"):
        merge_statistics([])
