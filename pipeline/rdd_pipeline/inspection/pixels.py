"""Passes over the maps themselves, for what the stored counts cannot say; by Dask, image by image.

Without a Dask client in charge the images are spread over threads of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError
from rdd_pipeline.inspection.summary import Progress

Result = TypeVar("Result")

FARTHEST = 511
"""City-block distance, in pixels, beyond which all pixels count as equally far."""

_CHUNKS_AT_ONCE = 64


def over_images(
    function: Callable[[str], Result],
    image_ids: Sequence[str],
    *,
    per_task: int = 8,
    progress: Progress | None = None,
) -> Iterator[list[Result]]:
    """Results of a function of an image's name, in order, a few images at a time.

    Args:
        function: Picklable where a Dask client with workers is in charge.
        image_ids: The images.
        per_task: Images of one Dask task.
        progress: Called with the number of images finished since the last call.

    Raises:
        EmptySelectionError: There are no images.
    """
    from dask.base import compute
    from dask.delayed import delayed

    if not image_ids:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    chunks = [image_ids[i : i + per_task] for i in range(0, len(image_ids), per_task)]
    run: Callable[..., Any] = compute  # Dask annotates only a part of what it exports
    task: Callable[..., Any] = delayed(_each, pure=False)
    for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
        together = chunks[start : start + _CHUNKS_AT_ONCE]
        for part in run(*(task(function, chunk) for chunk in together)):
            if progress is not None:
                progress(len(part))
            yield part


def _each(function: Callable[[str], Result], image_ids: Sequence[str]) -> list[Result]:
    return [function(image_id) for image_id in image_ids]


def city_block_distance(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Steps up, down, left and right from each pixel to the nearest one of a mask.

    Args:
        mask: bool (H, W).

    Returns:
        int32 (H, W), at most :data:`FARTHEST`, which it is everywhere if the mask is empty.

    Example:
        >>> city_block_distance(np.array([[True, False, False], [False, False, False]])).tolist()
        [[0, 1, 2], [1, 2, 3]]
    """
    distance = np.where(mask, 0, mask.size).astype(np.int32)
    for axis, length in enumerate(mask.shape):
        steps = np.arange(length, dtype=np.int32).reshape((-1, 1) if axis == 0 else (1, -1))
        forth = np.minimum.accumulate(distance - steps, axis=axis) + steps
        turned = np.flip(forth + steps, axis)
        distance = np.flip(np.minimum.accumulate(turned, axis=axis), axis) - steps
    return np.minimum(distance, FARTHEST)
