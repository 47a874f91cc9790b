"""Images in, batches of one size out: decoding ahead, and as many at a time as memory has room."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import torch

from rdd_pipeline.data import Sample, SegmentationDataset
from rdd_storage import RddError

logger = logging.getLogger("rdd.maps")

Result = TypeVar("Result")

_AUTO_CPU = 4
"""On the CPU larger batches gain nothing, and what does not fit may kill the process before torch
can say so."""

_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class TeacherMemoryError(RddError, MemoryError):
    """The teacher cannot take even one image at a time."""


class BatchLimit:
    """How many images of a size go through the teacher at once; learns from what did not fit.

    Memory is taken to grow with the pixels of a batch: what was learned from images of one size
    holds for all. To be used by one thread at a time.

    Args:
        wanted: Images per forward pass; ``auto`` begins with a whole shard on an accelerator, with
            4 on the CPU.
        shard_images: Images of a shard; no batch is larger.
        device: Where the teacher runs.
    """

    def __init__(
        self, wanted: int | Literal["auto"], shard_images: int, device: torch.device
    ) -> None:
        self.automatic = wanted == "auto"
        begin = _AUTO_CPU if device.type == "cpu" else shard_images
        self.wanted = min(shard_images, begin if wanted == "auto" else wanted)
        self.device = device
        self._pixels: int | None = None

    def images(self, height: int, width: int) -> int:
        """The largest batch of images of this size, at least 1."""
        if self._pixels is None:
            return self.wanted
        return max(1, min(self.wanted, self._pixels // (height * width)))

    def back_off(self, images: int, height: int, width: int) -> None:
        """Remember that so many images of a size did not fit, and try half of them."""
        self._pixels = images // 2 * height * width

    def run(
        self, samples: Sequence[Sample], compute: Callable[[Sequence[Sample]], Result]
    ) -> Iterator[Result]:
        """Call ``compute`` on images of one size, in parts that fit into memory.

        Yields:
            What it gave for each part, in order.

        Raises:
            TeacherMemoryError: One image alone does not fit; names it and its size.
        """
        height, width = samples[0].label.shape
        done, refused = 0, 0
        while done < len(samples):
            part = samples[done : done + self.images(height, width)]
            try:
                computed = compute(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise TeacherMemoryError(
                        f"image '{part[0].image_id}' of {height}x{width} pixels: one image at a "
                        f"time does not fit into the memory of {self.device}; use maps.view: "
                        "sliding with a smaller maps.window, maps.precision: bf16, or a device "
                        "with more memory"
                    ) from error
            else:
                done += len(part)
                if refused:
                    self._tell(refused, len(part), height, width)
                    refused = 0
                yield computed
                continue
            # Here and not above: the error holds on to the tensors of the pass that failed.
            refused = refused or len(part)
            self.back_off(len(part), height, width)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _tell(self, refused: int, fitting: int, height: int, width: int) -> None:
        level = logging.INFO if self.automatic else logging.WARNING
        logger.log(
            level,
            "maps.batch_size: %d images of %dx%d pixels do not fit into the memory of %s; going on "
            "with %d",
            refused, height, width, self.device, fitting,
        )  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, was not enough."""
    # The CPU's allocator and some libraries of the device raise a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )


def decoder_threads(device: torch.device) -> int:
    """Threads that decode images: one beside a network on the CPU, several beside an accelerator.

    A large photograph takes a thread about as long to decode as an accelerator needs for several.
    """
    if device.type == "cpu":
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // 2))


class DecodedImages:
    """Images decoded by a pool, a bounded number ahead of whoever takes them.

    The first ones are begun at once, so that they are there when the network is free.

    Args:
        pool: Decodes.
        dataset: Where the images come from.
        indices: Which, in the order in which they are given.
        ahead: How many may be decoded or under way before they are asked for.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        dataset: SegmentationDataset,
        indices: Sequence[int],
        ahead: int,
    ) -> None:
        self._pool, self._dataset = pool, dataset
        self._left = iter(indices)
        self._waiting: deque[Future[Sample]] = deque()
        for _ in range(max(1, ahead)):
            self._begin()

    def __iter__(self) -> Iterator[Sample]:
        """Yield the images; raises what reading one of them raised."""
        while self._waiting:
            sample = self._waiting.popleft().result()
            self._begin()
            yield sample

    def close(self) -> None:
        """Begin no more, and drop what waits."""
        self._left = iter(())
        while self._waiting:
            self._waiting.popleft().cancel()

    def _begin(self) -> None:
        index = next(self._left, None)
        if index is not None:
            self._waiting.append(self._pool.submit(self._dataset.__getitem__, index))


def batches_by_size(
    samples: Iterator[Sample], limit: BatchLimit
) -> Iterator[list[tuple[int, Sample]]]:
    """Group images of equal size into batches, whatever order they come in.

    Yields:
        Images with their places in ``samples``: a batch as soon as there is a full one, the
        others at the end.
    """
    open_batches: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
    for place, sample in enumerate(samples):
        height, width = sample.label.shape
        batch = open_batches.setdefault((height, width), [])
        batch.append((place, sample))
        if len(batch) >= limit.images(height, width):
            yield open_batches.pop((height, width))
    yield from open_batches.values()
