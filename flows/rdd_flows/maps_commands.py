"""The commands ``rdd maps`` that build and look after map stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rdd_flows import console
from rdd_flows.flow_runs import require_one_process, with_log
from rdd_flows.inspect_commands import register as register_inspection
from rdd_flows.label_error_commands import register as register_label_errors
from rdd_flows.options import ConfigPath, Overrides, Quiet, StorePath, start
from rdd_pipeline.files import readable_bytes

if TYPE_CHECKING:
    from rdd_pipeline.progress import Reporter

maps_app = typer.Typer(help="Build and look after map stores.", no_args_is_help=True)

_HOLDS = {"maps": "maps", "pack": "images"}


@maps_app.command("build")
def maps_build(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train or load the teacher and build the map store, or resume an interrupted build."""
    from rdd_pipeline.config import load_config

    settings = load_config(config, overrides or ())
    start(quiet)
    require_one_process()
    from rdd_flows.flows import build_maps_flow
    from rdd_flows.recording import LOG_FILE

    built = with_log(settings.run_dir / LOG_FILE, lambda: build_maps_flow(settings))
    console.out.print(str(built["path"]), soft_wrap=True)


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
    from rdd_pipeline.machine import resolve_device
    from rdd_pipeline.plan import plan_maps
    from rdd_pipeline.stages import ready_teacher

    settings = load_config(config, overrides or ())
    reporter = start(quiet)
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
    console.out.print(table)


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
    console.out.print(table)


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
    reporter = start(quiet)
    with reporter.bar("verify", 1, "objects") as bar:
        report = verify_store(path, bar.progress_to)
    for damage in report.damages:
        shard = "" if damage.shard is None else f" shard {damage.shard}"
        console.out.print(f"{damage.array}{shard}: {damage.problem} ({damage.key})", soft_wrap=True)
    console.out.print(
        f"{report.objects} objects read, {len(report.damages)} damaged", soft_wrap=True
    )
    if not report.ok:
        console.out.print(f"to mend it: rdd maps repair {path}", soft_wrap=True)
        raise typer.Exit(1)
    if config is not None and against_teacher:
        _compare_with_teacher(path, config, overrides or (), against_teacher, reporter)


def _compare_with_teacher(
    path: str, config: Path, overrides: Sequence[str], images: int, reporter: Reporter
) -> None:
    from rdd_pipeline.config import load_config
    from rdd_pipeline.machine import resolve_device
    from rdd_pipeline.run_images import open_split
    from rdd_pipeline.stages import run_teacher
    from rdd_pipeline.teacher_check import compare_with_teacher

    settings = load_config(config, overrides)
    differences = compare_with_teacher(
        path,
        open_split(settings.data, "train"),
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
    console.out.print(table)


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
    from rdd_pipeline.fidelity import choose_student, measure_fidelity
    from rdd_pipeline.machine import resolve_device
    from rdd_pipeline.report.fidelity_tables import fidelity_notes, fidelity_tables, write_fidelity
    from rdd_pipeline.run_images import image_digests, open_split
    from rdd_pipeline.stages import run_teacher

    settings = load_config(config, overrides or ())
    chosen = choose_student(settings, student)
    reporter = start(quiet)
    measured = measure_fidelity(
        settings,
        chosen,
        open_split(settings.data, "train"),
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
        console.out.print(f"{figures.title}\n", highlight=False)
        console.out.print(table)
        console.out.print()
    for note in fidelity_notes(measured.fidelity):
        console.out.print(note, highlight=False)
    for file in files:
        console.out.print(str(file), soft_wrap=True)


@maps_app.command("repair")
def maps_repair(path: StorePath, quiet: Quiet = False) -> None:
    """Restore metadata and mark damaged shards to be built again by 'rdd maps build'.

    Those of packs are built again by 'rdd data pack'.
    """
    from rdd_storage import repair_store, store_status

    reporter = start(quiet)
    with reporter.bar("verify", 1, "objects") as bar:
        report = repair_store(path, bar.progress_to)
    console.out.print(
        f"{len(report.damages)} damaged objects; {len(report.restored)} restored, "
        f"{len(report.reopened)} shards to build again, {readable_bytes(report.bytes_freed)} freed",
        soft_wrap=True,
    )
    if report.lost:
        console.out.print(
            f"shards {list(report.lost)} hold images of earlier versions alone and cannot be "
            "built again; remove those versions with 'rdd maps remove --version'",
            soft_wrap=True,
        )
    if report.reopened:
        command = "rdd data pack" if store_status(path).kind == "pack" else "rdd maps build"
        console.out.print(f"build them with: {command} CONFIG", soft_wrap=True)


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
    console.out.print(f"removed {what}: {readable_bytes(freed)} freed", soft_wrap=True)


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
    console.out.print(table)
    console.out.print(f"together {readable_bytes(total)}")


register_inspection(maps_app)
register_label_errors(maps_app)
