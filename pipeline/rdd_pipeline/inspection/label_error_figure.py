"""Pictures of label errors: image, label and suggestion around each region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError
from rdd_pipeline.inspection.figures import MapFigure
from rdd_pipeline.inspection.pictures import class_picture, overlay

if TYPE_CHECKING:
    from rdd_pipeline.inspection.label_error_list import LabelError
    from rdd_pipeline.inspection.maps import Maps

_LEAST_SIDE = 64  # pixels: of small regions too, one sees where they are
_MARGIN = 0.6  # of the region's longer side
_WIDTH, _ROW, _CAPTION = 7.5, 2.1, 0.5  # inches
_OPACITY = 0.65


def label_error_figure(maps: Maps, errors: Sequence[LabelError]) -> Figure:
    """A row for each error: image, label and suggestion, with the region outlined.

    Raises:
        EmptySelectionError: There are no errors.
        DataNeededError: An image has changed since the maps were built.
    """
    if not errors:
        raise EmptySelectionError("label errors: expected at least one to draw, got none")
    figure = MapFigure(
        figsize=(_WIDTH, _ROW * len(errors) + _CAPTION), layout="constrained", dpi=100
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(errors), 3, squeeze=False)
    seen: set[int] = set()
    for row, error in zip(grid, errors, strict=True):
        view, mask = maps[error.image_id], error.mask
        window = _window(error)
        label = view.label[window]
        suggested = np.where(mask[window], maps.class_index(error.suggestion), label)
        image = view.image[window]
        panels = [
            image,
            *(
                overlay(class_picture(classes.astype(np.uint8), maps.palette), image, _OPACITY)
                for classes in (label, suggested)
            ),
        ]
        seen |= set(np.unique(label).tolist()) | set(np.unique(suggested).tolist())
        titles = (error.image_id[-26:], f"label: {error.label}", f"teacher: {error.suggestion}")
        for axes, panel, title in zip(row, panels, titles, strict=True):
            axes.imshow(panel, interpolation="nearest")
            _outline(axes, mask[window])
            axes.set_title(title, fontsize=8)
            axes.set(xlim=(-0.5, panel.shape[1] - 0.5), ylim=(panel.shape[0] - 0.5, -0.5))
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"score {error.score:.1f}\n{error.area} pixels", fontsize=7)
        row[2].set_xlabel(
            f"p(label) {error.true_prob:.3f}, p(teacher) {error.confidence:.2f}", fontsize=7
        )
    colours, names = maps.palette / 255.0, maps.class_names
    figure.legend(
        handles=[Patch(color=colours[i], label=names[i]) for i in sorted(seen - {255})],
        loc="outside lower center", ncols=6, fontsize=7, frameon=False,
    )  # fmt: skip
    return figure


def _outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    # A border of zeros, so that regions at the edge of the crop are closed.
    padded = np.pad(mask, 1).astype(float)
    y, x = (np.arange(-1, length + 1) for length in mask.shape)
    for colour, width in (("black", 2.4), ("white", 1.2)):
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width)


def _window(error: LabelError) -> tuple[slice, slice]:
    """A square around the region, as far as it lies in the image."""
    x, y, width, height = error.bbox
    side = max(_LEAST_SIDE, round((1 + _MARGIN) * max(width, height)))
    parts = []
    for start, length, whole in ((y, height, error.size[0]), (x, width, error.size[1])):
        first = max(0, min(start + length // 2 - side // 2, whole - side))
        parts.append(slice(first, min(whole, first + side)))
    return parts[0], parts[1]
