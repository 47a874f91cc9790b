"""One image and its label, as they are handed to the writer of a pack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rdd_storage.maps import IGNORE_LABEL, check_array, check_codes
from rdd_storage.schema import ImageRecord, PackSchema


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedImage:
    """A decoded image and its label, H x W pixels, C classes."""

    image_id: str
    rgb: npt.NDArray[np.uint8]
    """uint8 (H, W, 3)."""
    label: npt.NDArray[np.uint8]
    """uint8 (H, W), 0..C-1 or 255 where ignored."""


def check_packed(image: PackedImage, record: ImageRecord, schema: PackSchema) -> None:
    """Refuse an image that does not fit the schema or its record.

    Raises:
        ShardDataError: Wrong shape, dtype or value; the message names image and array.
    """
    size = (record.height, record.width)
    where = f"image {record.image_id}"
    check_array(where, "rgb", image.rgb, (*size, 3), "uint8")
    check_array(where, "label", image.label, size, "uint8")
    check_codes(where, "label", image.label, schema.num_classes - 1, IGNORE_LABEL)
