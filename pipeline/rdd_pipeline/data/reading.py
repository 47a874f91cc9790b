"""Reading image and label files: the one place that knows about modes, orientation and damage."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from rdd_pipeline.data.places import in_bucket
from rdd_pipeline.errors import ImageReadError
from rdd_storage.processes import check_process, request_pool

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of files taken for images."""

LABEL_SUFFIXES = frozenset({".bmp", ".gif", ".pgm", ".png", ".tif", ".tiff"})
"""Suffixes, in lower case, of files taken for labels: formats that keep every number."""

# What Pillow raises on damaged files, by format and by where the damage is.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_LENGTH = 256, 257
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """An image file's bytes that lie in memory, as in a table of images."""

    name: str
    """Where it is from, for messages."""
    data: bytes

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """An image file in an object store, by its URL as :mod:`~rdd_pipeline.data.places` has it."""

    url: str

    def __str__(self) -> str:
        return self.url

    def fetch(self) -> tuple[EncodedImage, str | None]:
        """Its bytes, from one request, and the stamp that they have in listings.

        Raises:
            ImageReadError: There is no such object.
            StoreUnavailableError, StoreAccessError: The object store does not answer or refuses.
        """
        bucket, key = in_bucket(self.url)
        found = bucket.get_stamped(key)
        if found is None:
            raise ImageReadError(f"{self.url}: no such object")
        return EncodedImage(name=self.url, data=found[0]), found[1]


Source: TypeAlias = Path | EncodedImage | ObjectFile
"""What an image or label is read from."""


def source_of(file: str) -> Path | ObjectFile:
    """The source of a path, or of a URL as :mod:`~rdd_pipeline.data.places` has it."""
    return ObjectFile(file) if "://" in file else Path(file)


def load(source: Source) -> Path | EncodedImage:
    """What is in an object store in memory, so that it is asked for once; all else as it is.

    Raises:
        The errors of :meth:`ObjectFile.fetch`.
    """
    return source.fetch()[0] if isinstance(source, ObjectFile) else source


def load_both(image: Source, label: Source) -> tuple[Path | EncodedImage, Path | EncodedImage]:
    """:func:`load` of both, by requests that overlap."""
    if isinstance(image, ObjectFile) and isinstance(label, ObjectFile):
        check_process()
        loaded, other = request_pool().map(load, (image, label))
        return loaded, other
    return load(image), load(label)


def read_image(source: Source) -> NDArray[np.uint8]:
    """Read an image as RGB, turned upright as its EXIF orientation says.

    Greyscale is repeated over the channels, 16-bit greyscale keeps its high byte, palettes are
    resolved, CMYK is converted and transparency is dropped.

    Args:
        source: A file of any format Pillow reads.

    Returns:
        (H, W, 3) uint8; may be read-only.

    Raises:
        ImageReadError: The file is missing, damaged, cut short, or holds 32-bit samples.
    """
    with _opened(source) as image:
        rgb = _as_rgb(_upright(image))
        if rgb is not None:
            return np.asarray(rgb)
        mode = image.mode
    raise ImageReadError(f"{source}: expected 8- or 16-bit samples, got mode {mode}; convert it")


def read_label(source: Source) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int32]:
    """Read a label as the numbers that are in the file.

    Palette images give their indices, not their colours. A label is turned only if it has an
    orientation of its own, whatever that of its image.

    Args:
        source: A greyscale (8-, 16- or 32-bit) or palette image.

    Returns:
        (H, W), uint8, or uint16 or int32 where the file has more bits; may be read-only.

    Raises:
        ImageReadError: The file is missing, damaged or cut short, or is a colour image.
    """
    with _opened(source) as image:
        mode = image.mode
        if mode in ("L", "P"):
            return np.asarray(_upright(image), dtype=np.uint8)
        if mode == "1":
            return np.asarray(_upright(image)).astype(np.uint8)
        if mode.startswith("I;16"):
            return np.asarray(_upright(image)).astype(np.uint16)
        if mode == "I":
            return np.asarray(_upright(image), dtype=np.int32)
    raise ImageReadError(
        f"{source}: expected one class index per pixel (greyscale or palette), got mode {mode}; "
        "labels coded by colour are read with data.type: folder and label_format: colours"
    )


def read_colours(source: Source) -> NDArray[np.uint32]:
    """Read a label that is coded by colour.

    Args:
        source: A colour or palette image; transparency is dropped.

    Returns:
        (H, W), each pixel's colour as 0xRRGGBB.

    Raises:
        ImageReadError: The file is missing, damaged or cut short.
    """
    rgb = read_image(source).astype(np.uint32)
    high, middle = np.uint32(1 << 16), np.uint32(1 << 8)
    return rgb[..., 0] * high + rgb[..., 1] * middle + rgb[..., 2]


def image_size(source: Source) -> tuple[int, int]:
    """Height and width of the upright image or label, from the header alone.

    Raises:
        ImageReadError: The file is missing or its header is damaged.
    """
    with _opened(source) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # its size may have been turned already, or not
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_LENGTH]
        sideways = _orientation(image) in _ORIENTATIONS_ON_THE_SIDE
    return (width, height) if sideways else (height, width)


def read_palette(source: Source) -> list[int] | None:
    """Colours of a palette image: red, green and blue of each in turn; None without a palette.

    Raises:
        ImageReadError: The file is missing or its header is damaged.
    """
    with _opened(source) as image:
        return image.getpalette("RGB") if image.mode == "P" else None


def read_bytes(source: Source) -> bytes:
    """All bytes of an image or label file.

    Raises:
        ImageReadError: The file is missing or cannot be read.
    """
    source = load(source)
    if isinstance(source, EncodedImage):
        return source.data
    try:
        return source.read_bytes()
    except OSError as error:
        raise ImageReadError(f"{source}: cannot be read ({error.strerror})") from error


def pair_digest(image: Source, label: Source) -> str:
    """SHA-256, as hex, of the image file's bytes followed by the label file's bytes.

    Raises:
        ImageReadError: A file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for source in (image, label):
        digest.update(read_bytes(source))
    return digest.hexdigest()


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    source = load(source)
    try:
        # Not by its path: Pillow would map TIFF files into memory and then turn them wrongly.
        with (
            io.BytesIO(source.data)
            if isinstance(source, EncodedImage)
            else source.open("rb") as file,
            Image.open(file) as image,
        ):
            yield image
    except FileNotFoundError as error:
        raise ImageReadError(f"{source}: no such file") from error
    except _DAMAGE as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageReadError(
            f"{source}: cannot be read as an image ({reason}); replace the file"
        ) from error


def _orientation(image: Image.Image) -> int:
    # Asking a PNG without EXIF in its header for EXIF would decode it to the end.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


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
