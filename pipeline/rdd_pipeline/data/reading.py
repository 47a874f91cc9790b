"""Reading image and label files: the one place that knows about modes, orientation and damage."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from rdd_pipeline.data.base import IGNORE_INDEX
from rdd_pipeline.errors import DataError, ImageReadError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of files taken for images."""

# What Pillow raises on damaged files, by format and by where the damage is.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_LENGTH = 256, 257
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as RGB, turned upright as its EXIF orientation says.

    Greyscale is repeated over the channels, 16-bit greyscale keeps its high byte, palettes are
    resolved and transparency is dropped.

    Args:
        path: A file of any format Pillow reads.

    Returns:
        (H, W, 3) uint8; may be read-only.

    Raises:
        ImageReadError: The file is missing, damaged, cut short, or holds 32-bit samples.
    """
    with _opened(path) as image:
        upright = image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
        rgb = _as_rgb(upright)
        if rgb is not None:
            return np.asarray(rgb)
        mode = image.mode
    raise ImageReadError(f"{path}: expected 8- or 16-bit samples, got mode {mode}; convert it")


def read_label(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a label as the numbers that are in the file.

    Palette images give their indices, not their colours.

    Args:
        path: A greyscale (8- or 16-bit) or palette image.

    Returns:
        (H, W), uint8, or uint16 where the file has 16 bits; may be read-only.

    Raises:
        ImageReadError: The file is missing, damaged or cut short, or is a colour image.
    """
    with _opened(path) as image:
        mode = image.mode
        if mode in ("L", "P"):
            return np.asarray(image, dtype=np.uint8)
        if mode == "1":
            return np.asarray(image).astype(np.uint8)
        if mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)
    raise ImageReadError(
        f"{path}: expected one class index per pixel (greyscale or palette), got mode {mode}"
    )


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, from the header alone.

    Raises:
        ImageReadError: The file is missing or its header is damaged.
    """
    with _opened(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # its size may have been turned already, or not
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_LENGTH]
        sideways = _orientation(image) in _ORIENTATIONS_ON_THE_SIDE
    return (width, height) if sideways else (height, width)


def label_size(path: Path) -> tuple[int, int]:
    """Height and width of a label, from the header alone; labels have no orientation.

    Raises:
        ImageReadError: The file is missing or its header is damaged.
    """
    with _opened(path) as image:
        width, height = image.size
    return height, width


class LabelMap:
    """Maps the numbers in label files to classes.

    Args:
        mapping: Number in the file to class index, or to 255 for ignored. Numbers that are not
            named are errors in the data.
    """

    def __init__(self, mapping: Mapping[int, int]) -> None:
        self.mapping = dict(mapping)
        # Numbers without a class get a value that no class has.
        self._unknown = next(value for value in range(256) if value not in self.mapping.values())
        self._table = np.full(1 << 16, self._unknown, dtype=np.uint8)
        for number, class_index in self.mapping.items():
            self._table[number] = class_index
        self._bytes = self._table[:256].tobytes()

    def apply(self, label: NDArray[np.uint8] | NDArray[np.uint16], path: Path) -> NDArray[np.uint8]:
        """Class indices (H, W) of the numbers of a file.

        Raises:
            DataError: The file has numbers that are no class; names the file and the numbers.
        """
        if label.dtype == np.uint8:  # several times faster than indexing the table
            translated = label.tobytes().translate(self._bytes)
            mapped = np.frombuffer(translated, dtype=np.uint8).reshape(label.shape)
        else:
            mapped = self._table.take(label)
        wrong = mapped == self._unknown
        if wrong.any():
            numbers, counts = np.unique(label[wrong], return_counts=True)
            shown = ", ".join(str(number) for number in numbers[:8])
            more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
            raise DataError(
                f"{path}: label values {shown}{more} ({counts.sum()} pixels) are outside the "
                f"classes; expected {self._expected()}"
            )
        return mapped

    def _expected(self) -> str:
        classes = sorted(n for n, c in self.mapping.items() if c != IGNORE_INDEX)
        ignored = sorted(n for n, c in self.mapping.items() if c == IGNORE_INDEX)
        ends = f"{classes[0]} to {classes[-1]}"
        return f"{ends}, or {' or '.join(map(str, ignored))} for ignored" if ignored else ends


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageReadError(f"{path}: no such file") from error
    except _DAMAGE as error:
        raise ImageReadError(
            f"{path}: cannot be read as an image ({error}); replace the file"
        ) from error


def _orientation(image: Image.Image) -> int:
    # Asking a PNG without EXIF in its header for EXIF would decode it to the end.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _as_rgb(image: Image.Image) -> Image.Image | None:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        return None
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        # Pillow warns if such a palette goes to RGB directly.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
