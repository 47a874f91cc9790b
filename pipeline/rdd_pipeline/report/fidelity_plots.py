"""The chart of a fidelity measurement: errors over all crops above, some crops below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rdd_pipeline.fidelity import ERROR_EDGES, Example, Fidelity, Measurement, ScaleRange

# Okabe and Ito's colours, which all common kinds of colour vision tell apart.
_BLUE, _ORANGE, _BLACK = "#0072b2", "#e69f00", "#222222"
_GREY = "#d9d9d9"  # not on the scale cividis
_MAP = "cividis"
_WIDTH = 15.0  # inches
_ABOVE, _LEGENDS = 4.2, 1.2  # inches
_PICTURE = 2.75  # inches, the width of one
_MASKS = {
    "no label": "#ffffff",
    "easy in both": _GREY,
    "hard in both": "#7f7f7f",
    "hard as stored alone": _ORANGE,
    "hard on the crop alone": _BLUE,
}


def fidelity_plot(measurement: Measurement) -> Figure:
    """Draw the weights against each other, their errors, both against the scale, and examples."""
    examples = measurement.examples
    height, width = examples[0].covered.shape
    below_height = _LEGENDS + len(examples) * min(_PICTURE * height / width + 0.1, 4.0)
    figure = Figure(figsize=(_WIDTH, _ABOVE + below_height), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(
        2, 1, height_ratios=[_ABOVE, below_height], hspace=0.02, squeeze=False
    )
    above, below = parts[0, 0], parts[1, 0]
    joint, errors, weight, flips = above.subplots(1, 4)
    _draw_joint(above, joint, measurement.tally.joint_weight)
    _draw_errors(errors, measurement)
    each = measurement.tally.crop_figures()
    fidelity = measurement.fidelity
    ranges = fidelity.figures.by_scale
    _draw_by_scale(
        weight, fidelity, each.weight, "mean absolute error of W on a crop",
        [part.approximation.weight.mean_absolute.value for part in ranges],
    )  # fmt: skip
    _draw_by_scale(
        flips, fidelity, 100.0 * each.flipped, "flipped pixels on a crop (%)",
        [_percent(part) for part in ranges],
    )  # fmt: skip
    for axes in (errors, weight, flips):
        axes.grid(color=_GREY, linewidth=0.5)
        axes.set_axisbelow(True)
    _draw_examples(below, examples)
    return figure


def _draw_joint(figure: SubFigure, axes: Axes, counts: NDArray[np.int64]) -> None:
    # Bins without pixels stay white.
    shown = np.ma.masked_equal(counts.T, 0)
    norm = LogNorm(vmin=1, vmax=max(10, int(counts.max())))
    image = axes.imshow(
        shown, origin="lower", extent=(0, 1, 0, 1), cmap=_MAP, norm=norm, aspect="equal"
    )
    axes.plot([0, 1], [0, 1], color=_ORANGE, linewidth=1.0, dashes=(4, 3))
    axes.set_xlabel("W as stored")
    axes.set_ylabel("W on the crop")
    axes.set_title("weights of all labelled pixels", fontsize=10)
    figure.colorbar(image, ax=axes, label="pixels per bin", shrink=0.75)


def _draw_errors(axes: Axes, measurement: Measurement) -> None:
    curves = (
        ("on_crop", "teacher on the crop", _BLUE, "-"),
        ("whole", "teacher on the whole image", _ORANGE, "--"),
    )
    for live, name, colour, style in curves:
        counts = measurement.tally.error_counts(live, "weight")  # type: ignore[arg-type]
        above = 100.0 * (1.0 - np.cumsum(counts) / max(counts.sum(), 1))
        axes.plot(ERROR_EDGES[1:], above, color=colour, linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_xlim(1e-6, 1.0)
    axes.set_ylim(0.0, 125.0)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("|error| of W")
    axes.set_ylabel("labelled pixels with a larger error (%)")
    axes.set_title("stored weights against those of", fontsize=10)
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)


def _draw_by_scale(
    axes: Axes,
    fidelity: Fidelity,
    values: NDArray[np.float64],
    label: str,
    means: Sequence[float | None],
) -> None:
    axes.plot(
        fidelity.scales, values, "o", color=_BLUE, markersize=3, alpha=0.5, label="one crop",
        markeredgewidth=0,
    )  # fmt: skip
    name: str | None = "all crops of a range"
    for part, mean in zip(fidelity.figures.by_scale, means, strict=True):
        if mean is not None:
            axes.plot([part.low, part.high], [mean, mean], color=_BLACK, linewidth=2, label=name)
            name = None
    largest = float(np.nanmax(values, initial=0.0))
    axes.set_ylim(0.0, 1.25 * largest or 1.0)  # room for the legend
    axes.set_xlabel("scale of the augmentation")
    axes.set_ylabel(label)
    axes.set_title("stored against on the crop", fontsize=10)
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)


def _percent(part: ScaleRange) -> float | None:
    flipped = part.approximation.hard_mask.flipped.value
    return None if flipped is None else 100.0 * flipped


def _draw_examples(figure: SubFigure, examples: Sequence[Example]) -> None:
    grid = figure.subplots(len(examples), 5, squeeze=False)
    top = max(float(_difference(example).max()) for example in examples)
    titles = ("crop", "W as stored", "W on the crop", "|difference|", "hard masks")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    weights: AxesImage | None = None
    differences: AxesImage | None = None
    for row, example in zip(grid, examples, strict=True):
        row[0].imshow(example.image)
        row[0].set_ylabel(f"{_short(example.image_id)}\nscale {example.scale:.2f}", fontsize=8)
        for axes, weight in zip(
            row[1:3], (example.weight_stored, example.weight_on_crop), strict=True
        ):
            weights = axes.imshow(_covered(weight, example), cmap=_MAP, vmin=0.0, vmax=1.0)
        differences = row[3].imshow(_difference(example), cmap=_MAP, vmin=0.0, vmax=top or 1.0)
        row[4].imshow(
            _mask_classes(example), cmap=ListedColormap(list(_MASKS.values())),
            vmin=-0.5, vmax=len(_MASKS) - 0.5, interpolation="nearest",
        )  # fmt: skip
        for axes in row:
            axes.set_anchor("N")
            axes.set_xticks([])
            axes.set_yticks([])
    if weights is not None and differences is not None:
        for image, columns, label in (
            (weights, grid[:, 1:3], "weight W"),
            (differences, grid[:, 3], "|difference| of W"),
        ):
            figure.colorbar(
                image, ax=columns, label=label, location="bottom", fraction=0.04, aspect=40
            )
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=_BLACK, linewidth=0.4, label=name)
            for name, colour in _MASKS.items()
        ],
        loc="outside lower center", ncols=len(_MASKS), fontsize=9, frameon=False,
        title="hard masks",
    )  # fmt: skip


def _covered(values: NDArray[np.float32], example: Example) -> np.ma.MaskedArray:
    """Padding stays white."""
    return np.ma.masked_where(~example.covered, values)


def _difference(example: Example) -> np.ma.MaskedArray:
    return _covered(np.abs(example.weight_stored - example.weight_on_crop), example)


def _mask_classes(example: Example) -> NDArray[np.int64]:
    """Index into the masks' colours for each pixel."""
    classes = np.select(
        [
            ~example.labelled,
            example.hard_stored & example.hard_on_crop,
            example.hard_stored,
            example.hard_on_crop,
        ],
        [0, 2, 3, 4],
        default=1,
    )
    return np.asarray(classes, np.int64)


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]
