"""What is taken away: PNG overlays, CSV files, xarray data sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.files import write_atomically
from rdd_pipeline.inspection.errors import EmptySelectionError, InspectionError
from rdd_pipeline.inspection.pictures import class_picture, overlay, png, scale_picture
from rdd_storage import ExtraNotInstalledError, MapReader

if TYPE_CHECKING:
    import xarray

    from rdd_pipeline.inspection.image import ImageView

Layer = Literal["hardness", "weight", "confidence", "prediction", "error"]
LAYERS: tuple[Layer, ...] = ("hardness", "weight", "confidence", "prediction", "error")


class Tabular(Protocol):
    """Whatever has rows: rankings, reports, comparisons, distributions."""

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each row, all with the same keys."""


def write_csv(result: Tabular | Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write the table of a result as CSV, in one step; missing figures are empty cells.

    Args:
        result: Anything with ``table()``, or the rows themselves.
        path: The file, replaced if it exists.

    Raises:
        EmptySelectionError: There are no rows.
        OSError: The file cannot be written.
    """
    rows: Any = result.table() if hasattr(result, "table") else result
    if not rows:
        raise EmptySelectionError(f"{path}: expected rows to write, got none")
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    target = Path(path)
    write_atomically(target, lambda partial: partial.write_bytes(buffer.getvalue().encode()))
    return target


def picture(view: ImageView, layer: Layer = "hardness", *, opacity: float = 0.6) -> NDArray[Any]:
    """One map of an image as RGB (H, W, 3), over the image where the data set has it.

    Args:
        view: The image.
        layer: ``hardness``, ``weight`` and ``confidence`` on the scale cividis, 0 dark and 1 light;
            ``prediction`` in the colours of the classes; ``error`` in red where the prediction is
            wrong, which needs the label.
        opacity: Of the map over the image, in [0, 1].

    Raises:
        InspectionError: No such layer, or an opacity outside [0, 1].
        DataNeededError: ``error`` without a label.
    """
    if layer not in LAYERS:
        raise InspectionError(f"layer: expected one of {', '.join(LAYERS)}, got {layer!r}")
    if not 0.0 <= opacity <= 1.0:
        raise InspectionError(f"opacity: expected a number in [0, 1], got {opacity!r}")
    image = None if view.problem else view.image
    if layer == "prediction":
        return overlay(class_picture(view.prediction, view.palette), image, opacity)
    if layer == "error":
        wrong = (view.label != view.prediction) & view.valid
        plain = np.array(view.image)
        red = overlay(np.full_like(plain, (230, 30, 30)), plain, opacity)
        return np.where(wrong[..., None], red, plain)
    return overlay(scale_picture(getattr(view, layer)), image, opacity)


def write_overlays(
    views: Iterable[ImageView],
    folder: str | Path,
    *,
    layer: Layer = "hardness",
    opacity: float = 0.6,
) -> list[Path]:
    """Write :func:`picture` of each image as ``<name>.png``; a slash in a name becomes ``%2F``.

    Raises:
        EmptySelectionError: There are no images.
        InspectionError, DataNeededError: See :func:`picture`.
    """
    written = []
    for view in views:
        data = png(picture(view, layer, opacity=opacity))
        target = Path(folder) / f"{quote(view.image_id, safe=' ')}.png"
        write_atomically(target, lambda partial, data=data: partial.write_bytes(data))  # type: ignore[misc]
        written.append(target)
    if not written:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    return written


def store_dataset(reader: MapReader) -> xarray.Dataset:
    """The store as xarray opens it, lazily: the images of this version, in physical units.

    Raises:
        ExtraNotInstalledError: xarray is not installed.
    """
    xr = _xarray()
    path = reader.path
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    dataset: xarray.Dataset = xr.open_zarr(path)
    rows = [reader.row(image_id) for image_id in reader.image_ids]
    if rows != list(range(dataset.sizes["image"])):
        dataset = dataset.isel(image=rows)
    return dataset


def image_dataset(view: ImageView) -> xarray.Dataset:
    """The maps of one image as an xarray data set, without padding.

    Raises:
        ExtraNotInstalledError: xarray is not installed.
    """
    xr = _xarray()
    grid, points = ("grid_y", "grid_x"), ("y", "x")
    dims = {
        "discrepancy": grid, "logits": ("class", *grid), "image": (*points, "channel"),
    }  # fmt: skip
    units = {"discrepancy": "nats"}
    arrays = {
        name: (dims.get(name, points), values, {"units": units.get(name, "1")})
        for name, values in view.to_numpy().items()
    }
    result: xarray.Dataset = xr.Dataset(
        arrays, coords={"class": list(view.class_names)}, attrs={"image_id": view.image_id}
    )
    return result


def labelled(
    values: NDArray[Any], coordinates: Mapping[str, Sequence[Any] | NDArray[Any]], name: str
) -> xarray.DataArray:
    """An array with named axes.

    Raises:
        ExtraNotInstalledError: xarray is not installed.
    """
    coords = {axis: list(labels) for axis, labels in coordinates.items()}
    array: xarray.DataArray = _xarray().DataArray(
        values, coords=coords, dims=list(coords), name=name
    )
    return array


def _xarray() -> Any:
    try:
        import xarray
    except ImportError as error:
        raise ExtraNotInstalledError(
            "xarray is needed for this; install it with: pip install 'rdd-maps[notebooks]', or use "
            "to_numpy()"
        ) from error
    return xarray


def _cell(value: Any) -> Any:
    """NaN as an empty cell: programs that read CSV agree on nothing else."""
    return None if isinstance(value, float) and np.isnan(value) else value
