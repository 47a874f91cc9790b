"""Reports of runs and map stores: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rdd_pipeline.comparison import COMPARISON_FILE
from rdd_pipeline.config import parse_config
from rdd_pipeline.errors import CheckpointError, ConfigError
from rdd_pipeline.files import readable_bytes, write_atomically
from rdd_pipeline.inspection import DataSource, Maps
from rdd_pipeline.inspection.measures import THRESHOLD
from rdd_pipeline.inspection.pictures import scale_picture
from rdd_pipeline.progress import Reporter, current_reporter
from rdd_pipeline.report.comparison_section import comparison_section
from rdd_pipeline.report.maps_section import QUALITY_HEADER, MapsSection, maps_section
from rdd_pipeline.report.panels import VOID_COLOUR
from rdd_pipeline.report.run_results import read_results
from rdd_pipeline.report.run_section import (
    class_rows,
    diagnostics,
    difficulty_charts,
    network_rows,
    training_charts,
)
from rdd_pipeline.report.store_section import (
    StoreSection,
    find_store,
    open_maps,
    relative_path,
    store_section,
)
from rdd_storage import RddError, StoreIncompleteError, StoreNotFoundError

REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"

IMAGES = 24
"""Images shown unless said otherwise: the hardest, and as many of the most suspicious."""

_STAGES = ("check", "teacher", "maps", "students")


def write_report(
    target: str | Path,
    *,
    out: Path | None = None,
    data: DataSource | None = None,
    images: int = IMAGES,
    reporter: Reporter | None = None,
) -> Path:
    """Write the report of a run or of a map store; see the two functions below.

    Args:
        target: Folder of a finished ``rdd run`` or ``rdd students``, or path or URL of a store.
        out: The file to write.
        data: Where images and labels are.
        images: Images to show, 0 or more.
        reporter: Shows progress; None takes the process's.

    Raises:
        ConfigError: It is neither, or the run is not finished.
        RddError, OSError: See the two functions.
    """
    for name in (RESULTS_FILE, COMPARISON_FILE) if "://" not in str(target) else ():
        file = Path(target) / name
        if file.exists():
            return write_run_report(file, out=out, data=data, images=images, reporter=reporter)
    try:
        return write_store_report(target, out=out, data=data, images=images, reporter=reporter)
    except StoreNotFoundError as error:
        raise ConfigError(_neither(target)) from error


def write_run_report(
    results: Path,
    *,
    out: Path | None = None,
    data: DataSource | None = None,
    images: int = IMAGES,
    reporter: Reporter | None = None,
) -> Path:
    """Write ``report.html`` beside a run's results and return its path.

    Tables, per-class quality, curves, and everything about the run's map store that
    :func:`write_store_report` has. A store or data set that is gone is noted in the report; it is
    no error.

    Args:
        results: ``results.json``, which :func:`rdd_pipeline.results.write_results` wrote, or
            ``students.json`` of students that were trained from a store that was there.
        out: Another file to write.
        data: Where images and labels are; None takes the run's configuration.
        images: Images to show, 0 or more.
        reporter: Shows progress; None takes the process's.

    Raises:
        CheckpointError: The file is not the results of a run.
        OSError: It cannot be read, or the report cannot be written.
    """
    try:
        content = read_results(results)
        html = _render_run(content, results.parent, data, images, reporter or current_reporter())
    except (KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RddError):
            raise
        raise CheckpointError(
            f"{results}: expected the results of a run, but something is missing or of the wrong "
            f"type ({error!r}); run 'rdd run' or 'rdd students' again to write it anew"
        ) from error
    return _write(html, results.parent / REPORT_FILE if out is None else out)


def write_store_report(
    store: str | Path,
    *,
    out: Path | None = None,
    data: DataSource | None = None,
    images: int = IMAGES,
    reporter: Reporter | None = None,
) -> Path:
    """Write the report of a map store and return its path.

    What the store takes, how well its maps find wrong pixels, how hardness is spread over classes,
    the hardest images and, with ``data``, those whose labels are most suspicious. Images that have
    changed since the build are named; their maps are shown alone.

    Args:
        store: Path or URL.
        out: The file to write; None takes the store's name, with ``.html``, in the working folder.
        data: Where images and labels are, see :class:`rdd_pipeline.inspection.Maps`.
        images: Images to show, 0 or more.
        reporter: Shows progress; None takes the process's.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreUnavailableError, StoreAccessError: The store
            cannot be read.
        StoreIncompleteError: It is not built to the end.
        ConfigError, DataError, StoreMismatchError: ``data`` cannot be opened, or is not what the
            store was built from.
        OSError: The report cannot be written.
    """
    maps = Maps(store, data)
    _require_complete(maps)
    name = str(store).rstrip("/").rpartition("/")[2]
    note = "" if data is not None else "no data set was given, see --data"
    html = _template("store.html.jinja").render(
        name=name,
        store=store_section(maps, str(store)),
        maps=maps_section(
            maps, data_note=note, images=images, reporter=reporter or current_reporter()
        ),
        **_constants(),
    )
    return _write(html, Path(f"{name.removesuffix('.zarr')}.html") if out is None else out)


def _render_run(
    results: dict[str, Any],
    run_dir: Path,
    data: DataSource | None,
    images: int,
    reporter: Reporter,
) -> str:
    store, maps = StoreSection(path=""), None
    if results["maps"] is not None:
        path = find_store(str(results["maps"]["path"]), run_dir)
        shown = relative_path(path, run_dir)
        try:
            maps, store = _store_of_run(path, shown, results, data, images, reporter)
        except RddError as error:
            store = StoreSection(path=shown, problem=str(error))
    return _template("run.html.jinja").render(
        results=results,
        rows=network_rows(results),
        comparison=comparison_section(run_dir),
        classes=class_rows(results),
        stages=_in_order(results["seconds"]),
        charts=training_charts(results),
        diagnostics=diagnostics(results),
        difficulty=difficulty_charts(results),
        store=store,
        maps=maps,
        **_constants(),
    )


def _store_of_run(
    path: str,
    shown: str,
    results: dict[str, Any],
    data: DataSource | None,
    images: int,
    reporter: Reporter,
) -> tuple[MapsSection, StoreSection]:
    note = ""
    if data is None:
        try:
            data = parse_config(results["config"], source=RESULTS_FILE).data
        except RddError as error:
            note = str(error)
    maps, problem = open_maps(path, data)
    _require_complete(maps)
    store = store_section(maps, shown)
    return maps_section(maps, data_note=problem or note, images=images, reporter=reporter), store


def _require_complete(maps: Maps) -> None:
    if not maps.reader.complete:
        status = maps.status
        raise StoreIncompleteError(
            f"{maps.path}: expected a store that is built to the end, got {status.images_done} of "
            f"{len(maps)} images; 'rdd maps build' with the same configuration builds the others"
        )


def _neither(target: str | Path) -> str:
    what = f"{target}: expected the folder of a finished run, or a map store, got "
    if "://" in str(target):
        return f"{what}a place with no store; 'rdd maps list' shows the stores of a folder"
    path = Path(target)
    if not path.exists():
        return f"{what}a path that does not exist"
    if (path / "config.json").exists() or (path / "students").is_dir():
        return (
            f"{what}a run without {RESULTS_FILE} and {COMPARISON_FILE}; the same 'rdd run' or "
            "'rdd students' finishes it"
        )
    if not path.is_dir():
        return f"{what}a file; give the folder that holds {RESULTS_FILE}"
    return (
        f"{what}a folder that is neither; a run has {RESULTS_FILE} or {COMPARISON_FILE}, and 'rdd "
        "maps list' shows the stores of a folder"
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("rdd_pipeline.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "bytes": readable_bytes, "duration": _duration}
    return environment.get_template(name)


def _constants() -> dict[str, Any]:
    return {
        "void_colour": VOID_COLOUR,
        "scale_colours": _scale_colours(),
        "threshold": THRESHOLD,
        "quality_header": QUALITY_HEADER,
    }


def _write(html: str, path: Path) -> Path:
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return path


def _in_order(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """The stages in the order in which a run takes them; others after them."""
    order = {name: place for place, name in enumerate(_STAGES)}
    return sorted(seconds.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _scale_colours() -> str:
    """The colour scale of the maps as the stops of a CSS gradient."""
    stops = scale_picture(np.linspace(0.0, 1.0, 9)).tolist()
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


__all__ = ["write_report", "write_run_report", "write_store_report"]
