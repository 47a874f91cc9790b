"""The commands ``rdd data``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from rdd_flows.console import err, out
from rdd_flows.options import ConfigPath, Overrides, Quiet, start
from rdd_pipeline.files import readable_bytes

if TYPE_CHECKING:
    from rdd_pipeline.data import Survey

data_app = typer.Typer(help="Check and pack data sets.", no_args_is_help=True)


@data_app.command("check")
def data_check(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Read every file of both splits: sizes, shares of the classes, everything that is wrong.

    Exit code 1 if anything is.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset, survey_dataset
    from rdd_pipeline.errors import DataError

    settings = load_config(config, overrides or ())
    reporter = start(quiet)
    found = 0
    for split in ("train", "val"):
        try:
            dataset = build_dataset(settings.data, split)
        except DataError as error:  # the other split is looked at all the same
            found += 1
            err.print(f"{split}: {error}", markup=False, highlight=False, soft_wrap=True)
            continue
        with reporter.bar(f"check {split}", len(dataset)) as bar:
            survey = survey_dataset(dataset, progress=bar.advance)
        _print_survey(survey)
        for problem in survey.problems:
            err.print(problem, markup=False, highlight=False, soft_wrap=True)
        found += len(survey.problems)
    if found:
        err.print(f"{found} problem(s)", highlight=False)
        raise typer.Exit(1)
    out.print("no problems")


@data_app.command("pack")
def data_pack(
    config: ConfigPath,
    split: Annotated[
        Literal["train", "val", "all"], typer.Option("--split", help="What to pack.")
    ] = "all",
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Store decoded images and labels once, so that training reads only the pixels of its crops.

    Training takes the pack by itself and gives the same results. An interrupted command goes on
    where it was; a later one adds what is new or has changed.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset, pack_dataset

    settings = load_config(config, overrides or ())
    reporter = start(quiet)
    splits: tuple[Literal["train", "val"], ...] = ("train", "val") if split == "all" else (split,)
    for name in splits:
        packed = pack_dataset(
            build_dataset(settings.data, name), settings.data.packed_root, reporter=reporter
        )
        what = f"{packed.images_packed} of {packed.images} images packed in {packed.seconds:.1f} s"
        if not packed.images_packed:
            what = f"reused, {packed.images} images"
        size = readable_bytes(packed.bytes_on_disk)
        out.print(f"{name}: {what}, {size}: {packed.path}", highlight=False, soft_wrap=True)


def _print_survey(survey: Survey) -> None:
    """Print what a split holds."""
    heights, widths = zip(*survey.sizes, strict=True) if survey.sizes else ((0,), (0,))
    low, high = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    sizes = low if low == high else f"{low} to {high}, {len(survey.sizes)} sizes"
    out.print(
        f"{survey.name} {survey.split}: {survey.images} images of {sizes} (height x width), "
        f"{survey.ignored:.1%} of the pixels ignored, {len(survey.problems)} problem(s)",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("class", "pixels", "in images", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for item in survey.classes:
        table.add_row(escape(item.name), f"{item.share:.3%}", str(item.images))
    out.print(table)
    absent = [item.name for item in survey.classes if not item.images]
    if absent:
        out.print(
            f"in no image: {', '.join(absent)}", markup=False, highlight=False, soft_wrap=True
        )
    out.print()
