"""Packs: the decoded images and labels of a data set, stored once and read window by window.

A pack gives the same pixels as the files it was made of. It is used for those images whose files
still have the digests that they were packed with; every other image is read from its files.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import __version__ as pillow_version

from rdd_pipeline.config import DataConfig
from rdd_pipeline.data.base import (
    JSON,
    NO_IMAGES,
    Examined,
    Progress,
    Sample,
    SegmentationDataset,
    dataset_digests,
    in_threads,
)
from rdd_pipeline.errors import DataError
from rdd_pipeline.progress import Reporter
from rdd_storage import (
    ImageRecord,
    PackedImage,
    PackReader,
    PackSchema,
    PackWriter,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    identity_difference,
    store_path,
    store_status,
)

_COMMAND = "'rdd data pack CONFIG'"
_MEMORY = 2 * 2**30  # bytes that the shards under way may take together
_WAITING = 4  # threads for each core where they wait for an object store
_COPIES = 3  # of a shard's pixels: decoded, padded side by side, compressed


class PackedDataset(SegmentationDataset):
    """A data set whose pixels come from a pack; all else is that of its files.

    Each process opens the pack's arrays when it first reads, so that copies may be sent to
    processes started by ``spawn`` or ``forkserver``.

    Args:
        files: The data set that was packed.
        reader: Its pack.
        packed: Indices of the images that the pack has as they are in the files now; the others
            are read from their files.
    """

    def __init__(
        self, files: SegmentationDataset, reader: PackReader, packed: Collection[int]
    ) -> None:
        self.files = files
        self.name = files.name
        self.split = files.split
        self.class_names = files.class_names
        self.palette = files.palette
        self.image_ids = files.image_ids
        self.class_weights = files.class_weights
        self.over_network = files.over_network
        self.reader = reader
        self.packed = frozenset(packed)

    def __getitem__(self, index: int) -> Sample:
        index = self._require_index(index)
        return self._read(index, None) if index in self.packed else self.files[index]

    def read_window(self, index: int, rows: slice, columns: slice) -> Sample:
        """Read a part of one image and its label; nothing but the chunks it touches is decoded."""
        index = self._require_index(index)
        if index not in self.packed:
            return self.files.read_window(index, rows, columns)
        height, width = self.size(index)
        inside = [slice(*rows.indices(height)), slice(*columns.indices(width))]
        if any(part.step != 1 or part.start >= part.stop for part in inside):
            return super().read_window(index, rows, columns)
        return self._read(index, (inside[0], inside[1]))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, without a look at its file where it is packed."""
        index = self._require_index(index)
        if index not in self.packed:
            return self.files.size(index)
        record = self.reader.record(self.image_ids[index])
        return record.height, record.width

    def digest(self, index: int) -> str:
        """That of the files."""
        return self.files.digest(index)

    def digests(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Those of the files."""
        return self.files.digests(progress)

    def identity(self) -> dict[str, JSON]:
        """That of the files: a pack changes nothing that a result depends on."""
        return self.files.identity()

    def examine(self, index: int) -> Examined:
        """Examine the files."""
        return self.files.examine(index)

    def problems(self, progress: Progress | None = None) -> list[str]:
        """Those of the files."""
        return self.files.problems(progress)

    def _read(self, index: int, window: tuple[slice, slice] | None) -> Sample:
        image_id = self.image_ids[index]
        try:
            image, label = self.reader.read_many(
                [("rgb", image_id, window), ("label", image_id, window)]
            )
        except StoreError as error:
            error.add_note("data.packed: never reads the files instead")
            raise
        return Sample(
            image_id=image_id,
            image=cast("NDArray[np.uint8]", image),
            label=cast("NDArray[np.uint8]", label),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """What packing a split did."""

    path: str
    split: str
    images: int
    images_packed: int
    """Images that were decoded; 0 when a finished pack was reused."""
    version: int
    """Version of the pack that is published now."""
    seconds: float
    bytes_on_disk: int


def pack_path(dataset: SegmentationDataset, root: str) -> str:
    """Path or URL of a data set's pack below ``root``."""
    split = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.split)  # it may be an expression
    return store_path(root, dataset.name, split, _identity(dataset))


def pack_dataset(
    dataset: SegmentationDataset,
    root: str,
    *,
    reporter: Reporter,
    digests: Sequence[str] | None = None,
) -> PackResult:
    """Pack a data set, go on with a pack that was interrupted, or extend it by what is new.

    Images are decoded by one thread per core, each working on a shard of its own.

    Args:
        dataset: What to pack.
        root: Folder or URL that holds packs.
        reporter: Where progress is shown.
        digests: Of the data set's images, if they are known already.

    Raises:
        DataError: There are no images, or a label does not fit its image or the classes.
        ImageReadError: A file is missing or cannot be decoded; finished shards are kept.
        StoreFormatError: An image is larger than those the pack was made for.
        StoreLockedError: Another process is packing this data set.
        StoreWriteError: The place cannot be written; finished shards are kept.
    """
    started = time.perf_counter()
    if not len(dataset):
        raise DataError(f"{dataset.name} {dataset.split}: {NO_IMAGES}")
    if digests is None:
        with reporter.bar(f"read {dataset.split}", len(dataset)) as bar:
            digests = dataset_digests(dataset, bar.advance)
    records = [
        ImageRecord(image_id=image_id, height=height, width=width, digest=digest)
        for image_id, (height, width), digest in zip(
            dataset.image_ids,
            in_threads(dataset.size, len(dataset), None, dataset.over_network),
            digests,
            strict=True,
        )
    ]
    path = pack_path(dataset, root)
    try:
        writer = PackWriter.create(
            path,
            schema=PackSchema(
                num_classes=dataset.num_classes,
                class_names=dataset.class_names,
                height=max(record.height for record in records),
                width=max(record.width for record in records),
            ),
            images=records,
            identity=_identity(dataset),
            palette=dataset.palette,
            attributes={"decoder": f"Pillow {pillow_version}"},
            grow=True,
        )
    except StoreFormatError as error:
        error.add_note(f"to pack anew: rdd maps remove {path}")
        raise
    with writer.lease():
        pending = writer.pending_shards()
        count = sum(len(writer.shard_records(shard)) for shard in pending)
        if pending:
            with reporter.bar(f"pack {dataset.split}", len(dataset)) as bar:
                bar.start_at(len(dataset) - count)
                _write(dataset, writer, pending, bar.advance)
        writer.publish()
    return PackResult(
        path=path,
        split=dataset.split,
        images=len(dataset),
        images_packed=count,
        version=writer.version,
        seconds=time.perf_counter() - started,
        bytes_on_disk=store_status(path).bytes_on_disk,
    )


def from_pack(
    dataset: SegmentationDataset,
    config: DataConfig,
    *,
    digests: Callable[[], Sequence[str]],
    say: Callable[[str], object],
) -> SegmentationDataset:
    """The data set read from its pack, as ``data.packed`` wants it and as far as the pack fits.

    Call it once where reading begins, and hand the result to the workers: comparing the pack with
    the files takes the digests of all of them.

    Args:
        dataset: The files.
        config: The ``data`` section.
        digests: Gives the digests of the files as they are now; called only if there is a pack.
        say: Told in a line what is read from where, and why.

    Raises:
        DataError: ``data.packed: always``, and no pack has all images as they are now.
    """
    if config.packed == "never":
        return dataset
    where = f"{dataset.name} {dataset.split}"
    path = pack_path(dataset, config.packed_root)
    reader = _open(dataset, path)
    if isinstance(reader, PackReader):
        known = {record.image_id: record.digest for record in reader.records}
        pairs = enumerate(zip(dataset.image_ids, digests(), strict=True))
        packed = [index for index, (name, digest) in pairs if known.get(name) == digest]
        if len(packed) == len(dataset):
            say(f"{where}: images are read from the pack {path}")
            return PackedDataset(dataset, reader, packed)
        left = len(dataset) - len(packed)
        problem = f"{left} of {len(dataset)} images are new or have changed since {path} was packed"
    else:
        packed, problem = [], reader
    if config.packed == "always":
        raise DataError(
            f"data.packed: always: {where}: {problem or f'no pack at {path}'}; make it with "
            f"{_COMMAND}, or set data.packed: auto"
        )
    if problem:
        say(f"{where}: {problem}; their files are read instead; {_COMMAND} brings it up to date")
    if isinstance(reader, PackReader) and packed:
        return PackedDataset(dataset, reader, packed)
    return dataset


def _identity(dataset: SegmentationDataset) -> dict[str, Any]:
    return {"content": "decoded images and labels", "data": dataset.identity()}


def _open(dataset: SegmentationDataset, path: str) -> PackReader | str:
    """The pack, or why it cannot be used; empty where there is none."""
    try:
        reader = PackReader(path)
    except StoreNotFoundError:
        return ""
    except StoreError as error:
        return str(error)
    if not reader.complete:
        return f"the pack {path} is unfinished"
    lines = identity_difference(_identity(dataset), reader.identity)
    return f"{path} is the pack of other data ({lines[0]})" if lines else reader


def _write(
    dataset: SegmentationDataset, writer: PackWriter, shards: Sequence[int], progress: Progress
) -> None:
    """Decode and write shards, a bounded number of them at a time."""
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}

    def pack(shard: int) -> int:
        samples = [dataset[index_of[record.image_id]] for record in writer.shard_records(shard)]
        writer.write_shard(
            shard,
            [PackedImage(image_id=s.image_id, rgb=s.image, label=s.label) for s in samples],
        )
        return len(samples)

    schema = writer.schema
    shard_bytes = 4 * schema.height * schema.width * schema.shard_images
    cores = os.cpu_count() or 1
    wanted = _WAITING * cores if dataset.over_network else cores
    threads = min(wanted, max(1, _MEMORY // (_COPIES * shard_bytes)))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rdd-pack")
    try:
        for done in as_completed([pool.submit(pack, shard) for shard in shards]):
            progress(done.result())
    finally:
        pool.shutdown(cancel_futures=True)
