"""What runs in a stack: the command of each service, and how it shows that it is ready."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rdd_flows.stack import postgres
from rdd_flows.stack.errors import StackError
from rdd_flows.stack.health import (
    background_services_run,
    http_answers,
    http_json,
    redis_answers,
)
from rdd_flows.stack.state import HOST, Stack, write_private

PREFECT_WORKER = "prefect-worker"
_PYTHON = (sys.executable, "-m")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One process of the stack."""

    name: str
    command: Callable[[], list[str]]
    """Program and arguments; asked for when it is started, since ending it needs no program."""
    environment: dict[str, str]
    ready: Callable[[], bool]
    """Whether it does its work now."""
    port: int | None = None
    """Port that has to be free for it."""
    shown: str = ""
    """Where people find it."""
    account: Callable[[], tuple[int, int] | None] = lambda: None
    """User and group to run under, if not this process's."""
    prepare: Callable[[], None] = lambda: None
    """Called before each start."""
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 15.0
    """Seconds to end in."""


def waves(stack: Stack) -> list[list[Service]]:
    """The services in the order of their start; those of one wave start together.

    The last wave needs what :mod:`rdd_flows.stack.init` makes.
    """
    first = [_postgres(stack), _redis(stack), _dask_scheduler(stack)]
    if stack.s3 in ("weed", "moto"):
        first.append(_s3(stack))
    return [
        first,
        [_prefect_server(stack), *(_dask_worker(stack, i) for i in range(stack.workers))],
        [_prefect_services(stack), _prefect_worker(stack)],
    ]


def _program(name: str, remedy: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise StackError(f"{name}: expected the program on the PATH, got none; {remedy}")
    return found


def _postgres(stack: Stack) -> Service:
    port = stack.ports["postgres"]
    return Service(
        name="postgres",
        command=lambda: postgres.command(stack),
        environment=stack.environment(),
        ready=lambda: postgres.ready(stack),
        port=port,
        shown=f"{HOST}:{port}",
        account=postgres.account,
        prepare=lambda: postgres.prepare(stack),
        # SIGTERM would wait until the last client has gone.
        stop_signal=signal.SIGINT,
    )


def _redis(stack: Stack) -> Service:
    port = stack.ports["redis"]
    folder = stack.root / "redis"
    config = folder / "redis.conf"

    def prepare() -> None:
        folder.mkdir(exist_ok=True)
        lines = (
            f"bind {HOST}",
            f"port {port}",
            f'dir "{folder}"',
            "appendonly yes",
            f"requirepass {stack.secrets['redis']}",
        )
        write_private(config, "\n".join(lines) + "\n")

    return Service(
        name="redis",
        command=lambda: [
            _program("redis-server", "install it with scripts/install-system-packages"),
            str(config),
        ],
        environment=stack.environment(),
        ready=lambda: redis_answers(stack.redis_url),
        port=port,
        shown=f"{HOST}:{port}",
        prepare=prepare,
    )


def s3_by_default() -> str:
    """The object store that can be started here: ``weed``, ``moto``, or ``none``."""
    if shutil.which("weed"):
        return "weed"
    # moto's server needs more than moto itself.
    found = importlib.util.find_spec("moto") and importlib.util.find_spec("flask_cors")
    return "moto" if found else "none"


def _s3(stack: Stack) -> Service:
    port = stack.ports["s3"]
    url = f"http://{HOST}:{port}"
    folder = stack.root / "s3"
    moto = stack.s3 == "moto"
    answers = f"{url}/moto-api/data.json" if moto else f"{url}/healthz"

    def command() -> list[str]:
        if moto:
            return [*_PYTHON, "moto.server", "-H", HOST, "-p", str(port)]
        program = _program("weed", "install SeaweedFS, or choose --s3 moto, --s3 none or --s3 URL")
        return [program, "mini", f"-dir={folder}", f"-ip={HOST}", f"-s3.port={port}",
                "-webdav=false", "-admin.ui=false"]  # fmt: skip

    return Service(
        name="s3",
        command=command,
        environment=stack.environment(),
        ready=lambda: http_answers(answers),
        port=port,
        shown=f"{url} ({stack.s3})",
        prepare=lambda: folder.mkdir(exist_ok=True),
    )


def _prefect_server(stack: Stack) -> Service:
    url = stack.prefect_url
    port = stack.ports["prefect"]
    return Service(
        name="prefect-server",
        command=lambda: [*_PYTHON, "prefect", "server", "start", "--no-services", "--host", HOST,
                 "--port", str(port)],
        environment=stack.server_environment(),
        ready=lambda: http_answers(f"{url}/api/health"),
        port=port,
        shown=f"{url} (user rdd)",
    )  # fmt: skip


def _prefect_services(stack: Stack) -> Service:
    environment = stack.server_environment()
    return Service(
        name="prefect-services",
        command=lambda: [*_PYTHON, "prefect", "server", "services", "start"],
        environment=environment,
        ready=lambda: background_services_run(environment["PREFECT_SERVER_DOCKET_URL"]),
    )


def _prefect_worker(stack: Stack) -> Service:
    port = stack.ports["worker"]
    return Service(
        name=PREFECT_WORKER,
        command=lambda: [*_PYTHON, "prefect", "worker", "start", "--pool", stack.pool,
                         "--type", "process", "--with-healthcheck"],
        environment=stack.environment()
        | {"PREFECT_WORKER_WEBSERVER_HOST": HOST, "PREFECT_WORKER_WEBSERVER_PORT": str(port)},
        ready=lambda: http_answers(f"http://{HOST}:{port}/health"),
        port=port,
        shown=f"work pool {stack.pool}",
    )  # fmt: skip


def _dask_scheduler(stack: Stack) -> Service:
    port, dashboard = stack.ports["dask"], stack.ports["dask-dashboard"]
    return Service(
        name="dask-scheduler",
        command=lambda: [*_PYTHON, "dask", "scheduler", "--host", HOST, "--port", str(port),
                 "--dashboard-address", f"{HOST}:{dashboard}"],
        environment=stack.environment(),
        ready=lambda: http_answers(f"http://{HOST}:{dashboard}/health"),
        port=port,
        shown=stack.dask_url,
    )  # fmt: skip


def _dask_worker(stack: Stack, number: int) -> Service:
    name = f"dask-worker-{number}"
    folder = stack.root / "dask"
    # Students that train on a worker start processes of their own to load images.
    processes = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    gpu_environment = {"CUDA_VISIBLE_DEVICES": str(number)} if stack.gpus else {}
    gpu_options = ["--resources", "GPU=1"] if stack.gpus else []
    counts = f"http://{HOST}:{stack.ports['dask-dashboard']}/json/counts.json"
    return Service(
        name=name,
        # Two threads: a shard is computed while the one before is written.
        command=lambda: [*_PYTHON, "dask", "worker", stack.dask_url, "--name", name, "--host", HOST,
                 "--nthreads", "2", "--dashboard-address", f"{HOST}:0",
                 "--local-directory", str(folder), *gpu_options],
        environment=stack.environment() | processes | gpu_environment,
        ready=lambda: ((http_json(counts) or {}).get("workers") or 0) >= stack.workers,
        shown=stack.dask_url,
        prepare=lambda: folder.mkdir(exist_ok=True),
    )  # fmt: skip
