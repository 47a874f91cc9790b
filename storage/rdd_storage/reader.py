"""Reading a store: windows of maps for training, whole images and statistics for inspection."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from rdd_storage.errors import (
    StoreAccessError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreUnavailableError,
    UnknownArrayError,
    UnknownImageError,
    WindowError,
)
from rdd_storage.identity import identity_difference, mismatch_error
from rdd_storage.layout import ArraySpec, done_spec, map_specs, statistics_specs
from rdd_storage.location import locate
from rdd_storage.manifest import read_head, read_manifest, require_schema
from rdd_storage.marks import read_done
from rdd_storage.processes import check_process
from rdd_storage.schema import ImageRecord, MapSchema, PackSchema, Schema, SchemaT
from rdd_storage.statistics import MapStatistics, assemble_statistics, merge_statistics
from rdd_storage.summary_store import StoredSummary, open_summary
from rdd_storage.tensors import OpenArray, Pending, open_array

Window = tuple[slice, slice]
Request = tuple[str, str, Window | None]

_T = TypeVar("_T")
_S = TypeVar("_S")
_SHARDS_AHEAD = 1  # of maps, read while the caller works on a shard
_STATISTICS_AHEAD = 8  # shards; their counts are small


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMaps:
    """Maps of the images of one shard."""

    shard: int
    """Number of the shard."""
    image_ids: tuple[str, ...]
    """Its images, in the order of their rows."""
    maps: dict[str, tuple[npt.NDArray[np.generic], ...]]
    """For each array one map for each image, without padding, as :meth:`MapReader.read` gives it;
    maps of one array share memory."""


class StoreReader(Generic[SchemaT]):
    """One published version of a store, or what is done of an unfinished one.

    :class:`MapReader` and :class:`PackReader` are for the two kinds of stores.

    Reads are in the codes of :mod:`rdd_storage.quantise`; nothing is converted to float64.
    Picklable, and safe with the ``spawn`` and ``forkserver`` start methods: each process opens the
    arrays when it first reads. A process forked after reading raises
    :class:`~rdd_storage.errors.ForkedProcessError`.

    Args:
        path: Local path, or URL of ``file``, ``s3``, ``gs``, ``az`` or ``memory``.
        version: One of the store's published versions; None takes the newest.

    Raises:
        StoreNotFoundError: There is no map store.
        StoreFormatError: The store is of another format version, or damaged.
        StoreMismatchError: The store is of the other kind.
        UnknownVersionError: The store has no such version.
        StoreUnavailableError, StoreAccessError: The place cannot be read.
    """

    _schema_type: ClassVar[type[Schema] | None] = None
    """What the stores of a subclass have; None opens all."""

    def __init__(self, path: str | PathLike[str], *, version: int | None = None) -> None:
        self._head = read_head(locate(path))
        require_schema(self._head, self._schema_type)
        self._manifest = read_manifest(self._head, version)
        # Records are made when they are asked for: there may be a hundred thousand.
        images = self._manifest.entries
        self._places = dict(zip(images.image_ids, range(len(images)), strict=True))
        self._records: dict[str, ImageRecord] = {}
        self._specs = map_specs(self.schema, self._manifest.num_rows)
        self._tensors: dict[str, OpenArray] = {}
        self._kept: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
        self._done: npt.NDArray[np.bool_] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is to be kept in memory is part of the state, what has been read so far is not.
        kept: dict[str, Any] = {array: {} for array in self._kept}
        state = self.__dict__ | {"_tensors": {}, "_records": {}, "_kept": kept}
        state.pop("records", None)
        return state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @property
    def path(self) -> str:
        """Path or URL of the store."""
        return self._head.location.url

    @property
    def version(self) -> int:
        """The published version that is read; 0 while the first is being built."""
        return self._manifest.version if self.complete else 0

    @property
    def manifest_digest(self) -> str:
        """SHA-256 of the version's manifest, and so of its images and their digests.

        Empty while the first version is being built.
        """
        return self._head.versions.get(self.version, "")

    @property
    def images_version(self) -> int:
        """The version that first had these images and maps; later ones only added arrays."""
        return self._manifest.images_of or self.version

    @property
    def complete(self) -> bool:
        """Whether the store was published when it was opened."""
        return self._head.complete

    @property
    def schema(self) -> SchemaT:
        """Arrays and sizes, as this version has them."""
        return cast("SchemaT", self._head.schema_of(self._manifest.version))

    @property
    def identity(self) -> dict[str, Any]:
        """What decided the content: teacher, preprocessing, settings."""
        return self._head.identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the identity and the format version."""
        return self._head.fingerprint

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root group, apart from the format's own; ``palette`` among them."""
        return self._head.attributes

    @cached_property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images, in the order of their rows."""
        return self._manifest.records

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Names of the images, in the order of their rows."""
        return tuple(self._places)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self._places)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the maps that the store has."""
        return tuple(self._specs)

    def row(self, image_id: str) -> int:
        """Index of an image along the first axis of the arrays.

        Raises:
            UnknownImageError: The store has no such image.
        """
        return self._manifest.rows[self._place(image_id)]

    def record(self, image_id: str) -> ImageRecord:
        """Sizes and digest of an image.

        Raises:
            UnknownImageError: The store has no such image.
        """
        found = self._records.get(image_id)
        if found is None:
            found = self._manifest.entries.record(self._place(image_id))
            self._records[image_id] = found
        return found

    def is_done(self, image_id: str) -> bool:
        """Whether all arrays of an image are written.

        Raises:
            UnknownImageError: The store has no such image.
        """
        row = self.row(image_id)
        if self.complete:
            return True
        if self._done is None or not self._done[row]:  # the build may have gone on
            self._done = read_done(
                self._head.location, done_spec(self.schema, self._manifest.num_rows)
            )
        return bool(self._done[row])

    def check(self, identity: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        """Refuse the store unless it was built from this teacher, these settings and this data.

        Args:
            identity: The identity expected.
            digests: Digest of each image that will be read; the store may hold more images.

        Raises:
            StoreMismatchError: The message lists the differences.
            StoreIncompleteError: The store matches but is not built to the end.
        """
        lines = identity_difference(identity, self.identity)
        found = self._manifest.entries.digests
        for image_id, digest in digests.items():
            place = self._places.get(image_id)
            if place is None:
                lines.append(f"image {image_id}: expected in the store, found nothing")
            elif found[place] != digest:
                lines.append(
                    f"image {image_id}: digest: expected {digest[:12]}…, found "
                    f"{found[place][:12]}… (the image or its label has changed)"
                )
        if lines:
            raise mismatch_error(self.path, lines)
        if not self.complete:
            raise StoreIncompleteError(
                f"{self.path}: expected a finished store, got one that is still being built; "
                f"{self.schema.remedy} to finish it"
            )

    def read(
        self, array: str, image_id: str, window: Window | None = None
    ) -> npt.NDArray[np.generic]:
        """One map of one image, or a window of it, without padding.

        Args:
            array: One of :attr:`arrays`.
            image_id: One of :attr:`image_ids`.
            window: Rows and columns in the array's own coordinates (pixels, or grid points for
                ``discrepancy`` and the logits), step 1, inside the image; None reads all of it.

        Returns:
            Codes (h, w), float16 (h, w) for ``discrepancy``, float16 (C, h, w) for logits; a
            writable array of its own.

        Raises:
            UnknownArrayError: The store was built without that array.
            UnknownImageError: The store has no such image.
            WindowError: The window does not lie inside the image.
            StoreIncompleteError: The image is not done.
            StoreDamagedError: Stored data is missing or fails its checksum.
            ForkedProcessError: The process was forked after reading.
        """
        return self.read_many([(array, image_id, window)])[0]

    def read_many(self, requests: Sequence[Request]) -> list[npt.NDArray[np.generic]]:
        """Several reads at once, overlapped; see :meth:`read` for one."""
        return [finish() for finish in [self._start(*request) for request in requests]]

    def preload(self, array: str, *, budget: int, lazy: bool = False) -> bool:
        """Keep all maps of one array in memory, if they fit; later reads of it copy from there.

        A pickled copy keeps the setting and not the maps: it reads each image's whole map when it
        is first asked for any of it, and keeps it.

        Args:
            array: One of :attr:`arrays`; ``discrepancy`` is the small one that training needs.
            budget: Bytes that the maps may take in this process.
            lazy: Read each map when it is first needed instead of all of them now.

        Returns:
            Whether they fit; where they do not, nothing is kept and reads go on as before.

        Raises:
            UnknownArrayError, StoreIncompleteError, StoreDamagedError: See :meth:`read`.
        """
        spec = self._spec(array)
        of_a_point = spec.window(slice(0, 1), slice(0, 1))
        per_point = spec.numpy_dtype.itemsize * math.prod(part.stop for part in of_a_point)
        sizes = [spec.size(record) for record in self.records]
        if sum(height * width for height, width in sizes) * per_point > budget:
            return False
        kept = self._kept.setdefault(array, {})
        if not lazy:
            for shard in self.iter_shards([array]):
                for image_id, values in zip(shard.image_ids, shard.maps[array], strict=True):
                    kept[image_id] = values.copy()  # without the padding
        return True

    def iter_shards(self, arrays: Sequence[str] | None = None) -> Iterator[ShardMaps]:
        """All maps in the order of the rows, a shard at a time; the fastest way through a store.

        The next shard is read while the caller works on one: two shards are in memory at most.

        Args:
            arrays: Some of :attr:`arrays`; None takes all.

        Raises:
            UnknownArrayError, StoreIncompleteError, StoreDamagedError: See :meth:`read`.
        """
        names = self.arrays if arrays is None else tuple(arrays)
        for name in names:
            self._spec(name)

        def start(shard: int) -> dict[str, list[Pending]]:
            self._require_done(by_shard[shard])
            return {name: self._start_rows(self._spec(name), by_shard[shard]) for name in names}

        by_shard = self._by_shard()
        for shard, reads in _ahead(by_shard, start, _SHARDS_AHEAD):
            members = by_shard[shard]
            maps = {}
            for name, pending in reads.items():
                batch = self._finish_rows(pending, name, shard)
                views = []
                for index, image_id in enumerate(members):
                    inside = self._spec(name).inside(self.record(image_id))
                    views.append(batch[index][inside])
                maps[name] = tuple(views)
            yield ShardMaps(shard=shard, image_ids=tuple(members), maps=maps)

    def _place(self, image_id: str) -> int:
        try:
            return self._places[image_id]
        except KeyError:
            raise UnknownImageError(
                f"{self.path}: expected one of the store's {self.num_images} images, got "
                f"{image_id!r}; {self.schema.remedy} with this data set, or check the name"
            ) from None

    def _spec(self, array: str) -> ArraySpec:
        spec = self._specs.get(array)
        if spec is None and array in self._head.added:
            raise UnknownArrayError(
                f"{self.path}: {array}: expected a version from {self._head.added[array]} on, "
                f"which added it, got version {self.version}; read a newer version"
            )
        if spec is None:
            remedy = (
                "logits can be added to the store"
                if array == "logits"
                else "arrays that were left out come with another build"
            )
            raise UnknownArrayError(
                f"{self.path}: expected one of {', '.join(self.arrays)}, got {array!r}; {remedy}"
            )
        return spec

    def _by_shard(self) -> dict[int, list[str]]:
        by_shard: dict[int, list[str]] = {}
        size = self.schema.shard_images
        for image_id, row in zip(self._places, self._manifest.rows, strict=True):
            by_shard.setdefault(row // size, []).append(image_id)
        return by_shard

    def _require_done(self, image_ids: Iterable[str]) -> None:
        for image_id in image_ids:
            if not self.is_done(image_id):
                raise StoreIncompleteError(
                    f"{self.path}: image {image_id}: expected it to be done, but it is not yet; "
                    f"{self.schema.remedy} to finish it"
                )

    def _start(
        self, array: str, image_id: str, window: Window | None
    ) -> Callable[[], npt.NDArray[np.generic]]:
        """Begin a read; the result waits for it."""
        spec = self._spec(array)
        row, record = self.row(image_id), self.record(image_id)
        size = spec.size(record)
        crop = (slice(0, size[0]), slice(0, size[1]))
        if window is not None:
            crop = _check_window(array, image_id, window, size)
        self._require_done([image_id])
        what = f"image {image_id}"
        kept = self._kept.get(array)
        if kept is None:
            pending = self._tensor(spec).read((slice(row, row + 1), *spec.window(*crop)))
            return lambda: self._finish(pending, array, what)[0]
        if image_id in kept:
            return lambda: kept[image_id][spec.window(*crop)].copy()
        whole = (slice(row, row + 1), *spec.inside(record))
        pending = self._tensor(spec).read(whole)

        def keep() -> npt.NDArray[np.generic]:
            kept[image_id] = self._finish(pending, array, what)[0]
            return kept[image_id][spec.window(*crop)].copy()

        return keep

    def _start_rows(self, spec: ArraySpec, image_ids: list[str]) -> list[Pending]:
        """Begin to read the rows of a shard's images; a read for each run of adjacent rows.

        In a store that grew, the rows between may have no data.
        """
        rows = np.array([self.row(image_id) for image_id in image_ids])
        whole = tuple(slice(0, length) for length in spec.shape[1:])
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        tensor = self._tensor(spec)
        return [tensor.read((slice(int(run[0]), int(run[-1]) + 1), *whole)) for run in runs]

    def _finish_rows(self, pending: list[Pending], array: str, shard: int) -> npt.NDArray[Any]:
        parts = [self._finish(part, array, f"shard {shard}") for part in pending]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _finish(self, pending: Pending, array: str, what: str) -> npt.NDArray[Any]:
        try:
            return pending.result()
        except (StoreUnavailableError, StoreAccessError) as error:
            error.add_note(f"while reading {array} of {what}")
            raise
        except StoreError:
            raise
        except (ValueError, OSError) as error:
            raise StoreDamagedError(
                f"{self.path}: {array} of {what}: expected readable data, got damage ({error}); "
                "verify the store and rebuild its bad shards"
            ) from error

    def _tensor(self, spec: ArraySpec) -> OpenArray:
        check_process()
        tensor = self._tensors.get(spec.name)
        if tensor is None:
            metadata = self._head.arrays.get(spec.name)
            tensor = open_array(self._head.location, spec.name, metadata)
            self._tensors[spec.name] = tensor
        return tensor


class MapReader(StoreReader[MapSchema]):
    """The maps of one published version of a store; see :class:`StoreReader`."""

    _schema_type = MapSchema

    def summary(self) -> StoredSummary | None:
        """A few numbers for each image and class, made when the version was published.

        None for a store that is not finished, or from before there were summaries.

        Raises:
            StoreUnavailableError, StoreAccessError: The place cannot be read.
        """
        return open_summary(self._head, self._manifest)

    def statistics(self) -> MapStatistics:
        """Statistics of all images of the version; a few shards' counts are in memory at a time.

        Raises:
            StoreIncompleteError: The store is not built to the end.
            StoreDamagedError: Stored counts are missing or fail their checksum.
        """
        return merge_statistics(
            [assemble_statistics(names, arrays) for names, arrays in self.iter_statistics()]
        )

    def iter_statistics(
        self, arrays: Sequence[str] | None = None
    ) -> Iterator[tuple[tuple[str, ...], dict[str, npt.NDArray[Any]]]]:
        """The counts of all images of the version, a shard at a time, in the order of the rows.

        For what :meth:`statistics` adds up or would take too much memory for.

        Args:
            arrays: Some of ``hardness``, ``discrepancy``, ``confidence``, ``confusion``, ``sums``
                (docs/store-format.md, 3.7); None takes all. ``sums`` always comes along.

        Yields:
            The names of a shard's images, and each array with one row for each of them.

        Raises:
            UnknownArrayError: There is no such array.
            StoreIncompleteError: The store is not built to the end.
            StoreDamagedError: Stored counts are missing or fail their checksum.
        """
        if not self.complete:
            raise StoreIncompleteError(
                f"{self.path}: expected a finished store, got one that is still being built; "
                "statistics are read when all images are done"
            )
        specs = {
            name.removeprefix("statistics/"): spec
            for name, spec in statistics_specs(self.schema, self._manifest.num_rows).items()
        }
        chosen = set(specs if arrays is None else arrays) | {"sums"}
        if unknown := sorted(chosen - set(specs)):
            raise UnknownArrayError(
                f"{self.path}: statistics: expected some of {', '.join(specs)}, got {unknown[0]!r}"
            )
        by_shard = self._by_shard()

        def start(shard: int) -> dict[str, list[Pending]]:
            return {
                name: self._start_rows(spec, by_shard[shard])
                for name, spec in specs.items()
                if name in chosen
            }

        for shard, reads in _ahead(by_shard, start, _STATISTICS_AHEAD):
            counts = {
                name: self._finish_rows(pending, f"statistics/{name}", shard)
                for name, pending in reads.items()
            }
            if np.isnan(counts["sums"]).any():
                raise StoreDamagedError(
                    f"{self.path}: statistics of shard {shard}: expected the counts of version "
                    f"{self.version}, but those of images that have changed since were lost to "
                    "damage; read a newer version"
                )
            yield tuple(by_shard[shard]), counts


class PackReader(StoreReader[PackSchema]):
    """Decoded images, ``rgb`` uint8 (h, w, 3), and ``label`` uint8 (h, w), 255 where ignored.

    See :class:`StoreReader`. Images are what the decoder of the machine that packed them gave.
    """

    _schema_type = PackSchema


def _ahead(jobs: Iterable[_T], start: Callable[[_T], _S], depth: int) -> Iterator[tuple[_T, _S]]:
    """Each job with what ``start`` returned for it, which is called ``depth`` jobs ahead."""
    started: deque[tuple[_T, _S]] = deque()
    for job in jobs:
        started.append((job, start(job)))
        if len(started) > depth:
            yield started.popleft()
    yield from started


def _check_window(
    array: str, image_id: str, window: Window, size: tuple[int, int]
) -> tuple[slice, slice]:
    ok = len(window) == 2 and all(isinstance(part, slice) for part in window)
    checked = []
    for part, length in zip(window, size, strict=False) if ok else ():
        start = 0 if part.start is None else part.start
        stop = length if part.stop is None else part.stop
        ok = ok and part.step in (None, 1) and 0 <= start < stop <= length
        checked.append(slice(start, stop))
    if not ok:
        raise WindowError(
            f"{array} of image {image_id}: expected two slices of step 1 inside {size[0]} x "
            f"{size[1]}, got {window!r}"
        )
    return checked[0], checked[1]
