"""The summary of a version as part of its store (docs/store-format.md, section 12).

A group below the version's manifest, written before the version is published. The group's own
metadata is written last and names the manifest by its digest: it vouches for the arrays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdd_storage.chunks import ChunkError, ChunkLayout
from rdd_storage.errors import StoreDamagedError
from rdd_storage.layout import (
    ArraySpec,
    array_metadata,
    encode_objects,
    group_metadata,
    object_key,
    statistics_specs,
)
from rdd_storage.location import Location
from rdd_storage.manifest import Head, Manifest
from rdd_storage.measures import TEMPERATURE, THRESHOLD
from rdd_storage.ranged import FETCHES, RangedArray
from rdd_storage.schema import MapSchema
from rdd_storage.summary import (
    COUNTED,
    MEASURED,
    OF_IMAGE,
    ImageMeasures,
    Summary,
    SummaryBuilder,
    total_shapes,
)

logger = logging.getLogger("rdd.maps")

_STACKED = {"counts": COUNTED, "measures": MEASURED, "images": OF_IMAGE}
"""Arrays that hold several fields of a summary along their first axis."""
_SETTINGS = {"threshold": THRESHOLD, "temperature": TEMPERATURE}
_SHARDS_AT_ONCE = 16  # whose counts are fetched together

_TOTAL_DIMS = {
    "class_hardness": ("class", "region", "hardness_code"),
    "confusion": ("class", "predicted_class"),
    "outcome_discrepancy": ("outcome", "discrepancy_bin"),
    "outcome_confidence": ("correct", "confidence_code"),
}


class StoredSummary:
    """The summary of a published version, of which no more is read than is asked for.

    Args:
        location: The store.
        schema: Its schema.
        manifest: The version.
    """

    def __init__(self, location: Location, schema: MapSchema, manifest: Manifest) -> None:
        self._location = location
        self._specs = summary_specs(schema, manifest.version, len(manifest.entries))

    def of_class(self, index: int | None) -> ImageMeasures:
        """The numbers of one class, or of all labelled pixels; a few requests that overlap.

        Raises:
            StoreDamagedError: An object is missing or fails its checksum.
            StoreUnavailableError, StoreAccessError: The place cannot be read.
        """
        pending = {}
        for name, of in _STACKED.items():
            spec = self._specs[name]
            selection = [slice(0, length) for length in spec.shape]
            if len(selection) == 3:
                row = spec.shape[1] - 1 if index is None else index
                selection[1] = slice(row, row + 1)
            array = RangedArray(self._location, spec.name, json.loads(array_metadata(spec)))
            pending[of] = array.read(tuple(selection))
        fields: dict[str, NDArray[Any]] = {}
        try:
            for of, found in pending.items():
                fields |= zip(of, found.result().reshape(len(of), -1), strict=True)
        except ChunkError as error:
            raise self._damaged(error) from error
        return ImageMeasures(**fields)

    def read(self) -> Summary:
        """All of it.

        Raises:
            StoreDamagedError, StoreUnavailableError, StoreAccessError: See :meth:`of_class`.
        """
        fields: dict[str, NDArray[Any]] = {}
        contents = self._location.get_many([_key(spec) for spec in self._specs.values()])
        try:
            for (name, spec), content in zip(self._specs.items(), contents, strict=True):
                values = _decoded(self._location, _key(spec), content, _layout(spec))
                if of := _STACKED.get(name):
                    fields |= zip(of, values, strict=True)
                else:
                    fields[name] = values
        except ChunkError as error:
            raise self._damaged(error) from error
        return Summary(**fields)

    def _damaged(self, error: ChunkError) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self._location}: summary: expected readable data, got damage ({error}); repair the "
            "store, which makes its summary anew"
        )


def summary_specs(schema: MapSchema, version: int, images: int) -> dict[str, ArraySpec]:
    """The arrays of a summary, by their names in its group; each is one object."""
    rows = schema.num_classes + 1
    per_class = ("class_or_all", "place")

    def spec(name: str, dtype: str, dims: tuple[str, ...], shape: tuple[int, ...], text: str,
             **more: Any) -> ArraySpec:  # fmt: skip
        attributes = {"long_name": text}
        if of := _STACKED.get(name):
            attributes["names"] = list(of)  # type: ignore[assignment]
        return ArraySpec(
            name=f"{_folder(version)}/{name}", dtype=dtype, shape=shape, dims=dims,
            attributes=attributes, **({"chunks": shape} | more),
        )  # fmt: skip

    # A chunk for each class: rankings by one class need no other.
    counts, measures = (len(COUNTED), rows, images), (len(MEASURED), rows, images)
    specs = {
        "counts": spec(
            "counts", "uint32", ("count", *per_class), counts,
            "labelled pixels, and those predicted correctly, by class; all of them last",
            chunks=(len(COUNTED), 1, images), shards=counts,
        ),
        "measures": spec(
            "measures", "float32", ("measure", *per_class), measures,
            "measures of hardness by class; of all labelled pixels last",
            chunks=(len(MEASURED), 1, images), shards=measures, fill=np.nan,
        ),
        "images": spec(
            "images", "float32", ("quantity", "place"), (len(OF_IMAGE), images),
            "means of d and of exp(-d) over the output grid", fill=np.nan,
        ),
    }  # fmt: skip
    for name, shape in total_shapes(schema.num_classes).items():
        text = "sum of the counts of all images"
        specs[name] = spec(name, "uint64", _TOTAL_DIMS[name], shape, text)
    return specs


def summary_key(version: int) -> str:
    """Key of the object that says whether a version has a summary."""
    return f"{_folder(version)}/zarr.json"


def open_summary(head: Head, manifest: Manifest) -> StoredSummary | None:
    """The summary of a published version; None where the store has none of it."""
    content = head.location.get(summary_key(manifest.version))
    digest = head.versions.get(manifest.version)
    if content is None or digest is None or not isinstance(head.schema, MapSchema):
        return None
    try:
        found = json.loads(content)["attributes"]["rdd_summary"]
    except (KeyError, TypeError, ValueError):
        return None
    if found != _about(digest):  # left by a plan that was given up, or made in another way
        return None
    return StoredSummary(head.location, head.schema, manifest)


def summary_metadata(specs: dict[str, ArraySpec], version: int, digest: str) -> dict[str, bytes]:
    """Key and content of the metadata of a summary, that which vouches for it last.

    Args:
        specs: See :func:`summary_specs`.
        version: The version.
        digest: SHA-256 of its manifest.
    """
    objects = {f"{spec.name}/zarr.json": array_metadata(spec) for spec in specs.values()}
    return objects | {summary_key(version): group_metadata({"rdd_summary": _about(digest)})}


def summary_objects(
    head: Head, manifest: Manifest, digest: str, base: Manifest | None
) -> dict[str, bytes]:
    """Key and content of the objects of a version's summary, in the order to write them.

    Args:
        head: The store; its published versions are those before this one.
        manifest: The version, all of whose images are done.
        digest: SHA-256 of its manifest.
        base: A published version: what its summary has of the images that both have is taken over.

    Returns:
        The objects; none where counts cannot be read, and of a pack.
    """
    if not isinstance(head.schema, MapSchema):
        return {}
    try:
        summary = _summarise(head, head.schema, manifest, base)
    except (ChunkError, StoreDamagedError) as error:
        logger.warning(
            "%s: version %d gets no summary, so that looking at it begins slowly: %s; verify and "
            "repair the store",
            head.location, manifest.version, error,
        )  # fmt: skip
        return {}
    specs = summary_specs(head.schema, manifest.version, len(manifest.entries))
    objects: dict[str, bytes] = {}
    for name, spec in specs.items():
        of = _STACKED.get(name)
        values = getattr(summary, name) if of is None else np.stack(
            [getattr(summary, field) for field in of]
        )  # fmt: skip
        objects |= encode_objects(spec, values)
    return objects | summary_metadata(specs, manifest.version, digest)


def delete_summary(head: Head, version: int) -> None:
    """Delete a version's summary; what vouches for it first.

    Raises:
        StoreWriteError: An object cannot be deleted.
    """
    if isinstance(head.schema, MapSchema):
        specs = summary_specs(head.schema, version, 1)
        keys = [*(_key(spec) for spec in specs.values()), *summary_metadata(specs, version, "")]
        for key in reversed(keys):
            head.location.delete(key)


def decode_summary(spec: ArraySpec, content: bytes | None) -> NDArray[Any]:
    """One array from its object.

    Raises:
        ChunkError: It is missing or damaged.
    """
    if content is None:
        raise ChunkError(f"{_key(spec)} is missing")
    return _layout(spec).decode_object(content)


def _summarise(head: Head, schema: MapSchema, manifest: Manifest, base: Manifest | None) -> Summary:
    rows = np.asarray(manifest.rows, np.intp)
    if base is not None and (stored := open_summary(head, base)) is not None:
        # A row is of one image for ever, and its counts do not change.
        base_rows = np.asarray(base.rows, np.intp)
        _, here, there = np.intersect1d(rows, base_rows, assume_unique=True, return_indices=True)
        try:
            builder = SummaryBuilder(len(rows), schema.num_classes)
            builder.copy(stored.read(), here, there)
            for _, counts in _counts(head.location, schema, np.delete(base_rows, there)):
                builder.take_out(counts)
            return _add(builder, head, schema, rows, np.delete(np.arange(len(rows)), here))
        except (ChunkError, StoreDamagedError):
            pass  # what is damaged may not be needed
    builder = SummaryBuilder(len(rows), schema.num_classes)
    return _add(builder, head, schema, rows, np.arange(len(rows)))


def _add(
    builder: SummaryBuilder, head: Head, schema: MapSchema, rows: NDArray[np.intp],
    places: NDArray[np.intp],
) -> Summary:  # fmt: skip
    for part, counts in _counts(head.location, schema, rows[places]):
        builder.add(places[part], counts)
    return builder.finish()


def _counts(
    location: Location, schema: MapSchema, rows: NDArray[np.intp]
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Counts of rows in rising order, a shard at a time: which of the rows, and each array's.

    Raises:
        ChunkError: They are missing or damaged.
    """
    size = schema.shard_images
    specs = statistics_specs(schema, size)
    layouts = {name: _layout(spec) for name, spec in specs.items()}
    shards, firsts = np.unique(rows // size, return_index=True)
    parts = [slice(first, stop) for first, stop in pairwise([*firsts.tolist(), len(rows)])]
    for start in range(0, len(parts), _SHARDS_AT_ONCE):
        batch = range(start, min(start + _SHARDS_AT_ONCE, len(parts)))
        keys = [object_key(spec, int(shards[index])) for index in batch for spec in specs.values()]
        contents = zip(keys, location.get_many(keys), strict=True)
        for index in batch:
            inside = rows[parts[index]] % size
            found = {}
            for name, layout in layouts.items():
                values = _decoded(location, *next(contents), layout)
                whole = len(inside) == size
                found[name.removeprefix("statistics/")] = values if whole else values[inside]
            if np.isnan(found["sums"]).any():
                raise ChunkError(f"counts in shard {int(shards[index])} were lost to damage")
            yield parts[index], found


def _decoded(
    location: Location, key: str, content: bytes | None, layout: ChunkLayout
) -> NDArray[Any]:
    """An object's array; it is fetched again before it counts as damaged, as of chunks of maps."""
    for fetches_left in reversed(range(FETCHES)):
        try:
            if content is None:
                raise ChunkError(f"{key} is missing")
            return layout.decode_object(content)
        except ChunkError:
            if not fetches_left:
                raise
            content = location.get(key)
    raise AssertionError  # the last attempt returns or raises


def _layout(spec: ArraySpec) -> ChunkLayout:
    return ChunkLayout.from_metadata(json.loads(array_metadata(spec)))


def _about(digest: str) -> dict[str, Any]:
    return {"manifest_sha256": digest, **_SETTINGS}


def _folder(version: int) -> str:
    return f"versions/{version:06d}/summary"


def _key(spec: ArraySpec) -> str:
    return object_key(spec, 0)
