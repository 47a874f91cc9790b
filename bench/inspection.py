"""Looking at a large store: opening it, ranking its images, the first picture; time and memory.

    python bench/inspection.py              # 100,000 images of 1024 x 2048; about 5 minutes
    python bench/inspection.py --quick      # seconds; small and few images, figures mean little

A few shards are made as a teacher would leave them (bench/_maps.py) and written as always. All
other shards are hard links to their files, so that the store takes little room: counts and maps
repeat, names and digests do not, and the numbers of the summary are varied by chance, so that they
take the room they have in life. Every step runs in a process of its own, imports done, with the
files in the page cache and nothing in the user's cache. Memory is what the process gained over its
state after the imports.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _maps import Setting, make_maps
from rdd_pipeline.files import readable_bytes
from rdd_storage import ImageRecord, MapReader, MapWriter
from rdd_storage.layout import encode_objects
from rdd_storage.summary import COUNTED, MEASURED, OF_IMAGE
from rdd_storage.summary_store import summary_key, summary_specs

FULL = Setting("1024 x 2048, 19 classes", 1024, 2048, 19, (512, 1024), 100_000, 16)
QUICK = Setting("128 x 256, 19 classes", 128, 256, 19, (64, 64), 2_000, 16)
GOAL = 1.0  # seconds
VERSIONS = ("numpy", "zarr", "tensorstore", "matplotlib", "dask")


def main() -> None:
    """Run everything and print the table, or one step when called by that run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds")
    parser.add_argument("--templates", type=int, default=1, help="shards that are made (1)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measure(args.step, args.store)))
        return
    setting = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as root:
        store = Path(root, "large.zarr")
        build_store(store, setting, args.templates)
        text = run_steps(store, setting, Path(root, "cache"))
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def build_store(path: Path, setting: Setting, templates: int) -> None:
    """A published store: some shards made, the others links to them."""
    records = [_record(setting, index) for index in range(setting.images)]
    writer = MapWriter.create(
        path, schema=setting.schema(), images=records, identity={"teacher": {"weights": "none"}}
    )
    shards = writer.pending_shards()
    for shard in shards[:templates]:
        rows = writer.shard_rows(shard)
        made = [make_maps(setting, row).maps for row in rows]
        for maps, row in zip(made, rows, strict=True):
            object.__setattr__(maps, "image_id", records[row].image_id)
            object.__setattr__(maps, "logits", None)
        writer.write_shard(shard, made)
    for folder in sorted({file.parent for file in path.rglob("c/*") if file.is_dir()}):
        _link(folder, shards, templates)
    # One file for each shard where the array has one dimension.
    marks = path / "done" / "c"
    for shard in shards[templates:]:
        _hard_link(marks / str(shard % templates), marks / str(shard))
    writer.publish()
    _vary_summary(path)


def _vary_summary(path: Path) -> None:
    """Multiply the numbers of each image and class by a factor from 0.8 to 1."""
    reader = MapReader(path)
    stored = reader.summary()
    assert stored is not None
    summary, rng = stored.read(), np.random.default_rng(0)
    specs = summary_specs(reader.schema, reader.version, reader.num_images)
    for name, fields in (("counts", COUNTED), ("measures", MEASURED), ("images", OF_IMAGE)):
        values = np.stack([getattr(summary, field) for field in fields])
        values = (values * rng.uniform(0.8, 1.0, values.shape)).astype(values.dtype)
        for key, content in encode_objects(specs[name], values).items():
            (path / key).write_bytes(content)


def _record(setting: Setting, index: int) -> ImageRecord:
    return ImageRecord(
        image_id=f"city{index % 100:02d}/city{index % 100:02d}_{index:06d}_leftImg8bit",
        height=setting.height, width=setting.width,
        grid_height=setting.grid[0], grid_width=setting.grid[1], digest=f"{index:064x}",
    )  # fmt: skip


def _link(folder: Path, shards: list[int], templates: int) -> None:
    """Repeat the folders ``c/0`` to ``c/<templates - 1>`` of one array."""
    if folder.name != "c":
        return
    sources = [
        [file for file in (folder / str(shard)).rglob("*") if file.is_file()]
        for shard in range(templates)
    ]
    if not all(sources):
        return  # a coordinate, which is not by shard
    for shard in shards[templates:]:
        kind = shard % templates
        for file in sources[kind]:
            _hard_link(file, folder / str(shard) / file.relative_to(folder / str(kind)))


def _hard_link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # too many links to one file
        target.write_bytes(source.read_bytes())


def steps(store: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name, what it is, and what to do; each starts from nothing opened."""
    from rdd_pipeline.inspection import Maps
    from rdd_pipeline.inspection.figures import png_bytes

    def opened() -> Maps:
        return Maps(store)

    def picture() -> bytes:
        maps = Maps(store)
        return png_bytes(maps[len(maps) // 2].figure())

    return {
        "open": ("open: `Maps(path)`", opened),
        "first": ("open and rank for the first time: `maps.hardest(20)`",
                  lambda: Maps(store).hardest()),
        "p95": ("the same by 95th percentile", lambda: Maps(store).hardest(by="p95")),
        "soft_min": ("the same by soft-min of one class",
                     lambda: Maps(store).hardest(by="soft_min", class_name="class 3")),
        "hard_share": ("the same by the share of hard pixels of one class",
                       lambda: Maps(store).hardest(by="hard_share", class_name="class 3")),
        "threshold": ("the same at another threshold, from the counts",
                      lambda: Maps(store).hardest(by="hard_share", threshold=0.5)),
        "picture": ("open and first picture: `maps[i].figure()` as PNG", picture),
        "repr": ("open and show in a notebook (HTML)", lambda: Maps(store)._repr_html_()),
        "overview": ("open and 40 images x classes as a figure",
                     lambda: png_bytes(Maps(store).overview(n=40).figure())),
        "quality": ("open and quality of the discrepancy, no intervals",
                    lambda: Maps(store).quality(resamples=0)),
        "intervals": ("the same with 1,000 resamples", lambda: Maps(store).quality()),
        "statistics": ("for comparison: `MapReader.statistics()`",
                       lambda: MapReader(store).statistics()),
        "counts": ("a store without a summary: open and rank for the first time",
                   lambda: Maps(store).hardest()),
        "cached": ("a store without a summary: open and rank again, from the user's cache",
                   lambda: Maps(store).hardest()),
        "make": ("make the summary, as publication does",
                 lambda: MapWriter.open(store).restore_summaries()),
    }  # fmt: skip


# The steps that the goal is for, opening included.
_GOALS = ("open", "first", "p95", "soft_min", "hard_share", "picture")


def measure(step: str, store: Path) -> dict[str, float]:
    """Seconds and bytes of one step in this process."""
    _, work = steps(store)[step]
    import matplotlib.backends.backend_agg  # noqa: F401  imports are not what is measured
    import tensorstore  # noqa: F401

    import rdd_pipeline.inspection.figures
    import rdd_pipeline.inspection.html  # noqa: F401

    before = _peak_memory()
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - start_cpu,
        "memory": _peak_memory() - before,
    }


def _peak_memory() -> int:
    """Most bytes that this process had in memory since it started; Linux."""
    # Not getrusage, which begins with the peak of the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status: expected a line VmHWM, got none; run this on Linux")


def run_steps(store: Path, setting: Setting, cache: Path) -> str:
    """The table."""
    environment = os.environ | {"RDD_CACHE": str(cache)}
    titles = {name: title for name, (title, _) in steps(store).items()}
    found = {}
    voucher = store / summary_key(1)
    summary = sum(file.stat().st_size for file in voucher.parent.rglob("*") if file.is_file())
    for name in titles:
        if name == "counts":
            voucher.unlink()  # a store without it has no summary
        done = subprocess.run(
            [sys.executable, __file__, "--step", name, "--store", str(store)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[name] = json.loads(done.stdout)
    cached = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    given = "".join(f" {word}" for word in sys.argv[1:] if word.startswith("--quick"))
    lines = [
        "# Looking at a large store: time and memory",
        "",
        f"Command: `python bench/{Path(__file__).name}{given}`, {datetime.date.today()}, "
        f"{os.cpu_count()} cores. Python {platform.python_version()}, {versions}",
        "",
        f"{setting.images:,} images of {setting.name}, {setting.shard_images} to a shard. "
        f"The summary takes {readable_bytes(summary)}, in the user's cache "
        f"{readable_bytes(cached)}. "
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "| step | seconds | without opening | processor seconds | memory | goal |",
        "|---|---:|---:|---:|---:|---|",
    ]
    opening = found["open"]["seconds"]
    for name, title in titles.items():
        seconds = found[name]["seconds"]
        own = max(seconds - opening, 0.0)
        goal = ""
        if name in _GOALS:
            goal = "below 1 s: met" if seconds < GOAL else "below 1 s: **missed**"
        rest = "" if name == "open" else f"{own:.2f}"
        memory = readable_bytes(found[name]["memory"])
        processor = f"{found[name]['processor']:.2f}"
        lines.append(f"| {title} | {seconds:.2f} | {rest} | {processor} | {memory} | {goal} |")
    each = (found["make"]["seconds"] / setting.images, found["make"]["processor"] / setting.images)
    lines += [
        "",
        f"Publication takes {1000 * each[0]:.2f} s longer for each 1,000 images by its summary "
        f"({1000 * each[1]:.2f} processor seconds).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
