"""The report's sections about the maps: are they any good, how are they spread, what is hard?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from rdd_pipeline.inspection import (
    Maps,
    QualityReport,
    ScoreName,
    ScoreQuality,
    risk_coverage,
)
from rdd_pipeline.inspection.viewer import viewer_fragment
from rdd_pipeline.progress import Reporter
from rdd_pipeline.report.curves import (
    Chart,
    Interval,
    Line,
    interval_chart,
    line_chart,
)
from rdd_pipeline.report.label_error_section import (
    LabelErrorSection,
    label_error_section,
    search,
)
from rdd_pipeline.report.map_charts import quantile_ends, range_chart
from rdd_pipeline.report.panels import PictureBook
from rdd_pipeline.report.store_section import HardImage, hardest_images
from rdd_storage import RddError

MOST_READ = 1000
"""Images whose maps are read for one report; of larger stores the stored counts are enough."""

PICTURE_BYTES = 6_000_000
"""Of all pictures of a page, as text; the page stays below 10 MB."""

VIEWER_IMAGES = 8
"""Images that can be looked at closely, fewer where they would not fit."""

_VIEWER_BYTES = 1_500_000
_VIEWER_SIDE = 640  # pixels; of larger maps it has every k-th
_CONFUSIONS = 8
_NAMES_LISTED = 20

# Heading, name and number of digits of a figure of map quality.
_FIGURES = (
    ("AUROC", "auroc"),
    ("average precision", "average_precision"),
    ("AURC", "aurc"),
    ("E-AURC", "e_aurc"),
    ("AUGRC", "augrc"),
    ("AUSE", "ause"),
)
QUALITY_HEADER = (
    "score of a pixel", "AUROC", "AUROC over<br>1 − confidence",
    *(name for name, _ in _FIGURES[1:]), "ECE",
)  # fmt: skip

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One figure of the quality table, with its interval; empty text where there is none."""

    value: str
    interval: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One score."""

    title: str
    mark: str
    """What the reader has to know of it."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySection:
    """How well the maps find wrong pixels."""

    images: int
    resamples: int
    error_rate: str
    rows: tuple[QualityRow, ...]
    charts: tuple[Chart, ...]
    note: str
    """Why baselines are missing; empty when they are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfusionRow:
    """One pair of label and prediction."""

    label: str
    prediction: str
    pixels: int
    share: float
    """Of the label's pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsSection:
    """What the report shows of the maps themselves. A part that could not be made is None or
    empty, and ``problems`` says why."""

    class_names: tuple[str, ...]
    images: int
    data_note: str
    """Why images and labels are not shown; empty where they are."""
    changed: tuple[str, ...]
    """The first images whose files are not those the maps were made from."""
    changed_count: int
    checked: int
    """How many images were looked at for that."""
    quality: QualitySection | None
    distributions: Chart | None
    confusions: tuple[ConfusionRow, ...]
    hardest: tuple[HardImage, ...]
    suspicious: LabelErrorSection | None
    viewer: Markup | None
    problems: tuple[str, ...]


def maps_section(maps: Maps, *, data_note: str, images: int, reporter: Reporter) -> MapsSection:
    """Read and compute what the report shows of a store's maps.

    Args:
        maps: A finished store, with its data set if there is one.
        data_note: Why there is none.
        images: Images to show: half of them the most suspicious, where labels are there.
        reporter: Shows progress.

    Raises:
        StoreIncompleteError, StoreDamagedError: The store's counts cannot be read.
    """
    problems: list[str] = []

    def attempt(make: Callable[[], _Value]) -> _Value | None:
        """One part of the page; the others do without it."""
        try:
            return make()
        except RddError as error:
            problems.append(str(error))
            return None

    with reporter.bar("read counts", len(maps)) as bar:
        maps.progress = bar.advance
        _ = maps.summary
    changed = _changed(maps, reporter)
    found = None
    if maps.source.dataset is not None:
        found = attempt(lambda: search(maps, most=MOST_READ, reporter=reporter))
    book = PictureBook(images, limit=PICTURE_BYTES)
    suspicious = None
    if found is not None:
        suspicious = label_error_section(found, count=images // 2, book=book)
        images -= len(suspicious.images)
    hardest = attempt(lambda: hardest_images(maps, count=images, book=book))
    return MapsSection(
        class_names=maps.class_names,
        images=len(maps),
        data_note=data_note,
        changed=tuple(changed[:_NAMES_LISTED]),
        changed_count=len(changed),
        checked=min(len(maps), MOST_READ) if maps.source.dataset is not None else 0,
        quality=attempt(lambda: _quality(maps, bool(changed), reporter)),
        distributions=_distributions(maps),
        confusions=_confusions(maps),
        hardest=hardest or (),
        suspicious=suspicious,
        viewer=attempt(lambda: _viewer(maps, hardest or (), suspicious)),
        problems=tuple(problems),
    )


def _viewer(
    maps: Maps, hardest: Sequence[HardImage], suspicious: LabelErrorSection | None
) -> Markup | None:
    """The first of the images that are shown, to be looked at with sliders; None of none."""
    second = () if suspicious is None else suspicious.images
    pairs = zip_longest(hardest, second)  # both kinds, also where few fit
    names = list(dict.fromkeys(image.image_id for pair in pairs for image in pair if image))
    names = names[:VIEWER_IMAGES]
    if not names:
        return None
    return Markup(
        viewer_fragment(maps, names, max_side=_VIEWER_SIDE, max_bytes=_VIEWER_BYTES)
    )  # made of escaped names and our own script


def _changed(maps: Maps, reporter: Reporter) -> list[str]:
    """Images whose files are gone or have changed, of the first of the store."""
    if maps.source.dataset is None:
        return []
    found = []
    names = maps.image_ids[:MOST_READ]
    with reporter.bar("check images", len(names)) as bar:
        for name in names:
            if maps.source.problem(name):
                found.append(name)
            bar.advance()
    return found


def _quality(maps: Maps, changed: bool, reporter: Reporter) -> QualitySection | None:
    scores: list[ScoreName] = ["discrepancy", "confidence"]
    note = ""
    if maps.source.dataset is None:
        note = "Nearness to a boundary is left out: it needs the labels, see --data."
    elif changed:
        note = "Nearness to a boundary is left out: some labels are not those of the maps."
    elif len(maps) > MOST_READ:
        note = (
            f"Nearness to a boundary is left out: it would read the maps of {len(maps)} images. "
            f"rdd maps quality {maps.path} --config CONFIG measures it."
        )
    else:
        scores += ["predicted_boundary", "label_boundary"]
    with reporter.bar("map quality", len(maps)) as bar:
        maps.progress = bar.advance
        report = maps.quality(scores)
    first = report.rows[0].figures["error_rate"]
    if first.value is None:  # no labelled pixel
        return None
    return QualitySection(
        images=report.images,
        resamples=report.resamples,
        error_rate=f"{report['confidence'].figures['error_rate'].value or 0.0:.2%}",
        rows=tuple(_quality_row(row) for row in report.rows),
        charts=_quality_charts(report),
        note=note,
    )


def _quality_row(row: ScoreQuality) -> QualityRow:
    marks = ["baseline"] if row.baseline else []
    marks += ["uses the labels"] if row.uses_labels else []
    gain = (
        _cell(row.auroc_gain, "+.3f") if row.name != "confidence" else Cell(value="", interval="")
    )
    cells = [_cell(row.figures["auroc"], ".3f"), gain]
    cells += [_cell(row.figures[name], ".3f") for _, name in _FIGURES[1:]]
    cells.append(Cell(value="", interval="") if row.ece is None else _cell(row.ece, ".3f"))
    return QualityRow(title=_minus(row.title), mark=", ".join(marks), cells=tuple(cells))


def _cell(found: Any, pattern: str) -> Cell:
    if found.value is None:
        return Cell(value="–", interval="")
    ends = ""

    def shown(value: float) -> str:
        return format(value, pattern).replace("-", "−")

    if found.low is not None and found.high is not None:
        ends = f"{shown(found.low)} to {shown(found.high)}"
    return Cell(value=shown(found.value), interval=ends)


def _quality_charts(report: QualityReport) -> tuple[Chart, ...]:
    intervals = [
        Interval(label=_minus(row.title), mean=found.value, low=found.low, high=found.high)
        for row in report.rows
        if (found := row.figures["auroc"]).value is not None
    ]
    charts = []
    if intervals:
        title = "AUROC of finding wrong pixels; 0.5 is chance"
        charts.append(interval_chart(title, intervals, key="auroc", mark=0.5))
    lines = []
    for number, row in enumerate(report.rows):
        coverage, risk = (part.tolist() for part in risk_coverage(row.correct, row.wrong))
        if len(coverage) == 1:  # any order is as good as another
            coverage, risk = [0.0, 1.0], [*risk, *risk]
        lines.append(Line(label=_minus(row.title), x=coverage, y=risk, colour=number))
    charts.append(
        line_chart(
            "share of wrong pixels among those of lowest score",
            lines,
            key="risk",
            y_range=(0, None),
            x_end=1.0,
            x_label="share of the pixels, lowest score first",
        )
    )
    return tuple(charts)


def _distributions(maps: Maps) -> Chart | None:
    spread = maps.distributions()
    mean = {(row["class"], row["region"]): row["mean"] for row in spread.table()}
    present = np.flatnonzero(spread.counts.sum(axis=(1, 2)))
    if not present.size:
        return None
    names = [spread.class_names[index] for index in present.tolist()]
    groups = {
        region: (
            quantile_ends(spread.quantile, column)[present],
            np.array([mean[name, region] for name in names]),
        )
        for column, region in enumerate(("interior", "boundary"))
    }
    return range_chart(
        "hardness by class: mean (dot), middle half (bar), 5% to 95% (line)",
        names,
        groups,
        key="spread",
        x_label="hardness",
    )


def _confusions(maps: Maps) -> tuple[ConfusionRow, ...]:
    rows = [row for row in maps.confusion().table() if row["label"] != row["prediction"]]
    return tuple(
        ConfusionRow(
            label=row["label"],
            prediction=row["prediction"],
            pixels=row["pixels"],
            share=row["share_of_label"],
        )
        for row in rows[:_CONFUSIONS]
    )


def _minus(title: str) -> str:
    return title.replace("1 - ", "1 − ")
