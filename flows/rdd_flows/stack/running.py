"""Starting, ending and looking at a stack."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from rdd_flows.stack import processes
from rdd_flows.stack.errors import StackError
from rdd_flows.stack.services import PREFECT_WORKER, Service, s3_by_default, waves
from rdd_flows.stack.state import (
    PORTS,
    Stack,
    load_stack,
    new_stack,
    port_is_free,
    with_free_ports,
)

Say = Callable[[str], object]
_LINES = 20
_POLL = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """How a service does."""

    name: str
    state: str
    """``ready``, ``not ready`` or ``stopped``."""
    shown: str
    """Where people find it."""
    log: Path


def stack_up(
    root: Path,
    *,
    workers: int | None = None,
    gpus: int | None = None,
    s3: str | None = None,
    ports: Mapping[str, int] | None = None,
    prefect_file: Path | None = None,
    config: Path | None = None,
    timeout: float = 180.0,
    say: Say = lambda line: None,
) -> Stack:
    """Start all services of a stack that do not run, and wait until they are ready.

    Args:
        root: Folder of the stack; made where there is none.
        workers: Number of Dask workers; None keeps what it was (2 in a new stack).
        gpus: Number of GPUs; each has a Dask worker of its own, and there are no others.
        s3: ``weed``, ``moto``, ``none`` or the URL of a running server; None keeps what it was
            (in a new stack ``weed`` or ``moto``, whichever is installed, or ``none``).
        ports: Ports to use, by the names in :data:`rdd_flows.stack.state.PORTS`; the others are
            free ones.
        prefect_file: Deployments to register; None registers none.
        config: Configuration that they run; None takes that of the variable ``RDD_CONFIG``.
        timeout: Seconds that a service may take to get ready.
        say: Called with a line for each service.

    Raises:
        StackError: A service did not start; what this call has started is ended again.
    """
    _require_packages()
    with _alone(root):
        stack = _opened(root, workers, gpus, s3, ports or {})
        stack.save()
        started: list[Service] = []
        try:
            *first, last = waves(stack)
            for wave in first:
                _start_wave(stack, wave, started, timeout, say)
            _initialise(stack, prefect_file, config, say)
            _start_wave(stack, last, started, timeout, say)
        except BaseException:
            for service in reversed(started):
                _stop(stack, service)
            raise
    return stack


def stack_down(root: Path, *, purge: bool = False, say: Say = lambda line: None) -> None:
    """End every process of a stack; its data stays.

    Args:
        root: Folder of the stack.
        purge: Remove the folder with databases, objects and logs.
        say: Called with a line for each service.
    """
    root = root.absolute()
    stack = load_stack(root)
    if stack is None:
        say(f"no stack in {root}")
        return
    with _alone(root):
        running = [service for service in _all_services(stack) if _process(stack, service)]
        for service in reversed(running):
            _stop(stack, service)
            say(f"{service.name}: stopped")
            if service.name == PREFECT_WORKER:
                # Its flows, while there is a server that they can report to.
                others = [_process(stack, each) for each in running]
                processes.stop_marked(
                    stack.mark, keep=[p for p in others if p is not None], grace=service.grace
                )
        processes.stop_marked(stack.mark, keep=[], grace=5.0)
        if left := processes.marked(stack.mark):
            raise StackError(f"processes {[process.pid for process in left]} do not end")
        if purge:
            shutil.rmtree(root)
            say(f"removed {root}")


def stack_status(stack: Stack) -> list[ServiceStatus]:
    """How each service of a stack does."""
    found = []
    for service in _all_services(stack):
        state = "stopped"
        if _process(stack, service) is not None:
            state = "ready" if service.ready() else "not ready"
        found.append(
            ServiceStatus(
                name=service.name, state=state, shown=service.shown, log=stack.log(service.name)
            )
        )
    return found


def _require_packages() -> None:
    for name in ("asyncpg", "prefect_redis"):
        if importlib.util.find_spec(name) is None:
            raise StackError(
                f"{name}: expected the package, got none; pip install 'rdd-maps[server]'"
            )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other commands away from this stack."""
    root.mkdir(mode=0o711, parents=True, exist_ok=True)  # the database's account passes through
    with (root / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"{root}: another command starts or stops this stack; wait") from None
        yield


def _opened(
    root: Path, workers: int | None, gpus: int | None, s3: str | None, ports: Mapping[str, int]
) -> Stack:
    known = load_stack(root)
    wanted = known or replace(new_stack(root), s3=s3_by_default())
    if gpus is not None:
        wanted = replace(wanted, workers=gpus, gpus=True)
    elif workers is not None:
        wanted = replace(wanted, workers=workers, gpus=False)
    if unknown := sorted(ports.keys() - set(PORTS)):
        raise StackError(f"--port: expected {', '.join(PORTS)}, got {', '.join(unknown)}")
    stack = replace(
        wanted,
        s3=s3 or wanted.s3,
        ports=wanted.ports | dict(ports),
        fixed=tuple(sorted({*wanted.fixed, *ports})),
    )
    if known is not None and stack != known:
        running = [s.name for s in _all_services(known) if _process(known, s) is not None]
        if running:
            raise StackError(
                "expected the workers, GPUs, ports and object store with which the stack was "
                f"started, got others while {', '.join(running)} run; stop it first with "
                "'rdd stack down'"
            )
    if known is None or not any(_process(stack, s) for s in _all_services(stack)):
        stack = with_free_ports(stack)
    if stack.s3 not in ("weed", "moto", "none") and "://" not in stack.s3:
        raise StackError(f"--s3: expected weed, moto, none or a URL, got {stack.s3}")
    return stack


def _all_services(stack: Stack) -> list[Service]:
    return [service for wave in waves(stack) for service in wave]


def _pid_file(stack: Stack, service: Service) -> Path:
    return stack.root / "pids" / f"{service.name}.json"


def _process(stack: Stack, service: Service) -> psutil.Process | None:
    return processes.find(_pid_file(stack, service))


def _start_wave(
    stack: Stack, wave: Sequence[Service], started: list[Service], timeout: float, say: Say
) -> None:
    begun = time.monotonic()
    fresh = [service for service in wave if _process(stack, service) is None]
    for service in fresh:
        if service.port is not None and not port_is_free(service.port):
            raise StackError(
                f"{service.name}: port {service.port} is taken by another program; end that, or "
                "stop the whole stack, which then takes another port"
            )
        service.prepare()
        started.append(service)
        user, group = service.account() or (None, None)
        processes.start(
            _pid_file(stack, service),
            service.command(),
            environment=service.environment,
            log=stack.log(service.name),
            folder=stack.root,
            user=user,
            group=group,
        )
    waiting = list(wave)
    while waiting:
        for service in list(waiting):
            # Looked at before the question, so that an answer is this process's.
            if _process(stack, service) is None:
                raise StackError(f"{service.name}: ended while starting\n{_tail(stack, service)}")
            if service.ready():
                waiting.remove(service)
                how = f"in {time.monotonic() - begun:.1f} s" if service in fresh else "runs already"
                say(f"{service.name}: ready {how}  {service.shown}".rstrip())
            elif time.monotonic() - begun > timeout:
                raise StackError(
                    f"{service.name}: not ready after {timeout:.0f} s\n{_tail(stack, service)}"
                )
        time.sleep(_POLL)


def _initialise(stack: Stack, prefect_file: Path | None, config: Path | None, say: Say) -> None:
    bucket = [] if stack.s3_url is None else ["--bucket", stack.bucket]
    deployments = [] if prefect_file is None else ["--prefect-file", str(prefect_file.absolute())]
    runs = {} if config is None else {"RDD_CONFIG": str(config.absolute())}
    log = stack.log("init")
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "rdd_flows.stack.init", "--pool", stack.pool, *bucket,
             *deployments],
            env=stack.environment() | runs,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        raise StackError(f"bucket, work pool and deployments could not be made\n{_last(log)}")
    made = f"bucket {stack.bucket}, " if bucket else ""
    registered = f", deployments of {prefect_file}" if prefect_file else ""
    say(f"made {made}work pool {stack.pool}{registered}")


def _stop(stack: Stack, service: Service) -> None:
    process = _process(stack, service)
    if process is not None:
        processes.stop(process, number=service.stop_signal, grace=service.grace)
    _pid_file(stack, service).unlink(missing_ok=True)


def _tail(stack: Stack, service: Service) -> str:
    return _last(stack.log(service.name))


def _last(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
    return "\n".join([*lines, f"log: {log}"])
