"""The report's sections about the networks: their table, per-class quality and curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdd_pipeline.comparison import network_label
from rdd_pipeline.inspection.pictures import scale_picture
from rdd_pipeline.report.curves import Chart, Line, line_chart
from rdd_pipeline.report.map_charts import heat_chart

# Names in the history (see rdd_pipeline.losses) with what the report calls them. A colour belongs
# to a name, so that it means the same in every chart.
_TERMS = {
    "loss": "total",
    "ce": "cross-entropy",
    "ce_aux": "cross-entropy, auxiliary head",
    "tfe": "stage 1 (TFE)",
    "tse": "stage 2 (TSE)",
    "kd": "logit distillation",
    "cwd": "CWD",
    "dist": "DIST",
    "skd": "SKD",
    "cwd_features": "CWD on features",
    "skd_features": "SKD on features",
    "at": "AT",
    "ifvd": "IFVD",
    "dsd_pixel": "DSD, pixels",
    "dsd_category": "DSD, categories",
    "cirkd_minibatch": "CIRKD, batch",
    "cirkd_pixel": "CIRKD, remembered pixels",
    "cirkd_region": "CIRKD, remembered regions",
}
_SHARES = {
    "relative": "trained on in stage 2",
    "hard_teacher": "hard for the teacher",
    "hard_student": "hard for the student",
    "hard_both": "hard for both",
}
_TAUS = {"tau_teacher": "teacher", "tau_student": "student"}
_AGAINST_TEACHER: tuple[tuple[str, str, tuple[float | None, float | None]], ...] = (
    ("spearman", "rank correlation with the teacher's hardness", (None, None)),
    ("student_mean", "mean hardness", (0, None)),
    ("relative", "share of pixels hard for student or teacher alone", (0, None)),
)
_COUNT = "empty_masks"  # counted since the entry before; all else is averaged


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRow:
    """One line of the table; None where a figure is not known."""

    name: str
    method: str
    network: str
    """Architecture and encoder."""
    miou: float
    pixel_accuracy: float
    iterations: int | None
    seconds: float | None
    images_per_second: float | None
    step_ms: float | None
    step_ratio: float | None
    """Step time over that of the supervised student with the same network and batch."""
    same_timing: bool
    """Whether both step times of the ratio were taken in the same run, as far as is known."""
    data_wait_share: float | None
    parameters: int | None
    source: str
    """Whether it was made in this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCell:
    """Quality of one network on one class, with the colours of its cell."""

    iou: float | None
    background: str
    ink: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """One class of the per-class table."""

    name: str
    cells: tuple[ClassCell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """The charts of one student that was trained by relative difficulty."""

    name: str
    charts: tuple[Chart, ...]


def network_rows(results: Mapping[str, Any]) -> tuple[NetworkRow, ...]:
    """The teacher's line if it is known, then the students' in the order of the results."""
    config = results["config"]
    rows = []
    if results["teacher"] is not None:
        rows.append(
            _row(
                results["teacher"],
                name="teacher",
                method="teacher",
                network=config["teacher"]["network"],
                source=_source(results["teacher"]),
                baseline=None,
            )
        )
    for student in results["students"]:
        rows.append(
            _row(
                student,
                name=student["name"],
                method=student["label"],
                network=student["settings"]["network"],
                source=_source(student),
                baseline=_baseline(student, results["students"]),
            )
        )
    return tuple(rows)


def class_rows(results: Mapping[str, Any]) -> tuple[ClassRow, ...]:
    """Intersection over union of each class, for the networks in the order of the table."""
    networks = _named_networks(results)
    return tuple(
        ClassRow(
            name=name,
            cells=tuple(
                _cell(network["metrics"]["class_iou"].get(name)) for _, network in networks
            ),
        )
        for name in results["data"]["class_names"]
    )


def training_charts(results: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Loss terms of each network with a history; before them mIoU, if evaluated on the way."""
    charts = []
    networks = _named_networks(results)
    lines = [
        _line(name, network["evaluations"], "miou", colour)
        for colour, (name, network) in enumerate(networks)
        if len(network.get("evaluations", ())) > 1
    ]
    drawn = [line for line in lines if line is not None]
    if drawn:
        charts.append(line_chart("mIoU on the validation images", drawn, key="miou"))
    for number, (name, network) in enumerate(networks):
        chart = _chart(f"{name}: loss", network, _TERMS, key=f"loss{number}", y_range=(0, None))
        if chart is not None:
            charts.append(chart)
    return tuple(charts)


def diagnostics(results: Mapping[str, Any]) -> tuple[Diagnostics, ...]:
    """How the two stages went, for each student that has such figures."""
    found = []
    for number, student in enumerate(results["students"]):
        rdd = student["settings"]["methods"].get("rdd")
        if rdd is None:
            continue
        shares = _SHARES | {"relative": _relation_label(rdd["relation"])}
        charts = [
            _chart(title, student, names, key=f"stages{number}-{index}", y_range=limits)
            for index, (title, names, limits) in enumerate(
                (
                    ("share of the labelled pixels", shares, (0, None)),
                    ("mean weight exp(−D)", {"mean_weight": "mean weight"}, (0, 1)),
                    ("hard threshold tau", _TAUS, (0, 1)),
                    ("empty masks", {_COUNT: "empty masks"}, (0, None)),
                )
            )
        ]
        entries = [
            (entry["iteration"], entry["relative"]) for entry in student.get("class_history", ())
        ]
        if entries:
            title = f"{_relation_label(rdd['relation'])}: share of each class's pixels"
            names = results["data"]["class_names"]
            charts.append(heat_chart(title, names, entries, key=f"classes{number}"))
        drawn = tuple(chart for chart in charts if chart is not None)
        if drawn:
            found.append(Diagnostics(name=student["name"], charts=drawn))
    return tuple(found)


def difficulty_charts(results: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Students' difficulty against the teacher's over the iterations, where snapshots were kept."""
    histories = [
        (student["name"], student["difficulty_history"])
        for student in results["students"]
        if student.get("difficulty_history")
    ]
    if not histories:
        return ()
    charts = []
    for key, (name, title, limits) in enumerate(_AGAINST_TEACHER):
        lines = [
            _line(student, history, name, colour)
            for colour, (student, history) in enumerate(histories)
        ]
        if name == "student_mean":
            lines.append(_line("teacher", histories[0][1], "teacher_mean", len(histories)))
        drawn = [line for line in lines if line is not None]
        if drawn:
            charts.append(line_chart(title, drawn, key=f"difficulty{key}", y_range=limits))
    return tuple(charts)


def _chart(
    title: str,
    network: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    key: str,
    y_range: tuple[float | None, float | None],
) -> Chart | None:
    """The named values of a network's history; None if there are none."""
    history = network.get("history", ())
    lines = [
        line
        for colour, (name, label) in enumerate(names.items())
        if (line := _line(label, history, name, colour)) is not None
    ]
    if not lines:
        return None
    settings = network.get("settings", {})
    rdd = settings.get("methods", {}).get("rdd")
    return line_chart(
        title,
        lines,
        key=key,
        y_range=y_range,
        x_end=max(entry["iteration"] for entry in history),
        mark=None if rdd is None else _switch(rdd["switch"], settings["training"]["iterations"]),
        mark_label="stage 2",
    )


def _line(label: str, entries: Iterable[Mapping[str, Any]], name: str, colour: int) -> Line | None:
    """One value over the iterations; None if no entry has it. What was not computed is left out."""
    points = [
        (entry["iteration"], entry[name])
        for entry in entries
        if entry.get(name) is not None and math.isfinite(entry[name])
    ]
    if not points:
        return None
    x, y = zip(*points, strict=True)
    return Line(
        label=label, x=x, y=y, colour=colour, total=name == _COUNT, over=name == "tau_student"
    )


def _relation_label(relation: str) -> str:
    if relation == "student":
        return "hard for the student (trained on)"
    return f"teacher {relation.upper()} student (trained on)"


def _switch(switch: float, iterations: int) -> int:
    """The iteration at which stage 2 begins, as rdd_pipeline.losses.RDDLoss takes it."""
    return round(switch * iterations) if isinstance(switch, float) else switch


def _row(
    result: Mapping[str, Any],
    *,
    name: str,
    method: str,
    network: Mapping[str, Any],
    source: str,
    baseline: Mapping[str, Any] | None,
) -> NetworkRow:
    ratio = None
    if baseline is not None and result.get("step_ms") and baseline.get("step_ms"):
        ratio = result["step_ms"] / baseline["step_ms"]
    return NetworkRow(
        name=name,
        method=method,
        network=network_label(network),
        miou=result["metrics"]["miou"],
        pixel_accuracy=result["metrics"]["pixel_accuracy"],
        iterations=result.get("iterations"),
        seconds=result.get("seconds"),
        images_per_second=result.get("images_per_second"),
        step_ms=result.get("step_ms"),
        step_ratio=ratio,
        same_timing=baseline is None or _timing(result) == _timing(baseline),
        data_wait_share=result.get("data_wait_share"),
        parameters=result.get("parameters"),
        source=source,
    )


def _baseline(
    student: Mapping[str, Any], students: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The supervised student whose steps do the same work but for the distillation."""

    def work(entry: Mapping[str, Any]) -> list[Any]:
        settings = entry["settings"]
        training = settings["training"]
        same = ("batch_size", "crop_size", "precision")
        return [settings["network"], *(training[key] for key in same)]

    found = [
        other
        for other in students
        if other["method"] == ["supervised"] and work(other) == work(student)
    ]
    # The one that was timed together with this student, if there is one.
    found.sort(key=lambda other: _timing(other) != _timing(student))
    return found[0] if found else None


def _timing(student: Mapping[str, Any]) -> bool:
    """Whether the student's steps were timed in this run."""
    return bool(student["in_this_run"] and not student["reused"])


def _cell(iou: float | None) -> ClassCell:
    if iou is None:
        return ClassCell(iou=None, background="transparent", ink="inherit")
    red, green, blue = (int(channel) for channel in scale_picture(np.array([iou]))[0])
    # Relative luminance (ITU-R BT.709 weights); black and white contrast equally at about 0.46.
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.46 * 255
    return ClassCell(
        iou=iou,
        background=f"rgb({red}, {green}, {blue})",
        ink="#000" if light else "#fff",
    )


def _named_networks(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    teacher = results["teacher"]
    return [
        *([] if teacher is None else [("teacher", teacher)]),
        *((student["name"], student) for student in results["students"]),
    ]


def _source(entry: Mapping[str, Any]) -> str:
    if not entry.get("in_this_run", True):
        return "earlier run"
    return "reused" if entry["reused"] else "this run"
