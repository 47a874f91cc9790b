"""``rdd stack``: the services of a team on one machine, without containers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rdd_flows.console import out as _out
from rdd_flows.console import say as _say

stack_app = typer.Typer(
    help="Run PostgreSQL, Redis, Prefect, Dask and an object store on this machine.",
    no_args_is_help=True,
)
_State = Annotated[
    Path, typer.Option("--state", help="Folder of the stack's data, logs and passwords.")
]
_DEFAULT_STATE = Path(".stack")


@stack_app.command()
def up(
    state: _State = _DEFAULT_STATE,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Dask workers; 2 in a new stack.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="GPUs: a Dask worker for each, and no others."),
    ] = None,
    s3: Annotated[
        str | None,
        typer.Option(
            "--s3",
            help="Object store: weed (SeaweedFS), moto (a test server that forgets everything), "
            "none, or the URL of a running server. New stacks take the first that is installed.",
        ),
    ] = None,
    ports: Annotated[
        list[str] | None,
        typer.Option(
            "--port",
            metavar="NAME=NUMBER",
            help="Port of postgres, redis, s3, prefect, worker, dask or dask-dashboard; by default "
            "free ones. May be repeated.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Configuration that the deployments run. Without it, and without RDD_CONFIG, "
            "none are registered.",
        ),
    ] = None,
    prefect_file: Annotated[
        Path, typer.Option("--prefect-file", help="Deployments to register.")
    ] = Path("prefect.yaml"),
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that a service may take to get ready.")
    ] = 180.0,
) -> None:
    """Start what does not run yet, wait until everything is ready, register the deployments.

    Everything listens on 127.0.0.1 alone; passwords are generated. STATE/env has the settings for
    your shell.
    """
    from rdd_flows.stack.errors import StackError
    from rdd_flows.stack.running import stack_up

    numbers = {}
    for port in ports or ():
        name, _, number = port.partition("=")
        if not number.isdecimal():
            raise StackError(f"--port: expected NAME=NUMBER, got {port}")
        numbers[name] = int(number)
    deploys = config is not None or "RDD_CONFIG" in os.environ
    stack = stack_up(
        state,
        workers=workers,
        gpus=gpus,
        s3=s3,
        ports=numbers,
        prefect_file=prefect_file if deploys else None,
        config=config,
        timeout=timeout,
        say=_say,
    )
    _say(f"Prefect {stack.prefect_url}, user rdd, password in {stack.root / 'env'}")
    _say(f"use it in this shell: set -a; . {stack.root / 'env'}; set +a")


@stack_app.command()
def down(
    state: _State = _DEFAULT_STATE,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove databases, objects and logs as well.")
    ] = False,
) -> None:
    """End every process of the stack, flows included; data and logs stay."""
    from rdd_flows.stack.running import stack_down

    stack_down(state, purge=purge, say=_say)


@stack_app.command()
def status(state: _State = _DEFAULT_STATE) -> None:
    """Show the services, their addresses and logs; exit code 1 if one is not ready."""
    from rdd_flows.stack.errors import StackError
    from rdd_flows.stack.running import stack_status
    from rdd_flows.stack.state import load_stack

    stack = load_stack(state)
    if stack is None:
        raise StackError(f"{state}: expected the folder of a stack; make one with 'rdd stack up'")
    table = Table("service", "state", "address", "log", box=None)
    found = stack_status(stack)
    for service in found:
        table.add_row(service.name, service.state, service.shown, str(service.log))
    _out.print(table)
    if any(service.state != "ready" for service in found):
        raise typer.Exit(1)
