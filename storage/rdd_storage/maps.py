"""The maps of one image, as the teacher pass hands them to the writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rdd_storage.errors import ShardDataError
from rdd_storage.quantise import CONFIDENCE_UNWRITTEN
from rdd_storage.schema import ImageRecord, MapSchema

_Array = TypeVar("_Array", bound=npt.NDArray[np.generic])

IGNORE_LABEL = 255
"""Label of pixels without a class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMaps:
    """Maps of one image, H x W pixels, h x w grid points, C classes."""

    image_id: str
    discrepancy: npt.NDArray[np.float32] | npt.NDArray[np.float16]
    """float32 or float16 (h, w), nats, finite and >= 0."""
    hardness: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    """Codes of :func:`~rdd_storage.quantise.encode_hardness`, (H, W)."""
    prediction: npt.NDArray[np.uint8]
    """uint8 (H, W), class of the highest probability, 0..C-1."""
    confidence: npt.NDArray[np.uint8]
    """Codes of :func:`~rdd_storage.quantise.encode_confidence`, (H, W)."""
    label: npt.NDArray[np.uint8]
    """uint8 (H, W), 0..C-1 or 255; used for the statistics and not stored."""
    aux_hardness: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    """Like ``hardness``, of the auxiliary head; None where the schema has none."""
    logits: npt.NDArray[np.float16] | None = None
    """Result of :func:`~rdd_storage.quantise.encode_logits`, (C, h, w); None without logits."""
    aux_logits: npt.NDArray[np.float16] | None = None
    """Like ``logits``, of the auxiliary head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLogits:
    """Logits alone of one image, for a store whose other maps are there."""

    image_id: str
    logits: npt.NDArray[np.float16]
    """As in :class:`ImageMaps`."""


def check_maps(maps: ImageMaps, record: ImageRecord, schema: MapSchema) -> None:
    """Refuse maps that do not fit the schema or the image.

    Raises:
        ShardDataError: Wrong shape, dtype, NaN or value; the message names image and array.
    """
    size = (record.height, record.width)
    grid = (record.grid_height, record.grid_width)
    classes = schema.num_classes
    where = f"image {record.image_id}"

    check_array(where, "label", maps.label, size, "uint8")
    check_codes(where, "label", maps.label, classes - 1, IGNORE_LABEL)
    check_array(where, "prediction", maps.prediction, size, "uint8")
    check_codes(where, "prediction", maps.prediction, classes - 1, None)
    check_array(where, "confidence", maps.confidence, size, "uint8")
    check_codes(where, "confidence", maps.confidence, CONFIDENCE_UNWRITTEN - 1, None)

    ignored = maps.label == IGNORE_LABEL
    for name, wanted in (("hardness", True), ("aux_hardness", schema.aux_hardness)):
        codes = _optional(where, name, getattr(maps, name), wanted)
        if codes is None:
            continue
        codec = schema.codec
        check_array(where, name, codes, size, codec.dtype.name)
        check_codes(where, name, codes, codec.max_code, codec.ignored)
        if not np.array_equal(codes == codec.ignored, ignored):
            raise ShardDataError(
                f"{where}: {name}: expected the code {codec.ignored} exactly at the pixels whose "
                f"label is {IGNORE_LABEL}, got others; encode it with valid = label != "
                f"{IGNORE_LABEL}"
            )

    check_array(where, "discrepancy", maps.discrepancy, grid, "float32", "float16")
    _check_range(where, "discrepancy", maps.discrepancy, 0.0, np.inf)
    for name, wanted in (("logits", schema.logits), ("aux_logits", schema.aux_logits)):
        check_logits(name, getattr(maps, name), record, schema, wanted=wanted)


def check_logits(
    name: str,
    logits: npt.NDArray[np.float16] | None,
    record: ImageRecord,
    schema: MapSchema,
    *,
    wanted: bool,
) -> None:
    """Refuse logits that do not fit the schema or the image; see :func:`check_maps`."""
    where = f"image {record.image_id}"
    given = _optional(where, name, logits, wanted)
    if given is not None:
        shape = (schema.num_classes, record.grid_height, record.grid_width)
        check_array(where, name, given, shape, "float16")
        _check_range(where, name, given, -np.inf, 0.0)


def _optional(where: str, name: str, array: _Array | None, wanted: bool) -> _Array | None:
    if wanted == (array is not None):
        return array
    expected, got = ("an array", "None") if wanted else ("None", "an array")
    raise ShardDataError(
        f"{where}: {name}: expected {expected}, got {got}; the store's schema has {name} = {wanted}"
    )


def check_array(where: str, name: str, array: object, shape: tuple[int, ...], *dtypes: str) -> None:
    """Refuse what is no array of this shape and one of these dtypes.

    Raises:
        ShardDataError: It is not.
    """
    if not isinstance(array, np.ndarray):
        raise ShardDataError(f"{where}: {name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise ShardDataError(
            f"{where}: {name}: expected dtype {' or '.join(dtypes)}, got {array.dtype.name}"
        )
    if array.shape != shape:
        raise ShardDataError(
            f"{where}: {name}: expected shape {shape}, got {array.shape}; the sizes come from the "
            "image's record"
        )


def check_codes(
    where: str, name: str, codes: npt.NDArray[np.integer], largest: int, special: int | None
) -> None:
    """Refuse codes beyond the largest, but for a special one.

    Raises:
        ShardDataError: There are such codes.
    """
    if int(codes.max()) <= largest:
        return
    wrong = codes[(codes > largest) & (codes != special)] if special is not None else codes
    if wrong.size == 0:
        return
    also = f" or {special}" if special is not None else ""
    raise ShardDataError(
        f"{where}: {name}: expected values 0 to {largest}{also}, got {int(wrong.max())}"
    )


def _check_range(
    where: str, name: str, array: npt.NDArray[np.generic], low: float, high: float
) -> None:
    least, most = float(array.min()), float(array.max())
    if np.isfinite(least) and np.isfinite(most) and low <= least and most <= high:
        return
    finite = "finite values" + (" >= 0" if low == 0.0 else " <= 0")
    raise ShardDataError(
        f"{where}: {name}: expected {finite}, got {least:.6g} to {most:.6g}; encode it with "
        f"rdd_storage.encode_{name.removeprefix('aux_')}"
    )
