"""The command ``rdd``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from rdd_flows.commands import flows_app, serve
from rdd_flows.console import err as _err
from rdd_flows.console import out as _out
from rdd_flows.environment import configure_logging, quiet_prefect
from rdd_flows.inspect_commands import register as register_inspection
from rdd_flows.label_error_commands import register as register_label_errors
from rdd_flows.stack.commands import stack_app
from rdd_pipeline.files import readable_bytes
from rdd_pipeline.processes import is_main_process, leave_processes, world_size
from rdd_storage.errors import RddError

if TYPE_CHECKING:
    from rdd_pipeline.data import Survey
    from rdd_pipeline.progress import Reporter
    from rdd_pipeline.stages import TrainedNetwork

# Heavy imports (torch, Prefect) are made inside the commands, so that --help is instant and the
# processes that Dask and the loaders spawn start quickly.

app = typer.Typer(
    name="rdd",
    help="Difficulty maps of a segmentation teacher, and students trained from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
maps_app = typer.Typer(help="Build and look after map stores.", no_args_is_help=True)
data_app = typer.Typer(help="Check and pack data sets.", no_args_is_help=True)
register_inspection(maps_app)
register_label_errors(maps_app)
app.add_typer(maps_app, name="maps")
app.add_typer(data_app, name="data")
app.add_typer(stack_app, name="stack")
app.add_typer(flows_app, name="flows")
app.command("serve")(serve)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as --set data.root=PATH or "
        "--set 'students=[supervised, rdd]'. The value is YAML. May be repeated.",
    ),
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Path or URL of a map store.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and results only.")]

_HOLDS = {"maps": "maps", "pack": "images"}


def _start(quiet: bool) -> Reporter:
    from rdd_pipeline.progress import Reporter, set_reporter

    # Of several training processes the main one alone shows anything but errors.
    quiet = quiet or not is_main_process()
    configure_logging(_err, quiet=quiet)
    reporter = Reporter(_err, quiet=quiet)
    set_reporter(reporter)
    return reporter


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Run the whole way: teacher, maps, students, report.

    Finished stages are reused; an interrupted run continues where it was.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.files import read_json

    settings = load_config(config, overrides or ())
    _start(quiet)
    _require_one_process()
    from rdd_flows.flows import distill
    from rdd_flows.recording import LOG_FILE

    results = _with_log(settings.run_dir / LOG_FILE, lambda: distill(settings))
    print_results(read_json(results))
    _out.print(f"results {results}\nreport  {results.parent / 'report.html'}", soft_wrap=True)


@app.command()
def train(
    config: ConfigPath,
    student: Annotated[str, typer.Option("--student", help="Name of the student in CONFIG.")],
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Path or URL of the map store; by default the one in maps.root that fits.",
        ),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train one student from a ready map store.

    The teacher is loaded (and trained first, if it has not been) only for students with 'teacher:
    online' or with methods that compare features. For several processes or GPUs start it with
    'accelerate launch' or 'torchrun'.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.stages import check_data, run_student, run_teacher
    from rdd_storage import find_store

    settings = load_config(config, overrides or ())
    reporter = _start(quiet)
    chosen = next((item for item in settings.students if item.name == student), None)
    if chosen is None:
        names = ", ".join(item.name for item in settings.students)
        raise ConfigError(f"--student {student}: {config} has the students {names}")
    check_data(settings, reporter)
    if store is None and chosen.needs_maps:
        identity = build_dataset(settings.data, "train").identity()
        arrays = ["logits"] if chosen.distils_logits else []
        store = find_store(settings.maps_root, data=identity, arrays=arrays).path
        reporter.say(f"{chosen.name}: reads {store}")
    teacher = run_teacher(settings, reporter).weights if chosen.needs_teacher else None
    trained = run_student(settings, chosen, store, reporter, teacher)
    _print_trained(trained)


@app.command()
def students(
    config: ConfigPath,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Path or URL of the map store; by default the one in maps.root that fits.",
        ),
    ] = None,
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
    reporter = _start(quiet)
    from rdd_pipeline.many_students import StudentsFailedError, student_store

    store = student_store(settings, store, reporter)  # before Prefect's server is started
    from rdd_flows.flows import students_flow
    from rdd_flows.recording import LOG_FILE

    failure = None
    try:
        path = _with_log(settings.run_dir / LOG_FILE, lambda: students_flow(settings, store, count))
    except _Logged as error:
        if not isinstance(error.error, StudentsFailedError):
            raise
        failure, path = error, error.error.comparison
    print_comparison(read_json(path))
    _out.print(f"comparison {path}", soft_wrap=True)
    if failure is not None:
        raise failure


@app.command()
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
    from rdd_pipeline.stages import check_data, run_teacher

    extra = ["teacher.heads_only=true"] if heads_only else []
    settings = load_config(config, [*(overrides or ()), *extra])
    reporter = _start(quiet)
    check_data(settings, reporter)
    _print_trained(run_teacher(settings, reporter))


def _print_trained(trained: TrainedNetwork) -> None:
    """Say what came out, once, and part from the other training processes."""
    leave_processes()
    if not is_main_process():
        return
    best = trained.result.get("best_miou")
    kept = f" (best {best:.4f} at iteration {trained.result['best_iteration']})" if best else ""
    _out.print(
        f"{trained.name}: mIoU {trained.result['metrics']['miou']:.4f}{kept}, "
        f"weights {trained.weights}",
        soft_wrap=True,
    )


@app.command()
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
    reporter = _start(quiet)
    from rdd_pipeline.report import write_report

    path = write_report(target, out=out, data=source, images=images, reporter=reporter)
    _out.print(str(path), soft_wrap=True)


TrainedFolder = Annotated[
    Path,
    typer.Argument(metavar="TRAINED", help="Folder of a finished training: RUN/students/NAME."),
]


@app.command()
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

    _out.print(str(export_folder(trained, out)), soft_wrap=True)
    if onnx:
        path = out / "model.onnx"
        difference = export_onnx(load_trained(out), path, size)
        _out.print(f"{path}: logits differ from torch by at most {difference:.1e}", soft_wrap=True)


@app.command()
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
    from rdd_pipeline.stages import resolve_device

    reporter = _start(quiet)
    model = load_trained(trained, resolve_device(device))
    written = 0
    with reporter.bar("predict", len(image_files(images))) as bar:
        for _ in predict_folder(model, images, out, opacity=opacity, labels=labels):
            written += 1
            bar.advance()
    _out.print(f"{written} pictures in {out}", soft_wrap=True)


@data_app.command("check")
def data_check(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Read every file of both splits: sizes, shares of the classes, everything that is wrong.

    Exit code 1 if anything is.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset, survey_dataset
    from rdd_pipeline.errors import DataError

    settings = load_config(config, overrides or ())
    reporter = _start(quiet)
    found = 0
    for split in ("train", "val"):
        try:
            dataset = build_dataset(settings.data, split)
        except DataError as error:  # the other split is looked at all the same
            found += 1
            _err.print(f"{split}: {error}", markup=False, highlight=False, soft_wrap=True)
            continue
        with reporter.bar(f"check {split}", len(dataset)) as bar:
            survey = survey_dataset(dataset, progress=bar.advance)
        _print_survey(survey)
        for problem in survey.problems:
            _err.print(problem, markup=False, highlight=False, soft_wrap=True)
        found += len(survey.problems)
    if found:
        _err.print(f"{found} problem(s)", highlight=False)
        raise typer.Exit(1)
    _out.print("no problems")


@data_app.command("pack")
def data_pack(
    config: ConfigPath,
    split: Annotated[
        Literal["train", "val", "all"], typer.Option("--split", help="What to pack.")
    ] = "all",
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Store decoded images and labels once, so that training reads only the pixels of its crops.

    Training takes the pack by itself and gives the same results. An interrupted command goes on
    where it was; a later one adds what is new or has changed.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset, pack_dataset

    settings = load_config(config, overrides or ())
    reporter = _start(quiet)
    splits: tuple[Literal["train", "val"], ...] = ("train", "val") if split == "all" else (split,)
    for name in splits:
        packed = pack_dataset(
            build_dataset(settings.data, name), settings.data.packed_root, reporter=reporter
        )
        what = f"{packed.images_packed} of {packed.images} images packed in {packed.seconds:.1f} s"
        if not packed.images_packed:
            what = f"reused, {packed.images} images"
        size = readable_bytes(packed.bytes_on_disk)
        _out.print(f"{name}: {what}, {size}: {packed.path}", highlight=False, soft_wrap=True)


def _print_survey(survey: Survey) -> None:
    """Print what a split holds."""
    heights, widths = zip(*survey.sizes, strict=True) if survey.sizes else ((0,), (0,))
    low, high = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    sizes = low if low == high else f"{low} to {high}, {len(survey.sizes)} sizes"
    _out.print(
        f"{survey.name} {survey.split}: {survey.images} images of {sizes} (height x width), "
        f"{survey.ignored:.1%} of the pixels ignored, {len(survey.problems)} problem(s)",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("class", "pixels", "in images", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for item in survey.classes:
        table.add_row(_escape(item.name), f"{item.share:.3%}", str(item.images))
    _out.print(table)
    absent = [item.name for item in survey.classes if not item.images]
    if absent:
        _out.print(
            f"in no image: {', '.join(absent)}", markup=False, highlight=False, soft_wrap=True
        )
    _out.print()


@maps_app.command("build")
def maps_build(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train or load the teacher and build the map store, or resume an interrupted build."""
    from rdd_pipeline.config import load_config

    settings = load_config(config, overrides or ())
    _start(quiet)
    _require_one_process()
    from rdd_flows.flows import build_maps_flow
    from rdd_flows.recording import LOG_FILE

    built = _with_log(settings.run_dir / LOG_FILE, lambda: build_maps_flow(settings))
    _out.print(str(built["path"]), soft_wrap=True)


@maps_app.command("plan")
def maps_plan(
    config: ConfigPath,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Images to measure; three times as many are run.")
    ] = 8,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Measure a few images and say what the whole store will take: bytes, files, time, memory.

    Nothing is kept. The teacher's weights are used where they are ready; random ones take as long,
    but their maps differ in size.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.plan import plan_maps
    from rdd_pipeline.stages import ready_teacher, resolve_device

    settings = load_config(config, overrides or ())
    reporter = _start(quiet)
    plan = plan_maps(
        settings,
        ready_teacher(settings, reporter),
        sample=sample,
        device=str(resolve_device(settings.device)),
        reporter=reporter,
    )
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{plan.images}, measured on {plan.sampled}")
    each = readable_bytes(plan.bytes_per_image)
    table.add_row("on disk", f"{readable_bytes(plan.bytes_total)}, {each} an image")
    for name, size in plan.arrays.items():
        if size >= 0.01 * plan.bytes_per_image:
            table.add_row(f"  {name}", f"{readable_bytes(size)} an image")
    table.add_row("files", f"{plan.objects}")
    table.add_row(
        "time", f"{_duration(plan.seconds)} by one process, {plan.seconds_per_image:.3g} s an image"
    )
    table.add_row(
        "memory",
        f"maps of {readable_bytes(2 * plan.shard_bytes)} for each of {max(plan.workers, 1)} "
        "worker(s), beside the teacher",
    )
    table.add_row(
        "pays from",
        f"{plan.break_even_students} student(s): a training with the teacher on every crop spends "
        f"{_duration(plan.online_seconds)} in the teacher",
    )
    if not plan.trained_teacher:
        table.add_row("note", "the teacher is not trained yet: bytes are those of random weights")
    _out.print(table)


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, to three digits."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


@maps_app.command("status")
def maps_status(path: StorePath) -> None:
    """Show what a store holds, whether it is complete, who uses it, and its size on disk."""
    from rdd_storage import lease_holder, store_status, uses

    status = store_status(path)
    table = Table(show_header=False, box=None)
    table.add_row("store", status.path)
    table.add_row("holds", _HOLDS[status.kind])
    table.add_row("fingerprint", status.fingerprint)
    table.add_row("format version", str(status.format_version))
    table.add_row("version", str(status.version) if status.version else "none published yet")
    table.add_row("images", f"{status.images_done} of {status.images} done")
    table.add_row("shards", f"{status.shards_done} of {status.shards} done")
    table.add_row("state", "complete" if status.complete else "unfinished; build again to resume")
    each = readable_bytes(status.bytes_per_image)
    table.add_row("on disk", f"{readable_bytes(status.bytes_on_disk)}, {each} an image")
    for name, size in status.arrays.items():
        table.add_row(f"  {name}", f"{readable_bytes(size / max(status.images_done, 1))} an image")
    if status.growth is not None:
        growth = status.growth
        adds = f", adds {', '.join(growth.adds)}" if growth.adds else ""
        state = f"version {growth.version}{adds}: {growth.images_done} of {growth.images} images"
        table.add_row("unfinished", f"{state} done; build again to resume")
    holder = lease_holder(path)
    if holder is not None:
        table.add_row("being built by", str(holder))
    for use in uses(path):
        table.add_row("used by", f"{use.run}, version {use.version}, {use.at:%Y-%m-%d %H:%M} UTC")
    _out.print(table)


@maps_app.command("verify")
def maps_verify(
    path: StorePath,
    against_teacher: Annotated[
        int,
        typer.Option(
            "--against-teacher",
            metavar="N",
            min=0,
            help="Also run the teacher again over N random images; needs --config.",
        ),
    ] = 0,
    config: Annotated[
        Path | None, typer.Option("--config", help="Configuration the store was built with.")
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Read every byte of a store and list what is damaged; exit code 1 if anything is."""
    from rdd_pipeline.errors import ConfigError
    from rdd_storage import verify_store

    if against_teacher and config is None:
        raise ConfigError("--against-teacher: needs --config, to know the teacher and the data")
    reporter = _start(quiet)
    with reporter.bar("verify", 1, "objects") as bar:
        report = verify_store(path, bar.progress_to)
    for damage in report.damages:
        shard = "" if damage.shard is None else f" shard {damage.shard}"
        _out.print(f"{damage.array}{shard}: {damage.problem} ({damage.key})", soft_wrap=True)
    _out.print(f"{report.objects} objects read, {len(report.damages)} damaged", soft_wrap=True)
    if not report.ok:
        _out.print(f"to mend it: rdd maps repair {path}", soft_wrap=True)
        raise typer.Exit(1)
    if config is not None and against_teacher:
        _compare_with_teacher(path, config, overrides or (), against_teacher, reporter)


def _compare_with_teacher(
    path: str, config: Path, overrides: Sequence[str], images: int, reporter: Reporter
) -> None:
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset
    from rdd_pipeline.stages import resolve_device, run_teacher
    from rdd_pipeline.teacher_check import compare_with_teacher

    settings = load_config(config, overrides)
    differences = compare_with_teacher(
        path,
        build_dataset(settings.data, "train"),
        settings.teacher.network,
        run_teacher(settings, reporter).weights,
        maps=settings.maps,
        images=images,
        device=str(resolve_device(settings.device)),
        reporter=reporter,
    )
    table = Table("array", "in", "largest difference", "mean", "image", box=None)
    for row in differences:
        table.add_row(row.array, row.unit, f"{row.largest:.2e}", f"{row.mean:.2e}", row.image_id)
    _out.print(table)


@maps_app.command("fidelity")
def maps_fidelity(
    path: StorePath,
    config: Annotated[
        Path, typer.Option("--config", help="Configuration the store was built with.")
    ],
    crops: Annotated[
        int,
        typer.Option("--crops", metavar="N", min=1, help="Crops to compare, in whole batches."),
    ] = 200,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="Student whose crops and rdd settings to take; by default the first with rdd.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the crops.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to; by default 'fidelity' in the run's."),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Measure how far a store is from the teacher evaluated on every augmented crop.

    Writes fidelity.json, fidelity.md and fidelity.png.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset
    from rdd_pipeline.fidelity import choose_student, measure_fidelity
    from rdd_pipeline.report.fidelity_tables import (
        fidelity_notes,
        fidelity_tables,
        write_fidelity,
    )
    from rdd_pipeline.stages import image_digests, resolve_device, run_teacher

    settings = load_config(config, overrides or ())
    chosen = choose_student(settings, student)
    reporter = _start(quiet)
    measured = measure_fidelity(
        settings,
        chosen,
        build_dataset(settings.data, "train"),
        path,
        run_teacher(settings, reporter).weights,
        crops=crops,
        device=resolve_device(settings.device),
        reporter=reporter,
        seed=seed,
        digests=image_digests(settings.data),
    )
    files = write_fidelity(measured, out or settings.run_dir / "fidelity")
    for figures in fidelity_tables(measured.fidelity):
        table = Table(*figures.header, box=None)
        for row in figures.rows:
            table.add_row(*row)
        _out.print(f"{figures.title}\n", highlight=False)
        _out.print(table)
        _out.print()
    for note in fidelity_notes(measured.fidelity):
        _out.print(note, highlight=False)
    for file in files:
        _out.print(str(file), soft_wrap=True)


@maps_app.command("repair")
def maps_repair(path: StorePath, quiet: Quiet = False) -> None:
    """Restore metadata and mark damaged shards to be built again by 'rdd maps build'.

    Those of packs are built again by 'rdd data pack'.
    """
    from rdd_storage import repair_store, store_status

    reporter = _start(quiet)
    with reporter.bar("verify", 1, "objects") as bar:
        report = repair_store(path, bar.progress_to)
    _out.print(
        f"{len(report.damages)} damaged objects; {len(report.restored)} restored, "
        f"{len(report.reopened)} shards to build again, {readable_bytes(report.bytes_freed)} freed",
        soft_wrap=True,
    )
    if report.lost:
        _out.print(
            f"shards {list(report.lost)} hold images of earlier versions alone and cannot be "
            "built again; remove those versions with 'rdd maps remove --version'",
            soft_wrap=True,
        )
    if report.reopened:
        command = "rdd data pack" if store_status(path).kind == "pack" else "rdd maps build"
        _out.print(f"build them with: {command} CONFIG", soft_wrap=True)


@maps_app.command("remove")
def maps_remove(
    path: StorePath,
    version: Annotated[
        int | None, typer.Option("--version", help="Remove this version only.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a store, or one version of it."""
    from rdd_storage import remove_store, remove_version, store_status

    status = store_status(path)
    what = path if version is None else f"version {version} of {path}"
    if not yes:
        typer.confirm(f"Remove {what} ({readable_bytes(status.bytes_on_disk)})?", abort=True)
    freed = remove_store(path) if version is None else remove_version(path, version)
    _out.print(f"removed {what}: {readable_bytes(freed)} freed", soft_wrap=True)


@maps_app.command("list")
def maps_list(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URL that holds stores.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Only stores of this data set or split.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", help="Only stores of this architecture, encoder or weights' hash."
        ),
    ] = None,
) -> None:
    """List the stores in a folder, packs too, and what they take together."""
    from rdd_storage import find_stores, list_stores

    filtered = data is not None or teacher is not None
    # Stores that cannot be read are listed too, unless something is looked for in them.
    stores = (
        [
            (status.path, status, "")
            for status in find_stores(root, teacher=teacher, data=data, kind=None)
        ]
        if filtered
        else [(store.path, store.status, store.problem) for store in list_stores(root)]
    )
    table = Table("store", "holds", "images", "version", "state", "size", box=None)
    total = 0
    for path, status, problem in stores:
        name = path.rstrip("/").rpartition("/")[2]
        if status is None:
            table.add_row(name, "", "", "", problem, "")
            continue
        total += status.bytes_on_disk
        table.add_row(
            name,
            _HOLDS[status.kind],
            str(status.images),
            str(status.version or "-"),
            "complete" if status.complete else f"{status.images_done} done",
            readable_bytes(status.bytes_on_disk),
        )
    _out.print(table)
    _out.print(f"together {readable_bytes(total)}")


def print_results(results: dict[str, Any]) -> None:
    """Print the table of a run: mIoU, seconds and images/s of each student, store size."""
    table = Table(
        "network", "method", "mIoU", "train s", "images/s", "step ms", "data wait", box=None
    )
    teacher = results["teacher"]
    table.add_row("teacher", "reused" if teacher["reused"] else "", *_figures(teacher))
    for student in results["students"]:
        method = student["label"] + (" (reused)" if student["reused"] else "")
        table.add_row(student["name"], method, *_figures(student))
    _out.print(table)
    maps = results["maps"]
    added = maps["soft_labels_added"]
    labels = f", soft labels added to {added}" if added else ""
    _out.print(
        f"maps: {maps['images']} images, {readable_bytes(maps['bytes_per_image'])} an image, "
        f"{maps['images_built']} built{labels} in {maps['seconds']:.1f} s"
    )
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    _out.print(f"stages: {stages}; peak memory {readable_bytes(results['peak_memory_bytes'])}")


def print_comparison(tree: dict[str, Any]) -> None:
    """Print the students of a run by method: means over seeds, and differences to the baseline."""
    from rdd_pipeline.comparison import notes, table

    header, rows = table(tree)
    shown = Table(*header, box=None)
    for column in shown.columns:
        column.justify = "left" if column.header in ("network", "method") else "right"
    for row in rows:
        shown.add_row(*map(_escape, row))
    _out.print(shown)
    for note in notes(tree):
        _out.print(note, markup=False, highlight=False, soft_wrap=True)


def _figures(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['metrics']['miou']:.4f}",
        *(
            f"{result[key]:{form}}" if key in result else "-"
            for key, form in (
                ("seconds", ".1f"),
                ("images_per_second", ".1f"),
                ("step_ms", ".0f"),
                ("data_wait_share", ".1%"),
            )
        ),
    ]


def _require_one_process() -> None:
    from rdd_pipeline.errors import ConfigError

    if world_size() > 1:
        raise ConfigError(
            "torchrun and accelerate launch start 'rdd train' and 'rdd teach' alone; start this "
            "command once, without them"
        )


def _with_log(path: Path, function: Callable[[], Any]) -> Any:
    """Call a flow; a failure names the log file."""
    from rdd_flows.server import lost_server, require_server

    quiet_prefect()
    require_server()
    try:
        return function()
    except RddError as error:
        raise _Logged(path, error) from error
    except Exception as error:
        logging.getLogger("rdd").debug("unexpected error", exc_info=error)
        raise _Logged(path, lost_server(error) or error) from error


class _Logged(Exception):
    """An error of a flow, with its log file."""

    def __init__(self, log: Path, error: Exception) -> None:
        super().__init__(str(error))
        self.log = log
        self.error = error


def main() -> None:
    """Entry point: one clear line for an error, and an exit code that says so."""
    # A scheduler's SIGTERM must not leave workers and the embedded Prefect server behind.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except _Logged as failure:
        error = failure.error
        kind = "" if isinstance(error, RddError) else f"unexpected {type(error).__name__}: "
        _fail(f"{kind}{error}", failure.log)
    except RddError as error:
        _fail(str(error), None)
    except KeyboardInterrupt:
        _err.print("interrupted; run the same command again to continue")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as in 'rdd maps list | head'.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    _err.print("terminated; run the same command again to continue")
    raise SystemExit(128 + number)


def _fail(message: str, log: Path | None) -> None:
    _err.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True, highlight=False)
    if log is not None:
        _err.print(f"log: {_escape(str(log))}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
