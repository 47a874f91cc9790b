"""One image of a store: its maps as arrays in physical units, and pictures of them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data.geometry import CropWindow, resample_field
from rdd_pipeline.inspection.images import SourceImages
from rdd_storage import (
    ImageRecord,
    MapReader,
    UnknownArrayError,
    confidence_table,
    hardness_table,
    true_prob_table,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

_Value = TypeVar("_Value", bound=np.generic)

_COMMANDS = {
    "aux_hardness": "maps.aux_hardness=true",
    "logits": "maps.soft_labels=true",
    "aux_logits": "maps.soft_labels=true",
}


def require_array(reader: MapReader, array: str) -> None:
    """Refuse an array that the store was built without.

    Raises:
        UnknownArrayError: The message has the command that builds a store with it.
    """
    if array in reader.arrays:
        return
    option = _COMMANDS.get(array)
    remedy = (
        f"build one that has it with: rdd maps build CONFIG --set {option}"
        if option
        else f"choose one of {', '.join(reader.arrays)}"
    )
    raise UnknownArrayError(
        f"{reader.path}: expected a store with the array {array!r}, got one without; {remedy}"
    )


class ImageView:
    """The maps of one image, H x W pixels; each is read when it is first asked for.

    Arrays are read-only and in physical units. Pixels without a label have NaN hardness; the store
    knows the label no further, ``label`` comes from the data set.
    """

    def __init__(self, reader: MapReader, source: SourceImages, image_id: str) -> None:
        self._reader, self._source = reader, source
        self.record: ImageRecord = reader.record(image_id)
        """Sizes and digest."""

    def __repr__(self) -> str:
        height, width = self.size
        return f"ImageView({self.image_id!r}, {height} x {width})"

    def _repr_png_(self) -> bytes:
        from rdd_pipeline.inspection.figures import png_bytes

        return png_bytes(self.figure())

    @property
    def image_id(self) -> str:
        """Name of the image."""
        return self.record.image_id

    @property
    def size(self) -> tuple[int, int]:
        """H and W, pixels."""
        return self.record.height, self.record.width

    @cached_property
    def problem(self) -> str:
        """Why image and label cannot be shown, such as a changed digest; empty where they can."""
        return self._source.problem(self.image_id)

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """RGB (H, W, 3), from the data set.

        Raises:
            DataNeededError: There is no data set, or the image is not the one of the maps.
        """
        return self._sample[0]

    @cached_property
    def label(self) -> NDArray[np.uint8]:
        """Classes (H, W), 255 where ignored, from the data set.

        Raises:
            DataNeededError: There is no data set, or the image is not the one of the maps.
        """
        return self._sample[1]

    @cached_property
    def prediction(self) -> NDArray[np.uint8]:
        """The teacher's classes (H, W)."""
        return _frozen(self._read("prediction").astype(np.uint8, copy=False))

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """Probability of the predicted class (H, W), in [0, 1]."""
        return _frozen(confidence_table()[self._read("confidence")])

    @cached_property
    def hardness_codes(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Stored codes of the hardness (H, W), see docs/store-format.md, section 4."""
        codes = self._read("hardness")
        codes.flags.writeable = False
        return codes

    @cached_property
    def hardness(self) -> NDArray[np.float32]:
        """``sqrt(1 - p)`` (H, W), in [0, 1], p the probability of the label; NaN without label."""
        return _frozen(hardness_table(self._bits)[self.hardness_codes])

    @cached_property
    def true_prob(self) -> NDArray[np.float32]:
        """p (H, W), in [0, 1]; NaN without label."""
        prob = true_prob_table(self._bits)[self.hardness_codes]
        prob[~self.valid] = np.nan
        return _frozen(prob)

    @cached_property
    def aux_hardness(self) -> NDArray[np.float32]:
        """The hardness under the auxiliary head (H, W).

        Raises:
            UnknownArrayError: The store was built without.
        """
        return _frozen(hardness_table(self._bits)[self._read("aux_hardness")])

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Where there is a label, (H, W)."""
        return _frozen(self.hardness_codes != self._reader.schema.codec.ignored)

    @cached_property
    def discrepancy(self) -> NDArray[np.float32]:
        """Prediction discrepancy on the output grid (h, w), nats."""
        return _frozen(self._read("discrepancy").astype(np.float32))

    @cached_property
    def weight(self) -> NDArray[np.float32]:
        """``exp(-discrepancy)`` interpolated to the pixels (H, W), in (0, 1], as in training."""
        grid = self.discrepancy.shape
        whole = CropWindow(
            source_size=self.size, scaled_size=self.size, crop_size=self.size, offset=(0, 0)
        )
        return _frozen(resample_field(np.exp(-self.discrepancy), whole, (grid[0], grid[1])))

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """The teacher's logits on the output grid (C, h, w), the largest over the classes 0.

        Raises:
            UnknownArrayError: The store was built without.
        """
        return _frozen(self._read("logits").astype(np.float32))

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """The stored maps by name, in physical units; image and label where they can be read."""
        names = ["prediction", "confidence", "hardness", "discrepancy", "weight"]
        names += [name for name in ("aux_hardness", "logits") if name in self._reader.arrays]
        names += [] if self.problem else ["image", "label"]
        return {name: getattr(self, name) for name in names}

    def to_xarray(self) -> xarray.Dataset:
        """The same as an xarray data set, without padding.

        Raises:
            ExtraNotInstalledError: xarray is not installed.
        """
        from rdd_pipeline.inspection.export import image_dataset

        return image_dataset(self)

    def figure(self) -> Figure:
        """Image, label, prediction, confidence, weight and hardness side by side."""
        from rdd_pipeline.inspection.figures import image_figure

        return image_figure(self)

    @property
    def palette(self) -> NDArray[np.uint8]:
        """RGB (C, 3) of the classes."""
        return class_palette(self._reader, self._source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return self._reader.schema.class_names

    @property
    def _bits(self) -> int:
        return self._reader.schema.hardness_bits

    @cached_property
    def _sample(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        sample = self._source.sample(self.image_id)
        return sample.image, sample.label

    def _read(self, array: str) -> NDArray[Any]:
        require_array(self._reader, array)
        return self._reader.read(array, self.image_id)


def class_palette(reader: MapReader, source: SourceImages) -> NDArray[np.uint8]:
    """RGB (C, 3): the store's colours, or the data set's, or greys where there are none."""
    colours = reader.attributes.get("palette")
    if not colours and source.dataset is not None:
        colours = source.dataset.palette
    if not colours:
        levels = np.linspace(30, 225, reader.schema.num_classes)
        colours = np.repeat(levels[:, None], 3, axis=1)
    return np.asarray(colours, np.uint8).reshape(-1, 3)


def _frozen(array: NDArray[_Value]) -> NDArray[_Value]:
    """What is kept and handed out twice must not be changed by the first who gets it."""
    array.flags.writeable = False
    return array
