"""``rdd serve``: nightly builds and the students after them, on one machine without a work pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.types.entrypoint import EntrypointType

from rdd_flows.deployments import install_automations, refuse_served, students_trigger
from rdd_flows.flows import students_flow
from rdd_flows.nightly import nightly
from rdd_flows.server import ServerError, require_server, server_url
from rdd_pipeline.config import load_config

logger = logging.getLogger("rdd.flows")

_START_SECONDS = 180.0
_STOP_SECONDS = 15.0


def serve(
    config: Path,
    overrides: Sequence[str],
    *,
    schedule: CronSchedule,
    port: int,
    say: Callable[[str], object],
) -> None:
    """Serve ``nightly`` on a schedule and ``students`` after each new version, until a signal.

    SIGTERM and Ctrl-C end the flow runs under way, pause the deployments, and end the server where
    it was started here.

    Args:
        config: YAML file; it is read anew by each run.
        overrides: ``key.path=value``.
        schedule: When ``nightly`` runs.
        port: Port of the server and its page, if none is configured.
        say: Called with what people should know.

    Raises:
        ConfigError: The configuration is wrong, or another process serves this run already.
        ServerError: The server does not answer or does not start.
    """
    settings = load_config(config, overrides)
    with _server(port, say) as url:
        require_server()
        names = [f"{nightly.name}/{settings.name}", f"{students_flow.name}/{settings.name}"]
        refuse_served(names)
        parameters: dict[str, Any] = {
            "config": str(config.absolute()),
            "overrides": list(overrides) or None,
        }
        common: dict[str, Any] = {
            "parameters": parameters,
            "entrypoint_type": EntrypointType.MODULE_PATH,
            "concurrency_limit": ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            "tags": ["rdd-maps"],
            "paused": False,
        }
        # Called outside an event loop they are deployments, whatever their type says.
        deployments: list[Any] = [
            nightly.to_deployment(
                settings.name,
                schedules=[DeploymentScheduleCreate(schedule=schedule, active=True)],
                **common,
            ),
            students_flow.to_deployment(
                settings.name, triggers=[students_trigger(settings.name)], **common
            ),
        ]
        say(install_automations())
        when = f"{schedule.cron} {schedule.timezone}"
        asyncio.run(_serve(deployments, names, when, url, say))


async def _serve(
    deployments: Sequence[RunnerDeployment],
    names: Sequence[str],
    when: str,
    url: str,
    say: Callable[[str], object],
) -> None:
    runner = Runner(name="rdd-serve", pause_on_shutdown=True)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    ids: list[UUID] = []
    try:
        for deployment in deployments:
            ids.append(await runner.aadd_deployment(deployment))
        serving = asyncio.create_task(runner.start())
        while not runner.started and not serving.done():
            await asyncio.sleep(0.05)
        # The runner's own handler ends the process at once, and its schedules go on.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        say(f"serving {names[0]} at {when}, {names[1]} after each new version; page: {url}")
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            say("stopping: flow runs under way end, schedules are paused")
            with contextlib.suppress(asyncio.CancelledError):
                await runner.astop()
            await asyncio.wait({serving}, timeout=60.0)
        waiting.cancel()
        if serving.done() and not serving.cancelled() and (error := serving.exception()):
            raise error
    finally:
        async with get_client() as client:
            for identifier in ids:
                await client.pause_deployment(identifier)


@contextmanager
def _server(port: int, say: Callable[[str], object]) -> Iterator[str]:
    """The page of the server that is configured, or of one that runs as long as the context."""
    configured = server_url()
    if configured is not None:
        yield configured.removesuffix("/api")
        return
    url = f"http://127.0.0.1:{port}/api"
    log = Path(PREFECT_HOME.value()) / "rdd-serve-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if _answers(url):
            say(f"uses the Prefect server that runs at {url}")
        else:
            output = stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
                 "--port", str(port)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                # Ctrl-C reaches all processes of a terminal; the server has to outlive the runs.
                start_new_session=True,
            )  # fmt: skip
            stack.callback(_end, process)
            _wait_for(url, process, log)
        # In the environment for the flow runs' processes, in the settings for this one.
        stack.enter_context(temporary_settings(updates={PREFECT_API_URL: url}))
        os.environ["PREFECT_API_URL"] = url
        stack.callback(os.environ.pop, "PREFECT_API_URL", None)
        yield url.removesuffix("/api")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0).is_success
    except httpx.HTTPError:
        return False


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(
                f"the Prefect server did not start at {url} (see {log}); choose another --port if "
                "that one is taken, or start a server and set PREFECT_API_URL"
            )
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
