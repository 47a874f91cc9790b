"""The commands that train and use networks: ``rdd run``, ``train``, ``students``, ``teach``, ..."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rdd_flows import console
from rdd_flows.flow_runs import LoggedError, require_one_process, with_log
from rdd_flows.options import ConfigPath, Overrides, Quiet, start
from rdd_flows.tables import print_comparison, print_results
from rdd_pipeline.processes import is_main_process, leave_processes

if TYPE_CHECKING:
    from rdd_pipeline.reuse import TrainedNetwork

FittingStore = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Path or URL of the map store; by default the one in maps.root that fits.",
    ),
]


def run(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Run the whole way: teacher, maps, students, report.

    Finished stages are reused; an interrupted run continues where it was. A student that fails
    leaves the others alone; the exit code is then 1.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.files import read_json

    settings = load_config(config, overrides or ())
    start(quiet)
    require_one_process()
    from rdd_flows.flows import distill
    from rdd_flows.recording import LOG_FILE
    from rdd_pipeline.many_students import StudentsFailedError
    from rdd_pipeline.results import RESULTS_FILE

    failure = None
    try:
        results = with_log(settings.run_dir / LOG_FILE, lambda: distill(settings))
    except LoggedError as error:
        if not isinstance(error.error, StudentsFailedError):
            raise
        failure, results = error, error.error.comparison.with_name(RESULTS_FILE)
    print_results(read_json(results))
    console.out.print(
        f"results {results}\nreport  {results.parent / 'report.html'}", soft_wrap=True
    )
    if failure is not None:
        raise failure


def train(
    config: ConfigPath,
    student: Annotated[str, typer.Option("--student", help="Name of the student in CONFIG.")],
    store: FittingStore = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train one student from a ready map store.

    The teacher is loaded (and trained first, if it has not been) only for students with 'teacher:
    online' or with methods that compare features. For several processes or GPUs start it with
    'accelerate launch' or 'torchrun'.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.run_images import check_data, open_split
    from rdd_pipeline.stages import run_student, run_teacher
    from rdd_storage import find_store

    settings = load_config(config, overrides or ())
    reporter = start(quiet)
    chosen = next((item for item in settings.students if item.name == student), None)
    if chosen is None:
        names = ", ".join(item.name for item in settings.students)
        raise ConfigError(f"--student {student}: {config} has the students {names}")
    check_data(settings, reporter)
    if store is None and chosen.needs_maps:
        identity = open_split(settings.data, "train").identity()
        arrays = ["logits"] if chosen.distils_logits else []
        store = find_store(settings.maps_root, data=identity, arrays=arrays).path
        reporter.say(f"{chosen.name}: reads {store}")
    teacher = run_teacher(settings, reporter).weights if chosen.needs_teacher else None
    trained = run_student(settings, chosen, store, reporter, teacher)
    _print_trained(trained)


def students(
    config: ConfigPath,
    store: FittingStore = None,
    parallel: Annotated[
        str,
        typer.Option(
            "--parallel",
            metavar="N|auto",
            help="Trainings at a time; auto is one on each GPU, and without GPUs one.",
        ),
    ] = "auto",
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train all students of CONFIG, of its grid too, and compare them over their seeds.

    Finished students are reused, interrupted ones resume. A student that fails leaves the others
    alone; the exit code is then 1.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.files import read_json

    settings = load_config(config, overrides or ())
    if parallel != "auto" and not (parallel.isdecimal() and int(parallel) > 0):
        raise ConfigError(f"--parallel {parallel}: expected auto or a number from 1")
    count = None if parallel == "auto" else int(parallel)
    reporter = start(quiet)
    from rdd_pipeline.many_students import StudentsFailedError, student_store

    store = student_store(settings, store, reporter)  # before Prefect's server is started
    from rdd_flows.flows import students_flow
    from rdd_flows.recording import LOG_FILE

    failure = None
    try:
        path = with_log(settings.run_dir / LOG_FILE, lambda: students_flow(settings, store, count))
    except LoggedError as error:
        if not isinstance(error.error, StudentsFailedError):
            raise
        failure, path = error, error.error.comparison
    print_comparison(read_json(path))
    console.out.print(f"comparison {path}", soft_wrap=True)
    if failure is not None:
        raise failure


def teach(
    config: ConfigPath,
    heads_only: Annotated[
        bool,
        typer.Option(
            "--heads-only", help="Train the auxiliary head alone, on teacher.checkpoint's network."
        ),
    ] = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train the teacher, or train teacher.checkpoint further where teacher.training is given too.

    'rdd run' and 'rdd maps build' with the same settings take the result.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.run_images import check_data
    from rdd_pipeline.stages import run_teacher

    extra = ["teacher.heads_only=true"] if heads_only else []
    settings = load_config(config, [*(overrides or ()), *extra])
    reporter = start(quiet)
    check_data(settings, reporter)
    _print_trained(run_teacher(settings, reporter))


def _print_trained(trained: TrainedNetwork) -> None:
    """Say what came out, once, and part from the other training processes."""
    leave_processes()
    if not is_main_process():
        return
    best = trained.result.get("best_miou")
    kept = f" (best {best:.4f} at iteration {trained.result['best_iteration']})" if best else ""
    console.out.print(
        f"{trained.name}: mIoU {trained.result['metrics']['miou']:.4f}{kept}, "
        f"weights {trained.weights}",
        soft_wrap=True,
    )


def report(
    target: Annotated[
        str,
        typer.Argument(
            metavar="STORE|RUN", help="Path or URL of a map store, or folder of a finished run."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The file; by default RUN/report.html, for a store NAME.html here."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="CONFIG",
            help="Configuration that says where images and labels are; a run has its own.",
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            "--images", min=0, help="Images to show: half the hardest, half the most suspicious."
        ),
    ] = 24,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file about a run or a map store, that needs nothing else to be looked at."""
    from rdd_pipeline.config import load_config
    from rdd_pipeline.errors import ConfigError

    if overrides and data is None:
        raise ConfigError("--set changes the configuration of --data, and there is none; give both")
    source = None if data is None else load_config(data, overrides or ()).data
    reporter = start(quiet)
    from rdd_pipeline.report import write_report

    path = write_report(target, out=out, data=source, images=images, reporter=reporter)
    console.out.print(str(path), soft_wrap=True)


TrainedFolder = Annotated[
    Path,
    typer.Argument(metavar="TRAINED", help="Folder of a finished training: RUN/students/NAME."),
]


def export(
    trained: TrainedFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx as well.")] = False,
    size: Annotated[
        tuple[int, int],
        typer.Option("--size", metavar="H W", help="Image size that the ONNX model takes."),
    ] = (512, 1024),
) -> None:
    """Write a trained network as weights and description, and as ONNX.

    The folder loads in one line: rdd_pipeline.export.load_trained(FOLDER).
    """
    from rdd_pipeline.export import export_folder, export_onnx, load_trained

    console.out.print(str(export_folder(trained, out)), soft_wrap=True)
    if onnx:
        path = out / "model.onnx"
        difference = export_onnx(load_trained(out), path, size)
        console.out.print(
            f"{path}: logits differ from torch by at most {difference:.1e}", soft_wrap=True
        )


def predict(
    trained: TrainedFolder,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pictures.")],
    opacity: Annotated[
        float, typer.Option("--opacity", min=0.0, max=1.0, help="Of the classes' colours.")
    ] = 0.5,
    labels: Annotated[
        bool, typer.Option("--labels", help="Class indices as palette PNG, not overlays.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Predict images and write the classes as colour overlays."""
    from rdd_pipeline.export import image_files, load_trained, predict_folder
    from rdd_pipeline.machine import resolve_device

    reporter = start(quiet)
    model = load_trained(trained, resolve_device(device))
    written = 0
    with reporter.bar("predict", len(image_files(images))) as bar:
        for _ in predict_folder(model, images, out, opacity=opacity, labels=labels):
            written += 1
            bar.advance()
    console.out.print(f"{written} pictures in {out}", soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (run, train, students, teach, report, export, predict):
        app.command()(command)
