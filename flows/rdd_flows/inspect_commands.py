"""The commands that look at map stores: ``rdd maps hardest``, ``quality`` and ``compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rdd_flows.console import err as _err
from rdd_flows.console import out as _out
from rdd_flows.console import say as _say

if TYPE_CHECKING:
    from rdd_pipeline.inspection import Maps

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Path or URL of a map store.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration the store was built with: gives the labels."),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")]
Figure = Annotated[Path | None, typer.Option("--figure", help="Also draw it: .png, .pdf or .svg.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and results only.")]


def hardest(
    store: StorePath,
    count: Annotated[int, typer.Option("-n", help="How many images.")] = 20,
    by: Annotated[
        str,
        typer.Option("--by", help="mean, p95, soft_min, hard_share, error or discrepancy."),
    ] = "mean",
    class_name: Annotated[
        str | None, typer.Option("--class", help="Count the pixels of this class alone.")
    ] = None,
    easiest: Annotated[bool, typer.Option("--easiest", help="The other end.")] = False,
    threshold: Annotated[
        float,
        typer.Option("--threshold", help="Hard are pixels with a true-class probability up to it."),
    ] = 0.7,
    config: Config = None,
    overlays: Annotated[
        Path | None,
        typer.Option("--overlays", help="Also write their hardness as PNG to this folder; over "
                     "the images with --config."),
    ] = None,
    csv: Csv = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """List the images of a store that are hardest for its teacher."""
    from rdd_pipeline.inspection import MEASURES, Maps
    from rdd_pipeline.inspection.measures import EASY_ABOVE

    def rank() -> Any:
        return maps.hardest(count, by, class_name=class_name, easiest=easiest, threshold=threshold)

    maps = Maps(store, config)
    ranking = _with_progress(maps, rank, len(maps), quiet)
    table = Table("image", "pixels", *MEASURES, box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for image in ranking:
        figures = (_number(getattr(image, name)) for name in MEASURES)
        table.add_row(_plain(image.image_id), str(image.pixels), *figures)
    _say(ranking.title)
    _out.print(table)
    if by in EASY_ABOVE:
        _say(f"{by}: low is hard")
    _write_csv(ranking, csv)
    if overlays is not None:
        written = maps.export_overlays(overlays, ranking.image_ids)
        _say(f"{len(written)} pictures in {overlays}")


def quality(
    store: StorePath,
    config: Config = None,
    errors: Annotated[
        str | None,
        typer.Option("--errors", metavar="STORE", help="Find the errors of this store's teacher; "
                     "needs --config."),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option("--student", metavar="TRAINED", help="Find the errors of this student; "
                     "needs --config."),
    ] = None,
    hardness: Annotated[
        bool,
        typer.Option("--hardness", help="Test the hardness too; only on the errors of another "
                     "network."),
    ] = False,
    allow_circular: Annotated[
        bool,
        typer.Option("--allow-circular", help="Compute the hardness's figures on its own "
                     "teacher's errors all the same, and mark them."),
    ] = False,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="As many images, spread over the store.")
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=0, help="For the 95% intervals; 0 makes none.")
    ] = 1000,
    csv: Csv = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure how well the maps of a store find wrong pixels, beside simple baselines.

    Discrepancy and confidence need the store alone; the other baselines need --config.
    """
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.inspection import Maps

    if errors is not None and student is not None:
        raise ConfigError("--errors, --student: expected one of them, got both; leave one out")
    predict: Any = None if errors is None else Maps(errors)
    if student is not None:
        from rdd_pipeline.export import load_trained

        predict = load_trained(student).predict
    scores: list[Any] = ["discrepancy", "confidence"]
    scores += ["hardness"] if hardness else []
    scores += ["predicted_boundary", "label_boundary"] if config is not None else []

    maps = Maps(store, config)
    chosen = None if images is None else _spread(maps.image_ids, images)

    def assess() -> Any:
        return maps.quality(
            scores,
            errors=predict,
            images=chosen,
            allow_circular=allow_circular,
            resamples=resamples,
        )

    report = _with_progress(maps, assess, len(maps if chosen is None else chosen), quiet)
    _say(f"wrong pixels of {report.errors_of}, {report.images} images")
    names = ("auroc", "average_precision", "augrc", "aurc", "e_aurc", "ause")
    for row in report.rows:
        marks = [
            mark
            for mark, wanted in (
                ("baseline", row.baseline),
                ("uses labels", row.uses_labels),
                ("CIRCULAR, says nothing", row.circular),
            )
            if wanted
        ]
        marked = f" ({', '.join(marks)})" if marks else ""
        _say(f"\n{row.title}{marked}, {row.count} {row.over}")
        table = Table("", "value", "95% interval", box=None)
        figures = [("error rate", row.figures["error_rate"])]
        figures += [(name.replace("_", " "), row.figures[name]) for name in names]
        figures += [] if row.ece is None else [("ece", row.ece)]
        for name, found in figures:
            low_high = "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
            table.add_row(name, _number(found.value), low_high)
        _out.print(table)
    _write_csv(report, csv)
    _write_figure(report.figure, figure)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Path or URL of a map store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Path or URL of another.")],
    count: Annotated[int, typer.Option("-n", min=0, help="Images to list.")] = 10,
    quantity: Annotated[
        str, typer.Option("--quantity", help="hardness, discrepancy or confidence.")
    ] = "hardness",
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="As many images, spread over the store.")
    ] = None,
    csv: Csv = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Compare two stores of the same images: rank correlation, and what changed most."""
    from rdd_pipeline.inspection import Maps

    maps, other = Maps(a), Maps(b)
    common = [name for name in maps.image_ids if name in other]
    chosen = None if images is None else _spread(common, images)

    def compare_all() -> Any:
        return maps.compare(other, quantity=quantity, images=chosen)  # type: ignore[arg-type]

    comparison = _with_progress(maps, compare_all, len(common if chosen is None else chosen), quiet)
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{len(comparison.images)} compared, {comparison.only_a} in A alone, "
                  f"{comparison.only_b} in B alone, {len(comparison.changed_files)} of changed "
                  "files left out")  # fmt: skip
    table.add_row("Spearman", _number(comparison.spearman))
    table.add_row("Kendall", _number(comparison.kendall))
    table.add_row("mean |B - A|", _number(comparison.mean_absolute))
    table.add_row("mean B - A", _number(comparison.bias))
    _out.print(table)
    if count:
        changed = Table("changed most", "mean A", "mean B", "mean |B - A|", "Spearman", box=None)
        for image in comparison.images[:count]:
            changed.add_row(
                _plain(image.image_id),
                *map(_number, (image.mean_a, image.mean_b, image.mean_absolute, image.spearman)),
            )
        changed.columns[0].overflow = "fold"
        _out.print(changed)
    _write_csv(comparison, csv)
    _write_figure(comparison.figure, figure)


def register(maps_app: typer.Typer) -> None:
    """Add the commands to ``rdd maps``."""
    maps_app.command("hardest")(hardest)
    maps_app.command("quality")(quality)
    maps_app.command("compare")(compare)


def _with_progress(maps: Maps, work: Callable[[], Any], total: int, quiet: bool) -> Any:
    """Do something that may take a pass over many images of the store."""
    from rdd_pipeline.progress import Reporter

    with Reporter(_err, quiet=quiet).bar("read maps", total) as bar:
        maps.progress = bar.advance
        return work()


def _spread(names: Sequence[str], count: int) -> list[str]:
    """As many names, evenly spaced; all where there are fewer."""
    count = min(count, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def _write_csv(result: Any, path: Path | None) -> None:
    from rdd_pipeline.inspection import write_csv

    if path is not None:
        _say(str(write_csv(result, path)))


def _write_figure(draw: Callable[[], Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(path)
        _say(str(path))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
