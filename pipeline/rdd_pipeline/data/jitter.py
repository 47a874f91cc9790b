"""Random changes of an image's colours, as torchvision's ``ColorJitter`` defines them.

On Pillow, like torchvision's own on Pillow images, because loader processes need not import
torchvision for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from rdd_pipeline.config import JitterConfig

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_HUE = len(_ENHANCERS)


def jitter_colours(
    image_HWC: NDArray[np.uint8], jitter: JitterConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue, each by a random amount, in random order.

    Args:
        image_HWC: uint8 RGB (H, W, 3).
        jitter: How strongly.
        rng: Source of randomness; as many numbers are drawn whatever the strengths.

    Returns:
        uint8 (H, W, 3); may be read-only.
    """
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    factors = [rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths]
    turn = rng.uniform(-jitter.hue, jitter.hue)
    image = Image.fromarray(image_HWC)
    for change in rng.permutation(_HUE + 1):
        if change == _HUE:
            image = _turned(image, turn) if jitter.hue else image
        elif strengths[change]:
            image = _ENHANCERS[change](image).enhance(factors[change])
    return np.asarray(image)


def _turned(image: Image.Image, turn: float) -> Image.Image:
    """Shift the hue, which Pillow keeps in 8 bits and which wraps around in them."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255) % 256
    turned = hue.point([(code + shift) % 256 for code in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
