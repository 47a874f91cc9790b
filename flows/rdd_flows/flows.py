"""The flows ``build_maps``, ``train_student``, ``students`` and ``distill``.

Plain functions in :mod:`rdd_pipeline` do the work. Each stage is one Prefect task; the maps task
drives a Dask client over the shards. What is finished is known from the run's folder and from the
store's ``done`` marks, not from Prefect's result cache, so a run may be started anywhere again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from rdd_flows.artifacts import show_maps, show_report, show_students
from rdd_flows.checks import check_places
from rdd_flows.faults import RETRIES
from rdd_flows.limits import store_slot
from rdd_flows.recording import recorded, settings_of
from rdd_pipeline.build import BuildResult
from rdd_pipeline.comparison import MARKDOWN_FILE, Outcome
from rdd_pipeline.config import RunConfig, StudentConfig
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.files import write_json
from rdd_pipeline.many_students import (
    Sources,
    StudentsFailedError,
    Workers,
    choose_workers,
    one_after_another,
    side_by_side,
    student_store,
    train_student,
    write_comparison,
)
from rdd_pipeline.progress import current_reporter
from rdd_pipeline.report import write_run_report
from rdd_pipeline.results import Stopwatch, update_students, write_results
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import check_data, open_split
from rdd_pipeline.stages import run_maps, run_teacher
from rdd_pipeline.student import check_networks
from rdd_storage import MapReader, UnknownVersionError

# The flows leave validation to settings_of: its messages name the key, as those of the command line
# do. Prefect's page makes its form of the annotations all the same.


@task(name="check", cache_policy=NO_CACHE)
def check_task(config: RunConfig, students: tuple[StudentConfig, ...]) -> None:
    """Find what is wrong with data set, networks and places before anything long starts."""
    check_places(config)
    check_data(config, current_reporter())
    check_networks(config, open_split(config.data, "train"), students)


@task(name="teacher", cache_policy=NO_CACHE, **RETRIES)
def teacher_task(config: RunConfig, *, keep: bool = False) -> TrainedNetwork:
    """Train the teacher or load its checkpoint."""
    return run_teacher(config, current_reporter(), keep=keep)


@task(name="maps", cache_policy=NO_CACHE, **RETRIES)
def maps_task(
    config: RunConfig,
    teacher: TrainedNetwork,
    guard: Callable[[str], AbstractContextManager[object]] = store_slot,
) -> BuildResult:
    """Run the teacher over the training images and publish the map store."""
    maps = run_maps(config, teacher, current_reporter(), guard)
    show_maps(config, maps)
    return maps


@task(name="student", task_run_name="student {student.name}", cache_policy=NO_CACHE, **RETRIES)
def student_task(config: RunConfig, student: StudentConfig, sources: Sources) -> TrainedNetwork:
    """Train one student from the store, with the teacher beside it where its methods need that."""
    return train_student(config, student, sources, current_reporter())


@task(name="students on workers", cache_policy=NO_CACHE, **RETRIES)
def students_task(config: RunConfig, sources: Sources, workers: Workers) -> list[Outcome]:
    """Train all students on Dask workers, one at a time on each."""
    return side_by_side(config, sources, workers, current_reporter())


@task(name="report", cache_policy=NO_CACHE)
def report_task(results: Path) -> Path:
    """Write the report of the run."""
    report = write_run_report(results)
    show_report(report)
    return report


@flow(name="distill", validate_parameters=False)
def distill(config: RunConfig | str, overrides: list[str] | None = None) -> Path:
    """Run the whole way and return the path of ``results.json``.

    Args:
        config: The run, or the path of its YAML file; finished stages of its folder are reused.
        overrides: Changes to the file, as ``key.path=value``.

    Raises:
        StudentsFailedError: Some students failed; all others are finished, and in the report.
    """
    settings = settings_of(config, overrides)
    with recorded(settings):
        write_json(settings.run_dir / "config.json", settings.model_dump(mode="json"))
        stopwatch = Stopwatch()
        stopwatch.time("check", check_task, settings, settings.students)
        teacher: TrainedNetwork = stopwatch.time("teacher", teacher_task, settings)
        maps: BuildResult = stopwatch.time("maps", maps_task, settings, teacher)
        sources = Sources(store=maps.path, teacher=teacher.weights)
        outcomes = one_after_another(
            settings.students,
            lambda student: stopwatch.time("students", student_task, settings, student, sources),
            current_reporter(),
        )
        comparison = write_comparison(settings, outcomes, sources.store)
        show_comparison(settings, comparison)
        finished = {done.student: done.reused for done in outcomes if done.result is not None}
        results = write_results(settings, teacher, maps, finished, stopwatch.seconds)
        stopwatch.time("report", report_task, results)
        if len(finished) < len(outcomes):
            raise StudentsFailedError(outcomes, comparison)
        return results


@flow(name="students", validate_parameters=False)
def students_flow(
    config: RunConfig | str,
    store: str | None = None,
    parallel: int | None = None,
    version: int | None = None,
    overrides: list[str] | None = None,
) -> Path:
    """Train a run's students from one store and return the path of ``students.json``.

    Args:
        config: The run, or the path of its YAML file; finished students of its folder are reused.
        store: Path or URL of the store; None takes the one in ``maps.root`` that fits.
        parallel: Trainings at a time; None for one on each GPU, and without GPUs one.
        version: Version of the store that has to be there; the newest is used.
        overrides: Changes to the file, as ``key.path=value``.

    Raises:
        StudentsFailedError: Some failed; all others are finished.
    """
    settings = settings_of(config, overrides)
    with recorded(settings):
        reporter = current_reporter()
        workers = choose_workers(settings, parallel)
        sources = student_sources(settings, store, version)
        check_task(settings, settings.students)
        if workers.here:
            outcomes = one_after_another(
                settings.students,
                lambda student: student_task(settings, student, sources),
                reporter,
            )
        else:
            outcomes = students_task(settings, sources, workers)
        comparison = write_comparison(settings, outcomes, sources.store)
        show_comparison(settings, comparison)
        finished = [outcome for outcome in outcomes if outcome.result is not None]
        write_report_again(settings, {done.student: done.reused for done in finished})
        if len(finished) < len(outcomes):
            raise StudentsFailedError(outcomes, comparison)
        return comparison


@flow(name="train_student", validate_parameters=False)
def train_student_flow(
    config: RunConfig | str,
    student: str,
    store: str | None = None,
    version: int | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Train one student and say from which version of which store.

    Args:
        config: The run, or the path of its YAML file.
        student: Name of one of its students.
        store: Path or URL of the store; None takes the one in ``maps.root`` that fits.
        version: Version of the store that has to be there; the newest is used.
        overrides: Changes to the file, as ``key.path=value``.

    Returns:
        ``student``, ``miou``, ``weights``, ``store`` and ``store_version``.

    Raises:
        ConfigError: There is no such student.
    """
    settings = settings_of(config, overrides)
    chosen = tuple(item for item in settings.students if item.name == student)
    if not chosen:
        names = ", ".join(item.name for item in settings.students)
        raise ConfigError(f"student: expected one of {names}, got '{student}'")
    alone = settings.model_copy(update={"students": chosen})
    with recorded(settings):
        sources = student_sources(alone, store, version)
        check_task(alone, chosen)
        trained = student_task(alone, chosen[0], sources)
        write_report_again(settings, {trained.name: trained.reused})
        return {
            "student": trained.name,
            "miou": trained.result["metrics"]["miou"],
            "weights": str(trained.weights),
            "store": sources.store,
            "store_version": trained.result["settings"]["store_version"],
        }


@flow(name="build_maps", validate_parameters=False)
def build_maps_flow(config: RunConfig | str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train or load the teacher, then build the map store.

    Args:
        config: The run, or the path of its YAML file.
        overrides: Changes to the file, as ``key.path=value``.

    Returns:
        ``path``, ``version``, ``images`` and ``images_built``.
    """
    settings = settings_of(config, overrides)
    with recorded(settings):
        check_task(settings, ())
        return build_summary(maps_task(settings, teacher_task(settings)))


def build_summary(maps: BuildResult) -> dict[str, Any]:
    """What flows return of a build."""
    return {
        "path": maps.path,
        "version": maps.version,
        "images": maps.images,
        "images_built": maps.images_built,
    }


def student_sources(config: RunConfig, store: str | None, version: int | None) -> Sources:
    """Find the store and the teacher that the run's students need.

    Raises:
        UnknownVersionError: The store is older than the version asked for.
    """
    given = store is not None
    store = student_store(config, store, current_reporter())
    if store is not None:
        found = MapReader(store).version
        if version is not None and found < version:
            raise UnknownVersionError(
                f"{store}: expected version {version}, got {found}; wait until it is published, or "
                "leave the version out"
            )
        current_reporter().say(f"students: version {found} of {store}")
    needed = any(student.needs_teacher for student in config.students)
    # The teacher beside a given store has to be the one that made it.
    teacher = teacher_task(config, keep=given).weights if needed else None
    return Sources(store=store, teacher=teacher)


def show_comparison(config: RunConfig, comparison: Path) -> None:
    """Show the students side by side on the flow run's page."""
    show_students(config.name, (comparison.parent / MARKDOWN_FILE).read_text(encoding="utf-8"))


def write_report_again(config: RunConfig, trained: dict[str, bool]) -> None:
    """Bring the results and the report of a finished run up to date with students trained since."""
    results = update_students(config, trained)
    if results is not None:
        report_task(results)
