"""What of a store follows from its schema and a manifest: metadata and coordinates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rdd_storage.errors import StoreFormatError
from rdd_storage.identity import canonical
from rdd_storage.layout import (
    FIRST_VERSION,
    LAST_VERSION,
    OUTCOMES,
    QUANTITIES,
    REGIONS,
    STRING,
    ArraySpec,
    all_specs,
    array_metadata,
    coordinate_specs,
    encode_objects,
    group_metadata,
    groups,
)
from rdd_storage.manifest import Manifest
from rdd_storage.rows import RowEntry
from rdd_storage.schema import Schema
from rdd_storage.statistics import discrepancy_bin_edges

_RESERVED = ("rdd", "Conventions", "coordinates", "class_names", "palette")


def coordinates_attribute(schema: Schema) -> str:
    """Attribute ``coordinates`` of the root: these arrays describe the rows and are no maps."""
    return " ".join([*schema.sizes, "digest", FIRST_VERSION, LAST_VERSION, "done"])


def metadata_objects(schema: Schema, num_rows: int) -> dict[str, bytes]:
    """Key and content of the ``zarr.json`` of every array and group that readers see."""
    objects = {
        f"{spec.name}/zarr.json": array_metadata(spec)
        for spec in all_specs(schema, num_rows).values()
    }
    return objects | {f"{name}/zarr.json": group_metadata({}) for name in groups(schema)}


def coordinate_objects(
    schema: Schema,
    manifest: Manifest,
    num_rows: int,
    *,
    first_row: int = 0,
    rewritten: Collection[int] = (),
) -> dict[str, bytes]:
    """Key and content of the objects of the coordinates.

    Args:
        schema: The store's schema.
        manifest: The version that they are to repeat, with its retired rows.
        num_rows: Length of the image axis; at least the manifest's.
        first_row: Rows before this one are stored already. What a coordinate says of a row never
            changes, save for ``last_version``.
        rewritten: Chunks of ``last_version`` to include. It is stored where rows are retired, and
            else only where an object of a version since removed has to be replaced.
    """
    entries = (*manifest.entries, *manifest.retired)
    rows = np.array([entry.row for entry in entries], np.intp)
    retired = {entry.row // schema.shard_images for entry in manifest.retired}
    objects: dict[str, bytes] = {}
    for name, spec in coordinate_specs(schema, num_rows).items():
        if spec.dims != ("image",):
            objects |= encode_objects(spec, labels(schema, spec))
            continue
        dtype = np.dtype(object) if spec.dtype == STRING else spec.numpy_dtype
        values = np.full(spec.shape, spec.fill, dtype)
        values[rows] = np.array([coordinate_value(name, entry) for entry in entries], dtype)
        if name != LAST_VERSION:
            unit = first_row // spec.units[0]
            objects |= encode_objects(spec, values[unit * spec.units[0] :], first=unit)
            continue
        for chunk in sorted(retired | set(rewritten)):
            start = chunk * schema.shard_images
            part = values[start : start + schema.shard_images]
            objects |= encode_objects(spec, part, first=chunk)
    return objects


def coordinate_value(name: str, entry: RowEntry) -> Any:
    """Value of a coordinate along the image axis for one row."""
    if name in (FIRST_VERSION, LAST_VERSION):
        return getattr(entry, name)
    return getattr(entry.record, "image_id" if name == "image" else name)


def labels(schema: Schema, spec: ArraySpec) -> npt.NDArray[Any]:
    """Values of a coordinate that does not run along the images."""
    if spec.name == "statistics/discrepancy_bin":
        return discrepancy_bin_edges()[:-1]
    values: dict[str, Sequence[str]] = {
        "class": schema.class_names,
        "statistics/region": REGIONS,
        "statistics/outcome": OUTCOMES,
        "statistics/quantity": QUANTITIES,
    }
    return np.array(values[spec.name], object)


def root_attributes(
    schema: Schema,
    palette: Sequence[Sequence[int]] | None,
    attributes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Attributes of the root group of a new store, apart from ``rdd``.

    Raises:
        StoreFormatError: The palette does not fit the classes, or the attributes use a reserved
            name or are no JSON.
    """
    extra = canonical(dict(attributes or {}), "attributes")
    reserved = sorted(extra.keys() & set(_RESERVED))
    if reserved:
        raise StoreFormatError(
            f"attributes: expected names other than {', '.join(_RESERVED)}, got "
            f"{', '.join(reserved)}"
        )
    result: dict[str, Any] = {
        "Conventions": "CF-1.11",
        # Read by xarray: these arrays describe the rows and are no maps.
        "coordinates": coordinates_attribute(schema),
        "class_names": list(schema.class_names),
    }
    if palette is not None:
        colours = [[int(channel) for channel in colour] for colour in palette]
        if len(colours) != schema.num_classes or any(
            len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour)
            for colour in colours
        ):
            raise StoreFormatError(
                f"palette: expected {schema.num_classes} RGB colours of 0..255, one for each "
                f"class, got {len(colours)} entries"
            )
        result["palette"] = colours
    result.update(extra)
    return result
