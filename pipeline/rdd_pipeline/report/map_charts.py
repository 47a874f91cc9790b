"""Charts of what maps hold: ranges of hardness by class, and shares by class over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from rdd_pipeline.report.curves import (
    GRID,
    LINE,
    STYLE,
    TEXT,
    TICK_STEPS,
    Chart,
    LegendEntry,
    inline_svg,
)

MOST_COLUMNS = 48
"""Of a heat map over time; more entries are averaged."""

_WIDTH = 5.4  # inches
_LONGEST_NAME = 24
_QUANTILES = ((0.05, 0.95), (0.25, 0.75))


def range_chart(
    title: str,
    names: Sequence[str],
    groups: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    key: str,
    x_label: str,
) -> Chart:
    """Draw, for each name and group, a thin line, a thick one in it, and a dot.

    Args:
        title: Stands above the chart and is its text alternative.
        names: R rows, from top to bottom.
        groups: By name, ends (R, 4) of the lines (thin low, thick low, thick high, thin high) and
            places (R,) of the dots; NaN draws nothing.
        key: Unique in the page.
        x_label: What is below; values lie in [0, 1].
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH, 0.8 + 0.27 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=3, width=0.6)
        rows = np.arange(len(names))
        for number, (ends, dots) in enumerate(groups.values()):
            colour = LINE.format(number)
            at = rows + 0.34 * (number - (len(groups) - 1) / 2)
            axes.hlines(at, ends[:, 0], ends[:, 3], color=colour, linewidth=1.0)
            axes.hlines(at, ends[:, 1], ends[:, 2], color=colour, linewidth=4.5)
            axes.plot(
                dots, at, "o", color=colour, markersize=5, markeredgecolor=GRID, clip_on=False
            )
        axes.set_yticks(rows, [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel(x_label)
        svg = inline_svg(figure, title, key)
    legend = tuple(
        LegendEntry(label=label, colour=number, dashed=False) for number, label in enumerate(groups)
    )
    return Chart(title=title, svg=svg, legend=legend)


def heat_chart(
    title: str,
    names: Sequence[str],
    entries: Sequence[tuple[float, Sequence[float | None]]],
    *,
    key: str,
) -> Chart:
    """Draw shares of each name over the iterations as colours, on the scale cividis.

    Args:
        title: Stands above the chart and is its text alternative.
        names: R rows, from top to bottom.
        entries: At least one: an iteration and R shares, None where there is none.
        key: Unique in the page.
    """
    iterations = np.array([iteration for iteration, _ in entries])
    shares = np.array([row for _, row in entries], np.float64).T
    runs = np.array_split(np.arange(len(entries)), min(len(entries), MOST_COLUMNS))
    values = np.stack([_mean(shares[:, run]) for run in runs], axis=1)
    # Each column ends at its last iteration.
    first = iterations[0] - (iterations[-1] - iterations[0]) / max(len(entries) - 1, 1)
    start = max(first, 0.0) if len(entries) > 1 else iterations[0] - 1.0
    ends = (start, float(iterations[-1]), len(names) - 0.5, -0.5)
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH, 1.0 + 0.2 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=3, width=0.6)
        drawn = axes.imshow(
            np.ma.masked_invalid(values), cmap="cividis", vmin=0.0, vmax=top or 1.0,
            aspect="auto", interpolation="nearest", extent=ends,
        )  # fmt: skip
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
        bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
        bar.outline.set_edgecolor(TEXT)
        svg = inline_svg(figure, title, key)
    return Chart(title=title, svg=svg, legend=())


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (R,) over the columns that are there; NaN where none is."""
    known = np.isfinite(values)
    mean = np.full(len(values), np.nan)
    np.divide(
        np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1), out=mean,
        where=known.any(axis=1),
    )  # fmt: skip
    return mean


def quantile_ends(quantile: Any, column: int) -> NDArray[np.float64]:
    """Ends (C, 4) of :func:`range_chart` from :meth:`ClassDistributions.quantile`."""
    (low, high), (first, third) = _QUANTILES
    return np.stack([quantile(q)[:, column] for q in (low, first, third, high)], axis=1)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
