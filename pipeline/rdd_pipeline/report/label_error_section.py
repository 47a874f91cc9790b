"""The report's section about labels that are probably wrong: where, and what they should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from rdd_pipeline.inspection import (
    ImageView,
    LabelError,
    LabelErrors,
    Maps,
    find_label_errors,
)
from rdd_pipeline.inspection.pictures import class_picture
from rdd_pipeline.progress import Reporter
from rdd_pipeline.report.panels import Panel, PictureBook, photograph

REGIONS_LISTED = 3
"""Regions named for each image."""

_CLOSE_UP = 0.7  # of the longest side of whole images
_MARGIN = 1.8  # of the region's box
_LEAST = 96  # pixels of a close-up's side


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspiciousImage:
    """One image with probable label errors."""

    image_id: str
    errors: tuple[LabelError, ...]
    """The most suspicious first; the pictures are of the first."""
    more: int
    """How many others the image has."""
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelErrorSection:
    """The most suspicious images of a store."""

    total: int
    """Regions found."""
    images_with: int
    """Images that have any."""
    searched: int
    """Images that were looked at."""
    of: int
    """Images of the store."""
    images: tuple[SuspiciousImage, ...]


def search(maps: Maps, *, most: int, reporter: Reporter) -> LabelErrors:
    """Label errors of a store, or of its hardest images where it has many.

    Args:
        maps: A store with its data set.
        most: Images to look at; a small wrong label makes the soft minimum low.
        reporter: Shows progress.

    Raises:
        DataNeededError: No image is as it was when the maps were built.
        EmptySelectionError: No image has a label.
    """
    images = None if len(maps) <= most else maps.hardest(most, by="soft_min").image_ids
    with reporter.bar("label errors", len(maps) if images is None else len(images)) as bar:
        return find_label_errors(maps, images=images, progress=bar.advance)


def label_error_section(found: LabelErrors, *, count: int, book: PictureBook) -> LabelErrorSection:
    """The first images, each with pictures of its most suspicious region.

    Args:
        found: What the search found.
        count: Images, at most.
        book: Keeps the pictures small.
    """
    by_image = found.by_image()
    images = []
    for name in list(by_image)[:count]:
        errors, view = by_image[name], found.maps[name]
        images.append(
            SuspiciousImage(
                image_id=name,
                errors=tuple(errors[:REGIONS_LISTED]),
                more=max(len(errors) - REGIONS_LISTED, 0),
                panels=book.add(lambda side, quality: _panels(view, errors, side, quality)),  # noqa: B023  # called at once
            )
        )
    return LabelErrorSection(
        total=found.total,
        images_with=len(by_image),
        searched=found.images,
        of=len(found.maps),
        images=tuple(images),
    )


def _panels(
    view: ImageView, errors: list[LabelError], side: int, quality: int
) -> tuple[Panel, ...]:
    """The image with the listed regions, and its label, prediction and pixels around the first."""
    whole = (slice(0, view.size[0]), slice(0, view.size[1]))
    every = np.zeros(view.size, np.bool_)
    for error in errors[:REGIONS_LISTED]:
        every |= error.mask
    first = errors[0]
    near, close = _window(first), round(_CLOSE_UP * side)
    label, prediction = (class_picture(c, view.palette) for c in (view.label, view.prediction))
    return tuple(
        _outlined(title, picture, mask, window, length, quality)
        for title, picture, mask, window, length in (
            ("image", view.image, every, whole, side),
            ("close-up", view.image, first.mask, near, close),
            ("label", label, first.mask, near, close),
            ("teacher's prediction", prediction, first.mask, near, close),
        )
    )


def _outlined(
    title: str,
    picture: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    window: tuple[slice, slice],
    side: int,
    quality: int,
) -> Panel:
    """A part of a picture with the edge of a region: white on black, so that it shows anywhere."""
    part = np.ascontiguousarray(picture[window])
    height, width = part.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pixels stay pixels: where an edge runs is the question.
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    shown = np.array(Image.fromarray(part).resize(size, way))
    small = Image.fromarray(np.ascontiguousarray(mask[window]))
    inside = np.asarray(small.resize(size, Image.Resampling.NEAREST))
    grown = ndimage.binary_dilation(inside, iterations=2)
    shown[ndimage.binary_dilation(grown, iterations=1) & ~grown] = 0
    shown[grown & ~inside] = 255
    return photograph(title, shown, size, quality)


def _window(error: LabelError) -> tuple[slice, slice]:
    """Rows and columns around a region, of the image's shape."""
    x, y, width, height = error.bbox
    share = max(
        _MARGIN * height / error.size[0],
        _MARGIN * width / error.size[1],
        _LEAST / max(error.size),
    )
    return (
        _around(y + height / 2, share, error.size[0]),
        _around(x + width / 2, share, error.size[1]),
    )


def _around(middle: float, share: float, end: int) -> slice:
    size = min(end, round(share * end))
    start = min(max(0, round(middle - size / 2)), end - size)
    return slice(start, start + size)
