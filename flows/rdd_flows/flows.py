"""The flow ``distill``: teacher, maps, students, report.

Plain functions in :mod:`rdd_pipeline` do the work. Each stage is one Prefect task; the maps task
drives a Dask client over the shards. What is finished is known from the run's folder and from the
store's ``done`` marks, not from Prefect's result cache, so a run may be started anywhere again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rdd_flows.environment import configure_prefect, log_to_file, stop_logging_to_file

configure_prefect()

from prefect import flow, task  # noqa: E402 - reads its settings when it is imported
from prefect.cache_policies import NO_CACHE  # noqa: E402

from rdd_pipeline.build import BuildResult  # noqa: E402
from rdd_pipeline.config import RunConfig, StudentConfig  # noqa: E402
from rdd_pipeline.data import build_dataset  # noqa: E402
from rdd_pipeline.files import write_json  # noqa: E402
from rdd_pipeline.progress import current_reporter  # noqa: E402
from rdd_pipeline.report import write_run_report  # noqa: E402
from rdd_pipeline.stages import (  # noqa: E402
    Stopwatch,
    TrainedNetwork,
    check_data,
    run_maps,
    run_student,
    run_teacher,
    write_results,
)
from rdd_pipeline.student import check_networks  # noqa: E402

LOG_FILE = Path("logs") / "rdd.log"


@task(name="check", cache_policy=NO_CACHE)
def check_task(config: RunConfig, students: tuple[StudentConfig, ...]) -> None:
    """Find what is wrong with data set and networks before anything long starts."""
    check_data(config, current_reporter())
    check_networks(config, build_dataset(config.data, "train"), students)


@task(name="teacher", cache_policy=NO_CACHE)
def teacher_task(config: RunConfig) -> TrainedNetwork:
    """Train the teacher or load its checkpoint."""
    return run_teacher(config, current_reporter())


@task(name="maps", cache_policy=NO_CACHE)
def maps_task(config: RunConfig, teacher: TrainedNetwork) -> BuildResult:
    """Run the teacher over the training images and publish the map store."""
    return run_maps(config, teacher, current_reporter())


@task(name="student", task_run_name="student {student.name}", cache_policy=NO_CACHE)
def student_task(
    config: RunConfig, student: StudentConfig, store: str, teacher: TrainedNetwork
) -> TrainedNetwork:
    """Train one student from the store, with the teacher beside it where its methods need that."""
    return run_student(config, student, store, current_reporter(), teacher.weights)


@task(name="report", cache_policy=NO_CACHE)
def report_task(results: Path) -> Path:
    """Write the report of the run."""
    return write_run_report(results)


@flow(name="distill", validate_parameters=False)
def distill(config: RunConfig) -> Path:
    """Run the whole way and return the path of ``results.json``.

    Args:
        config: The run; finished stages of its folder are reused.
    """
    handler = log_to_file(config.run_dir / LOG_FILE)
    try:
        write_json(config.run_dir / "config.json", config.model_dump(mode="json"))
        stopwatch = Stopwatch()
        stopwatch.time("check", check_task, config, config.students)
        teacher: TrainedNetwork = stopwatch.time("teacher", teacher_task, config)
        maps: BuildResult = stopwatch.time("maps", maps_task, config, teacher)
        students: list[TrainedNetwork] = [
            stopwatch.time("students", student_task, config, student, maps.path, teacher)
            for student in config.students
        ]
        results = write_results(config, teacher, maps, students, stopwatch.seconds)
        stopwatch.time("report", report_task, results)
        return results
    finally:
        stop_logging_to_file(handler)


@flow(name="build_maps", validate_parameters=False)
def build_maps_flow(config: RunConfig) -> dict[str, Any]:
    """Train or load the teacher, then build the map store."""
    handler = log_to_file(config.run_dir / LOG_FILE)
    try:
        check_task(config, ())
        maps: BuildResult = maps_task(config, teacher_task(config))
        return {"path": maps.path, "images": maps.images, "images_built": maps.images_built}
    finally:
        stop_logging_to_file(handler)
