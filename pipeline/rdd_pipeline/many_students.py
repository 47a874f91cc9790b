"""Many students from one store, one after another or side by side on Dask workers.

A student is one piece of work, and its folder knows how far it is: whatever ends early is done
again by the same call, which reuses what is finished and resumes the rest from its checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import queue
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, Status, get_worker
from distributed.scheduler import KilledWorker

from rdd_pipeline.cluster import WORKERS_SECONDS, open_client
from rdd_pipeline.comparison import (
    COMPARISON_FILE,
    MARKDOWN_FILE,
    Outcome,
    comparison_tree,
    markdown,
)
from rdd_pipeline.config import RunConfig, StudentConfig
from rdd_pipeline.errors import ClusterError, ClusterUnavailableError, ConfigError
from rdd_pipeline.files import write_atomically, write_json
from rdd_pipeline.machine import machine, now, resolve_device
from rdd_pipeline.progress import Reporter
from rdd_pipeline.results import data_facts
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import forget_digests, open_split
from rdd_pipeline.stages import run_student
from rdd_storage import RddError, StoreMismatchError, StoreNotFoundError, find_store

logger = logging.getLogger("rdd.students")

MAX_DEATHS = 3
"""Workers that may die over a student before it counts as failed."""

_LOOK_SECONDS = 1.0  # between two looks at the workers
_LOST = (
    "cluster: the connection to the Dask scheduler was lost; what is finished is kept, run again "
    "to go on"
)

# A worker's process trains one student at a time, however many threads it was started with: the
# random state and torch's number of threads belong to the process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What students learn from, beside the images."""

    store: str | None
    """Path or URL of the map store; None where no student needs one."""
    teacher: Path | None
    """The teacher's weights, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where students are trained."""

    count: int | None
    """Trainings at a time; None takes as many as a scheduler elsewhere has workers."""
    gpus: bool
    """Whether each has a GPU of this machine to itself."""
    elsewhere: bool
    """Whether a scheduler that runs already has the workers."""

    @property
    def here(self) -> bool:
        """Whether students are trained in this process, one after another."""
        return self.count == 1 and not self.elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    config: RunConfig
    student: StudentConfig
    sources: Sources
    threads: int | None
    topic: str


class StudentsFailedError(RddError, RuntimeError):
    """Some students failed while others were finished."""

    def __init__(self, outcomes: Sequence[Outcome], comparison: Path) -> None:
        failed = [outcome for outcome in outcomes if outcome.result is None]
        lines = [f"  {outcome.student}: {outcome.error}" for outcome in failed]
        super().__init__(
            "\n".join([f"{len(failed)} of {len(outcomes)} students failed:", *lines])
            + "\nThe others are finished; run again to try these anew"
        )
        self.comparison = comparison
        """Path of ``students.json``."""


def choose_workers(config: RunConfig, parallel: int | None) -> Workers:
    """Decide how many students are trained at a time.

    Args:
        config: The run.
        parallel: As asked for; None for one on each GPU, or all workers of ``cluster.address``,
            and without either one after another.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    if config.cluster.address is not None:
        return Workers(count=parallel, gpus=False, elsewhere=True)
    gpus = 0
    if resolve_device(config.device).type == "cuda":
        gpus = config.cluster.gpus or torch.cuda.device_count()
    count = parallel or min(max(gpus, 1), len(config.students))
    return Workers(count=count, gpus=gpus > 0, elsewhere=False)


def student_store(config: RunConfig, store: str | None, reporter: Reporter) -> str | None:
    """The store that the run's students read: the one given, or the one that fits.

    Raises:
        ConfigError: A student needs maps and there is no store of them.
    """
    readers = [student.name for student in config.students if student.needs_maps]
    if store is not None or not readers:
        return store
    identity = open_split(config.data, "train").identity()
    distils = any(student.needs_maps and student.distils_logits for student in config.students)
    arrays = ["logits"] if distils else []
    try:
        found = find_store(config.maps_root, data=identity, arrays=arrays).path
    except (StoreNotFoundError, StoreMismatchError) as error:
        more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
        raise ConfigError(
            f"students: '{readers[0]}'{more} need maps, but {error}\n"
            "  build them with 'rdd maps build CONFIG', or give their path with --store"
        ) from error
    reporter.say(f"students: read {found}")
    return found


def train_student(
    config: RunConfig, student: StudentConfig, sources: Sources, reporter: Reporter
) -> TrainedNetwork:
    """Train one student, or take what an earlier run finished.

    Raises:
        Exception: See :func:`rdd_pipeline.stages.run_student`.
    """
    teacher = sources.teacher if student.needs_teacher else None
    return run_student(config, student, sources.store, reporter, teacher)


def one_after_another(
    students: Sequence[StudentConfig],
    train: Callable[[StudentConfig], TrainedNetwork],
    reporter: Reporter,
) -> list[Outcome]:
    """Train students in this process; one that fails is noted and the others go on.

    Args:
        students: Which.
        train: Trains one of them.
        reporter: Where progress is shown.
    """
    outcomes = []
    for number, student in enumerate(students, start=1):
        reporter.say(f"student {number} of {len(students)}: {student.name}")
        try:
            outcome = _finished(train(student))
        except Exception as error:
            outcome = _failed(student.name, error, reporter)
        outcomes.append(outcome)
    return outcomes


def side_by_side(
    config: RunConfig, sources: Sources, workers: Workers, reporter: Reporter
) -> list[Outcome]:
    """Train the run's students on Dask workers, one at a time on each.

    A student whose worker was killed is started again, and resumes from its checkpoint. One that
    fails is noted and the others go on.

    Raises:
        ClusterError: The workers cannot do what is asked.
        ClusterUnavailableError: The scheduler or all workers were lost; students under way resume
            with the next call.
    """
    cluster = config.cluster
    threads = None
    if not workers.elsewhere:
        count = workers.count or 1
        cluster = cluster.model_copy(
            update={
                "workers": None if workers.gpus else count,
                "threads": 1,
                "gpus": count if workers.gpus else 0,
            }
        )
        # What the user gave torch here, by OMP_NUM_THREADS or by default, is shared out.
        threads = max(1, torch.get_num_threads() // count)
    settings = {
        # Workers are daemons by default, which may not start the loaders' processes.
        "distributed.worker.daemon": False,
        # A death is told at once; whether to try again is decided here.
        "distributed.scheduler.allowed-failures": 0,
    }
    topic = f"rdd-students-{uuid.uuid4().hex}"
    with (
        dask.config.set(settings),
        open_client(
            cluster, workers=workers.count or 1, threads=1, gpus_each=int(workers.gpus)
        ) as client,
        _lines_of_workers(client, topic, reporter),
    ):
        jobs = [
            _Job(config=config, student=student, sources=sources, threads=threads, topic=topic)
            for student in config.students
        ]
        gpus = workers.gpus or (workers.elsewhere and _use_gpus(config, client))
        outcomes = _Crew(client, jobs, workers.count, gpus, reporter).work()
    return [outcomes[student.name] for student in config.students]


def write_comparison(
    config: RunConfig, outcomes: Sequence[Outcome], store: str | None = None
) -> Path:
    """Write ``students.json`` and ``students.md`` into the run's folder; returns the first.

    Args:
        config: The run.
        outcomes: How its students ended.
        store: Path or URL of the map store that they were given, for the report.
    """
    tree = comparison_tree(config, outcomes) | {
        "finished": now(),
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        "data": data_facts(config.data),
        "store": store,
    }
    path = config.run_dir / COMPARISON_FILE
    write_json(path, tree)
    text = markdown(tree)
    write_atomically(
        config.run_dir / MARKDOWN_FILE,
        lambda temporary: temporary.write_text(text, encoding="utf-8"),
    )
    return path


def outcomes_of(students: Sequence[TrainedNetwork]) -> list[Outcome]:
    """Students that are all finished, for :func:`write_comparison`."""
    return [_finished(student) for student in students]


class _Crew:
    """Gives each worker one student at a time.

    Dask counts a death against everything that a worker had been given, and would give students
    whose worker died to one that is busy. So each is given to a certain worker that is free, and
    deaths are counted here.
    """

    def __init__(
        self,
        client: Client,
        jobs: Sequence[_Job],
        count: int | None,
        gpus: bool,
        reporter: Reporter,
    ) -> None:
        self._client, self._count, self._gpus = client, count, gpus
        self._reporter = reporter
        self._jobs = len(jobs)
        self._waiting = deque(jobs)
        self._running: dict[str, tuple[Any, _Job, str]] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._deaths: Counter[str] = Counter()
        self._outcomes: dict[str, Outcome] = {}
        self._seen = time.monotonic()

    def work(self) -> dict[str, Outcome]:
        """Train all; returns how each ended, by name.

        Raises:
            ClusterUnavailableError: The scheduler or all workers were lost.
        """
        with self._reporter.bar("students", self._jobs, "students") as bar:
            while self._waiting or self._running:
                self._look_after(self._workers())
                with contextlib.suppress(queue.Empty):
                    self._take(self._ended.get(timeout=_LOOK_SECONDS))
                bar.progress_to(len(self._outcomes), self._jobs)
        return self._outcomes

    def _workers(self) -> list[str]:
        if self._client.status != "running":
            raise ClusterUnavailableError(_LOST)
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        alive = [
            address
            for address, worker in known.items()
            if not self._gpus or worker["resources"].get("GPU", 0) >= 1
        ]
        if alive:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > WORKERS_SECONDS:
            raise ClusterUnavailableError(
                f"cluster: no worker for {WORKERS_SECONDS:.0f} s; see the workers' logs. What is "
                "finished is kept: start workers and run again to go on"
            )
        return alive

    def _look_after(self, alive: list[str]) -> None:
        """Take back what was given to workers that are gone, and give free ones something."""
        for key, (future, job, address) in list(self._running.items()):
            if address not in alive and not future.done():
                del self._running[key]
                future.cancel()
                self._died(job, address)
        busy = {address for _, _, address in self._running.values()}
        for address in alive:
            full = self._count is not None and len(self._running) >= self._count
            if full or not self._waiting or address in busy:
                continue
            job = self._waiting.popleft()
            key = f"{job.topic}-{job.student.name}-{self._deaths[job.student.name]}"
            future = self._client.submit(
                _train_on_worker,
                job,
                pure=False,
                key=key,
                workers=[address],
                resources={"GPU": 1} if self._gpus else None,
            )
            self._running[key] = future, job, address
            future.add_done_callback(self._ended.put)

    def _take(self, future: Any) -> None:
        if future.key not in self._running:  # taken back already
            return
        _, job, address = self._running.pop(future.key)
        name = job.student.name
        if future.status == "finished":
            trained: TrainedNetwork = future.result()
            self._reporter.say(f"{name}: mIoU {trained.result['metrics']['miou']:.4f}")
            self._outcomes[name] = _finished(trained)
        elif future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                self._died(job, address)
            else:
                self._outcomes[name] = _failed(name, error, self._reporter)
        else:  # cancelled: Dask gives up all tasks of a lost scheduler
            raise ClusterUnavailableError(_LOST)
        future.release()

    def _died(self, job: _Job, address: str) -> None:
        name = job.student.name
        self._deaths[name] += 1
        if self._deaths[name] < MAX_DEATHS:
            self._reporter.say(f"{name}: its worker {address} died; it is given to another")
            self._waiting.appendleft(job)
            return
        error = ClusterError(
            f"{MAX_DEATHS} workers in turn died over it, the last was {address}; most likely "
            "memory was not enough: use fewer at a time, or a smaller training.batch_size"
        )
        self._outcomes[name] = _failed(name, error, self._reporter)


def _train_on_worker(job: _Job) -> TrainedNetwork:
    """What a worker does."""
    student = job.student
    with _ONE_AT_A_TIME, _lines_to_client(job.topic):
        forget_digests()  # the worker may be older than the newest images
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        training = job.config.student_training(student)
        if training.workers and multiprocessing.current_process().daemon:
            logger.info(
                "%s: loads images in the training process, because this worker may start no "
                "other; start workers with DASK_DISTRIBUTED__WORKER__DAEMON=False",
                student.name,
            )
            training = training.model_copy(update={"workers": 0})
            student = student.model_copy(update={"training": training})
        return train_student(job.config, student, job.sources, _worker_reporter())


def _finished(trained: TrainedNetwork) -> Outcome:
    return Outcome(student=trained.name, result=trained.result, reused=trained.reused)


def _failed(name: str, error: BaseException, reporter: Reporter) -> Outcome:
    kind = "" if isinstance(error, RddError) else f"unexpected {type(error).__name__}: "
    logger.debug("student %s failed", name, exc_info=error)
    message = f"{kind}{error}".removeprefix(f"{name}: ")
    reporter.say(f"{name}: failed: {message}")
    return Outcome(student=name, result=None, error=message)


def _use_gpus(config: RunConfig, client: Client) -> bool:
    """Whether students at a cluster elsewhere ask for a GPU each.

    Raises:
        ClusterError: The configuration asks for GPUs and no worker offers one.
    """
    if config.device == "cpu":
        return False
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    offered = any(worker["resources"].get("GPU", 0) >= 1 for worker in workers)
    if config.device == "cuda" and not offered:
        raise ClusterError(
            f"cluster: no worker at {config.cluster.address} offers a GPU; start them with "
            "'--resources GPU=1', or use device: auto"
        )
    return offered


class _Withdrawn(Exception):
    """Nobody waits for this training any more."""


def _worker_reporter() -> Reporter:
    """Logs lines, which go to the client, and ends a training that nobody waits for.

    Its client has gone, or its worker was given up. It would train on in this process otherwise,
    and another may train the same student by now.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def look(name: str, done: int, total: int) -> None:
        task = worker.state.tasks.get(key)
        wanted = task is not None and task.state == "executing"
        if not wanted or worker.status is not Status.running:
            raise _Withdrawn(f"{name}: withdrawn at {done} of {total}")

    reporter = Reporter(quiet=True)
    reporter.watch = look
    return reporter


class _ToClient(logging.Handler):
    """Sends what a worker says to the client, as events of the scheduler."""

    def __init__(self, topic: str) -> None:
        super().__init__(logging.INFO)
        self._topic = topic
        self._worker = get_worker()

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.log_event(self._topic, record.getMessage())


@contextmanager
def _lines_to_client(topic: str) -> Iterator[None]:
    said = logging.getLogger("rdd")
    said.setLevel(logging.DEBUG)
    handler = _ToClient(topic)
    said.addHandler(handler)
    try:
        yield
    finally:
        said.removeHandler(handler)


@contextmanager
def _lines_of_workers(client: Any, topic: str, reporter: Reporter) -> Iterator[None]:
    client.subscribe_topic(topic, lambda event: reporter.say(event[1]))
    try:
        yield
    finally:
        if client.status == "running":
            client.unsubscribe_topic(topic)
