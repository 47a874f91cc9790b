"""Geometry of a training crop: random scale, crop and flip, the same for everything sampled.

An image of height H is scaled to Hs rows so that the corners stay (``align_corners=True`` over the
whole image): row ``i`` of the scaled image shows position ``i * (H - 1) / (Hs - 1)`` of the source.
A map of h rows over the same image is sampled at ``i * (h - 1) / (Hs - 1)``. The scaled image is
never made: each pixel of the crop is sampled where it lies, so that a crop takes time for its own
pixels alone, and gives the same numbers whichever part of the source was read for it.
"""

# Shape suffixes: H W source pixels, h w grid of a map, n m points sampled, C channels or classes.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
Axis = Literal[0, 1]
AXES: tuple[Axis, Axis] = (0, 1)
Window = tuple[slice, slice]
"""Rows and columns, both with start and stop."""

IMAGE_FILL = (124, 116, 104)
"""Colour of padding: the ImageNet mean, which most networks see as zero."""

Code = TypeVar("Code", np.uint8, np.uint16)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropWindow:
    """A crop of the scaled image. Sizes are (height, width), offsets (top, left)."""

    source_size: Size
    """Size of the image as stored."""
    scaled_size: Size
    """Size it is scaled to."""
    offset: Size
    """Top-left corner of the crop, in pixels of the scaled image."""
    crop_size: Size
    """Size of the crop; what lies beyond the scaled image, at its right and bottom, is padding."""
    flip: bool = False
    """Whether the crop, padding included, is mirrored left to right."""

    def __post_init__(self) -> None:
        for axis in AXES:
            if not 0 <= self.offset[axis] < self.scaled_size[axis]:
                raise ValueError(
                    f"offset: expected a place inside the scaled image {self.scaled_size}, "
                    f"got {self.offset}"
                )
        for name in ("source_size", "crop_size"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1x1, got {getattr(self, name)}")

    @property
    def covered_size(self) -> Size:
        """How many rows and columns of the crop show the image; the rest is padding."""
        height, width = (
            min(self.crop_size[axis], self.scaled_size[axis] - self.offset[axis]) for axis in AXES
        )
        return height, width


def random_crop(
    rng: np.random.Generator,
    *,
    source_size: Size,
    crop_size: Size,
    scale: tuple[float, float] = (1.0, 1.0),
    flip: float = 0.0,
) -> CropWindow:
    """Draw a scale, a place and a flip.

    Args:
        rng: Source of randomness; four numbers are drawn whatever the arguments.
        source_size: Height and width of the image.
        crop_size: Height and width of the crop.
        scale: Range of the scale, which is uniform and common to height and width.
        flip: Probability of a horizontal flip.
    """
    factor = rng.uniform(*scale)
    scaled_size = (
        max(1, round(source_size[0] * factor)),
        max(1, round(source_size[1] * factor)),
    )
    top, left = (
        int(rng.integers(0, max(scaled_size[axis] - crop_size[axis], 0) + 1)) for axis in AXES
    )
    return CropWindow(
        source_size=source_size,
        scaled_size=scaled_size,
        offset=(top, left),
        crop_size=crop_size,
        flip=bool(rng.random() < flip),
    )


@lru_cache(maxsize=32)  # one sample asks for the same places several times
def source_coordinates(
    window: CropWindow, axis: Axis, *, size: int | None = None, points: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where the crop's points lie on a grid that spans the whole image.

    Args:
        window: The crop.
        axis: 0 for rows, 1 for columns.
        size: Length of the grid along the axis; the source's pixels by default.
        points: Number of points, spread over the crop corner to corner; its pixels by default. A
            single point lies in the middle.

    Returns:
        Positions in [0, size - 1], in order of the (flipped) crop, and whether each lies on the
        image: positions in the padding are those of the image's edge. Both are read-only.
    """
    crop, scaled = window.crop_size[axis], window.scaled_size[axis]
    size = window.source_size[axis] if size is None else size
    points = crop if points is None else points
    # Multiplied first and divided once, so that places that are whole numbers come out whole.
    place = (
        np.arange(points) * (crop - 1) / (points - 1) if points > 1 else np.array([(crop - 1) / 2])
    )
    if axis == 1 and window.flip:
        place = (crop - 1) - place
    place += window.offset[axis]
    covered = place <= scaled - 1 + 1e-6
    np.minimum(place, scaled - 1, out=place)
    if scaled > 1:
        place *= size - 1
        place /= scaled - 1
    place.flags.writeable = covered.flags.writeable = False
    return place, covered


def field_window(window: CropWindow, field_size: Size, *, points: Size | None = None) -> Window:
    """The part of a map that :func:`resample_field` needs.

    Args:
        window: The crop.
        field_size: Height and width of the map over the whole image.
        points: As for :func:`resample_field`.
    """
    return (
        _span(window, 0, field_size[0], None if points is None else points[0]),
        _span(window, 1, field_size[1], None if points is None else points[1]),
    )


def pixel_window(window: CropWindow) -> Window:
    """The part of image, label and code maps that the crop needs."""
    return field_window(window, window.source_size)


def crop_image(
    image_HWC: NDArray[np.uint8],
    window: CropWindow,
    *,
    origin: Size = (0, 0),
    fill: tuple[int, int, int] = IMAGE_FILL,
) -> NDArray[np.uint8]:
    """Sample an image at the crop's pixels, bilinearly, rounded to the nearest code.

    Args:
        image_HWC: uint8, the whole image or a part that holds :func:`pixel_window`.
        window: The crop.
        origin: Row and column of the whole image at which the given part begins.
        fill: Colour of the padding.

    Returns:
        uint8 (crop height, crop width, C).
    """
    channels = image_HWC.shape[2]
    rows = _Taps.at(_covered_places(window, 0), window.source_size[0], origin[0])
    # Pixels side by side with their channels are one long row: plain 2-D takes are the fastest.
    columns = _Taps.at(_covered_places(window, 1), window.source_size[1], origin[1]).per_channel(
        channels
    )
    flat = _bilinear(image_HWC.reshape(image_HWC.shape[0], -1), rows, columns)
    flat += 0.5
    inner = flat.astype(np.uint8).reshape(len(rows.lower), -1, channels)
    if inner.shape[:2] == window.crop_size:
        return inner
    crop = np.empty((*window.crop_size, channels), dtype=np.uint8)
    crop[:] = fill
    crop[inside(window)] = inner
    return crop


def crop_nearest(
    codes_HW: NDArray[Code], window: CropWindow, *, origin: Size = (0, 0)
) -> NDArray[Code]:
    """Sample a label or a map of codes at the crop's pixels: the nearest value, never a mixture.

    Args:
        codes_HW: uint8 or uint16, the whole map or a part that holds :func:`pixel_window`.
        window: The crop.
        origin: Row and column of the whole map at which the given part begins.

    Returns:
        (crop height, crop width) of the same dtype; padding is the dtype's largest value, which
        means ignored in labels and in hardness codes of either width.
    """
    rows, columns = (np.floor(_covered_places(window, axis) + 0.5).astype(np.intp) for axis in AXES)
    inner = codes_HW.take(rows - origin[0], axis=0).take(columns - origin[1], axis=1)
    if inner.shape == window.crop_size:
        return inner
    crop = np.full(window.crop_size, np.iinfo(codes_HW.dtype).max, dtype=codes_HW.dtype)
    crop[inside(window)] = inner
    return crop


def resample_field(
    field: NDArray[np.floating[Any]],
    window: CropWindow,
    field_size: Size,
    *,
    points: Size | None = None,
    origin: Size = (0, 0),
    fill: float | None = None,
) -> NDArray[np.float32]:
    """Sample a low-resolution map bilinearly at the crop's pixels, or at a grid over the crop.

    Equal to interpolating the whole map to the scaled image (``align_corners=True``), then
    cropping and flipping. Maps must be decoded, and ``exp`` taken, before.

    Args:
        field: (..., h, w) floating point, finite; the whole map or a part that holds
            :func:`field_window`.
        window: The crop.
        field_size: Height and width of the map over the whole image.
        points: Height and width of the grid to sample; the crop's pixels by default. Point ``i``
            of ``n`` rows lies at row ``i * (crop height - 1) / (n - 1)`` of the crop, as a
            network's output grid does under ``align_corners=True``.
        origin: Row and column of the whole map at which the given part begins.
        fill: Value in the padding; None repeats the value at the image's edge.

    Returns:
        float32 (..., n, m).
    """
    height, width = window.crop_size if points is None else points
    row_places, _ = source_coordinates(window, 0, size=field_size[0], points=height)
    column_places, _ = source_coordinates(window, 1, size=field_size[1], points=width)
    rows = _Taps.at(row_places, field_size[0], origin[0])
    columns = _Taps.at(column_places, field_size[1], origin[1])
    sampled = _bilinear(field, rows, columns)
    if fill is not None and window.covered_size != window.crop_size:
        sampled[..., ~covered_points(window, points)] = fill
    return sampled


def field_places(
    window: CropWindow, field_size: Size, *, origin: Size = (0, 0)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the crop's rows and columns lie on a map, for sampling it elsewhere.

    Args:
        window: The crop.
        field_size: Height and width of the map over the whole image.
        origin: Row and column of the whole map at which the part at hand begins.

    Returns:
        Places on that part, of the crop's rows and of its columns; -1 in the padding.
    """
    rows, columns = (
        np.where(covered, place - origin[axis], -1.0)
        for axis in AXES
        for place, covered in [source_coordinates(window, axis, size=field_size[axis])]
    )
    return rows, columns


def largest_field_window(
    *, source_size: Size, field_size: Size, crop_size: Size, scale: float
) -> Size:
    """The size that no :func:`field_window` of a crop's pixels exceeds.

    Args:
        source_size: Height and width of the image.
        field_size: Height and width of the map over the whole image.
        crop_size: Height and width of the crop.
        scale: The smallest scale, of which a crop shows most.
    """
    height, width = (
        # Between the points of the map on both sides of the crop's first and last.
        min(field_size[axis], math.ceil((crop_size[axis] - 1) * (field_size[axis] - 1) / last) + 2)
        for axis in AXES
        for last in [max(round(source_size[axis] * scale) - 1, 1)]
    )
    return height, width


def covered_points(window: CropWindow, points: Size | None = None) -> NDArray[np.bool_]:
    """Which points of a grid over the crop lie on the image, not in the padding.

    Args:
        window: The crop.
        points: Height and width of the grid; the crop's pixels by default.

    Returns:
        bool (n, m).
    """
    height, width = window.crop_size if points is None else points
    _, rows = source_coordinates(window, 0, points=height)
    _, columns = source_coordinates(window, 1, points=width)
    return rows[:, None] & columns


def inside(window: CropWindow) -> Window:
    """The part of the crop that shows the image; the rest is padding."""
    height, width = window.covered_size
    if window.flip:
        return slice(0, height), slice(window.crop_size[1] - width, window.crop_size[1])
    return slice(0, height), slice(0, width)


@dataclass(frozen=True, slots=True)
class _Taps:
    """The two values that each point is mixed from along one axis."""

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    share: NDArray[np.float32]
    """How much of ``upper``."""

    @classmethod
    def at(cls, places: NDArray[np.float64], size: int, origin: int) -> _Taps:
        lower = places.astype(np.intp)
        share = (places - lower).astype(np.float32)
        # A point exactly on a value must not ask for a neighbour that was not read.
        upper = np.where(share == 0, lower, np.minimum(lower + 1, size - 1))
        return cls(lower - origin, upper - origin, share)

    def per_channel(self, channels: int) -> _Taps:
        channel = np.arange(channels)
        return _Taps(
            (self.lower[:, None] * channels + channel).ravel(),
            (self.upper[:, None] * channels + channel).ravel(),
            np.repeat(self.share, channels),
        )


def _bilinear(field: NDArray[Any], rows: _Taps, columns: _Taps) -> NDArray[np.float32]:
    """Mix rows, then columns, of the last two axes, in float32."""
    mixed = _mix(field, rows.lower, rows.upper, rows.share[:, None], axis=-2)
    return _mix(mixed, columns.lower, columns.upper, columns.share, axis=-1)


def _mix(
    field: NDArray[Any],
    lower: NDArray[np.intp],
    upper: NDArray[np.intp],
    share: NDArray[np.float32],
    axis: int,
) -> NDArray[np.float32]:
    low = field.take(lower, axis=axis).astype(np.float32, copy=False)
    high = field.take(upper, axis=axis).astype(np.float32, copy=False)
    high -= low
    high *= share
    low += high
    return low


def _covered_places(window: CropWindow, axis: Axis) -> NDArray[np.float64]:
    """Source positions of the crop's rows or columns, those in the padding left out."""
    places, covered = source_coordinates(window, axis)
    return places[covered]


def _span(window: CropWindow, axis: Axis, size: int, points: int | None) -> slice:
    place, _ = source_coordinates(window, axis, size=size, points=points)
    first, last = int(place.min()), int(np.ceil(place.max()))
    return slice(first, last + 1)
