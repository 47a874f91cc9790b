"""Data sets of two files for each image: the image itself and its label."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from PIL import __version__ as pillow_version

from rdd_pipeline.data.base import JSON, Examined, Progress, Sample, SegmentationDataset
from rdd_pipeline.data.digests import over_network, pair_contents, pair_problems
from rdd_pipeline.data.label_maps import LabelReader
from rdd_pipeline.data.places import Listings, Place
from rdd_pipeline.data.reading import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    Source,
    image_size,
    load,
    load_both,
    pair_digest,
    read_image,
    source_of,
)
from rdd_pipeline.errors import DataError, ImageReadError

Result = TypeVar("Result")


class PairDataset(SegmentationDataset):
    """Images and labels that are encoded apart from each other.

    Subclasses set the attributes of :class:`SegmentationDataset` and ``_label_reader``, and say
    where an image and its label are.
    """

    _label_reader: LabelReader

    @abstractmethod
    def _image_source(self, index: int) -> Source:
        """Where the image is; the index is valid."""

    @abstractmethod
    def _label_source(self, index: int) -> Source:
        """Where the label is, or should be; the index is valid."""

    def __getitem__(self, index: int) -> Sample:
        index = self._require_index(index)
        image_file, label_file = load_both(self._image_source(index), self._label_source(index))
        image = read_image(image_file)
        label = self._label_reader.read(label_file)
        if image.shape[:2] != label.shape:
            raise DataError(_size_problem(label_file, label.shape, image.shape))
        return Sample(image_id=self.image_ids[index], image=image, label=label)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header alone."""
        return image_size(self._image_source(self._require_index(index)))

    def digest(self, index: int) -> str:
        """SHA-256, as hex, of the image file's bytes followed by the label file's bytes."""
        index = self._require_index(index)
        return pair_digest(self._image_source(index), self._label_source(index))

    def identity(self) -> dict[str, JSON]:
        """Name, split, classes and label mapping; not where the files lie."""
        return {
            "name": self.name,
            "split": self.split,
            "classes": list(self.class_names),
            "label_mapping": self._label_reader.identity(),
        }

    def examine(self, index: int) -> Examined:
        """Decode an image and its label to the end and say everything that is wrong with them."""
        index = self._require_index(index)
        found: list[str] = []
        size = label_size = classes = None
        image = _attempt(lambda: load(self._image_source(index)), found)
        if image is not None:
            size = _attempt(lambda: image_size(image), found)
        missing = self._missing_label(index)
        label = None if missing else _attempt(lambda: load(self._label_source(index)), found)
        if missing:
            found.append(missing)
        if label is not None:
            label_size = _attempt(lambda: image_size(label), found)
        if size and label_size and size != label_size and label is not None:
            found.append(_size_problem(label, label_size, size))
        # A file whose header is damaged has been named already; decode the others to the end.
        if size and image is not None:
            _attempt(lambda: read_image(image), found)
        if label_size and label is not None:
            classes = _attempt(lambda: self._label_reader.read(label), found)
        return Examined(problems=tuple(found), size=size, label=classes)

    def _missing_label(self, index: int) -> str:
        """The problem of an image known to have no label; empty if it has one."""
        return ""


def _attempt(function: Callable[[], Result], found: list[str]) -> Result | None:
    try:
        return function()
    except (ImageReadError, DataError) as error:
        found.append(str(error))
        return None


def _size_problem(label: Source, got: Sequence[int], image: Sequence[int]) -> str:
    return (
        f"{label}: expected the size of its image, {image[0]}x{image[1]} (height x width), "
        f"got {got[0]}x{got[1]}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePairs:
    """The files of one split, in order of the images."""

    image_ids: tuple[str, ...]
    # Strings: a hundred thousand paths would take seconds to send to a loader process.
    images: tuple[str, ...]
    labels: tuple[str, ...]
    """Where the labels are, or should be."""
    unlabelled: frozenset[str] = frozenset()
    """Names of the images without a label."""
    problems: tuple[str, ...] = ()
    """Files that belong to no pair, one line each."""


class FileDataset(PairDataset):
    """Pairs of files.

    Args:
        name: Name of the data set.
        split: Name of the split.
        class_names: Names of the classes, in index order.
        palette: RGB colour of each class.
        label_reader: How to read the labels.
        files: Which files.
        listings: What object stores had when they were found.
        class_weights: Customary weight of each class, if there is one.
    """

    read_all: bool = False
    """Whether :meth:`digests` and :meth:`problems` read files although they look unchanged."""

    def __init__(
        self,
        *,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        palette: tuple[tuple[int, int, int], ...],
        label_reader: LabelReader,
        files: FilePairs,
        listings: Listings,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.class_names = class_names
        self.palette = palette
        self.class_weights = class_weights
        self.image_ids = files.image_ids
        self._label_reader = label_reader
        self._files = files
        self._listings = listings
        self._sizes: dict[int, tuple[int, int]] = {}
        self.over_network = over_network(files.images, files.labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sizes": {}}

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from its header or as :meth:`digests` found it."""
        index = self._require_index(index)
        size = self._sizes.get(index)
        if size is None:
            size = super().size(index)
            if self.over_network:  # it has cost a request
                self._sizes[index] = size
        return size

    def digests(self, progress: Progress | None = None) -> tuple[str, ...]:
        """:meth:`digest` of all images; only files that are new or may have changed are read.

        See :mod:`~rdd_pipeline.data.digests`; ``read_all`` reads every file.
        """
        found = pair_contents(
            self._files.images,
            self._files.labels,
            self._listings,
            read_all=self.read_all,
            progress=progress,
        )
        self._sizes = {n: item.size for n, item in enumerate(found) if item.size is not None}
        return tuple(item.digest for item in found)

    def problems(self, progress: Progress | None = None) -> list[str]:
        """Everything wrong with the files; those known to be in order are not read again.

        See :mod:`~rdd_pipeline.data.digests`; ``read_all`` reads every file.
        """
        found = pair_problems(
            self._files.images,
            self._files.labels,
            self._listings,
            self._image_problems,
            how=f"Pillow {pillow_version} {json.dumps(self.identity(), sort_keys=True)}",
            read_all=self.read_all,
            progress=progress,
        )
        return [*self.layout_problems(), *found]

    def layout_problems(self) -> Sequence[str]:
        """Files that belong to no pair."""
        return self._files.problems

    def _image_source(self, index: int) -> Source:
        return source_of(self._files.images[index])

    def _label_source(self, index: int) -> Source:
        return source_of(self._files.labels[index])

    def _missing_label(self, index: int) -> str:
        if self.image_ids[index] not in self._files.unlabelled:
            return ""
        return (
            f"{self._files.images[index]}: image without a label; "
            f"expected {self._files.labels[index]}"
        )


def list_names(folder: Place, suffixes: frozenset[str], ending: str = "") -> list[tuple[str, str]]:
    """Image files in a folder, from one listing and without asking for the state of any.

    Args:
        folder: Where to look; not in folders below.
        suffixes: Suffixes in lower case, with the dot.
        ending: What the names end with before the suffix; other files are passed over.

    Returns:
        Name without ending and suffix, and path, in order of the file names.
    """
    start = str(folder / "x")[:-1]
    return [
        (stem.removesuffix(ending), f"{start}{stem}.{suffix}")
        for stem, dot, suffix in (name.rpartition(".") for name in folder.files())
        # Copies from a Mac hold a '._name' beside each file.
        if dot + suffix.lower() in suffixes and stem.endswith(ending) and not stem.startswith(".")
    ]


def match_files(
    images: Sequence[tuple[str, str]],
    labels: Sequence[tuple[str, str]],
    *,
    expected_image: Callable[[str], str],
    expected_label: Callable[[str], str],
) -> FilePairs:
    """Put images and labels of the same name together.

    Args:
        images: Name and path of each, in order.
        labels: Name and path of each.
        expected_image: Path that a label's image should have, for messages.
        expected_label: Path that an image's label should have.
    """
    problems: list[str] = []
    image_of = _by_name(images, problems)
    label_of = _by_name(labels, problems)
    problems += [
        f"{path}: label without an image; expected {expected_image(name)}"
        for name, path in label_of.items()
        if name not in image_of
    ]
    return FilePairs(
        image_ids=tuple(image_of),
        images=tuple(image_of.values()),
        labels=tuple(label_of.get(name) or expected_label(name) for name in image_of),
        unlabelled=frozenset(name for name in image_of if name not in label_of),
        problems=tuple(problems),
    )


def match_folders(images: Place, labels: Place) -> FilePairs:
    """Put the images of one folder and the labels of another together by name."""
    return match_files(
        list_names(images, IMAGE_SUFFIXES),
        list_names(labels, LABEL_SUFFIXES),
        expected_image=lambda name: f"{images / name}.*",
        expected_label=lambda name: f"{labels / name}.png",
    )


def _by_name(files: Sequence[tuple[str, str]], problems: list[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, path in files:
        other = found.setdefault(name, path)
        if other != path:
            problems.append(f"{path}: has the same name as {other}; keep one of them")
    return found


def require_folders(folders: Sequence[Place], layout: str, *, root: Place, inner: str = "") -> None:
    """Refuse a root that does not hold what the data set's layout has.

    Args:
        folders: What must be there; files may be named too.
        layout: The expected tree, for the message.
        root: ``data.root`` as it was given.
        inner: Where the layout's top usually lies in what a user unpacks, below ``root``.

    Raises:
        DataError: A folder is missing; the message shows the layout.
    """
    missing = [
        f"no {'file' if PurePath(path.name).suffix else 'folder'} {path}"
        for path in folders
        if not path.exists()
    ]
    if not missing:
        return
    advice = "Set data.root to the folder that holds them."
    if inner and (root / inner).is_folder():
        advice = f"Did you mean data.root: {root / inner}?"
    raise DataError(f"data.root: {' and '.join(missing)}; expected\n{layout}\n{advice}")


def require_images(files: FilePairs, where: str, layout: str) -> FilePairs:
    """Refuse a split without images.

    Raises:
        DataError: There are none; the message shows the layout.
    """
    if files.image_ids:
        return files
    raise DataError(
        f"data.root: no images in {where}; expected\n{layout}\n"
        "Set data.root to the folder that holds them."
    )


def tree(*lines: tuple[str, str]) -> str:
    """The picture of a layout: paths below ``data.root`` with what they hold."""
    width = max(len(path) for path, _ in lines)
    return "\n".join(
        ["  <data.root>/", *(f"    {path:<{width}}   {what}".rstrip() for path, what in lines)]
    )
