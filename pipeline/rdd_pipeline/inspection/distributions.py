"""How hardness is spread: over classes, regions, pairs of label and prediction, and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError
from rdd_pipeline.inspection.images import SourceImages
from rdd_pipeline.inspection.measures import HARDNESS, hardness_measures
from rdd_pipeline.inspection.pixels import over_images
from rdd_pipeline.inspection.summary import Progress
from rdd_pipeline.inspection.text import MOST_LINES, text_table
from rdd_storage import MapReader, hardness_table

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

REGIONS = ("interior", "boundary", "all")
_MOST_CLASSES = 6  # columns of an overview's text


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassDistributions:
    """Hardness of the labelled pixels of C classes, inside of regions and at their boundaries.

    A boundary pixel has a neighbour of another label above, below, left or right.
    """

    class_names: tuple[str, ...]
    counts: NDArray[np.uint64]
    """(C, 2, 251): pixels by class, region (interior, boundary) and code."""

    def __repr__(self) -> str:
        rows = [row for row in self.table() if row["region"] == "all"]
        columns = ("class", "pixels", "mean", "p95", "hard_share")
        title = f"ClassDistributions: hardness of {len(self.class_names)} classes"
        return text_table(title, rows, columns, total=len(rows))

    @property
    def hardness(self) -> NDArray[np.float64]:
        """(251,): hardness of each code."""
        return HARDNESS

    def quantile(self, share: float) -> NDArray[np.float64]:
        """(C, 3): least hardness that at least this share of the pixels do not exceed.

        The columns are :data:`REGIONS`; NaN without pixels.
        """
        counts = self._with_all()
        below = np.cumsum(counts, axis=-1)
        total = below[..., -1]
        place = np.argmax(below >= np.maximum(share * total, 1)[..., None], axis=-1)
        return np.where(total > 0, HARDNESS[place], np.nan)

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each class and region."""
        measures = hardness_measures(self._with_all())
        return [
            {
                "class": name, "region": region, "pixels": int(measures.pixels[row, column]),
                "mean": float(measures.mean[row, column]),
                "p95": float(measures.p95[row, column]),
                "hard_share": float(measures.hard_share[row, column]),
            }
            for row, name in enumerate(self.class_names)
            for column, region in enumerate(REGIONS)
        ]  # fmt: skip

    def to_xarray(self) -> xarray.DataArray:
        """The counts with names and hardness as coordinates."""
        from rdd_pipeline.inspection.export import labelled

        return labelled(
            self.counts,
            {"class": self.class_names, "region": REGIONS[:2], "hardness": HARDNESS},
            "pixels",
        )

    def figure(self) -> Figure:
        """Quantiles and means of each class, interior and boundary."""
        from rdd_pipeline.inspection.figures import distribution_figure

        return distribution_figure(self)

    def _with_all(self) -> NDArray[np.uint64]:
        return np.concatenate([self.counts, self.counts.sum(axis=1, keepdims=True)], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Pixels by label (rows) and the teacher's prediction (columns)."""

    class_names: tuple[str, ...]
    counts: NDArray[np.uint64]
    """(C, C)."""
    mean_hardness: NDArray[np.float64] | None
    """(C, C): mean hardness of each cell's pixels, NaN without; None where it was not asked for."""
    images: int
    """How many images were counted."""

    def __repr__(self) -> str:
        rows = self.table()
        columns = ("label", "prediction", "pixels", "share_of_label")
        title = f"Confusion: {self.images} images, {len(self.class_names)} classes"
        return text_table(title, rows, columns, total=len(rows))

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each cell with pixels, the largest confusions first."""
        cells = [
            {
                "label": self.class_names[row], "prediction": self.class_names[column],
                "pixels": int(self.counts[row, column]),
                "share_of_label": float(self.counts[row, column] / self.counts[row].sum()),
                "mean_hardness": None if self.mean_hardness is None
                else float(self.mean_hardness[row, column]),
            }
            for row, column in zip(*np.nonzero(self.counts), strict=True)
        ]  # fmt: skip
        return sorted(
            cells, key=lambda cell: (cell["label"] == cell["prediction"], -cell["pixels"])
        )

    def to_xarray(self) -> xarray.DataArray:
        """The counts with the names of the classes as coordinates."""
        from rdd_pipeline.inspection.export import labelled

        names = {"label": self.class_names, "prediction": self.class_names}
        return labelled(self.counts, names, "pixels")

    def figure(self) -> Figure:
        """Shares of each label's pixels, and the mean hardness of each cell where it is known."""
        from rdd_pipeline.inspection.figures import confusion_figure

        return confusion_figure(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """One measure of n images by C classes; NaN where an image has no pixel of a class."""

    by: str
    title: str
    """What the measure is called."""
    image_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    values: NDArray[np.float32]
    """(n, C)."""
    pixels: NDArray[np.uint32]
    """(n, C)."""

    def __repr__(self) -> str:
        images, classes = self.values.shape
        title = f"Overview: {self.title}, {images} images, {classes} classes"
        shown = self.class_names[:_MOST_CLASSES]
        first = [
            {"image": name, **dict(zip(shown, map(float, row), strict=False))}
            for name, row in zip(self.image_ids[:MOST_LINES], self.values, strict=False)
        ]
        return text_table(title, first, ("image", *shown), total=images)

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each image: its name, and the value of each class."""
        return [
            {"image": name, **dict(zip(self.class_names, map(float, row), strict=True))}
            for name, row in zip(self.image_ids, self.values, strict=True)
        ]

    def to_xarray(self) -> xarray.DataArray:
        """The values with the names of images and classes as coordinates."""
        from rdd_pipeline.inspection.export import labelled

        names = {"image": self.image_ids, "class": self.class_names}
        return labelled(self.values, names, self.by)

    def figure(self, images: int = 40) -> Figure:
        """The first images as a coloured table."""
        from rdd_pipeline.inspection.figures import overview_figure

        return overview_figure(self, images)


def confusion_with_hardness(
    reader: MapReader,
    source: SourceImages,
    images: Sequence[str] | None,
    progress: Progress | None = None,
) -> Confusion:
    """Confusion and the mean hardness of each cell, from the maps and labels.

    Raises:
        DataNeededError: There is no data set, or an image has changed since the build.
        EmptySelectionError: No images.
    """
    source.require("the hardness of each pair of label and prediction")
    chosen = list(reader.image_ids if images is None else dict.fromkeys(images))
    if not chosen:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    classes = reader.schema.num_classes
    counts, sums = np.zeros((classes, classes), np.uint64), np.zeros((classes, classes))
    for part in over_images(_CellCounter(reader, source), chosen, progress=progress):
        for pixels, hardness in part:
            counts += pixels
            sums += hardness
    mean = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=mean, where=counts > 0)
    return Confusion(
        class_names=reader.schema.class_names, counts=counts, mean_hardness=mean,
        images=len(chosen),
    )  # fmt: skip


@dataclass(frozen=True)
class _CellCounter:
    """Pixels, and sums of hardness, by label and prediction of one image. Picklable."""

    reader: MapReader
    source: SourceImages

    def __call__(self, image_id: str) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        label = self.source.sample(image_id).label
        prediction, codes = self.reader.read_many(
            [("prediction", image_id, None), ("hardness", image_id, None)]
        )
        schema = self.reader.schema
        known = codes != schema.codec.ignored
        classes = schema.num_classes
        cells = label[known].astype(np.intp) * classes + prediction[known]
        hardness = hardness_table(schema.hardness_bits)[codes[known]]
        shape = (classes, classes)
        counts = np.bincount(cells, minlength=classes**2).reshape(shape)
        sums = np.bincount(cells, weights=hardness, minlength=classes**2).reshape(shape)
        return counts.astype(np.uint64), sums.astype(np.float64, copy=False)
