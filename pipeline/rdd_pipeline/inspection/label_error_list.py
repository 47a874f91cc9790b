"""Label errors that were found: tables, pictures, and files for other tools."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.files import write_atomically
from rdd_pipeline.inspection.errors import EmptySelectionError, InspectionError
from rdd_pipeline.inspection.export import write_csv
from rdd_pipeline.inspection.pictures import png
from rdd_pipeline.inspection.run_lengths import decode_mask
from rdd_pipeline.inspection.text import MOST_LINES, text_table
from rdd_storage import ExtraNotInstalledError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rdd_pipeline.inspection.maps import Maps


# Of a pixel. FiftyOne rounds the edges of boxes down, and 29 / 100 * 100 is 28.999999999999996.
_NUDGE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelError:
    """Adjacent pixels of one label class in which the teacher is sure of one other class."""

    image_id: str
    label: str
    """Class of the label."""
    suggestion: str
    """Class that the teacher predicts."""
    score: float
    """``ln(confidence / (true_prob + 0.001)) * ln(1 + depth)``; high is suspicious."""
    true_prob: float
    """Mean probability of the label's class."""
    confidence: float
    """Mean probability of the suggestion."""
    area: int
    """Pixels."""
    depth: int
    """Pixels from the innermost pixel to the edge of the region; a line has 1."""
    bbox: tuple[int, int, int, int]
    """x, y, width and height, pixels."""
    centroid: tuple[float, float]
    """x and y of the mean pixel."""
    size: tuple[int, int]
    """H and W of the image."""
    counts: tuple[int, ...] = field(repr=False)
    """The region as run lengths, see :mod:`rdd_pipeline.inspection.run_lengths`."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The region, bool (H, W)."""
        return decode_mask(self.counts, self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelErrors(Sequence[LabelError]):
    """Label errors of a store's images, the most suspicious first."""

    errors: tuple[LabelError, ...]
    total: int
    """Regions found, of which these are the first."""
    images: int
    """Images whose labels were looked at, or needed no look: see ``skipped``."""
    skipped: int
    """Images that cannot have such a region by their counts alone."""
    problems: Mapping[str, str]
    """Images left out, such as those that have changed since the build, and why."""
    maps: Maps = field(repr=False)
    """Where classes and images come from."""

    def __len__(self) -> int:
        return len(self.errors)

    @overload
    def __getitem__(self, index: int) -> LabelError: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LabelError, ...]: ...
    def __getitem__(self, index: int | slice) -> LabelError | tuple[LabelError, ...]:
        return self.errors[index]

    def __iter__(self) -> Iterator[LabelError]:
        return iter(self.errors)

    def __repr__(self) -> str:
        columns = ("image_id", "label", "suggestion", "score", "area", "depth")
        first = [{name: getattr(error, name) for name in columns}
                 for error in self.errors[:MOST_LINES]]  # fmt: skip
        title = f"LabelErrors: {len(self)} of {self.total} regions in {self.images} images"
        return text_table(title, first, columns, total=len(self))

    def by_image(self) -> dict[str, list[LabelError]]:
        """The errors of each image that has any, the image with the most suspicious one first."""
        found: dict[str, list[LabelError]] = {}
        for error in self.errors:
            found.setdefault(error.image_id, []).append(error)
        return found

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each error; the mask as run lengths, in a string."""
        rows = []
        for rank, error in enumerate(self.errors, start=1):
            row: dict[str, Any] = {"rank": rank, **asdict(error)}
            bbox, centroid = row.pop("bbox"), row.pop("centroid")
            size, counts = row.pop("size"), row.pop("counts")
            row |= dict(zip(("x", "y", "width", "height"), bbox, strict=True))
            row |= dict(zip(("centroid_x", "centroid_y"), centroid, strict=True))
            row |= dict(zip(("image_height", "image_width"), size, strict=True))
            rows.append(row | {"counts": " ".join(map(str, counts))})
        return rows

    def to_csv(self, path: str | PathLike[str]) -> Path:
        """Write :meth:`table`.

        Raises:
            EmptySelectionError: There are no errors.
            OSError: The file cannot be written.
        """
        return write_csv(self, Path(path))

    def to_coco(
        self,
        path: str | PathLike[str],
        *,
        file_name: Callable[[str], str] | None = None,
    ) -> Path:
        """Write COCO annotations: a category is a suggestion, the label is in ``attributes``.

        Masks are uncompressed run lengths, which pycocotools and FiftyOne read. Categories are
        numbered from 1 in the order of the store's classes; ``score`` is the score.

        Args:
            path: The JSON file, replaced if it exists.
            file_name: Name of an image's file; by default as :meth:`write_images` names it.

        Raises:
            EmptySelectionError: There are no errors.
            OSError: The file cannot be written.
        """
        self._require_some(str(path))
        number = {name: index for index, name in enumerate(self.maps.class_names, start=1)}
        images = {error.image_id: error.size for error in self.errors}
        places = {name: place for place, name in enumerate(images, start=1)}
        naming = image_file if file_name is None else file_name
        tree = {
            "info": {"description": f"possible label errors of {self.maps.path}"},
            "categories": [{"id": index, "name": name} for name, index in number.items()],
            "images": [
                {"id": places[name], "file_name": naming(name), "height": h, "width": w}
                for name, (h, w) in images.items()
            ],
            "annotations": [
                {
                    "id": rank,
                    "image_id": places[error.image_id],
                    "category_id": number[error.suggestion],
                    "segmentation": {"size": list(error.size), "counts": list(error.counts)},
                    "area": error.area,
                    "bbox": list(error.bbox),
                    "iscrowd": 0,
                    "score": error.score,
                    "attributes": {
                        "label": error.label,
                        "true_prob": error.true_prob,
                        "confidence": error.confidence,
                        "depth": error.depth,
                    },
                }
                for rank, error in enumerate(self.errors, start=1)
            ],
        }
        text = json.dumps(tree, allow_nan=False)
        target = Path(path)
        write_atomically(target, lambda partial: partial.write_text(text, encoding="utf-8"))
        return target

    def write_images(self, folder: str | PathLike[str]) -> dict[str, Path]:
        """Write the images that have errors as PNG, for tools that need files.

        Returns:
            The file of each image.

        Raises:
            EmptySelectionError: There are no errors.
            DataNeededError: An image has changed since.
            OSError: A file cannot be written.
        """
        self._require_some(str(folder))
        files = {}
        for name in self.by_image():
            target = Path(folder, image_file(name))
            data = png(np.asarray(self.maps[name].image))
            write_atomically(target, lambda partial, data=data: partial.write_bytes(data))  # type: ignore[misc]
            files[name] = target
        return files

    def fiftyone_fields(self, files: Mapping[str, str | PathLike[str]]) -> list[dict[str, Any]]:
        """What FiftyOne's samples are made of, as plain values; needs no FiftyOne.

        Args:
            files: The file of each image that has errors, as :meth:`write_images` returns them.

        Returns:
            For each image ``filepath``, ``image_id`` and ``label_errors``, a list of the arguments
            of ``fiftyone.Detection``: ``label`` is the suggestion, ``bounding_box`` is relative,
            ``mask`` (bool) fills the box; ``given_label``, ``score``, ``true_prob``, ``area`` and
            ``rank`` are attributes.

        Raises:
            EmptySelectionError: There are no errors.
            InspectionError: An image has no file.
        """
        self._require_some("FiftyOne samples")
        rank = {id(error): place for place, error in enumerate(self.errors, start=1)}
        samples = []
        for name, errors in self.by_image().items():
            if name not in files:
                raise InspectionError(
                    f"files: expected a file for each image with errors, got none for {name!r}; "
                    "take what write_images() returns"
                )
            found = []
            for error in errors:
                (x, y, w, h), (height, width) = error.bbox, error.size
                found.append(
                    {
                        "label": error.suggestion,
                        "bounding_box": [
                            (x + _NUDGE) / width,
                            (y + _NUDGE) / height,
                            w / width,
                            h / height,
                        ],
                        "mask": error.mask[y : y + h, x : x + w],
                        "confidence": error.confidence,
                        "given_label": error.label,
                        "score": error.score,
                        "true_prob": error.true_prob,
                        "area": error.area,
                        "rank": rank[id(error)],
                    }
                )
            samples.append({"filepath": str(files[name]), "image_id": name, "label_errors": found})
        return samples

    def to_fiftyone(self, files: Mapping[str, str | PathLike[str]]) -> list[Any]:
        """FiftyOne samples, for ``dataset.add_samples``; see :meth:`fiftyone_fields`.

        Raises:
            ExtraNotInstalledError: FiftyOne is not installed.
            EmptySelectionError, InspectionError: See :meth:`fiftyone_fields`.
        """
        fields = self.fiftyone_fields(files)
        fo = _fiftyone()
        return [
            fo.Sample(
                filepath=sample["filepath"],
                image_id=sample["image_id"],
                label_errors=fo.Detections(
                    detections=[fo.Detection(**error) for error in sample["label_errors"]]
                ),
            )
            for sample in fields
        ]

    def figure(self, n: int = 10) -> Figure:
        """The first errors, a row each: image, label and suggestion around the region.

        Raises:
            EmptySelectionError: There are no errors, or none is asked for.
            DataNeededError: An image has changed since.
        """
        from rdd_pipeline.inspection.label_error_figure import label_error_figure

        return label_error_figure(self.maps, self.errors[: max(n, 0)])

    def write_pictures(self, folder: str | PathLike[str]) -> list[Path]:
        """Write :meth:`figure` of each error as ``<rank>.png``.

        Raises:
            EmptySelectionError: There are no errors.
            DataNeededError: An image has changed since.
            OSError: A file cannot be written.
        """
        from rdd_pipeline.inspection.figures import png_bytes
        from rdd_pipeline.inspection.label_error_figure import label_error_figure

        self._require_some(str(folder))
        written = []
        for rank, error in enumerate(self.errors, start=1):
            data = png_bytes(label_error_figure(self.maps, [error]))
            target = Path(folder, f"{rank:05d}.png")
            write_atomically(target, lambda partial, data=data: partial.write_bytes(data))  # type: ignore[misc]
            written.append(target)
        return written

    def _require_some(self, what: str) -> None:
        if not self.errors:
            raise EmptySelectionError(f"{what}: expected label errors to write, got none")


def image_file(image_id: str) -> str:
    """Name of an image's PNG file; a slash in the image's name becomes ``%2F``."""
    return f"{quote(image_id, safe=' ')}.png"


def _fiftyone() -> Any:
    try:
        return importlib.import_module("fiftyone")
    except ImportError as error:
        raise ExtraNotInstalledError(
            "fiftyone is needed for this; install it with: pip install fiftyone, or use "
            "fiftyone_fields() or to_coco()"
        ) from error
