"""The images and labels that a store's maps were made from; a store holds neither."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

from rdd_pipeline.config import DataConfig, RunConfig, load_config
from rdd_pipeline.data import Sample, SegmentationDataset, build_dataset
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.inspection.errors import DataNeededError
from rdd_storage import MapReader, RddError, StoreMismatchError, identity_difference

DataSource: TypeAlias = SegmentationDataset | DataConfig | RunConfig | str | PathLike[str]
"""A data set, the ``data`` section of a configuration, a whole one, or the path of its YAML."""


class SourceImages:
    """Reads images and labels of a store by name, and notices what has changed since the build.

    Args:
        reader: The store.
        data: Where to look; None where there is nothing to read.

    Raises:
        ConfigError: The configuration cannot be read.
        DataError: The data set cannot be opened.
        StoreMismatchError: The store was built from another data set.
    """

    def __init__(self, reader: MapReader, data: DataSource | None) -> None:
        self._reader = reader
        self.dataset = None if data is None else _open(reader, data)
        names = () if self.dataset is None else self.dataset.image_ids
        self._index = {name: index for index, name in enumerate(names)}
        self._problems: dict[str, str] = {}

    def require(self, what: str) -> SegmentationDataset:
        """The data set.

        Raises:
            DataNeededError: There is none; the message says what it is needed for.
        """
        if self.dataset is None:
            raise DataNeededError(
                f"{self._reader.path}: {what} needs the images' labels, which a store does not "
                "hold; open it as Maps(store, data=...) with the data set, or with the path of "
                "the configuration it was built with"
            )
        return self.dataset

    def problem(self, image_id: str) -> str:
        """What is wrong with an image's files; empty if they are those the maps were made from."""
        if self.dataset is None:
            return "no data set was given"
        if image_id not in self._problems:
            self._problems[image_id] = self._look(image_id)
        return self._problems[image_id]

    def sample(self, image_id: str) -> Sample:
        """The image and label that the maps were made from.

        Raises:
            DataNeededError: There is no data set, or the files are gone or have changed.
            ImageReadError, DataError: They cannot be decoded.
        """
        dataset = self.require("this")
        if problem := self.problem(image_id):
            raise DataNeededError(f"image {image_id}: {problem}")
        return dataset[self._index[image_id]]

    def _look(self, image_id: str) -> str:
        index = self._index.get(image_id)
        if self.dataset is None or index is None:
            return "the data set has no image of this name any more; restore it, or build again"
        try:
            found = self.dataset.digest(index)
        except RddError as error:
            return str(error)
        expected = self._reader.record(image_id).digest
        if found == expected:
            return ""
        return (
            "the image or its label has changed since the maps were built: expected digest "
            f"{expected[:12]}…, got {found[:12]}…; restore the file, or build the maps again"
        )


def _open(reader: MapReader, data: DataSource) -> SegmentationDataset:
    if isinstance(data, SegmentationDataset):
        _check_identity(reader, [data])
        return data
    if isinstance(data, (str, PathLike)):
        data = load_config(Path(data))
    if isinstance(data, RunConfig):
        data = data.data
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    datasets: list[SegmentationDataset] = []
    problem: RddError | None = None
    for split in splits:
        try:
            datasets.append(build_dataset(data, split))
        except ConfigError:
            raise
        except RddError as error:  # the other split may be the one that is needed
            problem = error
    if not datasets and problem is not None:
        raise problem
    return _check_identity(reader, datasets)


def _check_identity(reader: MapReader, datasets: list[SegmentationDataset]) -> SegmentationDataset:
    """The data set that the store was built from.

    Raises:
        StoreMismatchError: It is none of these.
    """
    wanted = reader.identity.get("data", {})
    differences = [identity_difference(wanted, dataset.identity()) for dataset in datasets]
    for dataset, lines in zip(datasets, differences, strict=True):
        if not lines:
            return dataset
    lines = min(differences, key=len)
    raise StoreMismatchError(
        f"{reader.path}: expected the data set that the store was built from, got another:\n"
        + "\n".join(f"  {line}" for line in lines)
        + "\ngive that one, or no data to look at the maps alone"
    )
