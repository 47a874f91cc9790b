"""The command ``rdd maps label-errors``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rdd_flows.console import out, say
from rdd_flows.inspect_options import Csv, NeededData, with_progress, write_table
from rdd_flows.options import Quiet, StorePath

if TYPE_CHECKING:
    from rdd_pipeline.inspection import LabelErrors


def label_errors(
    store: StorePath,
    data: NeededData,
    count: Annotated[int, typer.Option("-n", min=1, help="How many regions.")] = 50,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Only labels of this class.")
    ] = None,
    max_true_prob: Annotated[
        float,
        typer.Option("--max-true-prob", help="Most probability of the label's class."),
    ] = 0.5,
    min_confidence: Annotated[
        float,
        typer.Option("--min-confidence", help="Least probability of the suggested class."),
    ] = 0.5,
    min_area: Annotated[
        int, typer.Option("--min-area", min=1, help="Fewest pixels of a region.")
    ] = 20,
    csv: Csv = None,
    coco: Annotated[
        Path | None,
        typer.Option("--coco", help="Also write them as COCO annotations with masks."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", metavar="DIR", help="Also draw image, label and suggestion of "
                     "each to this folder."),
    ] = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """List regions whose label is probably wrong, with the class that the teacher sees there."""
    from rdd_pipeline.inspection import Maps, find_label_errors

    maps = Maps(store, data)

    def find(advance: Any) -> LabelErrors:
        return find_label_errors(
            maps, class_name=class_name, max_true_prob=max_true_prob,
            min_confidence=min_confidence, min_area=min_area, keep=count, progress=advance,
        )  # fmt: skip

    found: LabelErrors = with_progress("find label errors", len(maps), quiet, find)
    table = Table("", "image", "label", "teacher", "score", "p(label)", "p(teacher)", "pixels",
                  "x, y", box=None)  # fmt: skip
    table.columns[1].overflow = "fold"
    for rank, error in enumerate(found, start=1):
        table.add_row(
            str(rank), escape(error.image_id), escape(error.label), escape(error.suggestion),
            f"{error.score:.2f}", f"{error.true_prob:.3f}", f"{error.confidence:.3f}",
            str(error.area), f"{error.centroid[0]:.0f}, {error.centroid[1]:.0f}",
        )  # fmt: skip
    say(f"{len(found)} of {found.total} suspicious regions in {found.images} images")
    if len(found):
        out.print(table)
    if found.problems:
        name, problem = next(iter(found.problems.items()))
        say(f"left out {len(found.problems)} images; the first, {name}: {problem}")
    write_table(found, csv)
    if coco is not None:
        say(str(found.to_coco(coco)))
    if pictures is not None:
        say(f"{len(found.write_pictures(pictures))} pictures in {pictures}")


def register(maps_app: typer.Typer) -> None:
    """Add the command to ``rdd maps``."""
    maps_app.command("label-errors")(label_errors)
