"""What several commands take, and how they start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rdd_flows.console import err
from rdd_flows.environment import configure_logging
from rdd_pipeline.processes import is_main_process

if TYPE_CHECKING:
    from rdd_pipeline.progress import Reporter

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as --set data.root=PATH or "
        "--set 'students=[supervised, rdd]'. The value is YAML. May be repeated.",
    ),
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Path or URL of a map store.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and results only.")]


def start(quiet: bool) -> Reporter:
    """Set up logging and progress for a command."""
    from rdd_pipeline.progress import Reporter, set_reporter

    # Of several training processes the main one alone shows anything but errors.
    quiet = quiet or not is_main_process()
    configure_logging(err, quiet=quiet)
    reporter = Reporter(err, quiet=quiet)
    set_reporter(reporter)
    return reporter
