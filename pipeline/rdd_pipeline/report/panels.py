"""One image's maps as pictures: image, label, prediction, weight and hardness side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.data import IGNORE_INDEX
from rdd_pipeline.difficulty import tfe_weight
from rdd_storage import hardness_table

VOID_COLOUR = (224, 224, 224)
"""RGB of pixels without a label: a grey that is not on the scale cividis, whose middle is grey."""

_LONGEST_SIDE = 512  # pixels of an embedded picture
_JPEG_QUALITY = 85


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture of a row of panels."""

    title: str
    uri: str
    """The picture as a ``data:`` URI."""
    smooth: bool
    """Whether a browser that enlarges it may blend neighbouring pixels."""


def image_panels(
    *,
    image: NDArray[np.uint8] | None,
    label: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    discrepancy: NDArray[np.float16],
    hardness: NDArray[np.uint8],
    palette: Sequence[Sequence[int]],
) -> tuple[Panel, ...]:
    """Make the pictures of one image, at most 512 pixels long each.

    Args:
        image: RGB (H, W, 3); None leaves the picture out.
        label: Classes (H, W), 255 where ignored; None leaves the picture out.
        prediction: The teacher's classes (H, W).
        discrepancy: The teacher's prediction discrepancy (h, w), nats.
        hardness: 8-bit codes (H, W).
        palette: RGB colour of each class.
    """
    size = _shown_size(*prediction.shape)
    colours = class_colours(palette)
    panels = []
    if image is not None:
        panels.append(Panel(title="image", uri=_photograph(image, size), smooth=True))
    if label is not None:
        panels.append(Panel(title="label", uri=_indexed(label, colours, size), smooth=False))
    weight_HW = tfe_weight(torch.from_numpy(discrepancy)[None], size)[0].numpy()
    weight_codes = np.rint(255.0 * weight_HW).astype(np.uint8)
    panels += [
        Panel(title="teacher's prediction", uri=_indexed(prediction, colours, size), smooth=False),
        Panel(
            title="weight exp(−D)",
            uri=_indexed(weight_codes, cividis(np.linspace(0.0, 1.0, 256)), size),
            smooth=True,
        ),
        Panel(title="hardness", uri=_indexed(hardness, hardness_colours(), size), smooth=False),
    ]
    return tuple(panels)


def cividis(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """RGB (..., 3) of values in [0, 1] on the colour-blind-safe scale cividis."""
    colours: NDArray[np.uint8] = mpl.colormaps["cividis"](values, bytes=True)[..., :3]
    return colours


def class_colours(palette: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """RGB (256, 3) for every value of a label or prediction; grey where there is no class."""
    colours = np.full((256, 3), VOID_COLOUR, np.uint8)
    colours[: len(palette)] = np.asarray(palette, np.uint8).reshape(-1, 3)
    colours[IGNORE_INDEX] = VOID_COLOUR
    return colours


def hardness_colours() -> NDArray[np.uint8]:
    """RGB (256, 3) of the 8-bit hardness codes; grey where there is no hardness."""
    hardness = hardness_table(8)
    known = np.isfinite(hardness)
    colours = np.full((256, 3), VOID_COLOUR, np.uint8)
    colours[known] = cividis(hardness[known])
    return colours


def _shown_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _photograph(image: NDArray[np.uint8], size: tuple[int, int]) -> str:
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return _data_uri("image/jpeg", buffer)


def _indexed(codes: NDArray[np.uint8], colours: NDArray[np.uint8], size: tuple[int, int]) -> str:
    """A palette PNG: the codes are the pixels, so that it is small and nothing is blended."""
    picture = Image.fromarray(np.ascontiguousarray(codes))
    picture.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    picture.resize(size[::-1], Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer)


def _data_uri(media_type: str, buffer: io.BytesIO) -> str:
    return f"data:{media_type};base64,{base64.b64encode(buffer.getvalue()).decode()}"
