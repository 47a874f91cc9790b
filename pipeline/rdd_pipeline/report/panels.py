"""One image's maps as pictures: image, label, prediction, weight and hardness side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.inspection.pictures import VOID, class_picture, scale_picture

VOID_COLOUR = VOID
"""RGB of pixels without a label: a grey that is not on the scale cividis."""

LONGEST_SIDE = 512
"""Pixels of an embedded picture, unless said otherwise."""

# Size and quality give way together where a page has many pictures; the first step is the best.
_STEPS = ((1.0, 78), (0.75, 72), (0.55, 65), (0.4, 55), (0.28, 45))


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture of a row of panels."""

    title: str
    uri: str
    """The picture as a ``data:`` URI."""
    smooth: bool
    """Whether a browser that enlarges it may blend neighbouring pixels."""


class PictureBook:
    """Makes the panels of many images that together stay within a number of bytes.

    What an image leaves over is the next ones'.

    Args:
        images: How many there will be.
        limit: Bytes of all panels together, as text in a page; None for no limit.
        side: Longest side of a picture at most, pixels.
    """

    def __init__(self, images: int, *, limit: int | None = None, side: int = LONGEST_SIDE) -> None:
        self._images, self._left, self._side = max(images, 1), limit, side

    def add(self, draw: Callable[[int, int], tuple[Panel, ...]]) -> tuple[Panel, ...]:
        """The panels of the next image.

        Args:
            draw: Makes them, given the longest side in pixels and the quality from 0 to 100.
        """
        allowed = None if self._left is None else self._left / self._images
        panels: tuple[Panel, ...] = ()
        for scale, quality in _STEPS:
            panels = draw(round(scale * self._side), quality)
            size = sum(len(panel.uri) for panel in panels)
            if allowed is None or size <= allowed:
                break
        self._images = max(self._images - 1, 1)
        if self._left is not None:
            self._left -= size
        return panels


def image_panels(
    *,
    image: NDArray[np.uint8] | None,
    label: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    weight: NDArray[np.floating[Any]],
    hardness: NDArray[np.floating[Any]],
    palette: NDArray[np.uint8],
    side: int = LONGEST_SIDE,
    quality: int = _STEPS[0][1],
) -> tuple[Panel, ...]:
    """Make the pictures of one image.

    Args:
        image: RGB (H, W, 3); None leaves the picture out.
        label: Classes (H, W), 255 where ignored; None leaves the picture out.
        prediction: The teacher's classes (H, W).
        weight: exp(-D) at the pixels (H, W), in [0, 1].
        hardness: (H, W) in [0, 1], NaN without label.
        palette: RGB (C, 3) of the classes.
        side: Longest side of a picture, pixels.
        quality: Of the pictures that are not of classes, 0 to 100.
    """
    height, width = prediction.shape
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    panels = []
    if image is not None:
        panels.append(photograph("image", image, size, quality))
    if label is not None:
        panels.append(classes("label", label, palette, size))
    return (
        *panels,
        classes("teacher's prediction", prediction, palette, size),
        photograph("weight exp(−D)", scale_picture(weight), size, quality),
        photograph("hardness", scale_picture(hardness), size, quality),
    )


def photograph(
    title: str, picture: NDArray[np.uint8], size: tuple[int, int], quality: int
) -> Panel:
    """A picture whose neighbouring pixels may be blended; ``size`` is width and height."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    uri = _uri(image.resize(size, Image.Resampling.BOX), quality=quality, method=4)
    return Panel(title=title, uri=uri, smooth=True)


def classes(
    title: str, values: NDArray[np.uint8], palette: NDArray[np.uint8], size: tuple[int, int]
) -> Panel:
    """A label or prediction: nothing is blended, so that every colour is a class's."""
    small = Image.fromarray(np.ascontiguousarray(values)).resize(size, Image.Resampling.NEAREST)
    picture = Image.fromarray(class_picture(np.asarray(small), palette))
    return Panel(title=title, uri=_uri(picture, lossless=True, method=1), smooth=False)


def _uri(picture: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
