"""A teacher's view of an image: whole or by sliding windows, once or averaged over several passes.

Shape suffixes: B batch, C classes, h w a window's output grid, P Q points of the image's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageView:
    """How the teacher looks at an image: by default once, at the whole of it, as it is."""

    window: tuple[int, int] | None = None
    """Height and width in pixels of a window that slides over larger images; None: the whole."""
    overlap: float = 0.25
    """Least share of a window that its neighbour sees too, from 0 to below 1."""
    flip: bool = False
    """Average the probabilities with those of the mirrored image."""
    scales: tuple[float, ...] = (1.0,)
    """Average the probabilities over these sizes of the image."""

    @property
    def averages(self) -> bool:
        """Whether there is more than the one pass over the image as it is."""
        return self.flip or self.scales != (1.0,)

    @property
    def description(self) -> str:
        """The part of the image that a pass sees, in words: part of a store's identity."""
        if self.window is None:
            return "whole image"
        height, width = self.window
        return f"sliding window {height}x{width}, overlap {self.overlap:g}, triangular blend"


AS_IT_IS = ImageView()
"""The whole image, once."""


@dataclass(frozen=True, eq=False, slots=True)
class AxisWindow:
    """One window along one axis, and its share of the blend."""

    pixels: slice
    """The image's pixels that it sees."""
    points: slice
    """The points of the image's output grid that it has a part in."""
    blend: Tensor
    """(P, h), float32: takes logits on the window's own grid to ``points`` and weights them. The
    rows of a point sum to 1 over all windows."""


@lru_cache(maxsize=256)
def axis_windows(
    size: int,
    window: int,
    overlap: float,
    grid: int,
    window_grid: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  immutable
) -> tuple[AxisWindow, ...]:
    """Spread windows evenly along an axis, the first and last at the image's borders.

    A grid spans its image or window from the middle of the first pixel to that of the last
    (``align_corners=True``), so the two grids need not have points in common: logits are
    interpolated linearly. A window's weight is the distance to the nearest pixel outside of it
    (a triangle, above 0 wherever the window is used); weights are divided by their sum. Between two
    windows that only adjoin this is the interpolation between their outermost pixels, so that
    what is linear in the pixels' places comes out the same for every overlap.

    Args:
        size: Pixels of the image, at least ``window``.
        window: Pixels of a window.
        overlap: Least share of a window that its neighbour covers, in [0, 1).
        grid: Output points of the whole image.
        window_grid: Output points of a window.
        device: Of ``blend``.
    """
    step = max(1.0, window * (1.0 - overlap))
    steps = math.ceil((size - window) / step)
    starts = [round(i * (size - window) / steps) for i in range(steps)] + [size - window]
    # In pixels; a grid of one point has it at the first.
    places_P = np.arange(grid) * ((size - 1) / max(1, grid - 1))
    weights = [
        np.minimum(places_P - (start - 1), start + window - places_P).clip(0.0) for start in starts
    ]
    total_P = np.sum(weights, axis=0)
    found = []
    for start, weight_P in zip(starts, weights, strict=True):
        [inside] = np.nonzero(weight_P)
        if not inside.size:  # a window between two points of a coarse grid
            continue
        share = weight_P[inside] / total_P[inside]
        local = (places_P[inside] - start).clip(0, window - 1)
        local *= (window_grid - 1) / max(1, window - 1)
        lower = np.floor(local).astype(np.intp).clip(max=window_grid - 1)
        upper = np.minimum(lower + 1, window_grid - 1)
        blend = np.zeros((inside.size, window_grid))
        rows = np.arange(inside.size)
        np.add.at(blend, (rows, lower), share * (1.0 - (local - lower)))
        np.add.at(blend, (rows, upper), share * (local - lower))
        found.append(
            AxisWindow(
                pixels=slice(start, start + window),
                points=slice(int(inside[0]), int(inside[-1]) + 1),
                blend=torch.from_numpy(blend.astype(np.float32)).to(device),
            )
        )
    return tuple(found)


class SlidingWindows:
    """The windows over images of one size, and the blending of what they give.

    The weight of a window at a point is the product of its weights along both axes, so the weights
    of a point sum to 1 over all windows too.

    Args:
        size: Height and width of the images in pixels.
        window: Height and width of the windows; a side longer than the image's is cut to it.
        overlap: See :func:`axis_windows`.
        grid_size: Output grid of an image of a given height and width, as the network has it.
        device: Of the logits.
    """

    def __init__(
        self,
        size: tuple[int, int],
        window: tuple[int, int],
        overlap: float,
        grid_size: Callable[[int, int], tuple[int, int]],
        device: torch.device,
    ) -> None:
        sides = (min(size[0], window[0]), min(size[1], window[1]))
        self.grid = grid_size(*size)
        grids = grid_size(*sides)
        self._rows, self._columns = (
            axis_windows(size[i], sides[i], overlap, self.grid[i], grids[i], device) for i in (0, 1)
        )

    def __iter__(self) -> Iterator[tuple[AxisWindow, AxisWindow]]:
        """Yield all windows, each by its place along the rows and the columns."""
        for row in self._rows:
            for column in self._columns:
                yield row, column

    def blend(self, logits: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Bring the logits of all windows onto the images' grid.

        Args:
            logits: For each window, in the order of iteration, the heads' logits (B, C, h, w),
                float32.

        Returns:
            For each head (B, C, P, Q) on the grid of the whole images.
        """
        blended: list[Tensor] = []
        for (row, column), heads in zip(self, logits, strict=True):
            if not blended:
                blended = [head.new_zeros((*head.shape[:2], *self.grid)) for head in heads]
            for total_BCPQ, logits_BChw in zip(blended, heads, strict=True):
                with torch.autocast(logits_BChw.device.type, enabled=False):
                    part_BCPQ = row.blend @ logits_BChw @ column.blend.T
                    total_BCPQ[:, :, row.points, column.points] += part_BCPQ
        return blended
