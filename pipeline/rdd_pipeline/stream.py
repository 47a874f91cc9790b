"""The training stream: crops of images, labels and stored maps under one augmentation.

The stream is endless and addressed by position: sample ``k`` depends on the seed and ``k`` alone.
So it does not matter how many workers make it, and a run that was interrupted goes on where it
stopped.
"""

# Shape suffixes: B batch, C classes, H W pixels of the crop, h w output grid of the student.

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Collection, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from rdd_pipeline.data import Progress, SegmentationDataset, dataset_digests
from rdd_pipeline.data.geometry import (
    CropWindow,
    Size,
    Window,
    covered_points,
    crop_image,
    crop_nearest,
    field_window,
    pixel_window,
    random_crop,
    resample_field,
)
from rdd_pipeline.errors import ConfigError, DataError, ImageReadError
from rdd_storage import ImageRecord, MapReader, UnknownArrayError

Need = Literal["weight", "true_prob", "aux_true_prob", "logits"]

_ARRAYS: dict[Need, str] = {
    "weight": "discrepancy",
    "true_prob": "hardness",
    "aux_true_prob": "aux_hardness",
    "logits": "logits",
}
_HOW_TO_STORE: dict[Need, str] = {
    "aux_true_prob": "maps.aux_hardness: true",
    "logits": "maps.soft_labels: true",
}
# Second word of the random seeds: an epoch's order and a sample's crop must never share one.
_ORDER, _CROP = 0, 1


class MapStream(Dataset[dict[str, torch.Tensor]]):
    """Random crops of a data set with the teacher's maps for them.

    Position ``k`` belongs to epoch ``k // N`` of ``N`` images, each epoch in an order of its own.
    Image, label and maps of a sample have the same scale, place and flip; only what the crop needs
    is read. See :mod:`rdd_pipeline.data.geometry` for the coordinates.

    A sample is a dict of tensors:

    ======================  ================  ====================================================
    ``image``               uint8 (3, H, W)   RGB
    ``label``               uint8 (H, W)      255 where ignored, padding included
    ``index``               int64 ()          index of the image in the data set
    ``weight``              float32 (H, W)    TFE weight in (0, 1]; 1 in the padding
    ``true_prob_code``      uint8 or 16 (H,W) hardness code of the teacher's main head
    ``aux_true_prob_code``  like it           of its auxiliary head
    ``logits``              float16 (C, h, w) teacher's logits at the student's output grid
    ``logits_valid``        bool (h, w)       False at grid points in the padding
    ======================  ================  ====================================================

    The last five are there as ``needs`` and ``mark_padding`` ask for them.

    Args:
        dataset: Images and labels.
        reader: Store of the teacher's maps; None trains without any.
        crop_size: Height and width of the crop; smaller images are padded at right and bottom.
        scale: Range of the random scale.
        flip: Probability of a horizontal flip.
        seed: Seed of order and crops, 0 or more.
        length: Number of samples: iterations x batch size x processes.
        needs: Which of ``weight``, ``true_prob``, ``aux_true_prob`` and ``logits`` to give.
        grid_size: Output grid of the student for a crop; needed for ``logits``.
        mark_padding: Give ``logits_valid`` without stored logits too, for a teacher in memory.
        identity: Identity expected of the store; None expects the data set's part of it alone.
        digests: Digests of the data set's images in its order, if they are known already.
        progress: Called with the number of images digested since the last call.
        ram_budget: Bytes per process for maps kept in memory once read. An array of the store is
            kept if it fits for all images, ``discrepancy`` first; of others each crop reads its
            window.

    Raises:
        DataError: The data set is empty.
        StoreMismatchError: The store was built from other images, labels or settings, or lacks
            images of the data set; all are listed.
        StoreIncompleteError: The store is not built to the end.
        UnknownArrayError: The store was built without a map that is needed.
        ConfigError: The seed is negative.
        ValueError: Arguments contradict each other.
    """

    def __init__(
        self,
        *,
        dataset: SegmentationDataset,
        reader: MapReader | None,
        crop_size: Size,
        scale: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        seed: int = 0,
        length: int,
        needs: Collection[Need] = (),
        grid_size: Size | None = None,
        mark_padding: bool = False,
        identity: Mapping[str, Any] | None = None,
        digests: Sequence[str] | None = None,
        progress: Progress | None = None,
        ram_budget: int = 2**30,
    ) -> None:
        if not len(dataset):
            raise DataError(f"{dataset.name} {dataset.split}: there are no images to train on")
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        unknown = sorted(set(needs) - set(_ARRAYS))
        if unknown:
            raise ValueError(f"needs: expected some of {', '.join(_ARRAYS)}, got {unknown}")
        if ("logits" in needs or mark_padding) and grid_size is None:
            raise ValueError("grid_size: needed for logits; give the student's output grid")
        self.dataset = dataset
        self.reader = reader
        self.crop_size, self.scale, self.flip = crop_size, scale, flip
        self.seed, self.length = seed, length
        self.needs = tuple(need for need in _ARRAYS if need in needs)
        self.grid_size = grid_size
        self.mark_padding = mark_padding
        self._kept: frozenset[Need] = frozenset()
        self._sizes: dict[int, Size] = {}
        if reader is not None:
            _require_arrays(reader, self.needs)
            if digests is None:
                digests = dataset_digests(dataset, progress)
            if identity is None:
                identity = reader.identity
                if "data" in identity:
                    identity = {**identity, "data": dataset.identity()}
            reader.check(identity, dict(zip(dataset.image_ids, digests, strict=True)))
            records = [reader.record(image_id) for image_id in dataset.image_ids]
            self._sizes = {i: (r.height, r.width) for i, r in enumerate(records)}
            self._kept = _kept_in_ram(self.needs, records, reader, ram_budget)
        elif self.needs:
            raise ValueError(f"reader: needed for {', '.join(self.needs)}, got None")
        self._maps: dict[tuple[Need, int], NDArray[Any]] = {}
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}, "_orders": {}}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        if not 0 <= k < self.length:
            raise IndexError(f"expected a position below {self.length}, got {k}")
        index = self.image_index(k)
        window = random_crop(
            np.random.default_rng([self.seed, _CROP, k]),
            source_size=self._size(index),
            crop_size=self.crop_size,
            scale=self.scale,
            flip=self.flip,
        )
        try:
            return self.sample(index, window)
        except Exception as error:
            error.add_note(f"at position {k} of the stream, image {self.dataset.image_ids[index]}")
            raise

    def image_index(self, k: int) -> int:
        """Index in the data set of the image at position ``k``."""
        count = len(self.dataset)
        epoch, place = divmod(k, count)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(count)
            # A batch may span two epochs; older ones do not come back.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return int(order[place])

    def sample(self, index: int, window: CropWindow) -> dict[str, torch.Tensor]:
        """One image, label and maps under a given crop.

        Args:
            index: Index of the image in the data set.
            window: The crop; its source size is the image's.

        Raises:
            ImageReadError: A file cannot be read, or has changed its size.
            StoreError: The store cannot be read.
        """
        rows, columns = pixel_window(window)
        part = self.dataset.read_window(index, rows, columns)
        if part.label.shape != (rows.stop - rows.start, columns.stop - columns.start):
            raise ImageReadError(
                f"image {part.image_id}: expected {window.source_size[0]}x{window.source_size[1]} "
                "pixels; the file has changed since training began"
            )
        origin = (rows.start, columns.start)
        image = crop_image(part.image, window, origin=origin)
        sample = {
            # Not copied here: batching puts the channels first.
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "label": torch.from_numpy(crop_nearest(part.label, window, origin=origin)),
            "index": torch.tensor(index),
        }
        if self.mark_padding:
            sample["logits_valid"] = torch.from_numpy(covered_points(window, self.grid_size))
        if self.reader is not None and self.needs:
            maps = self._read_maps(self.reader, index, window, (rows, columns))
            sample |= {key: torch.from_numpy(value) for key, value in maps.items()}
        return sample

    def _read_maps(
        self, reader: MapReader, index: int, window: CropWindow, pixels: Window
    ) -> dict[str, NDArray[Any]]:
        """The needed maps, read together so that a remote store's latency counts once."""
        image_id = self.dataset.image_ids[index]
        record = reader.record(image_id)
        field_size = (record.grid_height, record.grid_width)
        windows: dict[Need, Window | None] = {}
        for need in self.needs:
            if (need, index) in self._maps:
                continue
            if need in self._kept:
                windows[need] = None
            elif need in ("weight", "logits"):
                points = self.grid_size if need == "logits" else None
                windows[need] = field_window(window, field_size, points=points)
            else:
                windows[need] = pixels
        read = reader.read_many([(_ARRAYS[need], image_id, part) for need, part in windows.items()])
        arrays: dict[Need, NDArray[Any]] = dict(zip(windows, read, strict=True))
        for need in self._kept & arrays.keys():
            self._maps[need, index] = arrays[need]

        maps: dict[str, NDArray[Any]] = {}
        for need in self.needs:
            array = arrays[need] if need in arrays else self._maps[need, index]
            part = windows.get(need)
            origin = (0, 0) if part is None else (part[0].start, part[1].start)
            if need == "weight":
                # Exponent before interpolation: the weight is the interpolated exp(-D).
                maps["weight"] = resample_field(
                    np.exp(-array.astype(np.float32)), window, field_size, origin=origin, fill=1.0
                )
            elif need == "logits":
                logits_Chw = resample_field(
                    array, window, field_size, points=self.grid_size, origin=origin
                )
                maps["logits"] = logits_Chw.astype(np.float16)
                maps["logits_valid"] = covered_points(window, self.grid_size)
            else:
                maps[f"{need}_code"] = crop_nearest(array, window, origin=origin)
        return maps

    def _size(self, index: int) -> Size:
        size = self._sizes.get(index)
        if size is None:
            size = self._sizes[index] = self.dataset.size(index)
        return size


def make_loader(
    stream: MapStream,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches of a stream in order, from a position on; an incomplete last one is left out.

    With several training processes, each takes every ``processes``-th batch. Neither making nor
    using the loader draws from torch's global random numbers.

    Args:
        stream: What to load.
        batch_size: Samples per batch and process.
        start: Position of the first sample, counted over all processes.
        workers: Loader processes, started fresh (a fork would break open stores); 0 loads in this
            process.
        pin_memory: Put batches into page-locked memory, for asynchronous copies to a GPU.
        rank: Number of this process.
        processes: Number of training processes.

    Returns:
        A loader of dicts, as :class:`MapStream` describes, with a batch dimension in front.
    """
    return DataLoader(
        stream,
        batch_sampler=_Batches(len(stream), batch_size, start, rank, processes),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context=_fresh_processes() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),
    )


class _Batches(Sampler[list[int]]):
    """Consecutive positions, dealt out to the processes batch by batch."""

    def __init__(self, length: int, batch_size: int, start: int, rank: int, processes: int) -> None:
        if not 0 <= rank < processes:
            raise ValueError(f"rank: expected 0 to {processes - 1}, got {rank}")
        self._batch_size, self._step = batch_size, batch_size * processes
        self._first = start + rank * batch_size
        self._count = max(0, (length - start) // self._step)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._count):
            first = self._first + batch * self._step
            yield list(range(first, first + self._batch_size))


def _fresh_processes() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once for all workers of all loaders: they then start in a fraction
    # of a second. Importing opens no store and starts no thread, so forking the server is safe.
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(_: int) -> None:
    """Let a worker keep the memory it has freed (torch has limited its threads already).

    By default glibc hands the arrays of a sample back to the system and faults them in again for
    the next one, which costs about as much as resampling the image. Elsewhere nothing is done.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**28)
        libc.mallopt(mmap_threshold, 2**25)


def _kept_in_ram(
    needs: Sequence[Need], records: Sequence[ImageRecord], reader: MapReader, budget: int
) -> frozenset[Need]:
    """The needs whose maps of all images fit into memory together, in the order of ``_ARRAYS``."""
    pixels = sum(record.height * record.width for record in records)
    points = sum(record.grid_height * record.grid_width for record in records)
    code_bytes = reader.schema.hardness_bits // 8
    sizes: dict[Need, int] = {
        "weight": 2 * points,
        "true_prob": code_bytes * pixels,
        "aux_true_prob": code_bytes * pixels,
        "logits": 2 * reader.schema.num_classes * points,
    }
    kept: set[Need] = set()
    for need in needs:
        if sizes[need] <= budget:
            kept.add(need)
            budget -= sizes[need]
    return frozenset(kept)


def _require_arrays(reader: MapReader, needs: Sequence[Need]) -> None:
    missing = [need for need in needs if _ARRAYS[need] not in reader.arrays]
    if missing:
        names = ", ".join(_ARRAYS[need] for need in missing)
        settings = " and ".join(_HOW_TO_STORE.get(n, "this version") for n in missing)
        raise UnknownArrayError(
            f"{reader.path}: expected the array(s) {names}, but the store was built without; "
            f"build maps with {settings}"
        )
