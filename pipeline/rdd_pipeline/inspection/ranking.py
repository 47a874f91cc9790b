"""Images in order of their difficulty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError
from rdd_pipeline.inspection.measures import (
    EASY_ABOVE,
    MEASURES,
    TEMPERATURE,
    THRESHOLD,
    check_measure,
    check_settings,
    hardness_measures,
)
from rdd_pipeline.inspection.summary import ImageMeasures, Progress
from rdd_pipeline.inspection.text import MOST_LINES, text_table
from rdd_storage import MapReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rdd_pipeline.inspection.maps import Maps

_HARDNESS = ("mean", "p95", "soft_min", "hard_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedImage:
    """One image and its measures, of all its labelled pixels or of those of a class."""

    image_id: str
    pixels: int
    mean: float
    """Mean hardness."""
    p95: float
    """95th percentile of the hardness."""
    soft_min: float
    """Soft minimum of the true-class probability; low where the image is difficult."""
    hard_share: float
    """Share of pixels with a true-class probability of at most the threshold."""
    error: float
    """Share of pixels that the teacher predicts wrong."""
    discrepancy: float
    """Mean discrepancy of the whole image, nats."""
    weight: float
    """Mean of exp(-discrepancy) of the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking(Sequence[RankedImage]):
    """Images in order, the most difficult first unless the easiest were asked for."""

    by: str
    class_name: str | None
    """The class whose pixels count; None for all."""
    threshold: float
    temperature: float
    easiest: bool
    total: int
    """Images with such pixels, of which these are the first."""
    images: tuple[RankedImage, ...]
    maps: Maps | None = field(default=None, repr=False)
    """Where pictures come from."""

    @property
    def title(self) -> str:
        """What the list shows, in words."""
        of = "" if self.class_name is None else f" of {self.class_name}"
        which = "easiest" if self.easiest else "hardest"
        return f"{len(self)} {which} of {self.total} images, by {MEASURES[self.by]}{of}"

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The names in order."""
        return tuple(image.image_id for image in self.images)

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> RankedImage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RankedImage, ...]: ...
    def __getitem__(self, index: int | slice) -> RankedImage | tuple[RankedImage, ...]:
        return self.images[index]

    def __iter__(self) -> Iterator[RankedImage]:
        return iter(self.images)

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each image, with its place."""
        return [{"place": place} | _as_dict(image) for place, image in enumerate(self.images, 1)]

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """The columns of the table."""
        return {
            item.name: np.array([getattr(image, item.name) for image in self.images])
            for item in fields(RankedImage)
        }

    def __repr__(self) -> str:
        first = [_as_dict(image) for image in self.images[:MOST_LINES]]
        columns = ("image_id", "pixels", *MEASURES)
        return text_table(f"Ranking: {self.title}", first, columns, total=len(self))

    def figure(self, images: int = 4) -> Figure:
        """The maps of the first images, a row for each."""
        from rdd_pipeline.inspection.figures import gallery_figure

        if self.maps is None:
            raise EmptySelectionError("expected a ranking with its maps, got one without")
        return gallery_figure([self.maps[name] for name in self.image_ids[:images]])

    def _repr_html_(self) -> str:
        from rdd_pipeline.inspection.html import ranking_html

        return ranking_html(self)


def measure_images(
    reader: MapReader,
    measures: ImageMeasures,
    class_index: int | None,
    *,
    threshold: float = THRESHOLD,
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """All measures of all images, (N,) each; NaN where an image has no such pixels.

    Other settings than 0.7 and 0.1 take a pass over the store's counts.
    """
    check_settings(threshold, temperature)
    pixels = measures.pixels
    wrong = np.full(len(pixels), np.nan)
    np.divide(pixels - measures.correct, pixels, out=wrong, where=pixels > 0)
    columns: dict[str, NDArray[Any]] = {
        "pixels": pixels,
        **{name: getattr(measures, name) for name in _HARDNESS},
        "error": wrong,
        "discrepancy": measures.discrepancy,
        "weight": measures.weight,
    }
    if (threshold, temperature) != (THRESHOLD, TEMPERATURE):
        parts = []
        for names, counts in reader.iter_statistics(("hardness",)):
            of_class = slice(None) if class_index is None else slice(class_index, class_index + 1)
            codes = counts["hardness"][:, of_class].sum(axis=(1, 2))
            parts.append(hardness_measures(codes, threshold=threshold, temperature=temperature))
            if progress is not None:
                progress(len(names))
        for name in ("soft_min", "hard_share"):
            columns[name] = np.concatenate([getattr(part, name) for part in parts])
    return columns


def rank_images(
    image_ids: Sequence[str],
    columns: dict[str, NDArray[Any]],
    n: int,
    *,
    by: str,
    class_name: str | None,
    easiest: bool,
    min_pixels: int,
    threshold: float,
    temperature: float,
    maps: Maps | None,
) -> Ranking:
    """The first images by one measure; ties keep the order of the store.

    Raises:
        InspectionError: There is no such measure.
        EmptySelectionError: Fewer than one image asked for, or none has enough such pixels.
    """
    check_measure(by, of_class=class_name is not None)
    if n < 1:
        raise EmptySelectionError(f"n: expected at least 1 image, got {n}")
    values = columns[by].astype(np.float64)
    rising = (by in EASY_ABOVE) != easiest
    some = np.flatnonzero((columns["pixels"] >= max(min_pixels, 1)) & ~np.isnan(values))
    if not some.size:
        what = "labelled pixels" if class_name is None else f"pixels of {class_name!r}"
        raise EmptySelectionError(
            f"expected images with at least {max(min_pixels, 1)} {what}, got none; lower "
            "min_pixels or choose another class"
        )
    total = int(some.size)
    keys = values[some] if rising else -values[some]
    if n < total:  # the few that are shown, then their order
        near = np.partition(keys, n - 1)[n - 1]
        kept = keys <= near
        some, keys = some[kept], keys[kept]
    order = some[np.argsort(keys, kind="stable")][:n]
    names = [item.name for item in fields(RankedImage) if item.name != "image_id"]
    return Ranking(
        by=by,
        class_name=class_name,
        threshold=threshold,
        temperature=temperature,
        easiest=easiest,
        total=total,
        images=tuple(
            RankedImage(
                image_id=image_ids[index],
                **{name: columns[name][index].item() for name in names},
            )
            for index in order.tolist()
        ),
        maps=maps,
    )


def _as_dict(image: RankedImage) -> dict[str, Any]:
    return {item.name: getattr(image, item.name) for item in fields(RankedImage)}
