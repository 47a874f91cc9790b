"""Crops against the plain way: interpolate the whole map with torch, then cut and mirror."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rdd_pipeline.data.geometry import (
    IMAGE_FILL,
    CropWindow,
    covered_points,
    crop_image,
    crop_nearest,
    field_places,
    field_window,
    largest_field_window,
    pixel_window,
    random_crop,
    resample_field,
    source_coordinates,
)
from rdd_pipeline.signals import expand_weight

_SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def windows(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    low = draw(st.sampled_from([0.3, 0.5, 1.0]))
    return random_crop(
        np.random.default_rng(seed),
        source_size=draw(_SIZES),
        crop_size=draw(_SIZES),
        scale=(low, draw(st.sampled_from([1.0, 2.0, 3.1]))),
        flip=0.5,
    )


def whole_then_crop(array_chw, window, fill):
    """The definition: scale everything, cut, pad right and bottom, mirror. In float64."""
    scaled = F.interpolate(
        torch.from_numpy(array_chw.astype(np.float64))[None],
        size=window.scaled_size,
        mode="bilinear",
        align_corners=True,
    )[0].numpy()
    top, left = window.offset
    height, width = window.crop_size
    cut = scaled[:, top : top + height, left : left + width]
    crop = np.full((array_chw.shape[0], height, width), fill, dtype=np.float64)
    crop[:, : cut.shape[1], : cut.shape[2]] = cut
    return crop[:, :, ::-1] if window.flip else crop


def random_image(window, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, size=(*window.source_size, 3), dtype=np.uint8
    )


@settings(max_examples=60, deadline=None)
@given(windows())
def test_image_crop_equals_resize_then_crop(window):
    image = random_image(window)
    crop = crop_image(image, window, fill=(7, 7, 7))
    expected = whole_then_crop(image.transpose(2, 0, 1), window, 7).transpose(1, 2, 0)
    assert crop.dtype == np.uint8
    # Rounded to the nearest code, so half a code apart at most.
    assert np.abs(crop - expected).max() <= 0.5 + 2e-4


@settings(max_examples=60, deadline=None)
@given(windows(), _SIZES, st.integers(0, 100))
def test_field_crop_equals_resize_then_crop(window, field_size, seed):
    weight = np.random.default_rng(seed).random((2, *field_size), dtype=np.float32)
    crop = resample_field(weight, window, field_size, fill=1.0)
    expected = whole_then_crop(weight, window, 1.0)
    assert crop.dtype == np.float32
    np.testing.assert_allclose(crop, expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(windows(), _SIZES, _SIZES, st.integers(0, 100))
def test_field_on_a_grid_lies_where_the_grid_points_are(window, field_size, grid, seed):
    field = np.random.default_rng(seed).normal(size=(3, *field_size)).astype(np.float16)
    found = resample_field(field, window, field_size, points=grid)
    # An independent reference: grid_sample at the positions in the whole field.
    coordinates = []
    for axis in (0, 1):
        last = window.crop_size[axis] - 1
        # A single point lies in the middle.
        place = np.linspace(0, last, grid[axis]) if grid[axis] > 1 else np.array([last / 2])
        if axis == 1 and window.flip:
            place = place[::-1]
        scaled = np.minimum(place + window.offset[axis], window.scaled_size[axis] - 1)
        span = max(window.scaled_size[axis] - 1, 1)
        coordinates.append(2 * scaled / span - 1)
    rows, columns = np.meshgrid(*coordinates, indexing="ij")
    expected = F.grid_sample(
        torch.from_numpy(field.astype(np.float64))[None],
        torch.from_numpy(np.stack([columns, rows], axis=-1))[None],
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(windows(), _SIZES)
def test_the_device_samples_the_same_bits(window, field_size):
    field = np.random.default_rng(0).random(field_size, dtype=np.float32)
    rows, columns = field_window(window, field_size)
    filled = np.pad(field[rows, columns], ((0, 3), (0, 2)), constant_values=7.0)
    row_places, column_places = field_places(window, field_size, origin=(rows.start, columns.start))
    parts = {"field": filled, "rows": row_places, "columns": column_places}
    found = expand_weight({f"weight_{k}": torch.from_numpy(v)[None] for k, v in parts.items()})
    expected = resample_field(field, window, field_size, fill=1.0)
    np.testing.assert_array_equal(found[0].numpy(), expected)


@settings(max_examples=200, deadline=None)
@given(_SIZES, _SIZES, _SIZES, st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3, 1.0]))
def test_no_window_exceeds_the_largest(source_size, field_size, crop_size, seed, low):
    window = random_crop(
        np.random.default_rng(seed),
        source_size=source_size,
        crop_size=crop_size,
        scale=(low, 1.5 * low),
    )
    largest = largest_field_window(
        source_size=source_size, field_size=field_size, crop_size=crop_size, scale=low
    )
    for part, size, whole in zip(
        field_window(window, field_size), largest, field_size, strict=True
    ):
        assert part.stop - part.start <= size <= whole


@settings(max_examples=60, deadline=None)
@given(windows(), _SIZES, _SIZES)
def test_reading_only_the_window_gives_the_same_bits(window, field_size, grid):
    image = random_image(window)
    rows, columns = pixel_window(window)
    origin = (rows.start, columns.start)
    assert 0 <= rows.start < rows.stop <= window.source_size[0]
    assert 0 <= columns.start < columns.stop <= window.source_size[1]
    part = image[rows, columns]
    np.testing.assert_array_equal(
        crop_image(part, window, origin=origin), crop_image(image, window)
    )
    np.testing.assert_array_equal(
        crop_nearest(part[..., 0], window, origin=origin), crop_nearest(image[..., 0], window)
    )
    field = np.random.default_rng(1).random((2, *field_size), dtype=np.float32)
    for points in (None, grid):
        rows, columns = field_window(window, field_size, points=points)
        part = field[:, rows, columns]
        found = resample_field(
            part, window, field_size, points=points, origin=(rows.start, columns.start)
        )
        np.testing.assert_array_equal(
            found, resample_field(field, window, field_size, points=points)
        )


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from([np.uint8, np.uint16]))
def test_label_crop_equals_resize_then_crop(window, dtype):
    """The rule, in whole numbers: the value at place i * (H - 1) / (Hs - 1), a half rounded up."""
    codes = np.random.default_rng(0).integers(0, 255, window.source_size).astype(dtype)
    nearest = [
        [(2 * i * (size - 1) + span) // (2 * span) for i in range(scaled)]
        for size, scaled in zip(window.source_size, window.scaled_size, strict=True)
        for span in [max(scaled - 1, 1)]
    ]
    top, left = window.offset
    cut = codes[np.ix_(*nearest)][
        top : top + window.crop_size[0], left : left + window.crop_size[1]
    ]
    expected = np.full(window.crop_size, np.iinfo(dtype).max, dtype=dtype)
    expected[: cut.shape[0], : cut.shape[1]] = cut
    np.testing.assert_array_equal(
        crop_nearest(codes, window), expected[:, ::-1] if window.flip else expected
    )


@settings(max_examples=40, deadline=None)
@given(windows(), st.sampled_from([np.uint8, np.uint16]))
def test_labels_and_codes_are_sampled_by_one_index_and_padding_is_ignored(window, dtype):
    count = window.source_size[0] * window.source_size[1]
    # Every pixel its own number: the crop says where each came from.
    numbers = np.arange(count, dtype=np.uint16).reshape(window.source_size)
    codes = (numbers % 251).astype(dtype)
    where = crop_nearest(numbers, window)
    cropped = crop_nearest(codes, window)
    covered = covered_points(window)
    assert cropped.dtype == dtype
    np.testing.assert_array_equal(cropped[covered], codes.ravel()[where[covered]])
    assert (cropped[~covered] == np.iinfo(dtype).max).all()
    rows, _ = source_coordinates(window, 0)
    columns, _ = source_coordinates(window, 1)
    row, column = np.divmod(where[covered].astype(int), window.source_size[1])
    everywhere = np.broadcast_arrays(rows[:, None], columns)
    assert np.abs(everywhere[0][covered] - row).max() <= 0.5
    assert np.abs(everywhere[1][covered] - column).max() <= 0.5


@settings(max_examples=30, deadline=None)
@given(windows(), _SIZES)
def test_a_flip_mirrors_everything(window, grid):
    def mirrored(flip):
        return CropWindow(
            source_size=window.source_size,
            scaled_size=window.scaled_size,
            offset=window.offset,
            crop_size=window.crop_size,
            flip=flip,
        )

    plain, flipped = mirrored(False), mirrored(True)
    image = random_image(window)
    np.testing.assert_array_equal(crop_image(image, flipped), crop_image(image, plain)[:, ::-1])
    np.testing.assert_array_equal(
        crop_nearest(image[..., 0], flipped), crop_nearest(image[..., 0], plain)[:, ::-1]
    )
    np.testing.assert_array_equal(
        covered_points(flipped, grid), covered_points(plain, grid)[:, ::-1]
    )
    field = image[..., 0].astype(np.float32) / 255
    for points in (None, grid):
        np.testing.assert_allclose(
            resample_field(field, flipped, field.shape, points=points),
            resample_field(field, plain, field.shape, points=points)[:, ::-1],
            rtol=0,
            atol=1e-5,
        )


def test_padding_of_a_crop_larger_than_the_image():
    window = CropWindow(source_size=(4, 6), scaled_size=(4, 6), offset=(0, 0), crop_size=(7, 11))
    image = np.full((4, 6, 3), 9, dtype=np.uint8)
    crop = crop_image(image, window)
    assert window.covered_size == (4, 6)
    assert (crop[:4, :6] == 9).all()
    assert (crop[4:] == IMAGE_FILL).all()
    assert (crop[:, 6:] == IMAGE_FILL).all()
    valid = covered_points(window, (3, 3))  # grid rows at 0, 3, 6; columns at 0, 5, 10
    assert valid.tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    field = resample_field(np.full((2, 2), 0.25, np.float32), window, (2, 2), fill=1.0)
    assert (field[:4, :6] == 0.25).all()
    assert (field[4:] == 1.0).all()


def test_unscaled_crop_is_an_exact_cut():
    window = CropWindow(
        source_size=(30, 50), scaled_size=(30, 50), offset=(3, 8), crop_size=(20, 30)
    )
    image = random_image(window)
    np.testing.assert_array_equal(crop_image(image, window), image[3:23, 8:38])
    np.testing.assert_array_equal(crop_nearest(image[..., 1], window), image[3:23, 8:38, 1])
    assert pixel_window(window) == (slice(3, 23), slice(8, 38))


def test_random_crop_covers_its_ranges_and_repeats_with_its_seed():
    def draw(seed):
        return random_crop(
            np.random.default_rng(seed),
            source_size=(60, 80),
            crop_size=(40, 40),
            scale=(0.5, 2.0),
            flip=0.5,
        )

    drawn = [draw(seed) for seed in range(300)]
    assert drawn == [draw(seed) for seed in range(300)]
    heights = [window.scaled_size[0] for window in drawn]
    assert min(heights) >= 30
    assert max(heights) <= 120
    assert min(heights) < 36
    assert max(heights) > 114
    assert 100 < sum(window.flip for window in drawn) < 200
    for window in drawn:
        assert window.offset[0] <= max(window.scaled_size[0] - 40, 0)
        assert window.offset[1] <= max(window.scaled_size[1] - 40, 0)
    assert any(window.offset[0] == max(window.scaled_size[0] - 40, 0) > 0 for window in drawn)
    assert any(window.offset[0] == 0 and window.scaled_size[0] > 40 for window in drawn)


def test_an_offset_outside_the_image_is_refused():
    with pytest.raises(ValueError, match="offset"):
        CropWindow(source_size=(4, 4), scaled_size=(8, 8), offset=(0, 8), crop_size=(4, 4))
    with pytest.raises(ValueError, match="crop_size"):
        CropWindow(source_size=(4, 4), scaled_size=(8, 8), offset=(0, 0), crop_size=(0, 4))
