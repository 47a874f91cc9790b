"""Figures of maps, distributions, quality and comparisons, for notebooks and files.

They are matplotlib figures that do not touch pyplot: ``figure.savefig(path)`` writes one, and a
notebook shows one that is the last value of a cell.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rdd_pipeline.inspection.errors import EmptySelectionError
from rdd_pipeline.inspection.measures import HARDNESS
from rdd_pipeline.inspection.pictures import class_picture, scale_picture, shrunk
from rdd_pipeline.inspection.quality import risk_coverage

if TYPE_CHECKING:
    from rdd_pipeline.inspection.assessment import QualityReport
    from rdd_pipeline.inspection.comparison import StoreComparison, StudentHistory
    from rdd_pipeline.inspection.distributions import ClassDistributions, Confusion, Overview
    from rdd_pipeline.inspection.image import ImageView

# Okabe and Ito's colours, which all common kinds of colour vision tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_GREY, _BLACK = "#d9d9d9", "#222222"
_MAP = "cividis"
_LONGEST_SIDE = 900  # pixels of a map in a figure
_MOST_IN_LEGEND = 24


class MapFigure(Figure):
    """A figure that notebooks show as PNG, whether or not pyplot is loaded."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def png_bytes(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def image_figure(view: ImageView) -> Figure:
    """Image, label, prediction, confidence, weight and hardness of one image."""
    return gallery_figure([view])


def gallery_figure(views: Sequence[ImageView]) -> Figure:
    """A row for each image: image and label where the data set has them, and the teacher's maps.

    Raises:
        EmptySelectionError: There are no images.
    """
    if not views:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    with_data = any(not view.problem for view in views)
    titles = ["image", "label"] if with_data else []
    titles += ["prediction", "confidence", "weight exp(−D)", "hardness"]
    ratios = [view.size[0] / view.size[1] for view in views]
    width = 2.7
    figure = _figure(width * len(titles), sum(width * ratio + 0.35 for ratio in ratios) + 0.9)
    grid = figure.subplots(
        len(views), len(titles), squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for row, view in zip(grid, views, strict=True):
        panels = _panels(view, with_data)
        for axes, panel in zip(row, panels, strict=True):
            _bare(axes)
            if panel is None:
                axes.set_frame_on(False)
            else:
                axes.imshow(panel, interpolation="nearest")
        row[0].set_ylabel(_short(view.image_id), fontsize=8)
        # Without a data set there is nothing to be missed.
        if view.problem and view.problem != "no data set was given":
            row[-1].set_xlabel(_wrapped(view.problem), fontsize=7, color="#b00000")
    _scale_bar(figure, grid, "confidence, weight, hardness")
    _class_legend(figure, views)
    return figure


def distribution_figure(distributions: ClassDistributions) -> Figure:
    """For each class the middle half, 5% to 95%, and the mean, of interior and boundary pixels."""
    names = distributions.class_names
    figure = _figure(8.0, 0.34 * len(names) + 1.4)
    axes = figure.subplots()
    low, first, third, high = (distributions.quantile(q) for q in (0.05, 0.25, 0.75, 0.95))
    counts = distributions.counts.astype(np.float64)
    total = counts.sum(axis=-1)
    mean = np.full(total.shape, np.nan)
    np.divide(counts @ HARDNESS, total, out=mean, where=total > 0)
    places = np.arange(len(names))
    for column, (region, colour) in enumerate(
        zip(("interior", "boundary"), _COLOURS, strict=False)
    ):
        at = places + (-0.17, 0.17)[column]
        axes.hlines(at, low[:, column], high[:, column], color=colour, linewidth=1)
        axes.hlines(at, first[:, column], third[:, column], color=colour, linewidth=5, alpha=0.6)
        axes.plot(mean[:, column], at, "o", color=colour, markersize=4, label=region)
    axes.set_yticks(places, [_short(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("hardness: mean (dot), middle half (bar), 5% to 95% (line)")
    axes.grid(axis="x", color=_GREY, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def confusion_figure(confusion: Confusion) -> Figure:
    """Shares of each label's pixels; beside it the mean hardness of each cell, where known."""
    names = [_short(name, 18) for name in confusion.class_names]
    panels = 1 if confusion.mean_hardness is None else 2
    side = min(0.32 * len(names) + 2.2, 14.0)
    figure = _figure(side * panels + 0.6, side)
    grid = figure.subplots(1, panels, squeeze=False)[0]
    counts = confusion.counts.astype(np.float64)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    # Most of a row is on the diagonal: on a linear scale confusions could not be seen.
    shown = np.ma.masked_where(~(shares > 0), shares)
    first = grid[0].imshow(shown, cmap=_MAP, norm=LogNorm(vmin=1e-4, vmax=1.0, clip=True))
    figure.colorbar(first, ax=grid[0], label="share of the label's pixels", shrink=0.7)
    if confusion.mean_hardness is not None:
        second = grid[1].imshow(
            np.ma.masked_invalid(confusion.mean_hardness), cmap=_MAP, vmin=0, vmax=1
        )
        figure.colorbar(second, ax=grid[1], label="mean hardness", shrink=0.7)
    for axes in grid:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("label")
    return figure


def overview_figure(overview: Overview, images: int) -> Figure:
    """Images by classes as a coloured table; white where an image lacks a class."""
    values = overview.values[:images]
    rows, columns = values.shape
    figure = _figure(min(0.3 * columns + 4.0, 24.0), 0.2 * rows + 2.0)
    axes = figure.subplots()
    shown = np.ma.masked_invalid(values)
    picture = axes.imshow(shown, cmap=_MAP, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(
        range(columns), [_short(n, 18) for n in overview.class_names], rotation=90, fontsize=7
    )
    axes.set_yticks(range(rows), [_short(n) for n in overview.image_ids[:images]], fontsize=7)
    figure.colorbar(picture, ax=axes, label=overview.title, shrink=0.8)
    return figure


def quality_figure(report: QualityReport) -> Figure:
    """AUROC of each score with its interval, and the error rate against the coverage."""
    figure = _figure(11.0, 0.4 * len(report.rows) + 2.4)
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(report.rows):
        colour = _COLOURS[place % len(_COLOURS)]
        auroc = row.figures["auroc"]
        if auroc.value is not None:
            if auroc.low is not None and auroc.high is not None:
                left.hlines(place, auroc.low, auroc.high, color=colour, linewidth=3, alpha=0.5)
            left.plot(auroc.value, place, "s" if row.baseline else "o", color=colour)
        coverage, risk = risk_coverage(row.correct, row.wrong)
        right.plot(
            coverage, 100 * risk, color=colour, linewidth=1.6, label=row.title,
            linestyle="--" if row.baseline else "-", marker="." if len(coverage) == 1 else "",
        )  # fmt: skip
    names = [row.title + (" (circular)" if row.circular else "") for row in report.rows]
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.axvline(0.5, color=_BLACK, linewidth=0.8, linestyle=":")
    left.set_xlabel("AUROC of finding wrong pixels (0.5: chance)")
    right.set_xlabel("coverage: share of the pixels, lowest scores first")
    right.set_ylabel("wrong among them (%)")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(color=_GREY, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure


def comparison_figure(comparison: StoreComparison, images: int) -> Figure:
    """The joint histogram, and the difference maps of the images that changed most."""
    shown = [c.image_id for c in comparison.images if c.pixels][:images]
    figure = _figure(4.6 + 3.4 * len(shown), 4.2)
    grid = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    values, joint = comparison.values, comparison.joint
    top = values[np.flatnonzero(joint.any(axis=0) | joint.any(axis=1))].max(initial=values[1])
    # Bins of discrepancies are of unequal width: drawn at their values, and not by number.
    picture = grid[0].pcolormesh(
        values, values, np.ma.masked_equal(joint.T, 0), cmap=_MAP, shading="nearest",
        norm=LogNorm(vmin=1, vmax=max(10, int(joint.max()))), rasterized=True,
    )  # fmt: skip
    grid[0].plot([0, top], [0, top], color=_COLOURS[1], linewidth=1, dashes=(4, 3))
    grid[0].set(xlim=(0, top), ylim=(0, top), aspect="equal")
    grid[0].set_xlabel(f"{comparison.quantity} in a")
    grid[0].set_ylabel(f"{comparison.quantity} in b")
    grid[0].set_title(f"Spearman {comparison.spearman:.3f}", fontsize=10)
    figure.colorbar(picture, ax=grid[0], label="pixels", shrink=0.7)
    differences = [comparison.difference(name) for name in shown]
    limit = max((float(np.nanmax(np.abs(d))) for d in differences), default=1.0) or 1.0
    for axes, name, difference in zip(grid[1:], shown, differences, strict=True):
        _bare(axes)
        last = axes.imshow(
            np.ma.masked_invalid(shrunk(difference, _LONGEST_SIDE)), cmap="PuOr_r", vmin=-limit,
            vmax=limit, interpolation="nearest",
        )  # fmt: skip
        axes.set_title(_short(name), fontsize=8)
    if len(grid) > 1:
        figure.colorbar(last, ax=grid[1:], label="b − a", shrink=0.7)
    return figure


def history_figure(history: StudentHistory) -> Figure:
    """Rank correlation with the teacher, and shares of hard pixels, over the checkpoints."""
    figure = _figure(9.5, 3.4)
    left, right = figure.subplots(1, 2)
    steps = history.steps
    names = ["final" if step.iteration is None else str(step.iteration) for step in steps]
    places = range(len(steps))
    left.plot(places, [s.spearman for s in steps], "o-", color=_COLOURS[0], label="Spearman")
    left.plot(places, [s.kendall for s in steps], "s--", color=_COLOURS[1], label="Kendall")
    left.set_ylabel("rank correlation of the hardness")
    shares: tuple[tuple[str, list[float]], ...] = (
        ("student alone", [s.student_alone for s in steps]),
        ("teacher alone", [s.teacher_alone for s in steps]),
        ("both", [s.both for s in steps]),
    )
    for (name, values), colour in zip(shares, _COLOURS, strict=False):
        right.plot(places, [100 * v for v in values], "o-", color=colour, label=name)
    right.set_ylabel("hard pixels (%)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xticks(places, names)
        axes.set_xlabel("checkpoint")
        axes.grid(color=_GREY, linewidth=0.5)
        axes.legend(fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float) -> MapFigure:
    figure = MapFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(view: ImageView, with_data: bool) -> list[NDArray[np.uint8] | None]:
    palette = view.palette

    def small(array: NDArray[Any]) -> NDArray[Any]:
        return shrunk(array, _LONGEST_SIDE)  # before it is coloured, which takes longer

    panels: list[NDArray[np.uint8] | None] = []
    if with_data and view.problem:
        panels = [None, None]
    elif with_data:
        panels = [small(view.image), class_picture(small(view.label), palette)]
    return [
        *panels,
        class_picture(small(view.prediction), palette),
        *(scale_picture(small(values)) for values in (view.confidence, view.weight, view.hardness)),
    ]


def _scale_bar(figure: Figure, axes: NDArray[Any], label: str) -> None:
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(cmap=_MAP)
    mappable.set_clim(0.0, 1.0)
    figure.colorbar(mappable, ax=axes, label=label, location="bottom", fraction=0.05, aspect=60)


def _class_legend(figure: Figure, views: Sequence[ImageView]) -> None:
    """The classes that are predicted in these images; of many the first ones alone."""
    seen = np.unique(np.concatenate([np.unique(view.prediction) for view in views]))
    palette, names = views[0].palette / 255.0, views[0].class_names
    handles = [Patch(color=palette[i], label=names[i]) for i in seen[:_MOST_IN_LEGEND].tolist()]
    handles.append(Patch(color="#e0e0e0", label="no label"))
    figure.legend(handles=handles, loc="outside lower left", ncols=8, fontsize=7, frameon=False)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _wrapped(text: str, width: int = 52) -> str:
    import textwrap

    return textwrap.fill(text, width)
