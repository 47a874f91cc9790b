"""The report of a run: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.files import read_json, readable_bytes, write_atomically
from rdd_pipeline.report.panels import VOID_COLOUR, cividis
from rdd_pipeline.report.run_section import (
    class_rows,
    diagnostics,
    network_rows,
    training_charts,
)
from rdd_pipeline.report.store_section import THRESHOLD, store_section

REPORT_FILE = "report.html"

_STAGES = ("check", "teacher", "maps", "students")


def write_run_report(results: Path) -> Path:
    """Write ``report.html`` beside a run's ``results.json`` and return its path.

    Tables, per-class quality, curves, and the hardest training images of the run's map store. A
    store or data set that is gone is noted in the report; it is no error.

    Args:
        results: A file that :func:`rdd_pipeline.stages.write_results` wrote.

    Raises:
        CheckpointError: The file is not the results of a run.
        OSError: It cannot be read, or the report cannot be written.
    """
    content = read_json(results)
    try:
        html = _render(content, results.parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{results}: expected the results of a run, but something is missing or of the wrong "
            f"type ({error!r}); run 'rdd run' again to write it anew"
        ) from error
    report = results.parent / REPORT_FILE
    write_atomically(report, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return report


def _render(results: dict[str, Any], run_dir: Path) -> str:
    environment = Environment(
        loader=PackageLoader("rdd_pipeline.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "bytes": readable_bytes, "duration": _duration}
    return environment.get_template("template.html.jinja").render(
        results=results,
        rows=network_rows(results),
        classes=class_rows(results),
        stages=_in_order(results["seconds"]),
        charts=training_charts(results),
        diagnostics=diagnostics(results),
        store=store_section(results, run_dir),
        void_colour=VOID_COLOUR,
        scale_colours=_scale_colours(),
        threshold=THRESHOLD,
    )


def _in_order(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """The stages in the order in which a run takes them; others after them."""
    order = {name: place for place, name in enumerate(_STAGES)}
    return sorted(seconds.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _scale_colours() -> str:
    """The colour scale of the maps as the stops of a CSS gradient."""
    stops = cividis(np.linspace(0.0, 1.0, 9)).tolist()
    return ", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in stops)


def _figure(value: float | None, pattern: str) -> str:
    """A number in a format such as ``.1%``; a dash where there is none."""
    return "–" if value is None else format(value, pattern)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


__all__ = ["write_run_report"]
