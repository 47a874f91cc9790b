"""Line charts as inline SVG whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLOURS = 8
"""Colours of the page's palette, the CSS variables --line-0 to --line-7."""

SIZE_INCHES = (4.6, 2.5)
MAX_POINTS = 400
"""Points of a line; it is drawn about 400 pixels wide."""
TICK_STEPS = (1, 2, 2.5, 5, 10)

# Matplotlib wants fixed colours; these stand in for CSS variables and are replaced in the SVG.
TEXT = "#b00000"
GRID = "#b00001"
LINE = "#a0000{}"
_PLACEHOLDERS = re.compile(r"#(?:a0000([0-7])|(b00000)|(b00001))")
STYLE: Any = {  # matplotlib's stubs take literal keys only
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Any number from 0; beyond :data:`NUM_COLOURS` colours come again, dashed."""
    over: bool = False
    """Whether it may lie on another line: it is dashed then, so that both are seen."""
    total: bool = False
    """Whether points that are drawn as one are added up; otherwise they are averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendEntry:
    """What the template needs to draw one key of a legend."""

    label: str
    colour: int
    """Number of the CSS variable."""
    dashed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart ready for the template."""

    title: str
    svg: Markup
    legend: tuple[LegendEntry, ...]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    key: str,
    y_range: tuple[float | None, float | None] = (None, None),
    x_end: float | None = None,
    x_label: str = "iteration",
    mark: float | None = None,
    mark_label: str = "",
) -> Chart:
    """Draw lines, over the training iterations unless said otherwise.

    Args:
        title: What is drawn, with its unit; stands above the chart and is its text alternative.
        lines: At least one.
        key: Unique in the page; keeps the ids of several SVGs apart.
        y_range: Limits of the vertical axis; None leaves one to the data.
        x_end: Last iteration of the training; None ends with the lines.
        x_label: What is below; anything but iterations may have broken ticks.
        mark: Iteration of a vertical mark.
        mark_label: Written beside the mark.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=3, width=0.6)
        for line in lines:
            x, y = thinned(line)
            axes.plot(
                x,
                y,
                color=LINE.format(line.colour % NUM_COLOURS),
                linewidth=1.6,
                linestyle=(0, (4.0, 2.0)) if _dashed(line) else "-",
                marker="o" if len(x) == 1 else "",
                markersize=3,
                solid_joinstyle="round",
                clip_on=False,
            )
        axes.set_xlabel(x_label)
        axes.set_xlim(0, x_end)
        low, high = y_range
        if low == 0 and high is None and not any(value > 0 for line in lines for value in line.y):
            high = 1
        axes.set_ylim(low, high)
        counts = all(line.total for line in lines)
        whole = x_label == "iteration"
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=TICK_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=counts, steps=TICK_STEPS))
        if mark is not None:
            axes.axvline(mark, color=TEXT, linewidth=0.8, dashes=(2, 2), clip_on=False)
            axes.annotate(
                mark_label,
                (mark, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 1),
                textcoords="offset points",
                fontsize=8,
                va="bottom",
            )
        svg = inline_svg(figure, title, key)
    legend = tuple(
        LegendEntry(
            label=line.label,
            colour=line.colour % NUM_COLOURS,
            dashed=_dashed(line),
        )
        for line in lines
    )
    return Chart(title=title, svg=svg, legend=legend)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """One line of a chart of intervals."""

    label: str
    mean: float
    low: float | None
    """None draws the mean alone."""
    high: float | None


def interval_chart(
    title: str, intervals: Sequence[Interval], *, key: str, mark: float = 0.0
) -> Chart:
    """Draw values as dots with their intervals, one below the other.

    Args:
        title: What is drawn; stands above the chart and is its text alternative.
        intervals: At least one, from top to bottom.
        key: Unique in the page.
        mark: Where a line says: no difference.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        height = 0.7 + 0.22 * len(intervals)
        figure = Figure(figsize=(SIZE_INCHES[0], height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=3, width=0.6)
        axes.axvline(mark, color=TEXT, linewidth=0.8, dashes=(2, 2))
        for row, item in enumerate(intervals):
            if item.low is not None and item.high is not None:
                axes.plot([item.low, item.high], [row, row], color=LINE.format(0), linewidth=1.6)
            axes.plot([item.mean], [row], color=LINE.format(0), marker="o", markersize=4)
        axes.set_yticks(range(len(intervals)), [item.label for item in intervals])
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        svg = inline_svg(figure, title, key)
    return Chart(title=title, svg=svg, legend=())


def _dashed(line: Line) -> bool:
    return line.over or line.colour >= NUM_COLOURS


def thinned(line: Line) -> tuple[list[float], list[float]]:
    """Its points, at most 400: runs of neighbours become one, at the last one's iteration."""
    step = -(-len(line.x) // MAX_POINTS)
    if step <= 1:
        return list(line.x), list(line.y)
    x, y = [], []
    for start in range(0, len(line.x), step):
        values = line.y[start : start + step]
        x.append(line.x[min(start + step, len(line.x)) - 1])
        y.append(sum(values) / (1 if line.total else len(values)))
    return x, y


def inline_svg(figure: Figure, title: str, key: str) -> Markup:
    """The figure as an SVG element: colours as CSS variables, ids that begin with the key."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Ids are unique in the page only if each chart has its own.
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    text = _PLACEHOLDERS.sub(_css_variable, text)
    label = Markup('<svg role="img" aria-label="{}" ').format(title)
    return Markup(text.replace("<svg ", label, 1))


def _css_variable(match: re.Match[str]) -> str:
    line, is_text, _ = match.groups()
    if line is not None:
        return f"var(--line-{line})"
    return "var(--quiet)" if is_text else "var(--rule)"
