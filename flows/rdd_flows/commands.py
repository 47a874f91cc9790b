"""The commands ``rdd serve`` and ``rdd flows``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rdd_flows.console import say
from rdd_flows.options import ConfigPath, Overrides

flows_app = typer.Typer(help="Check and register Prefect deployments.", no_args_is_help=True)


def serve(
    config: ConfigPath,
    cron: Annotated[
        str, typer.Option("--cron", help="When to look for new images: five fields of cron.")
    ] = "0 2 * * *",
    timezone: Annotated[
        str, typer.Option("--timezone", help="Time zone of --cron, such as Europe/Berlin.")
    ] = "UTC",
    port: Annotated[
        int,
        typer.Option("--port", help="Port of the Prefect server, without PREFECT_API_URL."),
    ] = 4200,
    overrides: Overrides = None,
) -> None:
    """Look for new images every night, and train the students from each new version of the maps.

    For one machine, without a work pool. Starts a Prefect server if none is configured. Ends with
    Ctrl-C or SIGTERM, and its schedule with it.
    """
    from rdd_flows.deployments import check_schedule

    schedule = check_schedule(cron, timezone)  # before torch is imported
    from rdd_flows.serve import serve as serve_until_signal

    serve_until_signal(config, overrides or (), schedule=schedule, port=port, say=say)


@flows_app.command("check")
def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Deployments.")] = Path(
        "prefect.yaml"
    ),
) -> None:
    """Check schedules, time zones and names of a prefect.yaml before 'prefect deploy --all'."""
    from rdd_flows.deployments import check_prefect_file

    say(f"{path}: {', '.join(check_prefect_file(path))}")


@flows_app.command("install-automations")
def automations() -> None:
    """Let the Prefect server mark flow runs as crashed whose process has gone; may be repeated."""
    from rdd_flows.deployments import install_automations
    from rdd_flows.server import require_server, server_url
    from rdd_pipeline.errors import ConfigError

    if server_url() is None:
        raise ConfigError("PREFECT_API_URL: expected the address of a Prefect server, got nothing")
    require_server()
    say(install_automations())
