"""Data sets of the package ``datasets``: from the hub, or tables of images on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from rdd_pipeline.config import HuggingFaceData
from rdd_pipeline.data.label_maps import LabelMap
from rdd_pipeline.data.pairs import PairDataset
from rdd_pipeline.data.palettes import bit_palette
from rdd_pipeline.data.reading import EncodedImage, Source
from rdd_pipeline.errors import ConfigError, DataError

_SAVED = ("dataset_dict.json", "state.json")
"""Files that ``save_to_disk`` leaves."""


class HuggingFaceDataset(PairDataset):
    """One split of a table with a column of images and one of labels.

    Images stay encoded in the table until they are read, whole rows are never held in memory.

    Args:
        config: The ``data`` section.
        split: Which of its two splits.

    Raises:
        ConfigError: The package ``datasets`` is not installed.
        DataError: The data set, the split or a column does not exist, or two rows have one name.
    """

    def __init__(self, config: HuggingFaceData, split: Literal["train", "val"]) -> None:
        wanted = config.train_split if split == "train" else config.val_split
        rows = _open(config, wanted)
        columns = [config.image, config.label, *([config.id] if config.id else [])]
        missing = [name for name in columns if name not in rows.column_names]
        if missing:
            raise DataError(
                f"data.image, data.label, data.id: {config.path} {wanted} has no column "
                f"{' and no '.join(missing)}; it has {', '.join(rows.column_names)}"
            )
        # Names of stores hold letters, digits, '.', '_' and '-' alone; splits may be train[:10%].
        self.name = config.name or _slug(Path(config.path).name)
        self.split = _slug(wanted)
        self.class_names = config.classes
        self.palette = config.palette or bit_palette(len(config.classes))
        if config.id:
            self.image_ids = tuple(str(name) for name in rows[config.id])
        else:
            self.image_ids = tuple(f"{row:08d}" for row in range(len(rows)))
        if len(set(self.image_ids)) < len(self.image_ids):
            raise DataError(
                f"data.id: expected a name of its own in each row of {config.id}, got "
                f"{len(self.image_ids)} rows with {len(set(self.image_ids))} names"
            )
        self._label_reader = LabelMap(config.label_values())
        self._images = _encoded(rows, config.image)
        self._labels = _encoded(rows, config.label)
        self._columns = (config.image, config.label)

    def _image_source(self, index: int) -> Source:
        return self._source(self._images, index, self._columns[0])

    def _label_source(self, index: int) -> Source:
        return self._source(self._labels, index, self._columns[1])

    def _source(self, rows: Any, index: int, column: str) -> Source:
        value = rows[index][column]
        where = f"{self.name} {self.split} row {index} ({column})"
        data, path = value, None
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return EncodedImage(name=where, data=data)
        if path:
            return Path(path)
        raise DataError(f"{where}: expected an encoded image, got {type(data).__name__}")


def _open(config: HuggingFaceData, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "data.type: huggingface needs the package datasets; install it with: "
            "pip install 'rdd-maps[huggingface]'"
        ) from error
    folder = Path(config.path)
    try:
        if not any((folder / name).is_file() for name in _SAVED):
            return datasets.load_dataset(
                config.path, name=config.subset, revision=config.revision, split=split
            )
        saved = datasets.load_from_disk(config.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.path: cannot load {config.path}, split '{split}' ({error}); check path, subset, "
            "revision and the names of the splits"
        ) from error
    # A table that was saved alone is one split, and may know which.
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split): saved}
    if split not in splits:
        raise DataError(
            f"data.train_split, data.val_split: {config.path} has no split '{split}'; it has "
            f"{', '.join(splits)}. Save both splits as one DatasetDict."
        )
    return splits[split]


def _encoded(rows: Any, column: str) -> Any:
    """One column, whose images are given as the bytes of their files."""
    import datasets

    table = rows.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    return table


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "data"
