"""What the commands that look at maps take, and how they show and write what they found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rdd_flows.console import err, say

if TYPE_CHECKING:
    from rdd_pipeline.inspection import Maps

_DATA_HELP = "Configuration the store was built with: gives images and labels."

Data = Annotated[Path | None, typer.Option("--data", "--config", metavar="CONFIG", help=_DATA_HELP)]
NeededData = Annotated[Path, typer.Option("--data", "--config", metavar="CONFIG", help=_DATA_HELP)]
Images = Annotated[
    int | None, typer.Option("--images", min=1, help="As many images, spread over the store.")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")]
Figure = Annotated[Path | None, typer.Option("--figure", help="Also draw it: .png, .pdf or .svg.")]


def with_progress(
    name: str, total: int, quiet: bool, work: Callable[[Callable[[int], object]], Any]
) -> Any:
    """Do something that may take a while, with a bar.

    Args:
        name: What is done.
        total: Steps.
        quiet: Show no bar.
        work: Gets what it has to call with the number of steps done since the last call.
    """
    from rdd_pipeline.progress import Reporter

    with Reporter(err, quiet=quiet).bar(name, total) as bar:
        return work(bar.advance)


def over_maps(maps: Maps, total: int, quiet: bool, work: Callable[[], Any]) -> Any:
    """Do something that may take a pass over many images of a store, with a bar."""

    def looked_at(advance: Callable[[int], object]) -> Any:
        maps.progress = advance
        return work()

    return with_progress("read maps", total, quiet, looked_at)


def spread(names: Sequence[str], count: int) -> list[str]:
    """As many names, evenly spaced; all where there are fewer."""
    count = min(count, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def write_table(result: Any, path: Path | None) -> None:
    """Write a result as CSV, if asked to."""
    from rdd_pipeline.inspection import write_csv

    if path is not None:
        say(str(write_csv(result, path)))


def write_figure(draw: Callable[[], Any], path: Path | None) -> None:
    """Write a figure, if asked to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(path)
        say(str(path))


def number(value: float | None) -> str:
    """Four digits; a dash for what there is not."""
    return "-" if value is None or value != value else f"{value:.4f}"
