"""The commands that look at stores: ``rdd maps hardest``, ``quality``, ``compare``, ``student``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rdd_flows.console import out, say
from rdd_flows.inspect_options import (
    Csv,
    Data,
    Figure,
    Images,
    NeededData,
    number,
    over_maps,
    spread,
    write_figure,
    write_table,
)
from rdd_flows.options import Quiet, StorePath


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
    data: Data = None,
    overlays: Annotated[
        Path | None,
        typer.Option("--overlays", help="Also write their hardness as PNG to this folder; over "
                     "the images with --data."),
    ] = None,
    csv: Csv = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """List the images of a store that are hardest for its teacher."""
    from rdd_pipeline.inspection import MEASURES, Maps
    from rdd_pipeline.inspection.measures import EASY_ABOVE

    def rank() -> Any:
        return maps.hardest(count, by, class_name=class_name, easiest=easiest, threshold=threshold)

    maps = Maps(store, data)
    ranking = over_maps(maps, len(maps), quiet, rank)
    table = Table("image", "pixels", *MEASURES, box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for image in ranking:
        figures = (number(getattr(image, name)) for name in MEASURES)
        table.add_row(escape(image.image_id), str(image.pixels), *figures)
    say(ranking.title)
    out.print(table)
    if by in EASY_ABOVE:
        say(f"{by}: low is hard")
    write_table(ranking, csv)
    if overlays is not None:
        written = maps.export_overlays(overlays, ranking.image_ids)
        say(f"{len(written)} pictures in {overlays}")


def quality(
    store: StorePath,
    data: Data = None,
    errors: Annotated[
        str | None,
        typer.Option("--errors", metavar="STORE", help="Find the errors of this store's teacher; "
                     "needs --data."),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option("--student", metavar="TRAINED", help="Find the errors of this student; "
                     "needs --data."),
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
    images: Images = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=0, help="For the 95% intervals; 0 makes none.")
    ] = 1000,
    csv: Csv = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure how well the maps of a store find wrong pixels, beside simple baselines.

    Discrepancy and confidence need the store alone; the other baselines need --data.
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
    scores += ["predicted_boundary", "label_boundary"] if data is not None else []

    maps = Maps(store, data)
    chosen = None if images is None else spread(maps.image_ids, images)

    def assess() -> Any:
        return maps.quality(
            scores,
            errors=predict,
            images=chosen,
            allow_circular=allow_circular,
            resamples=resamples,
        )

    report = over_maps(maps, len(maps if chosen is None else chosen), quiet, assess)
    say(f"wrong pixels of {report.errors_of}, {report.images} images")
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
        say(f"\n{row.title}{marked}, {row.count} {row.over}")
        table = Table("", "value", "95% interval", box=None)
        figures = [("error rate", row.figures["error_rate"])]
        figures += [(name.replace("_", " "), row.figures[name]) for name in names]
        figures += [] if row.ece is None else [("ece", row.ece)]
        for name, found in figures:
            low_high = "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
            table.add_row(name, number(found.value), low_high)
        out.print(table)
    write_table(report, csv)
    write_figure(report.figure, figure)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Path or URL of a map store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Path or URL of another.")],
    count: Annotated[int, typer.Option("-n", min=0, help="Images to list.")] = 10,
    quantity: Annotated[
        str, typer.Option("--quantity", help="hardness, discrepancy or confidence.")
    ] = "hardness",
    images: Images = None,
    csv: Csv = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Compare two stores of the same images: rank correlation, and what changed most."""
    from rdd_pipeline.inspection import Maps

    maps, other = Maps(a), Maps(b)
    common = [name for name in maps.image_ids if name in other]
    chosen = None if images is None else spread(common, images)

    def compare_all() -> Any:
        return maps.compare(other, quantity=quantity, images=chosen)  # type: ignore[arg-type]

    comparison = over_maps(maps, len(common if chosen is None else chosen), quiet, compare_all)
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{len(comparison.images)} compared, {comparison.only_a} in A alone, "
                  f"{comparison.only_b} in B alone, {len(comparison.changed_files)} of changed "
                  "files left out")  # fmt: skip
    table.add_row("Spearman", number(comparison.spearman))
    table.add_row("Kendall", number(comparison.kendall))
    table.add_row("mean |B - A|", number(comparison.mean_absolute))
    table.add_row("mean B - A", number(comparison.bias))
    out.print(table)
    if count:
        changed = Table("changed most", "mean A", "mean B", "mean |B - A|", "Spearman", box=None)
        for image in comparison.images[:count]:
            changed.add_row(
                escape(image.image_id),
                *map(number, (image.mean_a, image.mean_b, image.mean_absolute, image.spearman)),
            )
        changed.columns[0].overflow = "fold"
        out.print(changed)
    write_table(comparison, csv)
    write_figure(comparison.figure, figure)


def student(
    store: StorePath,
    trained: Annotated[
        Path,
        typer.Argument(metavar="TRAINED", help="Folder of a finished training: RUN/students/NAME."),
    ],
    data: NeededData,
    images: Annotated[
        int, typer.Option("--images", min=1, help="As many images, spread over the store.")
    ] = 16,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    csv: Csv = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Follow a student's difficulty against the teacher's over the weights that its training kept.

    training.snapshots says how many it keeps; without any there are two points at most.
    """
    from rdd_pipeline.inspection import Maps
    from rdd_pipeline.machine import resolve_device
    from rdd_pipeline.training_state import snapshot_folders

    maps = Maps(store, data)
    on = str(resolve_device(device))

    def follow() -> Any:
        return maps.student_history(trained, images=images, device=on)

    points = 1 + (len(snapshot_folders(trained)) or 1)
    history = over_maps(maps, points * min(images, len(maps)), quiet, follow)
    columns = {
        "spearman": "Spearman", "student_mean": "student's mean", "teacher_mean": "teacher's mean",
        "relative": "hard for one alone", "student_alone": "student alone",
        "teacher_alone": "teacher alone", "both": "both",
    }  # fmt: skip
    table = Table("iteration", *columns.values(), box=None)
    for column in table.columns:
        column.justify = "right"
    for row in history.table():
        iteration = "end" if row["iteration"] is None else str(row["iteration"])
        table.add_row(iteration, *(number(row[name]) for name in columns))
    say(f"hardness of {len(history.image_ids)} images for {trained} and for the teacher of {store}")
    out.print(table)
    write_table(history, csv)
    write_figure(history.figure, figure)


def register(maps_app: typer.Typer) -> None:
    """Add the commands to ``rdd maps``."""
    for command in (hardest, quality, compare, student):
        maps_app.command()(command)
