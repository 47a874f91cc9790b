"""Maps to look through, with image, label and prediction beside them, in notebooks and in pages.

    Viewer(maps, by="soft_min")                          # in a notebook, the hardest first
    viewer_page(maps, None, "hardest.html")              # a file that needs nothing else
    html = viewer_fragment(maps, maps.hardest(8))        # for a page of one's own

All three show ``static/viewer.js``. It is given a description of the images (:func:`viewer_meta`)
and, for each, the stored codes packed by zlib with the photograph as JPEG (:func:`viewer_record`);
it decodes to physical units itself, so that thresholds are on the values of the maps and not on
colours.
"""

from __future__ import annotations

import base64
import html
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rdd_pipeline.files import readable_bytes, write_atomically
from rdd_pipeline.inspection.errors import EmptySelectionError, InspectionError
from rdd_pipeline.inspection.measures import MEASURES
from rdd_pipeline.inspection.pictures import cividis, overlay, scale_picture, shrunk
from rdd_pipeline.inspection.ranking import Ranking
from rdd_storage import (
    ExtraNotInstalledError,
    confidence_table,
    encode_confidence,
    hardness_table,
)

if TYPE_CHECKING:
    from rdd_pipeline.inspection.image import ImageView
    from rdd_pipeline.inspection.maps import Maps
    from rdd_pipeline.inspection.viewer_widget import ViewerWidget

MAX_SIDE = 768
"""Pixels; larger maps show every k-th row and column in a page."""

MAX_BYTES = 16_000_000
"""Of the images in a page."""

_JPEG_QUALITY = 88
_FALLBACK_SIDE = 384  # pixels of the picture that is seen where no script runs
_FALLBACK_BYTES = 400_000  # of what a notebook keeps beside the widget

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ margin: 8px; }}</style>
</head>
<body>
{fragment}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewerRecord:
    """One image as the browser gets it."""

    header: dict[str, Any]
    """Name, sizes, and name and type of each array."""
    buffers: list[bytes]
    """The arrays: row by row, little-endian, packed by zlib; the photograph as JPEG."""


class Viewer:
    """Images with their maps, one at a time; in a notebook an interactive widget.

    The widget gets the image that is shown and the one after it from Python. Where anywidget is
    missing, and in notebooks exported to HTML, a page's viewer with the first images stands in its
    place.

    Args:
        maps: The store. Without its ``data``, images and labels are left out.
        images: Names in the order to show them, or a ranking; None ranks the images.
        by: Measure of the ranking, see :meth:`Maps.hardest`.
        n: Images of the ranking.
        max_side: Larger maps show every k-th row and column; None shows every pixel.

    Raises:
        EmptySelectionError, UnknownImageError: No images; no such image.
        InspectionError, StoreIncompleteError: See :meth:`Maps.hardest`.
    """

    def __init__(
        self,
        maps: Maps,
        images: Sequence[str] | Ranking | None = None,
        *,
        by: str = "mean",
        n: int = 50,
        max_side: int | None = 2048,
    ) -> None:
        _check_side(max_side)
        chosen = maps.hardest(n, by) if images is None else images
        self.maps = maps
        self.images = chosen
        """What is shown."""
        self.max_side = max_side
        self.meta = viewer_meta(maps, chosen)
        """See :func:`viewer_meta`."""

    def __repr__(self) -> str:
        return f"Viewer({self.maps!r}, {len(self.images)} images)"

    @cached_property
    def widget(self) -> ViewerWidget:
        """The widget, whose ``index``, ``quantity``, ``opacity`` and ``threshold`` can be set.

        Raises:
            ExtraNotInstalledError: anywidget is not installed.
        """
        from rdd_pipeline.inspection.viewer_widget import ViewerWidget

        return ViewerWidget(self)

    def record(self, index: int) -> ViewerRecord:
        """The image at a place of the order.

        Raises:
            StoreIncompleteError, StoreDamagedError: Its maps cannot be read.
        """
        return viewer_record(self.maps, _names(self.images)[index], self.max_side)

    def page(self, path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> Path:
        """Write the viewer as a file; see :func:`viewer_page`."""
        side = self.max_side
        return viewer_page(self.maps, self.images, path, max_side=side, max_bytes=max_bytes)

    def _repr_html_(self) -> str:
        return viewer_fragment(
            self.maps, self.images, max_side=_FALLBACK_SIDE, max_bytes=_FALLBACK_BYTES
        )

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shown: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        try:
            bundle = self.widget._repr_mimebundle_()
        except ExtraNotInstalledError:
            bundle = None
        return (shown, {}) if bundle is None else ({**bundle[0], **shown}, bundle[1])


def viewer_fragment(
    maps: Maps,
    image_ids: Sequence[str] | Ranking | None = None,
    *,
    max_side: int | None = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
) -> str:
    """HTML that shows images with their maps, to be put anywhere in the body of a page.

    It brings its data, style and script, requests nothing, and shares a page with others of its
    kind. A content security policy must allow inline scripts and styles, and images from
    ``data:``. Where scripts do not run, a picture of the first image's hardness is shown.

    Args:
        maps: The store. Without its ``data``, images and labels are left out.
        image_ids: Names in the order to show them, or a ranking; None takes the 20 hardest.
        max_side: Larger maps show every k-th row and column; None shows every pixel.
        max_bytes: Images that would make their data larger are left out at the end, which the
            viewer says; the first is always there.

    Raises:
        EmptySelectionError, UnknownImageError: No images; no such image.
        InspectionError: A limit is not positive.
        StoreIncompleteError: The maps of an image are not there.
    """
    _check_side(max_side)
    if max_bytes < 1:
        raise InspectionError(f"max_bytes: expected at least 1, got {max_bytes}; give more")
    chosen = maps.hardest() if image_ids is None else image_ids
    names = _names(chosen)
    meta = viewer_meta(maps, chosen)
    records: list[dict[str, Any]] = []
    total = 0
    for name in names:
        record = viewer_record(maps, name, max_side)
        buffers = [base64.b64encode(buffer).decode() for buffer in record.buffers]
        total += sum(map(len, buffers))
        if records and total > max_bytes:
            left = len(names) - len(records)
            meta["images"] = meta["images"][: len(records)]
            meta["note"] += (
                f" {left} more of {len(names)} images are left out to keep the page within "
                f"{readable_bytes(max_bytes)}."
            )
            break
        records.append({"header": record.header, "buffers": buffers})
    # In a script element only "<" could end the data.
    data = json.dumps({"meta": meta, "records": records}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    # The picture goes once the script has put the viewer in its place.
    return (
        f'<div class="rddv-embedded">{_fallback(maps[names[0]])}'
        f'<script type="application/json">{data}</script></div>\n'
        f"<style>\n{static('viewer.css')}</style>\n"
        f'<script type="module">\n{static("viewer.js")}\nmountEmbedded();\n</script>\n'
    )


def viewer_page(
    maps: Maps,
    image_ids: Sequence[str] | Ranking | None,
    path: str | PathLike[str],
    *,
    max_side: int | None = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write :func:`viewer_fragment` as an HTML file that needs no network and no other file.

    Raises:
        EmptySelectionError, UnknownImageError, InspectionError, StoreIncompleteError: See there.
        OSError: The file cannot be written.
    """
    fragment = viewer_fragment(maps, image_ids, max_side=max_side, max_bytes=max_bytes)
    title = html.escape(f"Difficulty maps: {Path(maps.path).name}")
    text = _PAGE.format(policy=_POLICY, title=title, fragment=fragment)
    target = Path(path)
    write_atomically(target, lambda partial: partial.write_text(text, encoding="utf-8"))
    return target


def viewer_meta(maps: Maps, images: Sequence[str] | Ranking) -> dict[str, Any]:
    """What the browser knows before it has an image: names, classes, units. JSON.

    Raises:
        EmptySelectionError, UnknownImageError: No images; no such image.
    """
    names = _names(images)
    for name in names:
        maps[name]  # refuses unknown names
    if isinstance(images, Ranking):
        notes = [f"{MEASURES[images.by]}: {getattr(image, images.by):.3g}" for image in images]
    else:
        notes = [""] * len(names)
    codec = maps.reader.schema.codec
    confidence_steps = int(np.isfinite(confidence_table()).sum()) - 1
    missing = (
        "Image and label are not shown: the store holds neither. Open it with its data set or "
        "configuration, Maps(store, data=...)."
    )
    return {
        "images": [{"id": name, "note": note} for name, note in zip(names, notes, strict=True)],
        "classes": [
            {"name": name, "color": colour.tolist()}
            for name, colour in zip(maps.class_names, maps.palette, strict=False)
        ],
        # A value is float32(code * scale); codes above the highest have none.
        "hardness": {"scale": codec.scale, "highest": codec.max_code},
        "confidence": {"scale": 1 / confidence_steps, "highest": confidence_steps},
        "usual": float(hardness_table(codec.bits)[codec.threshold_code]),
        "cividis": cividis().tobytes().hex(),
        "note": missing if maps.source.dataset is None else "",
    }


def viewer_record(maps: Maps, image_id: str, max_side: int | None = None) -> ViewerRecord:
    """One image as the browser gets it: stored codes, and the photograph as JPEG.

    Args:
        maps: The store.
        image_id: The image.
        max_side: Every k-th row and column, so that neither side is longer; values are not
            blended, the photograph is. None keeps all.

    Raises:
        UnknownImageError: No such image.
        StoreIncompleteError, StoreDamagedError: The maps cannot be read.
    """
    view = maps[image_id]
    longest = max(view.size) if max_side is None else max_side
    step = -(-max(view.size) // longest)
    codes = {
        "hardness": view.hardness_codes,
        "confidence": encode_confidence(view.confidence),
        "prediction": view.prediction,
    }
    problem = view.problem
    if not problem:
        codes["label"] = view.label
    arrays = {name: shrunk(array, longest) for name, array in codes.items()}
    height, width = arrays["prediction"].shape
    described = [{"name": name, "type": array.dtype.name} for name, array in arrays.items()]
    buffers = [_packed(array) for array in arrays.values()]
    described.append({"name": "discrepancy", "type": "float32"})
    buffers.append(_packed(view.discrepancy))
    if not problem:
        described.append({"name": "image", "type": "image/jpeg"})
        buffers.append(_jpeg(Image.fromarray(view.image).reduce(step)))
    header = {
        "id": view.image_id,
        "width": width,
        "height": height,
        "step": step,
        "size": list(view.size),
        "grid": list(view.discrepancy.shape),
        # Where there is no data set at all, the note of the whole viewer says so.
        "problem": "" if maps.source.dataset is None else problem,
        "arrays": described,
    }
    return ViewerRecord(header=header, buffers=buffers)


@cache
def static(name: str) -> str:
    """A file of the viewer."""
    return (resources.files(__package__) / "static" / name).read_text(encoding="utf-8")


def _names(images: Sequence[str] | Ranking) -> list[str]:
    if isinstance(images, str):  # a sequence of letters otherwise
        images = [images]
    names = list(images.image_ids if isinstance(images, Ranking) else images)
    if not names:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    return names


def _check_side(max_side: int | None) -> None:
    if max_side is not None and max_side < 1:
        raise InspectionError(
            f"max_side: expected at least 1 pixel, or None for all, got {max_side}"
        )


def _packed(array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return zlib.compress(np.ascontiguousarray(little).tobytes(), 6)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _fallback(view: ImageView) -> str:
    image = None if view.problem else shrunk(view.image, _FALLBACK_SIDE)
    picture = overlay(scale_picture(shrunk(view.hardness, _FALLBACK_SIDE)), image, 0.6)
    uri = f"data:image/jpeg;base64,{base64.b64encode(_jpeg(Image.fromarray(picture))).decode()}"
    name = html.escape(view.image_id, quote=True)
    return f'<img src="{uri}" alt="hardness of {name}, bright where hard">'
