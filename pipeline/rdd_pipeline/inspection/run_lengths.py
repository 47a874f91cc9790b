"""Masks as COCO's run lengths: down the columns, zeros first.

Format: https://cocodataset.org/#format-data, ``segmentation`` with a list of ``counts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode_pixels(pixels: NDArray[np.integer[Any]], size: tuple[int, int]) -> tuple[int, ...]:
    """Run lengths of a mask that is given by its pixels.

    Args:
        pixels: At least one place in the mask, flattened by rows; none twice.
        size: H and W.

    Returns:
        Lengths of the runs of 0 and 1 in turn, beginning with 0; their sum is H * W.

    Example:
        >>> encode_pixels(np.array([0, 1, 3]), (2, 3))  # 1 1 0 / 1 0 0
        (0, 3, 3)
    """
    height, width = size
    places = np.sort(pixels % width * height + pixels // width)
    after_gap = np.diff(places, prepend=-2) != 1
    starts, ends = places[after_gap], places[np.append(after_gap[1:], True)] + 1
    counts = np.diff(np.stack((starts, ends), axis=1).reshape(-1), prepend=0).tolist()
    rest = height * width - int(ends[-1])
    return (*counts, rest) if rest else tuple(counts)


def decode_mask(counts: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask (H, W) of run lengths.

    Example:
        >>> decode_mask((0, 3, 3), (2, 3)).astype(int).tolist()
        [[1, 1, 0], [1, 0, 0]]
    """
    height, width = size
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(values.reshape(width, height).T)
