"""The command ``rdd``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import typer
from rich.markup import escape

from rdd_flows.commands import flows_app, serve
from rdd_flows.console import err
from rdd_flows.data_commands import data_app
from rdd_flows.flow_runs import LoggedError
from rdd_flows.maps_commands import maps_app
from rdd_flows.stack.commands import stack_app
from rdd_flows.training_commands import register as register_training
from rdd_storage.errors import RddError

# Heavy imports (torch, Prefect) are made inside the commands, so that --help is instant and the
# processes that Dask and the loaders spawn start quickly.

app = typer.Typer(
    name="rdd",
    help="Difficulty maps of a segmentation teacher, and students trained from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
register_training(app)
app.add_typer(maps_app, name="maps")
app.add_typer(data_app, name="data")
app.add_typer(stack_app, name="stack")
app.add_typer(flows_app, name="flows")
app.command("serve")(serve)


def main() -> None:
    """Entry point: one clear line for an error, and an exit code that says so."""
    # A scheduler's SIGTERM must not leave workers and the embedded Prefect server behind.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except LoggedError as failure:
        error = failure.error
        kind = "" if isinstance(error, RddError) else f"unexpected {type(error).__name__}: "
        _fail(f"{kind}{error}", failure.log)
    except RddError as error:
        _fail(str(error), None)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to continue")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as in 'rdd maps list | head'.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    err.print("terminated; run the same command again to continue")
    raise SystemExit(128 + number)


def _fail(message: str, log: Path | None) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    if log is not None:
        err.print(f"log: {escape(str(log))}", soft_wrap=True, highlight=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
