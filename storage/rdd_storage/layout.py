"""The arrays of a store as Zarr metadata, and their encoding (docs/store-format.md, section 3).

All bytes are made by zarr-python in memory, so that the store holds nothing that plain Zarr
would not have written; a :class:`~rdd_storage.location.Location` then puts each object in one
atomic step. An object is therefore always replaced as a whole and never merged with old content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.storage
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype

from rdd_storage.schema import (
    PUBLISHED_DISCREPANCY,
    ImageRecord,
    MapSchema,
    PackSchema,
    Schema,
)

STRING = "string"
"""Stands for the variable-length string type."""

NEVER = 2**31 - 1
"""A version that no store reaches: rows that are current have it as their last version."""

FIRST_VERSION = "first_version"
LAST_VERSION = "last_version"

LABEL_UNWRITTEN = 254
"""Value of packed labels that were never written."""

_COORDINATE_SHARDS = 256  # a coordinate is read as a whole: one object for this many shards

NUM_DISCREPANCY_BINS = 248
"""Bins of the discrepancy histogram: the float16 bit pattern without its lowest seven bits."""
NUM_HARDNESS_BINS = 251
"""Bins of the hardness histogram: the 8-bit codes 0..250."""
NUM_CONFIDENCE_BINS = 255
"""Bins of the confidence histogram: the codes 0..254."""
REGIONS = ("interior", "boundary")
"""Axis ``region`` of the hardness histogram."""
OUTCOMES = ("wrong", "correct", "ignored")
"""Axis ``outcome`` of the histograms; the confidence histogram has the first two."""
QUANTITIES = ("discrepancy_sum", "weight_sum")
"""Axis ``quantity`` of the sums over the output grid: of d and of exp(-d)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store."""

    name: str
    """Path in the store, such as ``hardness`` or ``statistics/confusion``."""
    dtype: str
    """Zarr data type, or :data:`STRING`."""
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    chunks: tuple[int, ...]
    """The unit of compression."""
    shards: tuple[int, ...] | None = None
    """The unit of writing where it holds several chunks."""
    fill: Any = 0
    """Value of what is not written."""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of one stored object: of a shard, or of a chunk where there are no shards."""
        return self.shards or self.chunks

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the array in memory."""
        return np.dtypes.StringDType() if self.dtype == STRING else np.dtype(self.dtype)

    @property
    def on_grid(self) -> bool:
        """Whether an image's size in this array is that of its output grid."""
        return "grid_y" in self.dims

    def window(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """The part of one image's values: all classes or channels of these rows and columns."""
        places = {"y": rows, "grid_y": rows, "x": columns, "grid_x": columns}
        inner = zip(self.dims[1:], self.shape[1:], strict=True)
        return tuple(places.get(dim, slice(0, length)) for dim, length in inner)

    def inside(self, record: ImageRecord) -> tuple[slice, ...]:
        """The part of a row that is not padding."""
        return self.window(*(slice(0, length) for length in self.size(record)))

    def size(self, record: ImageRecord) -> tuple[int, int]:
        """Height and width of an image in this array."""
        if self.on_grid:
            return record.grid_height, record.grid_width
        return record.height, record.width


def map_specs(schema: Schema, num_rows: int) -> dict[str, ArraySpec]:
    """The maps, or the images and labels, themselves: one shard of K images is one object."""
    return (
        _pack_specs(schema, num_rows) if isinstance(schema, PackSchema) else _maps(schema, num_rows)
    )


def _maps(schema: MapSchema, num_rows: int) -> dict[str, ArraySpec]:
    codec = schema.codec
    size = (schema.height, schema.width)
    grid = (schema.grid_height, schema.grid_width)
    pixels, points = ("y", "x"), ("grid_y", "grid_x")
    hardness = {
        "long_name": "learning difficulty of the pixel for the teacher",
        "comment": "sqrt(1 - probability of the labelled class); NaN where there is no label",
        "units": "1",
        "scale_factor": codec.scale,
        "add_offset": 0.0,
        "_FillValue": codec.ignored,
        "valid_range": [0, codec.max_code],
    }
    classes = _flags(schema)

    # Only where it is another: stores from before there were others must keep their metadata.
    definition = (
        {} if schema.discrepancy == PUBLISHED_DISCREPANCY else {"definition": schema.discrepancy}
    )

    def spec(
        name: str,
        dtype: str,
        fill: Any,
        dims: tuple[str, ...],
        inner: tuple[int, ...],
        **attrs: Any,
    ) -> ArraySpec:
        return _sharded(schema, name, dtype, fill, dims, (num_rows, *inner), attrs)

    specs = [
        spec(
            "discrepancy",
            "float16",
            math.nan,
            points,
            grid,
            long_name="prediction discrepancy of the teacher",
            comment="take exp(-d) first, then interpolate bilinearly with aligned corners",
            units="1",
            **definition,
        ),
        spec("hardness", codec.dtype.name, codec.unwritten, pixels, size, **hardness),
        spec("prediction", "uint8", 255, pixels, size, long_name="predicted class", **classes),
        spec(
            "confidence",
            "uint8",
            255,
            pixels,
            size,
            long_name="probability of the predicted class",
            units="1",
            scale_factor=1.0 / 254.0,
            add_offset=0.0,
            _FillValue=255,
        ),
    ]
    if schema.aux_hardness:
        text = "learning difficulty of the pixel for the teacher's auxiliary head"
        specs.append(
            spec(
                "aux_hardness",
                codec.dtype.name,
                codec.unwritten,
                pixels,
                size,
                **(hardness | {"long_name": text}),
            )
        )
    for name, present in (("logits", schema.logits), ("aux_logits", schema.aux_logits)):
        if present:
            head = "auxiliary" if name == "aux_logits" else "main"
            specs.append(
                spec(
                    name,
                    "float16",
                    math.nan,
                    ("class", *points),
                    (schema.num_classes, *grid),
                    long_name=f"logits of the teacher's {head} head",
                    comment="shifted so that the largest over the classes is 0",
                    units="1",
                )
            )
    return {item.name: item for item in specs}


def _pack_specs(schema: PackSchema, num_rows: int) -> dict[str, ArraySpec]:
    size = (num_rows, schema.height, schema.width)
    label = {"long_name": "labelled class", "comment": "255 where ignored"} | _flags(schema)
    image = {"long_name": "image as it was decoded, upright", "units": "1"}
    specs = [
        # The channels last, as images are in memory: a crop needs no transposition.
        _sharded(schema, "rgb", "uint8", 0, ("y", "x", "channel"), (*size, 3), image),
        _sharded(schema, "label", "uint8", LABEL_UNWRITTEN, ("y", "x"), size, label),
    ]
    return {item.name: item for item in specs}


def _sharded(
    schema: Schema,
    name: str,
    dtype: str,
    fill: Any,
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> ArraySpec:
    """An array of which one shard of K images is one object."""
    largest = dict.fromkeys(("y", "grid_y"), schema.chunk_height)
    largest |= dict.fromkeys(("x", "grid_x"), schema.chunk_width)
    inner = shape[1:]
    chunk = tuple(
        _balanced_chunk(length, largest.get(dim, length))
        for dim, length in zip(dims, inner, strict=True)
    )
    return ArraySpec(
        name=name,
        dtype=dtype,
        shape=shape,
        dims=("image", *dims),
        chunks=(1, *chunk),
        shards=(
            schema.shard_images,
            *(math.ceil(n / c) * c for n, c in zip(inner, chunk, strict=True)),
        ),
        fill=fill,
        attributes=attributes,
    )


def _flags(schema: Schema) -> dict[str, Any]:
    return {
        "flag_values": list(range(schema.num_classes)),
        "flag_meanings": " ".join("_".join(name.split()) for name in schema.class_names),
    }


def statistics_specs(schema: Schema, num_rows: int) -> dict[str, ArraySpec]:
    """Per-image counts and sums, of maps alone: one chunk of K rows is one object."""
    if isinstance(schema, PackSchema):
        return {}
    classes, rows = schema.num_classes, schema.shard_images

    def spec(name: str, dtype: str, axes: dict[str, int], text: str) -> ArraySpec:
        return ArraySpec(
            name=f"statistics/{name}",
            dtype=dtype,
            shape=(num_rows, *axes.values()),
            dims=("image", *axes),
            chunks=(rows, *axes.values()),
            attributes={"long_name": text},
        )

    specs = [
        spec(
            "hardness",
            "uint32",
            {"class": classes, "region": 2, "hardness_code": NUM_HARDNESS_BINS},
            "labelled pixels by class, distance to a label boundary and 8-bit hardness code",
        ),
        spec(
            "discrepancy",
            "uint32",
            {"outcome": 3, "discrepancy_bin": NUM_DISCREPANCY_BINS},
            "grid points by the outcome at the nearest pixel and by discrepancy",
        ),
        spec(
            "confidence",
            "uint32",
            {"correct": 2, "confidence_code": NUM_CONFIDENCE_BINS},
            "labelled pixels by whether the prediction is correct and by confidence code",
        ),
        spec(
            "confusion",
            "uint32",
            {"class": classes, "predicted_class": classes},
            "labelled pixels by class and predicted class",
        ),
        spec("sums", "float64", {"quantity": len(QUANTITIES)}, "sums over the output grid"),
    ]
    return {item.name: item for item in specs}


def done_spec(schema: Schema, num_rows: int) -> ArraySpec:
    """The completion marks: one chunk for each shard, written last."""
    return ArraySpec(
        name="done",
        dtype="bool",
        shape=(num_rows,),
        dims=("image",),
        chunks=(schema.shard_images,),
        fill=False,
        attributes={"long_name": "whether all arrays of the image are written"},
    )


def coordinate_specs(schema: Schema, num_rows: int) -> dict[str, ArraySpec]:
    """Names and sizes, and the fixed labels of the other axes; written when a store is made."""

    # Chunks of K rows like the maps', so that xarray takes chunks of K images without a warning.
    per_shard = (schema.shard_images,)
    object_rows = (_COORDINATE_SHARDS * schema.shard_images,)

    def spec(name: str, dtype: str, length: int, dim: str, text: str) -> ArraySpec:
        by_row = dim == "image"
        return ArraySpec(
            name=name,
            dtype=dtype,
            shape=(length,),
            dims=(dim,),
            chunks=per_shard if by_row else (length,),
            # Retiring a row rewrites a chunk of last_version. Were it part of a larger object,
            # a reader between two requests to that object would find its chunks moved.
            shards=object_rows if by_row and name != LAST_VERSION else None,
            fill="" if dtype == STRING else NEVER if name in (FIRST_VERSION, LAST_VERSION) else 0,
            attributes={"long_name": text},
        )

    rows = [
        ("image", STRING, "name of the image"),
        ("height", "int32", "height of the image in pixels; below it is padding"),
        ("width", "int32", "width of the image in pixels; beyond it is padding"),
        ("grid_height", "int32", "height of the image's output grid"),
        ("grid_width", "int32", "width of the image's output grid"),
        ("digest", STRING, "SHA-256 of the image and its label"),
        (FIRST_VERSION, "int32", "version of the store that added the row"),
        (LAST_VERSION, "int32", "last version that has the row; 2147483647 while it is current"),
    ]
    labels = [("class", STRING, schema.num_classes, "class", "name of the class")]
    if groups(schema):
        region = "a boundary pixel has a neighbour of another label"
        labels += [
            ("statistics/region", STRING, 2, "region", region),
            ("statistics/outcome", STRING, 3, "outcome", "prediction against label"),
            ("statistics/quantity", STRING, len(QUANTITIES), "quantity", "what is summed"),
            (
                "statistics/discrepancy_bin",
                "float32",
                NUM_DISCREPANCY_BINS,
                "discrepancy_bin",
                "lower edge of the bin",
            ),
        ]
    absent = set(MapSchema.sizes) - set(schema.sizes)
    specs = [spec(name, dtype, num_rows, "image", text) for name, dtype, text in rows
             if name not in absent]  # fmt: skip
    specs += [spec(*label) for label in labels]
    return {item.name: item for item in specs}


def all_specs(schema: Schema, num_rows: int) -> dict[str, ArraySpec]:
    """Every array of a store."""
    done = done_spec(schema, num_rows)
    return (
        map_specs(schema, num_rows)
        | coordinate_specs(schema, num_rows)
        | {done.name: done}
        | statistics_specs(schema, num_rows)
    )


def consolidated_metadata(schema: Schema, num_rows: int) -> dict[str, Any]:
    """Metadata of every array and group below the root, as readers of a version see it."""
    nodes: dict[str, Any] = {name: json.loads(group_metadata({})) for name in groups(schema)}
    for name, spec in all_specs(schema, num_rows).items():
        nodes[name] = json.loads(array_metadata(spec))
    return {name: nodes[name] for name in sorted(nodes)}


def groups(schema: Schema) -> tuple[str, ...]:
    """Names of the groups of arrays below the root."""
    return () if isinstance(schema, PackSchema) else ("statistics",)


def array_metadata(spec: ArraySpec) -> bytes:
    """The content of the array's ``zarr.json``."""
    objects: dict[str, Buffer] = {}
    _create(spec, objects)
    return objects[f"{spec.name}/zarr.json"].to_bytes()


def encode_objects(
    spec: ArraySpec,
    data: npt.NDArray[Any],
    first: int = 0,
    present: npt.NDArray[np.bool_] | None = None,
) -> dict[str, bytes]:
    """Encode rows that begin at a unit's border.

    Args:
        spec: The array.
        data: The rows; the axes after the first have the array's full length.
        first: Index along the first axis of the unit (shard, or chunk) with the first row.
        present: Which of the rows to store; of a sharded array the others get no chunk, as if
            they had never been written. None stores all of them.

    Returns:
        Key and content of each object; rows missing from the last unit are left as fill.
    """
    objects: dict[str, Buffer] = {}
    array = _create(replace(spec, shape=data.shape), objects)
    if present is None or present.all():
        array[...] = data
    else:
        edges = np.flatnonzero(np.diff(present, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2).tolist():
            array[start:stop] = data[start:stop]
    prefix = f"{spec.name}/c/"
    encoded = {}
    for key, content in objects.items():
        if key.startswith(prefix):
            index, *rest = key.removeprefix(prefix).split("/")
            encoded[prefix + "/".join([str(int(index) + first), *rest])] = content.to_bytes()
    return encoded


def decode_object(
    spec: ArraySpec, content: bytes, rows: int, select: slice | None = None
) -> npt.NDArray[Any]:
    """Decode one stored object, by the array's specification and not by stored metadata.

    Args:
        spec: The array.
        content: The object: a shard, or a chunk where there are no shards.
        rows: Rows of the array that lie in it.

        select: The rows to decode, counted from the object's first; None decodes all of them.

    Raises:
        ValueError, RuntimeError: A checksum fails, or the content is no such object.
    """
    objects: dict[str, Buffer] = {}
    array = _create(replace(spec, shape=(rows, *spec.shape[1:])), objects)
    objects[object_key(spec, 0)] = default_buffer_prototype().buffer.from_bytes(content)
    return np.asarray(array[... if select is None else select])


def object_key(spec: ArraySpec, index: int) -> str:
    """Key of the object that holds the rows of one unit along the first axis.

    All axes but the first lie in one unit.
    """
    return "/".join([spec.name, "c", str(index), *("0" for _ in spec.shape[1:])])


def group_metadata(
    attributes: Mapping[str, Any], consolidated: Mapping[str, Any] | None = None
) -> bytes:
    """The content of a group's ``zarr.json``."""
    document: dict[str, Any] = {
        "attributes": dict(attributes),
        "zarr_format": 3,
        "node_type": "group",
    }
    if consolidated is not None:
        document["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": dict(consolidated),
        }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()


def _create(spec: ArraySpec, objects: dict[str, Buffer]) -> zarr.Array[Any]:
    return zarr.create_array(
        zarr.storage.MemoryStore(objects),
        name=spec.name,
        shape=spec.shape,
        dtype=str if spec.dtype == STRING else spec.dtype,
        chunks=spec.chunks,
        shards=spec.shards,
        compressors=ZstdCodec(level=3, checksum=True),
        fill_value=spec.fill,
        dimension_names=spec.dims,
        attributes=spec.attributes,
        # An all-fill chunk is written too, so that a missing one always means missing.
        config={"write_empty_chunks": True},
    )


def _balanced_chunk(length: int, limit: int) -> int:
    """Largest chunk length within the limit that cuts an axis into even parts."""
    return math.ceil(length / math.ceil(length / limit))
