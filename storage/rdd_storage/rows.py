"""The rows that a manifest lists, kept as its columns.

A version may have a hundred thousand images, of which a reader looks at a few at a time: an entry
is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from rdd_storage.layout import NEVER
from rdd_storage.schema import ImageRecord

_GRID = ("grid_height", "grid_width")
_RECORD = ("image_id", "height", "width", *_GRID, "digest")
_VERSIONS = {"first_version": 1, "last_version": NEVER}
_COLUMNS = ("row", *_RECORD, *_VERSIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEntry:
    """One row of a store and the versions it belongs to. A row is never given to another image."""

    row: int
    record: ImageRecord
    first_version: int
    """The version that added the row."""
    last_version: int = NEVER
    """The last version that has the row; :data:`~rdd_storage.layout.NEVER` while it is current."""

    def in_version(self, version: int) -> bool:
        """Whether a version has this row."""
        return self.first_version <= version <= self.last_version


class RowTable(Sequence[RowEntry]):
    """Entries in the order of their rows.

    Args:
        columns: Equally long lists by the names that docs/store-format.md, 5.5, gives them. Those
            of the grid and of the versions may be missing, as they may in a manifest.

    Raises:
        KeyError, TypeError: A list is missing, or is none.
        ValueError: The lists have different lengths.
    """

    __slots__ = ("_columns",)

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        count = len(columns["row"])
        missing = dict.fromkeys(_GRID, 0) | _VERSIONS
        self._columns: dict[str, Sequence[Any]] = {
            name: [missing[name]] * count
            if name in missing and name not in columns
            else columns[name]
            for name in _COLUMNS
        }
        lengths = {name: len(column) for name, column in self._columns.items()}
        if set(lengths.values()) != {count}:
            raise ValueError(f"lists of different lengths: {lengths}")

    @classmethod
    def of(cls, entries: Iterable[RowEntry]) -> RowTable:
        """The table of these entries."""
        listed = list(entries)
        columns: dict[str, list[Any]] = {
            name: [getattr(entry.record, name) for entry in listed] for name in _RECORD
        }
        for name in ("row", *_VERSIONS):
            columns[name] = [getattr(entry, name) for entry in listed]
        return cls(columns)

    @property
    def rows(self) -> Sequence[int]:
        """Row of each entry."""
        return self._columns["row"]

    @property
    def image_ids(self) -> Sequence[str]:
        """Name of each entry's image."""
        return self._columns["image_id"]

    @property
    def digests(self) -> Sequence[str]:
        """Digest of each entry's image."""
        return self._columns["digest"]

    def record(self, place: int) -> ImageRecord:
        """The image of the entry at a place."""
        columns = self._columns
        return ImageRecord(**{name: columns[name][place] for name in _RECORD})

    def records(self) -> tuple[ImageRecord, ...]:
        """The images of all entries."""
        columns = zip(*(self._columns[name] for name in _RECORD), strict=True)
        return tuple(
            ImageRecord(
                image_id=name, height=height, width=width, grid_height=grid_height,
                grid_width=grid_width, digest=digest,
            )
            for name, height, width, grid_height, grid_width, digest in columns
        )  # fmt: skip

    def columns(self, *, versions: Sequence[str]) -> dict[str, Sequence[Any]]:
        """The lists as a manifest has them, with some of those of the versions."""
        left_out = set(_VERSIONS) - set(versions)
        left_out |= {name for name in _GRID if not any(self._columns[name])}  # a pack has none
        return {name: self._columns[name] for name in (*_RECORD, "row", *_VERSIONS)
                if name not in left_out}  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> RowEntry: ...
    @overload
    def __getitem__(self, place: slice) -> RowTable: ...
    def __getitem__(self, place: int | slice) -> RowEntry | RowTable:
        columns = self._columns
        if isinstance(place, slice):
            return RowTable({name: column[place] for name, column in columns.items()})
        return RowEntry(
            row=columns["row"][place],
            record=self.record(place),
            first_version=columns["first_version"][place],
            last_version=columns["last_version"][place],
        )

    def __iter__(self) -> Iterator[RowEntry]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowTable) and self._columns == other._columns

    def __hash__(self) -> int:
        return hash(tuple(self.rows))

    def __repr__(self) -> str:
        return f"RowTable({len(self)} rows)"
