"""The command ``rdd``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rdd_flows.environment import configure_logging, quiet_prefect
from rdd_pipeline.files import readable_bytes
from rdd_storage.errors import RddError

if TYPE_CHECKING:
    from rdd_pipeline.progress import Reporter

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
data_app = typer.Typer(help="Check data sets.", no_args_is_help=True)
app.add_typer(maps_app, name="maps")
app.add_typer(data_app, name="data")

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

_out = Console()
_err = Console(stderr=True)


def _start(quiet: bool) -> Reporter:
    from rdd_pipeline.progress import Reporter, set_reporter

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
    from rdd_flows.flows import LOG_FILE, distill

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
    """Train one student from a ready map store; no teacher is needed.

    For several processes or GPUs start it with 'accelerate launch' or 'torchrun'.
    """
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.stages import check_data, run_student
    from rdd_storage import find_store

    settings = load_config(config, overrides or ())
    reporter = _start(quiet)
    chosen = next((item for item in settings.students if item.name == student), None)
    if chosen is None:
        names = ", ".join(item.name for item in settings.students)
        raise ConfigError(f"--student {student}: {config} has the students {names}")
    check_data(settings, reporter)
    if store is None and chosen.method != ("supervised",):
        identity = build_dataset(settings.data, "train").identity()
        store = find_store(settings.maps_root, data=identity).path
        reporter.say(f"{chosen.name}: reads {store}")
    trained = run_student(settings, chosen, store, reporter)
    _out.print(
        f"{trained.name}: mIoU {trained.result['metrics']['miou']:.4f}, weights {trained.weights}",
        soft_wrap=True,
    )


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
) -> None:
    """Write report.html of a run again."""
    from rdd_pipeline.errors import ConfigError
    from rdd_pipeline.report import write_run_report

    results = run_dir / "results.json"
    if not results.exists():
        raise ConfigError(f"{run_dir}: no results.json; give the folder of a finished run")
    _out.print(str(write_run_report(results)), soft_wrap=True)


@data_app.command("check")
def data_check(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Check both splits: missing or unreadable files, sizes, label values."""
    from rdd_pipeline.config import load_config
    from rdd_pipeline.data import build_dataset
    from rdd_pipeline.stages import check_data

    settings = load_config(config, overrides or ())
    check_data(settings, _start(quiet))
    for split in ("train", "val"):
        dataset = build_dataset(settings.data, split)
        _out.print(f"{dataset.name} {split}: {len(dataset)} images, no problems")


@maps_app.command("build")
def maps_build(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train or load the teacher and build the map store, or resume an interrupted build."""
    from rdd_pipeline.config import load_config

    settings = load_config(config, overrides or ())
    _start(quiet)
    from rdd_flows.flows import LOG_FILE, build_maps_flow

    built = _with_log(settings.run_dir / LOG_FILE, lambda: build_maps_flow(settings))
    _out.print(str(built["path"]), soft_wrap=True)


@maps_app.command("status")
def maps_status(path: StorePath) -> None:
    """Show what a store holds, whether it is complete, who uses it, and its size on disk."""
    from rdd_storage import lease_holder, store_status, uses

    status = store_status(path)
    table = Table(show_header=False, box=None)
    table.add_row("store", status.path)
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


@maps_app.command("repair")
def maps_repair(path: StorePath, quiet: Quiet = False) -> None:
    """Restore metadata and mark damaged shards to be built again by 'rdd maps build'."""
    from rdd_storage import repair_store

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
        _out.print("build them with: rdd maps build CONFIG", soft_wrap=True)


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
    """List the map stores in a folder, and what they take together."""
    from rdd_storage import find_stores, list_stores

    filtered = data is not None or teacher is not None
    # Stores that cannot be read are listed too, unless something is looked for in them.
    stores = (
        [(status.path, status, "") for status in find_stores(root, teacher=teacher, data=data)]
        if filtered
        else [(store.path, store.status, store.problem) for store in list_stores(root)]
    )
    table = Table("store", "images", "version", "state", "size", box=None)
    total = 0
    for path, status, problem in stores:
        name = path.rstrip("/").rpartition("/")[2]
        if status is None:
            table.add_row(name, "", "", problem, "")
            continue
        total += status.bytes_on_disk
        table.add_row(
            name,
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
        method = "+".join(student["method"]) + (" (reused)" if student["reused"] else "")
        table.add_row(student["name"], method, *_figures(student))
    _out.print(table)
    maps = results["maps"]
    _out.print(
        f"maps: {maps['images']} images, {readable_bytes(maps['bytes_per_image'])} an image, "
        f"{maps['images_built']} built in {maps['seconds']:.1f} s"
    )
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    _out.print(f"stages: {stages}; peak memory {readable_bytes(results['peak_memory_bytes'])}")


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


def _with_log(path: Path, function: Callable[[], Any]) -> Any:
    """Call a flow; a failure names the log file."""
    quiet_prefect()
    try:
        return function()
    except RddError as error:
        raise _Logged(path, error) from error
    except Exception as error:
        logging.getLogger("rdd").debug("unexpected error", exc_info=error)
        raise _Logged(path, error) from error


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
