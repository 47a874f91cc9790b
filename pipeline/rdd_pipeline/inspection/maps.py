"""A map store to look at, with no training and no network: what it holds and where it is hard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.assessment import Predict, QualityReport, ScoreName, assess
from rdd_pipeline.inspection.comparison import (
    Quantity,
    StoreComparison,
    StudentHistory,
    compare_stores,
    student_history,
)
from rdd_pipeline.inspection.distributions import (
    ClassDistributions,
    Confusion,
    Overview,
    confusion_with_hardness,
)
from rdd_pipeline.inspection.errors import EmptySelectionError, UnknownClassError, nearest_names
from rdd_pipeline.inspection.export import Layer, write_overlays
from rdd_pipeline.inspection.image import ImageView, class_palette
from rdd_pipeline.inspection.images import DataSource, SourceImages
from rdd_pipeline.inspection.measures import (
    EASY_ABOVE,
    MEASURES,
    TEMPERATURE,
    THRESHOLD,
    check_measure,
)
from rdd_pipeline.inspection.ranking import Ranking, measure_images, rank_images
from rdd_pipeline.inspection.summary import Progress, Summary, cached_summary, read_summary
from rdd_storage import (
    MapReader,
    MapStatistics,
    StoredSummary,
    StoreStatus,
    UnknownImageError,
    store_status,
)

if TYPE_CHECKING:
    import xarray

    from rdd_pipeline.inspection.viewer import Viewer


class Maps:
    """The maps of one store, read as they are asked for.

    In a notebook it shows what it is; ``maps["name"]`` is one image. Rankings, distributions and
    figures of quality come from counts that were made with the maps; what needs the maps
    themselves says so, and takes time in proportion to the images.

    Args:
        path: Path or URL of a store.
        data: Where images and labels are, which the store does not hold: a data set, a
            configuration, or the path of the one the store was built with. None leaves them out.
        version: One of the store's published versions; None takes the newest.
        cache: Whether the summary of a store that has none, of 1,000 images or more, is kept for
            the next time, see :mod:`rdd_pipeline.inspection.summary`.
        progress: See :attr:`progress`.

    Raises:
        StoreNotFoundError, StoreFormatError, UnknownVersionError, StoreUnavailableError,
        StoreAccessError: See :class:`rdd_storage.MapReader`.
        ConfigError, DataError, StoreMismatchError: ``data`` cannot be opened, or is not what the
            store was built from.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        data: DataSource | None = None,
        *,
        version: int | None = None,
        cache: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.reader = MapReader(path, version=version)
        """The store, for what this class does not do."""
        self.source = SourceImages(self.reader, data)
        """Images and labels."""
        self.progress = progress
        """Called with the number of images finished since the last call, by whatever takes a pass
        over the store."""
        self._cache = cache

    def __repr__(self) -> str:
        return f"Maps({self.path!r}, {len(self)} images)"

    def __len__(self) -> int:
        return self.reader.num_images

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._has(image_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self.image_ids)

    def __getitem__(self, image: str | int) -> ImageView:
        """One image by name, or by its place in the store.

        Raises:
            UnknownImageError: There is none; the message has the nearest names.
            IndexError: The place is beyond the last image.
        """
        if isinstance(image, int):
            return ImageView(self.reader, self.source, self.image_ids[image])
        self._require(image)
        return ImageView(self.reader, self.source, image)

    @property
    def path(self) -> str:
        """Path or URL of the store."""
        return self.reader.path

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """Names of the images, in the order of the store."""
        return self.reader.image_ids

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return self.reader.schema.class_names

    @property
    def palette(self) -> NDArray[np.uint8]:
        """RGB (C, 3) of the classes."""
        return class_palette(self.reader, self.source)

    @cached_property
    def status(self) -> StoreStatus:
        """State and bytes of the store; lists all its objects."""
        return store_status(self.path)

    @cached_property
    def summary(self) -> Summary:
        """A few numbers for each image and class, all of them; of an old store from the cache.

        Raises:
            StoreIncompleteError: The store is not built to the end.
        """
        return read_summary(self.reader, cache=self._cache, progress=self.progress)

    @property
    def summary_is_ready(self) -> bool:
        """Whether :attr:`summary` takes no pass over the store's counts."""
        if self._stored is not None:
            return True
        if "summary" not in self.__dict__ and self._cache:
            found = cached_summary(self.reader)
            if found is not None:
                self.__dict__["summary"] = found
        return "summary" in self.__dict__

    @cached_property
    def _stored(self) -> StoredSummary | None:
        return self.reader.summary()

    def statistics(self) -> MapStatistics:
        """The store's exact counts, about 7 kB in memory for each image.

        Raises:
            StoreIncompleteError: The store is not built to the end.
        """
        return self.reader.statistics()

    def class_index(self, name: str) -> int:
        """Index of a class.

        Raises:
            UnknownClassError: There is none; the message has the nearest names.
        """
        if name in self.class_names:
            return self.class_names.index(name)
        raise UnknownClassError(
            f"{self.path}: expected one of the store's {len(self.class_names)} classes, got "
            f"{name!r}{nearest_names(name, self.class_names)}"
        )

    def measures(
        self,
        class_name: str | None = None,
        *,
        threshold: float = THRESHOLD,
        temperature: float = TEMPERATURE,
    ) -> dict[str, NDArray[Any]]:
        """All measures of all images as arrays (N,), in the order of :attr:`image_ids`.

        Args:
            class_name: Count the pixels of this class alone.
            threshold: True-class probability up to which a pixel is hard; another than 0.7 takes a
                pass over the store's counts.
            temperature: Of the soft minimum; another than 0.1 takes a pass too.

        Returns:
            Arrays by the names of :class:`RankedImage`'s fields; NaN where there are no pixels.

        Raises:
            UnknownClassError, InspectionError: No such class; a setting out of its range.
            StoreIncompleteError: The store is not built to the end.
        """
        index = None if class_name is None else self.class_index(class_name)
        # The store's summary is read by class, unless all of it is here already.
        ready = "summary" in self.__dict__
        source = self.summary if ready or self._stored is None else self._stored
        return measure_images(
            self.reader, source.of_class(index), index, threshold=threshold,
            temperature=temperature, progress=self.progress,
        )  # fmt: skip

    def hardest(
        self,
        n: int = 20,
        by: str = "mean",
        *,
        class_name: str | None = None,
        easiest: bool = False,
        min_pixels: int = 1,
        threshold: float = THRESHOLD,
        temperature: float = TEMPERATURE,
    ) -> Ranking:
        """The most difficult images.

        Args:
            n: How many.
            by: ``mean`` or ``p95`` of the hardness; ``soft_min`` of the true-class probability, as
                in arXiv 2307.05080, which finds small wrong labels; ``hard_share``, the share of
                pixels up to ``threshold``; ``error`` of the teacher; or ``discrepancy``, which
                knows no labels. See :class:`HardnessMeasures`.
            class_name: Count the pixels of this class alone, of images that have it.
            easiest: The other end.
            min_pixels: Leave out images with fewer such pixels.
            threshold: See :meth:`measures`.
            temperature: See :meth:`measures`.

        Raises:
            InspectionError: No such measure, or a setting out of its range.
            UnknownClassError, EmptySelectionError: No such class; no image has it.
            StoreIncompleteError: The store is not built to the end.
        """
        check_measure(by, of_class=class_name is not None)
        return rank_images(
            self.image_ids,
            self.measures(class_name, threshold=threshold, temperature=temperature),
            n,
            by=by,
            class_name=class_name,
            easiest=easiest,
            min_pixels=min_pixels,
            threshold=threshold,
            temperature=temperature,
            maps=self,
        )

    def view(
        self,
        images: Sequence[str] | Ranking | None = None,
        *,
        by: str = "mean",
        n: int = 50,
        max_side: int | None = 2048,
    ) -> Viewer:
        """The images to look through, the most difficult first; a widget in a notebook.

        See :class:`~rdd_pipeline.inspection.Viewer`, also for the arguments.

        Raises:
            EmptySelectionError, UnknownImageError: No images; no such image.
            InspectionError, StoreIncompleteError: See :meth:`hardest`.
        """
        from rdd_pipeline.inspection.viewer import Viewer

        return Viewer(self, images, by=by, n=n, max_side=max_side)

    def distributions(self) -> ClassDistributions:
        """Hardness of each class, inside of regions and at their boundaries.

        Raises:
            StoreIncompleteError: The store is not built to the end.
        """
        return ClassDistributions(
            class_names=self.class_names, counts=np.asarray(self.summary.class_hardness)
        )

    def confusion(
        self, *, hardness: bool = False, images: Sequence[str] | None = None
    ) -> Confusion:
        """Pixels by label and by the teacher's prediction.

        Args:
            hardness: Also the mean hardness of each cell, which takes a pass over maps and labels.
            images: Some images, with ``hardness``; None takes all.

        Raises:
            DataNeededError: ``hardness`` or ``images``, and no data set was given.
            UnknownImageError, EmptySelectionError, StoreIncompleteError: See the other methods.
        """
        if hardness or images is not None:
            return confusion_with_hardness(
                self.reader, self.source, self._checked(images), self.progress
            )
        return Confusion(
            class_names=self.class_names, counts=np.asarray(self.summary.confusion),
            mean_hardness=None, images=len(self),
        )  # fmt: skip

    def overview(self, by: str = "mean", *, n: int | None = None) -> Overview:
        """One measure of each image and class, the most difficult images first.

        Args:
            by: One of the measures of :meth:`hardest`, but for ``discrepancy``.
            n: The first images only.

        Raises:
            InspectionError: No such measure.
            EmptySelectionError: Fewer than one image asked for.
            StoreIncompleteError: The store is not built to the end.
        """
        check_measure(by, of_class=True)
        if n is not None and n < 1:
            raise EmptySelectionError(f"n: expected at least 1 image, got {n}")
        summary = self.summary
        table = summary.error() if by == "error" else getattr(summary, by)
        whole = np.asarray(table[-1], np.float64)
        keys = np.nan_to_num(whole if by in EASY_ABOVE else -whole, nan=np.inf)
        order = np.argsort(keys, kind="stable")[:n]
        return Overview(
            by=by,
            title=MEASURES[by],
            image_ids=tuple(self.image_ids[index] for index in order.tolist()),
            class_names=self.class_names,
            values=np.ascontiguousarray(table[:-1, order].T),
            pixels=np.ascontiguousarray(summary.pixels[:-1, order].T),
        )

    def quality(
        self,
        scores: Sequence[ScoreName] | None = None,
        *,
        errors: Maps | Predict | None = None,
        images: Sequence[str] | None = None,
        allow_circular: bool = False,
        resamples: int = 1000,
        seed: int = 0,
    ) -> QualityReport:
        """How well the maps find the pixels that are predicted wrong, beside simple baselines.

        Ignored pixels count nowhere. Discrepancy and confidence come from the stored counts;
        everything else takes a pass over maps and labels.

        Args:
            scores: ``discrepancy``, ``hardness``, ``confidence``, ``predicted_boundary``,
                ``label_boundary``; by default the discrepancy with all baselines that can be had.
                Confidence and a random order are always added.
            errors: Whose errors are to be found: another store of the same images, or a function
                from an image to its classes, such as ``load_trained(folder).predict``; None takes
                the store's teacher.
            images: Some images; None takes all.
            allow_circular: Compute figures that are good by construction (the hardness on its own
                teacher's errors), and mark them.
            resamples: For the 95% intervals, drawing images; 0 makes none.
            seed: Of the resamples.

        Raises:
            CircularScoreError: The hardness is to be tested on the errors it was made from.
            DataNeededError: Labels are needed, and there are none.
            InspectionError, UnknownImageError, EmptySelectionError, StoreIncompleteError: See the
                other methods.
        """
        return assess(
            self.reader,
            self.source,
            scores=scores,
            errors=errors.reader if isinstance(errors, Maps) else errors,
            images=self._checked(images),
            allow_circular=allow_circular,
            resamples=resamples,
            seed=seed,
            progress=self.progress,
        )

    def compare(
        self,
        other: Maps | str | PathLike[str],
        *,
        quantity: Quantity = "hardness",
        images: Sequence[str] | None = None,
    ) -> StoreComparison:
        """This store beside another: of another teacher, or another version of it.

        Takes a pass over the maps of both; labels are not needed.

        Args:
            other: The other store, ``b``.
            quantity: ``hardness``, ``discrepancy`` or ``confidence``.
            images: Some images; None takes all that both have.

        Raises:
            EmptySelectionError: They have no image in common.
            InspectionError, UnknownImageError: See the other methods.
        """
        reader = other.reader if isinstance(other, Maps) else MapReader(other)
        return compare_stores(
            self.reader,
            reader,
            quantity=quantity,
            images=self._checked(images),
            progress=self.progress,
        )

    def student_history(
        self,
        trained: str | Path,
        *,
        checkpoints: Sequence[Path] | None = None,
        images: Sequence[str] | int = 16,
        device: str = "cpu",
    ) -> StudentHistory:
        """A student's difficulty against the teacher's, at each of its checkpoints.

        Args:
            trained: Folder of a finished training, such as ``runs/NAME/students/STUDENT``.
            checkpoints: Folders of snapshots or checkpoints, named by their iterations; None takes
                the snapshots that the training kept (``training.snapshots``), without any its last
                checkpoint. The final weights are always added.
            images: Names, or how many to spread over the store.
            device: Where the student runs.

        Raises:
            DataNeededError: There is no data set.
            CheckpointError: The student, or a checkpoint, cannot be loaded.
            EmptySelectionError, UnknownImageError: No images; no such image.
        """
        chosen = images if isinstance(images, int) else self._checked(images) or ()
        return student_history(
            self.reader, self.source, Path(trained), checkpoints=checkpoints, images=chosen,
            device=device, progress=self.progress,
        )  # fmt: skip

    def export_overlays(
        self,
        folder: str | PathLike[str],
        images: Sequence[str],
        *,
        layer: Layer = "hardness",
        opacity: float = 0.6,
    ) -> list[Path]:
        """Write a map of each image as PNG, over the image where there is a data set.

        See :func:`rdd_pipeline.inspection.write_overlays`.
        """
        views = (self[name] for name in images)
        return write_overlays(views, Path(folder), layer=layer, opacity=opacity)

    def to_xarray(self) -> xarray.Dataset:
        """The store as an xarray data set, lazily, in physical units.

        Raises:
            ExtraNotInstalledError: xarray is not installed.
        """
        from rdd_pipeline.inspection.export import store_dataset

        return store_dataset(self.reader)

    def _repr_html_(self) -> str:
        from rdd_pipeline.inspection.html import maps_html

        return maps_html(self)

    def _has(self, image_id: str) -> bool:
        try:
            self.reader.row(image_id)
        except UnknownImageError:
            return False
        return True

    def _require(self, image_id: str) -> None:
        if not self._has(image_id):
            raise UnknownImageError(
                f"{self.path}: expected one of the store's {len(self)} images, got "
                f"{image_id!r}{nearest_names(image_id, self.image_ids)}"
            )

    def _checked(self, images: Sequence[str] | None) -> Sequence[str] | None:
        if images is None:
            return None
        if isinstance(images, str):  # a sequence of letters otherwise
            images = [images]
        if not images:
            raise EmptySelectionError("images: expected at least one, got none; choose some")
        for image_id in images:
            self._require(image_id)
        return images
