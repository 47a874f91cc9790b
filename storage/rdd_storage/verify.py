"""Reading a whole store, to find every damaged object."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from rdd_storage.chunks import ChunkError, ChunkLayout
from rdd_storage.coordinates import coordinate_value, labels
from rdd_storage.errors import StoreError
from rdd_storage.identity import fingerprint
from rdd_storage.layout import (
    FIRST_VERSION,
    LAST_VERSION,
    STRING,
    ArraySpec,
    all_specs,
    array_metadata,
    consolidated_metadata,
    coordinate_specs,
    decode_object,
    done_spec,
    object_key,
)
from rdd_storage.location import Location, locate
from rdd_storage.manifest import Head, Manifest, manifest_key, read_head, read_manifest
from rdd_storage.marks import read_done
from rdd_storage.rows import RowEntry
from rdd_storage.schema import MapSchema
from rdd_storage.shards import has_unwritten
from rdd_storage.summary_store import decode_summary, summary_key, summary_metadata, summary_specs

_THREADS = 4
_AHEAD = 4  # objects per thread that are read before their result is looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One object of a store that is missing, unreadable or inconsistent."""

    array: str
    """Name of the array, or ``metadata``."""
    shard: int | None
    """Number of the shard to build again; None where the object belongs to no shard."""
    key: str
    """Key of the object in the store."""
    problem: str
    """What is wrong with it."""

    def __str__(self) -> str:
        where = self.array if self.shard is None else f"{self.array}, shard {self.shard}"
        return f"{where} ({self.key}): {self.problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of :func:`verify_store`."""

    path: str
    version: int
    """The published version; 0 for an unfinished store."""
    objects: int
    """Objects of arrays that were read."""
    damages: tuple[Damage, ...]
    """Everything found wrong."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.damages

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """Shards to build again, in rising order."""
        return tuple(sorted({d.shard for d in self.damages if d.shard is not None}))


def verify_store(
    path: str | PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = _THREADS,
) -> VerifyReport:
    """Read every object of a store and report each that is damaged.

    Found: missing objects, failed checksums of chunks and shard indices, maps with unwritten
    codes, metadata, coordinates and manifests that contradict each other. All published versions
    are read; of an unfinished store the shards that are done. What a version under way has beyond
    the published ones is not.

    Args:
        path: Path or URL of the store.
        progress: Called with the number of objects read and their total.
        threads: Objects that are read at a time.

    Raises:
        StoreNotFoundError: There is no map store.
        StoreFormatError: The root or the manifest is damaged, so that nothing can be checked.
    """
    location = locate(path)
    head = read_head(location)
    contents = _Contents(head, read_manifest(head))
    damages = list(_metadata_damages(location, head))
    damages += _manifest_damages(head)
    summaries, damaged = _summaries(head)
    damages += damaged
    units = [*contents.units(), *((spec, 0) for spec in summaries)]
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        problems = _in_order(pool, contents.problem, units, threads * _AHEAD)
        for count, ((spec, index), problem) in enumerate(zip(units, problems, strict=True), 1):
            if problem:
                of_none = spec.name in contents.coordinates or spec.dims[0] != "image"
                shard = None if of_none else index
                key = object_key(spec, index)
                damages.append(Damage(array=spec.name, shard=shard, key=key, problem=problem))
            if progress is not None:
                progress(count, len(units))
    return VerifyReport(
        path=location.url, version=head.version, objects=len(units), damages=tuple(damages)
    )


class _Contents:
    """What a store has to contain."""

    def __init__(self, head: Head, manifest: Manifest) -> None:
        schema = head.schema
        self._head = head
        self._size = schema.shard_images
        num_rows = max(head.num_rows, manifest.num_rows)
        self._specs = _present(head, all_specs(schema, num_rows))
        self._layouts = {
            spec.name: ChunkLayout.from_metadata(json.loads(array_metadata(spec)))
            for spec in self._specs.values()
            if spec.dtype != STRING
        }
        self.coordinates = _present(head, coordinate_specs(schema, num_rows))
        self._done = read_done(head.location, done_spec(schema, num_rows))
        self._entries: dict[int, list[RowEntry]] = {}
        for entry in manifest.living(head.versions):
            # Maps of a retired row that were lost to damage cannot be made again: its mark says so.
            if entry.last_version >= manifest.version or self._done[entry.row]:
                self._entries.setdefault(entry.row // self._size, []).append(entry)

    def units(self) -> Iterator[tuple[ArraySpec, int]]:
        """Array and number of each object along the array's first axis."""
        shards = sorted(self._entries)
        if not self._head.complete:
            shards = [s for s in shards if all(self._done[e.row] for e in self._entries[s])]
        for spec in self._specs.values():
            if spec.name == LAST_VERSION:
                for shard in shards:
                    yield spec, shard
            elif spec.name in self.coordinates:
                for index in range(-(-spec.shape[0] // spec.units[0])):
                    yield spec, index
            else:
                for shard in shards:
                    if any(self._has(spec, entry) for entry in self._entries[shard]):
                        yield spec, shard

    def problem(self, unit: tuple[ArraySpec, int]) -> str:
        """What is wrong with one object; empty when nothing is."""
        spec, index = unit
        entries = [entry for entry in self._members(spec, index) if self._has(spec, entry)]
        content = self._head.location.get(object_key(spec, index))
        if spec.name.startswith("versions/"):
            return _summary_problem(spec, content)
        if content is None:
            if spec.name == LAST_VERSION and all(e.last_version == spec.fill for e in entries):
                return ""
            return "missing"
        start = index * spec.units[0]
        try:
            data = self._decode(spec, content, start, entries)
        except (ValueError, RuntimeError, OSError, IndexError, TypeError) as error:
            return f"cannot be decoded: {str(error).splitlines()[0] if str(error) else repr(error)}"
        if spec.name in self.coordinates:
            if spec.dims != ("image",):
                wanted: Any = labels(self._head.schema, spec)
                return "" if np.array_equal(data, wanted) else "contradicts the schema"
            same = all(self._same(spec, data[e.row - start], e) for e in entries)
            return "" if same else "contradicts the manifest"
        if spec.name == "done":
            return "" if all(data[e.row - start] for e in entries) else "not all images are done"
        for entry in entries:
            if has_unwritten(spec, data[entry.row - start], entry):
                return f"image {entry.record.image_id} has values that were never written"
        return ""

    def _has(self, spec: ArraySpec, entry: RowEntry) -> bool:
        return self._head.has(spec.name, entry)

    def _same(self, spec: ArraySpec, value: Any, entry: RowEntry) -> bool:
        """Whether a coordinate has the row's value, as far as the versions that there are tell."""
        wanted = coordinate_value(spec.name, entry)
        if spec.name != LAST_VERSION:
            return bool(value == wanted)
        # The removal of the newest version leaves rows that it had retired with its number.
        return all((version <= value) == (version <= wanted) for version in self._head.versions)

    def _members(self, spec: ArraySpec, index: int) -> list[RowEntry]:
        """The rows that an object holds and whose content is known."""
        if spec.dims[0] != "image":
            return []
        shards = range(
            index * spec.units[0] // self._size, -(-(index + 1) * spec.units[0] // self._size)
        )
        return [entry for shard in shards for entry in self._entries.get(shard, ())]

    def _decode(
        self, spec: ArraySpec, content: bytes, start: int, entries: Sequence[RowEntry]
    ) -> npt.NDArray[Any]:
        """All of an object; rows of a shard that has no chunk for them are fill."""
        layout = self._layouts.get(spec.name)
        if layout is None:
            return decode_object(spec, content, min(spec.units[0], spec.shape[0] - start))
        if layout.shards is None:
            return layout.decode_chunk(content)
        return _decode_shard(layout, spec, content, [entry.row - start for entry in entries])


def _decode_shard(
    layout: ChunkLayout, spec: ArraySpec, content: bytes, rows: Sequence[int]
) -> npt.NDArray[Any]:
    if layout.shards is None or len(content) < layout.index_size:
        raise ChunkError(f"{len(content)} bytes hold no shard")
    index = layout.decode_index(content[-layout.index_size :])
    per_row = len(index) // (layout.shards[0] // layout.chunks[0])
    data = np.full(layout.shards, spec.fill, layout.dtype)
    missing = {number for number, (offset, _) in enumerate(index) if offset == 2**64 - 1}
    for row in rows:
        first = row // layout.chunks[0] * per_row
        if not missing.isdisjoint(range(first, first + per_row)):
            raise ChunkError(f"row {row} of the shard is missing")
    whole = tuple(slice(0, length) for length in layout.shards)
    for part in (part for parts in layout.parts(whole).values() for part in parts):
        if part.number not in missing:
            offset, length = index[part.number]
            data[part.outside] = layout.decode_chunk(content[offset : offset + length])
    return data


def _summary_problem(spec: ArraySpec, content: bytes | None) -> str:
    if content is None:
        return "missing"
    try:
        decode_summary(spec, content)
    except ChunkError as error:
        return f"cannot be decoded: {error}"
    return ""


def _summaries(head: Head) -> tuple[list[ArraySpec], list[Damage]]:
    """The arrays of the summaries that the published versions have; what their metadata lacks."""
    found: list[ArraySpec] = []
    damages: list[Damage] = []
    for version, digest in sorted(head.versions.items()):
        if (
            not isinstance(head.schema, MapSchema)
            or head.location.get(summary_key(version)) is None
        ):
            continue
        try:
            images = len(read_manifest(head, version).entries)
        except StoreError:
            continue  # which is listed as damage of the manifest
        specs = summary_specs(head.schema, version, images)
        found += specs.values()
        for key, wanted in summary_metadata(specs, version, digest).items():
            content = head.location.get(key)
            if _parsed(content) != json.loads(wanted):
                problem = "missing" if content is None else "not the metadata of this summary"
                damages.append(Damage(array="metadata", shard=None, key=key, problem=problem))
    return found, damages


def _parsed(content: bytes | None) -> Any:
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def _present(head: Head, specs: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Leave out what stores that never grew may lack."""
    if not head.complete or FIRST_VERSION in head.arrays:
        return specs
    return {k: spec for k, spec in specs.items() if k not in (FIRST_VERSION, LAST_VERSION)}


def _in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[tuple[ArraySpec, int]], str],
    units: Iterable[tuple[ArraySpec, int]],
    ahead: int,
) -> Iterator[str]:
    """Results in the order of the units, with a bounded number of them under way."""
    waiting: deque[Future[str]] = deque()
    for unit in units:
        waiting.append(pool.submit(function, unit))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _metadata_damages(location: Location, head: Head) -> Iterator[Damage]:
    def damage(key: str, problem: str) -> Damage:
        return Damage(array="metadata", shard=None, key=key, problem=problem)

    if fingerprint(head.identity) != head.fingerprint:
        yield damage("zarr.json", "the fingerprint is not that of the identity")
    if head.attributes.get("class_names") != list(head.schema.class_names):
        yield damage("zarr.json", "the attribute class_names is not the schema's")
    if not head.complete:
        num_rows = read_manifest(head).num_rows
    else:
        num_rows = head.num_rows
        nodes = consolidated_metadata(head.schema, num_rows)
        specs = _present(head, all_specs(head.schema, num_rows))
        for name, node in nodes.items():
            if (name in specs or name == "statistics") and head.arrays.get(name) != node:
                yield damage(
                    "zarr.json", f"the consolidated metadata of '{name}' is not the schema's"
                )
    for spec in _present(head, all_specs(head.schema, num_rows)).values():
        key = f"{spec.name}/zarr.json"
        content = location.get(key)
        if content is None:
            yield damage(key, "missing")
            continue
        try:
            same = _without_rows(spec, json.loads(content), num_rows) == _without_rows(
                spec, json.loads(array_metadata(spec)), num_rows
            )
        except (ValueError, KeyError, TypeError, IndexError):
            same = False
        if not same:
            yield damage(key, "not the metadata that the schema asks for")


def _without_rows(spec: ArraySpec, metadata: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """Metadata without the number of rows, which may be larger while a version is published."""
    shape = list(metadata["shape"])
    if spec.dims[0] == "image" and shape[0] >= num_rows:
        shape[0] = num_rows
    return metadata | {"shape": shape}


def _manifest_damages(head: Head) -> Iterator[Damage]:
    """The manifests of the versions before the newest, which has been read already."""
    for version in sorted(head.versions):
        if version == head.version:
            continue
        try:
            read_manifest(head, version)
        except StoreError as error:
            problem = str(error).partition(": expected ")[2] or str(error)
            yield Damage(
                array="metadata",
                shard=None,
                key=manifest_key(version),
                problem=f"expected {problem}",
            )
