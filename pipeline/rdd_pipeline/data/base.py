"""What every data set gives: named images with labels, cheap sizes, digests and self-checks."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.errors import DataError

IGNORE_INDEX = 255
"""Label of pixels without a class, on disk and in code; losses and metrics leave them out."""

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Progress: TypeAlias = Callable[[int], object]
"""Called with the number of images finished since the last call, always from one thread."""

NO_IMAGES = "there are no images; check the settings under data"
"""The problem of a split without images."""

_LISTED_PROBLEMS = 20
_WAITING_THREADS = 32  # threads that wait for a network take no processor

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image and its label; both arrays may be read-only."""

    image_id: str
    """Name of the image, unique in its data set and split."""
    image: NDArray[np.uint8]
    """RGB, (H, W, 3)."""
    label: NDArray[np.uint8]
    """Class indices (H, W), 255 where ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """What there is to say about one image and its label, however damaged."""

    problems: tuple[str, ...] = ()
    """One line each, naming the file."""
    size: tuple[int, int] | None = None
    """Height and width of the image; None where its header cannot be read."""
    label: NDArray[np.uint8] | None = None
    """Class indices (H, W); None where the label cannot be used."""


class SegmentationDataset(ABC):
    """Images of one split with their labels, in a fixed order.

    Implementations set the attributes below, are picklable, and may be read from several threads
    at once.
    """

    name: str
    """Name of the data set, part of a store's file name."""
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each class, for pictures."""
    image_ids: tuple[str, ...]
    """Names of the images, in index order."""
    class_weights: tuple[float, ...] | None = None
    """Customary weight of each class in the cross-entropy; None where there is no custom."""
    over_network: bool = False
    """Whether images come from an object store, so that reading is waiting and threads help."""

    @property
    def num_classes(self) -> int:
        """Number of classes; ignored pixels are none of them."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.image_ids)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read one image and its label.

        Raises:
            IndexError: There is no such index.
            ImageReadError: A file is missing or cannot be decoded.
            DataError: The label does not fit its image or the classes.
        """

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def read_window(self, index: int, rows: slice, columns: slice) -> Sample:
        """Read a part of one image and its label, the same pixels as slicing the whole.

        Data sets that can decode a part alone override this.

        Args:
            index: Which image.
            rows: Rows of the part; ``start`` and ``stop`` are given.
            columns: Columns of the part.

        Raises:
            The errors of ``self[index]``.
        """
        whole = self[index]
        return Sample(
            image_id=whole.image_id,
            image=whole.image[rows, columns],
            label=whole.label[rows, columns],
        )

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header alone.

        Raises:
            ImageReadError: The header cannot be read.
        """

    @abstractmethod
    def digest(self, index: int) -> str:
        """SHA-256, as hex, of the image's bytes followed by the label's bytes.

        Raises:
            ImageReadError: A file cannot be read.
        """

    def digests(self, progress: Progress | None = None) -> tuple[str, ...]:
        """:meth:`digest` of all images, in several threads.

        Data sets that can tell which files have not changed since override this.
        """
        return tuple(in_threads(self.digest, len(self), progress))

    @abstractmethod
    def identity(self) -> dict[str, JSON]:
        """What decides the content apart from the images themselves: classes, label mapping."""

    @abstractmethod
    def examine(self, index: int) -> Examined:
        """Decode one image and its label to the end and say everything that is wrong with them."""

    def problems(self, progress: Progress | None = None) -> list[str]:
        """Everything wrong with the files, one line each, naming the file; empty if all is well.

        Every image and label is decoded, in several threads.
        """
        found = list(self.layout_problems())
        for lines in in_threads(self._image_problems, len(self), progress, self.over_network):
            found += lines
        return found

    def layout_problems(self) -> Sequence[str]:
        """Problems of the data set as a whole, such as labels without an image."""
        return ()

    def _image_problems(self, index: int) -> Sequence[str]:
        return self.examine(index).problems

    def _require_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{self.name} {self.split}: expected an index below {len(self)}, got {index}"
            )
        return index % len(self)


def check_dataset(dataset: SegmentationDataset, progress: Progress | None = None) -> None:
    """Refuse a data set with problems before long work starts.

    Args:
        dataset: What to check; every image and label of it is decoded.
        progress: Called with the number of images checked since the last call.

    Raises:
        DataError: The first 20 problems, each naming its file, and how many more there are.
    """
    problems = dataset.problems(progress)
    if not len(dataset):
        problems.insert(0, NO_IMAGES)
    if not problems:
        return
    listed = [f"  {line}" for line in problems[:_LISTED_PROBLEMS]]
    if len(problems) > _LISTED_PROBLEMS:
        listed.append(f"  ... and {len(problems) - _LISTED_PROBLEMS} more")
    raise DataError(
        "\n".join([f"{dataset.name} {dataset.split}: {len(problems)} problem(s)", *listed])
    )


def dataset_digests(
    dataset: SegmentationDataset, progress: Progress | None = None
) -> tuple[str, ...]:
    """Digests of all images, in index order, computed in several threads.

    Reads every file once, but for those that a data set of files knows to be unchanged since an
    earlier time. Compute them in one process only, once for a run.

    Args:
        dataset: Whose images.
        progress: Called with the number of images digested since the last call.

    Raises:
        ImageReadError: A file is missing or cannot be read.
    """
    return dataset.digests(progress)


def in_threads(
    function: Callable[[int], Result],
    count: int,
    progress: Progress | None,
    over_network: bool = False,
) -> Iterator[Result]:
    """Results of ``function(0..count-1)`` in order; decoding and hashing release the GIL."""
    threads = _WAITING_THREADS if over_network else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for result in pool.map(function, range(count)):
            yield result
            if progress is not None:
                progress(1)
