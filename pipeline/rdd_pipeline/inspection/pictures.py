"""Maps as small pictures: PNG bytes and overlays, without a plotting library's figures."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = (224, 224, 224)
"""RGB where there is no value: a grey that is not on the scale cividis."""


@cache
def cividis() -> NDArray[np.uint8]:
    """RGB (256, 3) of the scale cividis, which all common kinds of colour vision read alike."""
    import matplotlib as mpl

    colours: NDArray[np.uint8] = mpl.colormaps["cividis"](np.arange(256), bytes=True)[:, :3]
    return colours


def scale_picture(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """RGB (H, W, 3) of values in [0, 1] on the scale cividis; grey where NaN."""
    known = np.isfinite(values)
    codes = np.rint(255 * np.clip(np.where(known, values, 0), 0, 1)).astype(np.uint8)
    picture: NDArray[np.uint8] = cividis()[codes]
    picture[~known] = VOID
    return picture


def class_picture(classes: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (H, W, 3) of a label or prediction; grey where there is no class."""
    colours = np.full((256, 3), VOID, np.uint8)
    colours[: len(palette)] = palette
    colours[255] = VOID
    picture: NDArray[np.uint8] = colours[classes]
    return picture


def overlay(
    picture: NDArray[np.uint8], image: NDArray[np.uint8] | None, opacity: float
) -> NDArray[np.uint8]:
    """A picture laid over an image of its size; the picture alone where there is no image."""
    if image is None:
        return picture
    mixed = (1.0 - opacity) * image + opacity * picture
    return np.rint(mixed).astype(np.uint8)


def shrunk(array: NDArray[Any], longest: int) -> NDArray[Any]:
    """Every k-th row and column, so that neither side is longer; values are not blended."""
    step = -(-max(array.shape[:2]) // longest)
    return array[::step, ::step]


def png(picture: NDArray[np.uint8]) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def png_uri(picture: NDArray[np.uint8]) -> str:
    """The picture as a ``data:`` URI for HTML."""
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
