"""From what label files hold, numbers or colours, to class indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.data.base import IGNORE_INDEX
from rdd_pipeline.data.reading import Source, read_colours, read_label
from rdd_pipeline.errors import DataError

_SHOWN = 8
_NUMBERS = 1 << 16


class LabelReader(ABC):
    """Reads label files of one encoding as class indices."""

    @abstractmethod
    def read(self, source: Source) -> NDArray[np.uint8]:
        """Class indices (H, W) of a file, 255 where ignored; may be read-only.

        Raises:
            ImageReadError: The file is missing, damaged or of another encoding.
            DataError: The file holds values that are no class; names the file and the values.
        """

    @abstractmethod
    def identity(self) -> dict[str, int]:
        """What maps to what, apart from numbers that are their own class index."""


class LabelMap(LabelReader):
    """Maps the numbers in label files to classes.

    Args:
        mapping: Number in the file, 0 to 65535, to class index, or to 255 for ignored. Numbers
            that are not named are errors in the data.
    """

    def __init__(self, mapping: Mapping[int, int]) -> None:
        self.mapping = dict(mapping)
        self._unknown = _free_value(self.mapping.values())
        self._table = np.full(_NUMBERS, self._unknown, dtype=np.uint8)
        for number, class_index in self.mapping.items():
            self._table[number] = class_index
        self._bytes = self._table[:256].tobytes()

    def read(self, source: Source) -> NDArray[np.uint8]:
        """Class indices (H, W) of a greyscale or palette image."""
        return self.apply(read_label(source), source)

    def apply(
        self, label: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int32], source: Source
    ) -> NDArray[np.uint8]:
        """Class indices (H, W) of the numbers of a file.

        Raises:
            DataError: The file has numbers that are no class; names the file and the numbers.
        """
        if label.dtype == np.uint8:  # several times faster than indexing the table
            translated = label.tobytes().translate(self._bytes)
            mapped = np.frombuffer(translated, dtype=np.uint8).reshape(label.shape)
        elif label.dtype == np.uint16:
            mapped = self._table.take(label)
        else:
            inside = (label >= 0) & (label < _NUMBERS)
            mapped = np.where(inside, self._table.take(label, mode="clip"), self._unknown)
        wrong = mapped == self._unknown
        if wrong.any():
            shown, pixels = _shown(label[wrong], "{}")
            raise DataError(
                f"{source}: label values {shown} ({pixels} pixels) are outside the "
                f"classes; expected {self._expected()}"
            )
        return mapped

    def identity(self) -> dict[str, int]:
        """Numbers that are not their own class index, and what they map to."""
        return {str(n): c for n, c in self.mapping.items() if n != c}

    def _expected(self) -> str:
        classes = _ranges(n for n, c in self.mapping.items() if c != IGNORE_INDEX)
        ignored = _ranges(n for n, c in self.mapping.items() if c == IGNORE_INDEX)
        return f"{classes}, or {ignored} for ignored" if ignored else classes


class ColourMap(LabelReader):
    """Maps the colours in label files to classes.

    Args:
        colours: RGB colour of each class, all different.
        ignored: Further colours, of pixels without a class. Colours that are not named are errors
            in the data.
    """

    def __init__(
        self, colours: Sequence[tuple[int, int, int]], ignored: Iterable[tuple[int, int, int]] = ()
    ) -> None:
        pairs = [*zip(colours, range(len(colours)), strict=True)]
        pairs += [(colour, IGNORE_INDEX) for colour in ignored]
        self._codes = tuple(((r << 16) | (g << 8) | b, index) for (r, g, b), index in pairs)

    def read(self, source: Source) -> NDArray[np.uint8]:
        """Class indices (H, W) of a colour image, or of a palette image by its colours."""
        codes = read_colours(source)
        table, unknown = _colour_table(self._codes)
        mapped: NDArray[np.uint8] = table.take(codes)
        wrong = mapped == unknown
        if wrong.any():
            shown, pixels = _shown(codes[wrong], "#{:06x}")
            raise DataError(
                f"{source}: colours {shown} ({pixels} pixels) belong to no class; add them to "
                "data.palette or data.ignore_colours"
            )
        return mapped

    def identity(self) -> dict[str, int]:
        """Class index of each colour."""
        return {f"#{code:06x}": index for code, index in self._codes}


@lru_cache(maxsize=2)
def _colour_table(codes: tuple[tuple[int, int], ...]) -> tuple[NDArray[np.uint8], int]:
    """Class of every colour: 16 MiB, so one for a process and never pickled."""
    unknown = _free_value(index for _, index in codes)
    table = np.full(1 << 24, unknown, dtype=np.uint8)
    for code, index in codes:
        table[code] = index
    return table, unknown


def _free_value(used: Iterable[int]) -> int:
    """A value that no class has, for numbers and colours without one."""
    taken = set(used)
    return next(value for value in range(256) if value not in taken)


def _shown(wrong: NDArray[np.generic], form: str) -> tuple[str, int]:
    values, counts = np.unique(wrong, return_counts=True)
    shown = ", ".join(form.format(value) for value in values[:_SHOWN].tolist())
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return shown + more, int(counts.sum())


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: ``0 to 10, 12``."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(f"{low} to {high}" if high > low else str(low) for low, high in runs)
