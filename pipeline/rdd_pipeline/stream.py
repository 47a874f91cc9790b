"""The training stream: crops of images, labels and stored maps under one augmentation.

The stream is endless and addressed by position: sample ``k`` depends on the seed and ``k`` alone.
So it does not matter how many workers make it, and a run that was interrupted goes on where it
stopped.
"""

# Shape suffixes: B batch, C classes, H W pixels of the crop, h w output grid of the student.

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from rdd_pipeline.config import JitterConfig
from rdd_pipeline.data import Progress, SegmentationDataset, dataset_digests
from rdd_pipeline.data.geometry import (
    CropWindow,
    Size,
    Window,
    covered_points,
    crop_image,
    crop_nearest,
    field_places,
    field_window,
    inside,
    largest_field_window,
    pixel_window,
    random_crop,
    resample_field,
)
from rdd_pipeline.data.jitter import jitter_colours
from rdd_pipeline.errors import ConfigError, DataError, ImageReadError
from rdd_storage import ImageRecord, MapReader, StoreMismatchError, UnknownArrayError

Need = Literal["weight", "true_prob", "aux_true_prob", "logits"]
Shuffle = Literal["images", "shards"]

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
ADD_SOFT_LABELS = (
    "'rdd maps build CONFIG --set maps.soft_labels=true' adds logits to a store that has none and "
    "leaves its other maps as they are"
)
# Second word of the random seeds, so that no two uses share one; fidelity.py has 2.
_ORDER, _CROP, _JITTER = 0, 1, 3
_LISTED_MISSING = 20


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
    ``weight_field``        float32 (., .)    part of the TFE weight at the teacher's output grid,
                                              in (0, 1]; filled up to a size common to all
    ``weight_rows``         float64 (H,)      where the crop's rows lie on it; -1 in the padding
    ``weight_columns``      float64 (W,)      its columns
    ``true_prob_code``      uint8 or 16 (H,W) hardness code of the teacher's main head
    ``aux_true_prob_code``  like it           of its auxiliary head
    ``logits``              float16 (C, h, w) teacher's logits at the student's output grid
    ``logits_valid``        bool (h, w)       False at grid points in the padding
    ======================  ================  ====================================================

    All but the first three are there as ``needs``, ``spans`` and ``mark_padding`` ask for them. The
    weight is sampled at the crop's pixels on the training device, by
    :func:`rdd_pipeline.signals.expand_weight`.

    Args:
        dataset: Images and labels.
        reader: Store of the teacher's maps; None trains without any.
        crop_size: Height and width of the crop; smaller images are padded at right and bottom.
        scale: Range of the random scale.
        flip: Probability of a horizontal flip.
        seed: Seed of order and crops, 0 or more.
        jitter: Random changes of the image's colours, drawn apart from everything else; the maps
            are those of the image as it is stored.
        shuffle: Order of an epoch: all images at random, or shard by shard; see
            :func:`shard_order`.
        shuffle_buffer: Images that ``shards`` mixes with each other.
        shard_images: Consecutive images taken for a shard where there is no store.
        length: Number of samples: iterations x batch size x processes.
        needs: Which of ``weight``, ``true_prob``, ``aux_true_prob`` and ``logits`` to give.
        spans: Positions at which each of them is given; everywhere by default.
        grid_size: Output grid of the student for a crop; needed for ``logits``.
        mark_padding: Give ``logits_valid`` without stored logits too, for a teacher in memory.
        identity: Identity expected of the store; None expects the data set's part of it alone.
        allow_missing: Leave images without maps out instead of refusing the store.
        digests: Digests of the data set's images in its order, if they are known already.
        progress: Called with the number of images digested since the last call.
        ram_budget: Bytes per process for maps kept in memory once read. An array of the store is
            kept if it fits for all images, ``discrepancy`` first; of others each crop reads its
            window.

    Raises:
        DataError: The data set is empty.
        StoreMismatchError: The store was built from other images, labels or settings; or it lacks
            images of the data set, which are listed, or all of them.
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
        jitter: JitterConfig | None = None,
        shuffle: Shuffle = "images",
        shuffle_buffer: int = 256,
        shard_images: int = 16,
        seed: int = 0,
        length: int,
        needs: Collection[Need] = (),
        spans: Mapping[Need, range] | None = None,
        grid_size: Size | None = None,
        mark_padding: bool = False,
        identity: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
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
        self.jitter = jitter
        self.shuffle, self.shuffle_buffer = shuffle, shuffle_buffer
        self.seed, self.length = seed, length
        self.needs = tuple(need for need in _ARRAYS if need in needs)
        self.spans = dict(spans or {})
        self.grid_size = grid_size
        self.mark_padding = mark_padding
        self._kept: frozenset[Need] = frozenset()
        self._sizes: dict[int, Size] = {}
        self._field_size: Size = (1, 1)
        self._indices = np.arange(len(dataset))
        self._shards = self._indices // shard_images
        if reader is not None:
            require_arrays(reader, self.needs)
            if digests is None:
                digests = dataset_digests(dataset, progress)
            if identity is None:
                identity = reader.identity
                if "data" in identity:
                    identity = {**identity, "data": dataset.identity()}
            self._indices = mapped_images(dataset, reader)
            mapped = {i: dataset.image_ids[i] for i in self._indices.tolist()}
            reader.check(identity, {image_id: digests[i] for i, image_id in mapped.items()})
            if not mapped or (len(mapped) < len(dataset) and not allow_missing):
                raise _missing_error(dataset, reader, self._indices)
            rows = np.array([reader.row(image_id) for image_id in mapped.values()])
            self._shards = rows // reader.schema.shard_images
            records = [reader.record(image_id) for image_id in mapped.values()]
            self._sizes = {i: (r.height, r.width) for i, r in zip(mapped, records, strict=True)}
            self._kept = _kept_in_ram(self.needs, records, reader, ram_budget)
            if "weight" in self.needs:
                self._field_size = _field_size(records, crop_size, scale[0])
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
        needs = [need for need in self.needs if need not in self.spans or k in self.spans[need]]
        try:
            sample = self.sample(index, window, needs)
        except Exception as error:
            error.add_note(f"at position {k} of the stream, image {self.dataset.image_ids[index]}")
            raise
        if self.jitter is not None:
            # Padding keeps its colour, which networks see as zero.
            shown_HWC = sample["image"].permute(1, 2, 0).numpy()[inside(window)]
            rng = np.random.default_rng([self.seed, _JITTER, k])
            shown_HWC[:] = jitter_colours(shown_HWC, self.jitter, rng)
        return sample

    @property
    def images(self) -> int:
        """Number of images that are trained on: an epoch."""
        return len(self._indices)

    def image_index(self, k: int) -> int:
        """Index in the data set of the image at position ``k``."""
        epoch, place = divmod(k, self.images)
        order = self._orders.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.seed, _ORDER, epoch])
            if self.shuffle == "shards":
                order = shard_order(rng, self._shards, self.shuffle_buffer)
            else:
                order = rng.permutation(self.images)
            # A batch may span two epochs; older ones do not come back.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return int(self._indices[order[place]])

    def sample(
        self, index: int, window: CropWindow, needs: Sequence[Need] | None = None
    ) -> dict[str, torch.Tensor]:
        """One image, label and maps under a given crop.

        Args:
            index: Index of the image in the data set.
            window: The crop; its source size is the image's.
            needs: Which of the stream's needs to give; all by default.

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
        needs = self.needs if needs is None else needs
        if self.reader is not None and needs:
            maps = self._read_maps(self.reader, needs, index, window, (rows, columns))
            sample |= {key: torch.from_numpy(value) for key, value in maps.items()}
        return sample

    def _read_maps(
        self,
        reader: MapReader,
        needs: Sequence[Need],
        index: int,
        window: CropWindow,
        pixels: Window,
    ) -> dict[str, NDArray[Any]]:
        """The needed maps, read together so that a remote store's latency counts once."""
        image_id = self.dataset.image_ids[index]
        record = reader.record(image_id)
        field_size = (record.grid_height, record.grid_width)
        windows: dict[Need, Window | None] = {}
        for need in needs:
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
        for need in needs:
            array = arrays[need] if need in arrays else self._maps[need, index]
            part = windows.get(need)
            origin = (0, 0) if part is None else (part[0].start, part[1].start)
            if need == "weight":
                if part is None:
                    part = field_window(window, field_size)
                    array = array[part]
                # Exponent before interpolation: the weight is the interpolated exp(-D).
                field_hw = np.exp(-array.astype(np.float32))
                height, width = np.maximum(field_hw.shape, self._field_size) - field_hw.shape
                maps["weight_field"] = np.pad(field_hw, ((0, height), (0, width)))
                maps["weight_rows"], maps["weight_columns"] = field_places(
                    window, field_size, origin=(part[0].start, part[1].start)
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


def mapped_images(dataset: SegmentationDataset, reader: MapReader) -> NDArray[np.int64]:
    """Indices of the data set's images that the store has maps of."""
    stored = set(reader.image_ids)
    return np.array(
        [i for i, image_id in enumerate(dataset.image_ids) if image_id in stored], dtype=np.int64
    )


def shard_order(
    rng: np.random.Generator, shards: NDArray[np.int64], buffer: int
) -> NDArray[np.int64]:
    """An order of all images that stays within few shards at a time.

    Shards come in random order, their images too, and a shuffle buffer mixes neighbours: an image
    leaves it up to ``buffer`` images after it came in. So any ``n`` images in a row lie within
    ``n + 2 * buffer`` images of the shards' order.

    Args:
        rng: Source of randomness.
        shards: Shard of each image.
        buffer: Images that are mixed with each other, 1 or more; 1 keeps shards whole.

    Returns:
        int64, a permutation of ``0..len(shards) - 1``.
    """
    _, members = np.unique(shards, return_inverse=True)
    turn_of_shard = rng.permutation(members.max() + 1)
    images = rng.permutation(len(shards))
    in_turn = images[np.argsort(turn_of_shard[members[images]], kind="stable")]
    # Delays below the buffer's size, sorted: what a buffer that lets each image go when its time
    # has come would give, without going through it image by image.
    leaves = np.arange(len(shards)) + buffer * rng.random(len(shards))
    order: NDArray[np.int64] = in_turn[np.argsort(leaves, kind="stable")]
    return order


def _field_size(records: Sequence[ImageRecord], crop_size: Size, scale: float) -> Size:
    """What holds the part of the weight's field that any crop of any image needs."""
    sizes = {((r.height, r.width), (r.grid_height, r.grid_width)) for r in records}
    heights, widths = zip(
        *(
            largest_field_window(
                source_size=source, field_size=field, crop_size=crop_size, scale=scale
            )
            for source, field in sizes
        ),
        strict=True,
    )
    return max(heights), max(widths)


def _missing_error(
    dataset: SegmentationDataset, reader: MapReader, mapped: NDArray[np.int64]
) -> StoreMismatchError:
    missing = np.setdiff1d(np.arange(len(dataset)), mapped)
    lines = [f"  {dataset.image_ids[index]}" for index in missing[:_LISTED_MISSING]]
    if len(missing) > _LISTED_MISSING:
        lines.append(f"  ... and {len(missing) - _LISTED_MISSING} more")
    remedy = "build their maps with 'rdd maps build CONFIG'"
    if len(mapped):
        remedy += ", or leave them out of the training with student.allow_missing: true"
    return StoreMismatchError(
        "\n".join(
            [
                f"{reader.path}: expected maps of all {len(dataset)} images of {dataset.name} "
                f"{dataset.split}, found none of these {len(missing)}:",
                *lines,
                remedy,
            ]
        )
    )


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


def require_arrays(reader: MapReader, needs: Sequence[Need]) -> None:
    """Refuse a store without maps that are needed.

    Raises:
        UnknownArrayError: The message says how to get them.
    """
    missing = [need for need in needs if _ARRAYS[need] not in reader.arrays]
    if missing:
        names = ", ".join(_ARRAYS[need] for need in missing)
        settings = " and ".join(_HOW_TO_STORE.get(n, "this version") for n in missing)
        remedy = f"build maps with {settings}" if missing != ["logits"] else ADD_SOFT_LABELS
        raise UnknownArrayError(
            f"{reader.path}: expected the array(s) {names}, but the store was built without; "
            f"{remedy}"
        )
