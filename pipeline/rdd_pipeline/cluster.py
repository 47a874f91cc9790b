"""Dask workers: processes of this machine, or those of a scheduler that runs elsewhere.

:func:`open_client` connects and checks that the workers can do what is asked, :func:`run_tasks`
gives them work: a bounded number of tasks at a time, so that neither the scheduler nor this process
grows with the number of images, and an end that leaves nothing half done.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from distributed import (
    Client,
    LocalCluster,
    Nanny,
    Reschedule,
    Scheduler,
    SpecCluster,
    WorkerPlugin,
)
from distributed.scheduler import KilledWorker
from distributed.system import MEMORY_LIMIT
from distributed.versions import get_versions
from distributed.worker import Worker

from rdd_pipeline.config import ClusterConfig
from rdd_pipeline.errors import ClusterError, ClusterUnavailableError

logger = logging.getLogger("rdd.cluster")

CONNECT_SECONDS = 15.0
"""Seconds to wait for a scheduler's answer."""
WORKERS_SECONDS = 60.0
"""Seconds to wait for workers: for the first ones, and for others once all are gone."""
DRAIN_SECONDS = 20.0
"""Seconds that tasks under way get to end when their work is cancelled; less than Prefect's worker
waits between asking a process to end and killing it."""

# What has to be the same everywhere, beside Python: what is pickled, or decides the results.
_PACKAGES = ("rdd-maps", "dask", "distributed", "cloudpickle", "msgpack", "torch", "zarr", "numpy")
_TOPIC = "rdd-refused"
_LOOK_SECONDS = 2.0  # between two looks at the workers
_ASK_SECONDS = 15.0  # for the answers of all workers

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def open_client(
    cluster: ClusterConfig, *, workers: int, threads: int, gpus_each: float = 0
) -> Iterator[Client]:
    """Connect to the workers of a configuration; those started here end with the context.

    Args:
        cluster: Which workers.
        workers: Worker processes to start here where the configuration does not say.
        threads: Tasks that each of these has under way at once, likewise.
        gpus_each: Share of a GPU that each task will ask for (resource ``GPU``); 0 for none.

    Raises:
        ClusterUnavailableError: The scheduler does not answer, or has no workers.
        ClusterError: The workers have other versions of what matters, or no GPU as is asked for.
    """
    if cluster.address is None:
        with (
            _local_cluster(cluster, workers, threads) as local,
            Client(local, set_as_default=False) as client,
        ):
            client.register_plugin(_LocalWorker())
            client.subscribe_topic(_TOPIC, lambda event: logger.warning("%s", event[1]))
            _require_gpus(client, cluster, gpus_each)
            logger.info("dask dashboard: %s", client.dashboard_link)
            yield client
        return
    with _connect(cluster.address) as client:
        _wait_for_workers(client, cluster)
        _require_same_versions(client)
        _require_gpus(client, cluster, gpus_each)
        count, address = len(client.nthreads()), cluster.address
        logger.info("%d workers at %s, dashboard: %s", count, address, client.dashboard_link)
        client.subscribe_topic(_TOPIC, lambda event: logger.warning("%s", event[1]))
        with prepared_workers(client, CheckedPlugin(), f"rdd-versions-{client.id}"):
            yield client


def _local_cluster(cluster: ClusterConfig, workers: int, threads: int) -> SpecCluster:
    count = cluster.gpus or cluster.workers or max(workers, 1)
    threads = cluster.threads or threads
    if cluster.gpus:
        return _gpu_cluster(visible_gpus(cluster.gpus), threads)
    # Any free port for the dashboard: several builds may run. Dask's own limit of memory follows
    # the share of the cores, which says nothing about what a network takes.
    return LocalCluster(
        n_workers=count,
        threads_per_worker=threads,
        processes=True,
        dashboard_address="127.0.0.1:0",
        memory_limit=MEMORY_LIMIT // count,
        silence_logs=logging.ERROR,
    )


def visible_gpus(wanted: int) -> list[str]:
    """Names of so many of the GPUs that this process may use, for ``CUDA_VISIBLE_DEVICES``.

    Raises:
        ClusterError: There are fewer.
    """
    found = torch.cuda.device_count()
    if found < wanted:
        raise ClusterError(
            f"cluster.gpus: expected at most the {found} GPU(s) that torch sees here, got {wanted}"
        )
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = allowed.split(",") if allowed else [str(index) for index in range(found)]
    return [name.strip() for name in names[:wanted]]


def _gpu_cluster(gpus: list[str], threads: int) -> SpecCluster:
    """One worker process for each GPU, which sees no other."""
    options = {
        "host": "127.0.0.1",
        "nthreads": threads,
        "memory_limit": MEMORY_LIMIT // len(gpus),
        "resources": {"GPU": 1},
        "dashboard": False,
        "silence_logs": logging.ERROR,
    }
    return SpecCluster(
        scheduler={
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"},
        },
        workers={
            index: {
                "cls": Nanny,
                "options": options | {"env": {"CUDA_VISIBLE_DEVICES": name}},
            }
            for index, name in enumerate(gpus)
        },
        silence_logs=logging.ERROR,
    )


class _LocalWorker(WorkerPlugin):
    """How a worker process of this machine ends: when the main process says so, and at once.

    Ctrl-C reaches all processes of a terminal, and the SIGTERM by which Prefect's worker cancels a
    flow all of its process group; what is under way may end nevertheless. A worker whose main
    process was killed ends by itself.
    """

    def setup(self, worker: Worker) -> None:
        """Called by Dask on each worker."""
        # Taking torch's modules apart lasts seconds on a busy machine; Dask kills it after four.
        atexit.register(os._exit, 0)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)


def _connect(address: str) -> Client:
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClusterUnavailableError(
            f"cluster: no Dask scheduler answers at {address} within {CONNECT_SECONDS:.0f} s "
            f"({error}); start one with 'dask scheduler', or use cluster: local"
        ) from error


def _wait_for_workers(client: Client, cluster: ClusterConfig) -> None:
    wanted = cluster.workers or 1
    if len(client.nthreads()) >= wanted:
        return
    logger.info("waiting for %d worker(s) at %s", wanted, cluster.address)
    try:
        client.wait_for_workers(wanted, timeout=WORKERS_SECONDS)
    except TimeoutError as error:
        raise ClusterUnavailableError(
            f"cluster: expected {wanted} worker(s) at {cluster.address} within "
            f"{WORKERS_SECONDS:.0f} s, got {len(client.nthreads())}; start them with 'dask worker "
            f"{cluster.address}'"
        ) from error


def own_versions() -> dict[str, str]:
    """Versions of what workers and this process have to share."""
    return _decisive(get_versions(packages=_PACKAGES)["packages"])


def _decisive(packages: Mapping[str, str | None]) -> dict[str, str]:
    # A local label such as +cpu tells how a package was built; of Python, only the first two
    # numbers decide what can be sent from one to the other.
    python = ".".join(str(packages["python"]).split(".")[:2])
    return {"python": python} | {
        name: str(packages.get(name) or "none").partition("+")[0] for name in _PACKAGES
    }


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} {found[name]} (here {version})"
        for name, version in expected.items()
        if found[name] != version
    )


def _require_same_versions(client: Client) -> None:
    """Compare this process, the scheduler and all workers.

    Raises:
        ClusterError: Which of them has which other version.
    """
    expected = own_versions()
    found: Any = client.get_versions(packages=list(_PACKAGES))
    # The scheduler runs none of our code: what is pickled for workers passes through it unread.
    of_scheduler = _decisive(found["scheduler"]["packages"])
    lines = []
    relevant = {name: expected[name] for name in ("python", "dask", "distributed", "rdd-maps")}
    if different := _differences(relevant, of_scheduler):
        lines.append(f"the scheduler has {different}")
    for address, versions in sorted(found["workers"].items()):
        if different := _differences(expected, _decisive(versions["packages"])):
            lines.append(f"worker {address} has {different}")
    if lines:
        raise ClusterError(
            "\n  ".join(["cluster: expected the same versions everywhere", *lines])
            + "\n  install the same versions there, from one image or one constraints.txt"
        )


def _require_gpus(client: Client, cluster: ClusterConfig, gpus_each: float) -> None:
    """Refuse what the scheduler would wait for in silence and for ever."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    offered = [worker["resources"].get("GPU", 0) for worker in workers.values()]
    if cluster.gpus <= sum(offered) and gpus_each <= max(offered, default=0):
        return
    where = cluster.address or "this machine"
    raise ClusterError(
        f"cluster: expected {max(cluster.gpus, 1)} GPU(s), but the {len(workers)} worker(s) at "
        f"{where} offer {sum(offered):g}; start workers with 'CUDA_VISIBLE_DEVICES=0 dask worker "
        f"{cluster.address or 'ADDRESS'} --nthreads 2 --resources GPU=1', or use device: cpu and "
        "no gpus"
    )


class CheckedPlugin(WorkerPlugin):
    """Prepares workers for some work; register it with :func:`prepared_workers`.

    A worker that joins later is prepared too. Where it cannot be, or has other versions, it leaves
    the cluster: its log says why, and so does this process's. Work that reaches it before has to
    be sent elsewhere with :func:`send_elsewhere`.
    """

    def __init__(self) -> None:
        self.expected = own_versions()
        self.known: frozenset[str] = frozenset()
        """Addresses of the workers that were there at registration; what goes wrong on these is
        the caller's error."""

    def start(self, worker: Worker) -> None:
        """Prepare a worker.

        Raises:
            Exception: It cannot be prepared.
        """

    async def setup(self, worker: Worker) -> None:
        """Called by Dask on each worker."""
        try:
            found = _decisive(get_versions(packages=_PACKAGES)["packages"])
            if different := _differences(self.expected, found):
                raise ClusterError(f"worker {worker.address} has {different}")
            self.start(worker)
        except Exception as error:
            if worker.address in self.known:
                raise
            logger.exception("this worker leaves the cluster")
            self._leaving = asyncio.create_task(_leave(worker, error))


async def _leave(worker: Worker, error: Exception) -> None:
    # A worker that closes before it has joined hangs, and with it whoever asks all workers.
    while not worker.periodic_callbacks["heartbeat"].is_running():
        await asyncio.sleep(0.05)
    worker.log_event(_TOPIC, f"worker {worker.address} was sent away: {error}")
    await asyncio.sleep(0.2)  # for the message to go out before the connection closes
    await worker.close(reason="rdd-refused", nanny=True)


def send_elsewhere() -> NoReturn:
    """Let the task that calls this be done by another worker, because this one leaves."""
    time.sleep(0.5)
    raise Reschedule


@contextmanager
def prepared_workers(client: Client, plugin: CheckedPlugin, name: str) -> Iterator[None]:
    """Prepare all workers, also those that join later, until the context ends.

    Args:
        client: A client.
        plugin: What to do on each worker.
        name: Name by which tasks find the plugin on their worker; a plugin of the same name that
            an earlier process left behind is replaced.

    Raises:
        Exception: The first worker's error.
    """
    plugin.known = frozenset(client.nthreads())
    client.register_plugin(plugin, name=name)
    try:
        yield
    finally:
        if client.status == "running":
            _forget(client, name)


def _forget(client: Client, name: str) -> None:
    """Take a plugin off all workers, but do not wait for ever for one that hangs."""
    scheduler: Any = client.scheduler
    try:
        client.sync(scheduler.unregister_worker_plugin, name=name, callback_timeout=_ASK_SECONDS)
    except (TimeoutError, OSError, RuntimeError) as error:
        logger.debug("'%s' is not off all workers: %s", name, error)


def run_tasks(
    client: Client,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    done: Callable[[Item, Result], object],
    *,
    name: str,
    gpus_each: float = 0,
) -> None:
    """Call a function for each item on the client's workers, and ``done`` here for each result.

    Twice as many tasks as there are threads are submitted at a time. A task whose worker was killed
    is done again on another. When the work ends early, by an error or a signal, tasks that have not
    begun are withdrawn, and those under way get :data:`DRAIN_SECONDS` to end.

    Args:
        client: A client.
        function: Importable on the workers.
        items: Small and picklable.
        done: Called in this thread, in the order in which tasks end.
        name: Begins the tasks' names; on one scheduler no two works may share it.
        gpus_each: Share of a GPU that a task asks for.

    Raises:
        ClusterUnavailableError: The scheduler was lost, or all workers were and none came for
            :data:`WORKERS_SECONDS`.
        ClusterError: An item's workers died again and again.
        Exception: The first error of a task.
    """
    waiting = enumerate(items)
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: dict[str, tuple[Any, Item]] = {}
    watch = _Watch(client)
    resources = {"GPU": gpus_each} if gpus_each else None
    try:
        while True:
            while len(running) < watch.window and (item := next(waiting, None)) is not None:
                key = f"{name}-{item[0]}"
                future = client.submit(function, item[1], pure=False, key=key, resources=resources)
                running[key] = future, item[1]
                future.add_done_callback(ended.put)
            if not running:
                return
            future = watch.next_of(ended)
            _, value = running.pop(future.key)
            done(value, _result(future, value))
            future.release()
    except Exception:
        _drain(client, [future for future, _ in running.values()], name, limit=WORKERS_SECONDS)
        raise
    except BaseException:  # Ctrl-C, SIGTERM, a cancelled flow
        logger.info("stopping; what is under way may end")
        _drain(client, [future for future, _ in running.values()], name, limit=DRAIN_SECONDS)
        raise


def _result(future: Any, item: object) -> Any:
    if future.status == "finished":
        return future.result()
    if future.status != "error":  # cancelled: Dask gives up all tasks of a lost scheduler
        raise ClusterUnavailableError(
            "cluster: the connection to the Dask scheduler was lost; what is finished is kept, run "
            "again to go on"
        )
    error = future.exception()
    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"cluster: {error.allowed_failures + 1} workers in turn died over {item}, the last was "
            f"{error.last_worker.address}; most likely memory was not enough: see the workers' logs"
        ) from error
    raise error


class _Watch:
    """Looks at the workers now and then: how many there are, and whether any."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._looked = 0.0
        self._seen = time.monotonic()
        self._window = 1

    @property
    def window(self) -> int:
        """Tasks to have submitted at a time."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._look()
        return self._window

    def next_of(self, ended: queue.SimpleQueue[Any]) -> Any:
        """The next future that has ended."""
        while True:
            try:
                return ended.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        if self._client.status != "running":
            if self._client.status == "closed":
                raise ClusterUnavailableError(
                    "cluster: the connection to the Dask scheduler was lost; what is finished is "
                    "kept, run again to go on"
                )
            return
        threads = self._client.nthreads()
        if threads:
            self._seen = self._looked
            self._window = 2 * sum(threads.values())
        elif self._looked - self._seen > WORKERS_SECONDS:
            raise ClusterUnavailableError(
                f"cluster: no worker for {WORKERS_SECONDS:.0f} s; see the workers' logs. What is "
                "finished is kept: start workers and run again to go on"
            )


def _drain(client: Client, futures: list[Any], name: str, *, limit: float) -> None:
    """Withdraw tasks that have not begun, and wait for the others."""
    deadline = time.monotonic() + limit
    try:
        client.cancel(futures)
        while client.status == "running" and time.monotonic() < deadline:
            time.sleep(0.2)
            # Client.run, but with an end to its patience.
            left = max(deadline - time.monotonic(), 1.0)
            asked = client.sync(client._run, _under_way, name, on_error="ignore",
                                callback_timeout=left)  # fmt: skip
            if not any(asked.values()):
                return
    except Exception as error:  # the error that ends the work is the one to tell
        logger.debug("the workers could not be asked to stop", exc_info=error)


def _under_way(name: str, dask_worker: Worker) -> bool:
    return any(str(key).startswith(f"{name}-") for key in dask_worker.active_keys)


def require_readable(path: Path, what: str) -> None:
    """Refuse, on a worker, a file that only other machines can read.

    Raises:
        ClusterError: It cannot be opened; the message names the worker's machine.
    """
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ClusterError(
            f"cluster: {what} {path} cannot be read on {os.uname().nodename} ({error.strerror}); "
            "put it where all workers find it under this path"
        ) from error
