"""The map store beside other ways to keep maps: bytes, write, random crops, memory; and the limits.

    python bench/store.py                       # a few minutes on two cores
    python bench/store.py --quick               # seconds; small and few images, figures mean little
    python bench/store.py --camvid-labels DIR   # the small setting with real CamVid labels

Maps are made as a teacher would give them (bench/_maps.py). Every way is measured in processes of
its own, one after another, with the files in the page cache. A crop is the window of the hardness
and the part of the discrepancy's grid that covers it. Times are medians; "2 readers" is the time a
crop takes when two processes read at once. Peak memory is what the process gained over its start.
LitData takes part where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from _formats import FORMATS, Format, MapStore, Window, named, write_store
from _machine import machine
from _maps import STRIDE, Setting, TeacherMaps, make_maps
from rdd_storage import MapWriter
from rdd_storage.chunks import ChunkLayout, chunk_range
from rdd_storage.layout import array_metadata, map_specs, object_key

SETTINGS = {
    "cityscapes": Setting("1024 x 2048, 19 classes", 1024, 2048, 19, (512, 1024), 16, 16),
    "camvid": Setting("360 x 480, 11 classes", 360, 480, 11, (256, 256), 64, 64),
}
QUICK = {
    "cityscapes": Setting("256 x 512, 19 classes", 256, 512, 19, (128, 256), 4, 2),
    "camvid": Setting("120 x 160, 11 classes", 120, 160, 11, (96, 96), 4, 4),
}
TEACHER_SECONDS = 1 / 20  # an image on a GPU
VERSIONS = ("zarr", "tensorstore", "numcodecs", "numpy", "h5py", "hdf5plugin", "pillow", "litdata")
MB = 1e6
_results: dict[tuple[str, str, str], dict[str, float]] = {}


def main() -> None:
    """Run everything and print the tables, or one stage when called by that run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds")
    parser.add_argument("--crops", type=int, default=0, help="crops per measurement (150)")
    parser.add_argument("--camvid-labels", type=Path, help="folder of CamVid label PNGs")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--stage", nargs=3, metavar=("STAGE", "FORMAT", "SETTING"),
                        help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.crops = args.crops or (10 if args.quick else 150)
    if args.stage:
        print(json.dumps(run_stage(args)))
        return
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as root:
        args.root = Path(root)
        for line in report(args):
            print(line, flush=True)
            lines.append(line)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


# -- the report ----------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, as they are measured."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    options = " --quick" if args.quick else ""
    if args.camvid_labels:
        options += " --camvid-labels DIR"
    yield "# Map store: bytes, time and memory beside other formats"
    yield ""
    yield f"Command: `python bench/store.py{options}`, {datetime.date.today()}, {machine()}."
    yield f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in found.items())
    yield ""
    yield "Timings on a shared machine are noisy: compare within a table."
    for key in SETTINGS:
        setting = (QUICK if args.quick else SETTINGS)[key]
        yield ""
        source = "real labels" if key == "camvid" and args.camvid_labels else "drawn labels"
        yield f"## {setting.name}, {setting.images} images ({source})"
        yield ""
        made = stage(args, "prepare", "-", key)
        yield (
            f"Of the labelled pixels {made['right']:.1%} are predicted right and "
            f"{made['hard']:.1%} have p <= 0.7; {made['void']:.1%} are unlabelled. Crops of "
            f"{setting.crop[0]} x {setting.crop[1]}."
        )
        yield ""
        yield (
            "| kept as | bytes an image | write, ms an image | crop, ms | 2 readers, ms a crop | "
            "cold open and first crop, ms | memory reading, MB | |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|---|"
        for kind in FORMATS:
            yield format_row(args, kind, key)
        yield ""
        yield from limit_lines(args, key)
        if key == "cityscapes":
            goals = goal_rows(args, key)
    yield ""
    yield f"## Goals, {(QUICK if args.quick else SETTINGS)['cityscapes'].name}"
    yield ""
    yield "| goal | measured | |"
    yield "|---|---|---|"
    for goal, measured, met in goals:
        yield f"| {goal} | {measured} | {'met' if met else '**missed**'} |"


def format_row(args: argparse.Namespace, kind: type[Format], key: str) -> str:
    """One line of a table."""
    missing = kind.missing()
    if missing:
        return f"| {kind.name} | | | | | | | {missing} |"
    same_files = issubclass(kind, MapStore) and kind is not MapStore
    written = None if same_files else stage(args, "write", kind.__name__, key)
    read = stage(args, "read", kind.__name__, key)
    size, ms = ("", "") if written is None else (f"{written['bytes']:,.0f}", f"{written['ms']:.1f}")
    return (
        f"| {kind.name} | {size} | {ms} | {read['ms']:.2f} | {read['two']:.2f} | "
        f"{read['cold']:.1f} | {read['peak'] / MB:.1f} | {kind.note} |"
    )


def limit_lines(args: argparse.Namespace, key: str) -> Iterator[str]:
    """What no format can beat, and the store against it in turns."""
    limits = stage(args, "limits", "-", key)
    yield (
        f"Limits: memcpy of the crop {limits['memcpy']:.3f} ms; zstd decode of the chunks it "
        f"touches {limits['decode']:.2f} ms; order-0 entropy of both maps "
        f"{limits['entropy']:,.0f} bytes. Taken in turns with these: map store "
        f"{limits['reader']:.2f} ms ({limits['reader'] / limits['decode']:.2f} times the decode), "
        f"zarr-python on the same files {limits['zarr']:.2f} ms "
        f"({limits['zarr'] / limits['reader']:.2f} times the map store)."
    )


def goal_rows(args: argparse.Namespace, key: str) -> list[tuple[str, str, bool]]:
    """Goal, figure, and whether it is met."""
    written = stage(args, "write", MapStore.__name__, key)
    limits = stage(args, "limits", "-", key)
    few, many = (stage(args, f"build-{shards}", "-", key) for shards in (1, 4))
    teacher = stage(args, "pass", "-", key)
    decode, zarr = limits["reader"] / limits["decode"], limits["zarr"] / limits["reader"]
    growth = many["peak"] - few["peak"]
    return [
        (
            "at most 700 kB an image for hardness and discrepancy",
            f"{written['bytes'] / 1e3:.0f} kB",
            written["bytes"] <= 700e3,
        ),
        (
            "a crop takes at most 1.3 times the zstd decode of what it touches",
            f"{decode:.2f} times",
            decode <= 1.3,
        ),
        (
            "a crop is at least 2 times faster than by zarr-python",
            f"{zarr:.2f} times",
            zarr >= 2,
        ),
        (
            "storing costs at most 5% of a teacher pass at 20 images/s, on one core",
            f"with the writes in a thread beside it the pass takes {teacher['overhead']:.1%} "
            f"longer, and {teacher['last']:.1f} s once for the last shard; {teacher['cpu']:.0f} ms "
            "of processor time an image for four maps and statistics",
            teacher["overhead"] <= 0.05,
        ),
        (
            "memory of a build does not depend on the number of images",
            f"{few['peak'] / MB:.0f} MB for one shard, {many['peak'] / MB:.0f} MB for four",
            growth <= max(0.1 * few["peak"], 4 * MB),
        ),
    ]


def stage(args: argparse.Namespace, name: str, kind: str, key: str) -> dict[str, float]:
    """Run one stage in a process of its own, once: every figure has one measurement."""
    if (name, kind, key) in _results:
        return _results[name, kind, key]
    command = [
        sys.executable, str(Path(__file__).resolve()), "--root", str(args.root),
        "--crops", str(args.crops), "--stage", name, kind, key,
    ]  # fmt: skip
    command += ["--quick"] if args.quick else []
    if args.camvid_labels and key == "camvid":
        command += ["--camvid-labels", str(args.camvid_labels)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {shlex.join(command)}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    _results[name, kind, key] = result
    return result


# -- stages --------------------------------------------------------------------------------------


def run_stage(args: argparse.Namespace) -> dict[str, float]:
    """One measurement in this process."""
    name, kind_name, key = args.stage
    setting = (QUICK if args.quick else SETTINGS)[key]
    root = args.root / key
    if name == "prepare":
        return prepare(setting, root, args.camvid_labels)
    if name == "limits":
        return measure_limits(setting, root, args.crops)
    if name == "pass":
        return measure_pass(setting, root, images=8 if args.quick else 96)
    if name.startswith("build-"):
        return measure_build(setting, root, shards=int(name.partition("-")[2]))
    kind = next(kind for kind in FORMATS if kind.__name__ == kind_name)
    if name == "write":
        return measure_write(kind, setting, root)
    return measure_read(kind, setting, root, args.crops)


def prepare(setting: Setting, root: Path, labels: Path | None) -> dict[str, float]:
    """Make the maps and keep them; also the map store that is read."""
    root.mkdir(parents=True)
    maps = [make_maps(setting, index, labels) for index in range(setting.images)]
    (root / "maps.pickle").write_bytes(pickle.dumps(maps, protocol=5))
    write_store(setting, root / MapStore.__name__, maps)
    labelled = [item.maps.label != 255 for item in maps]
    count = sum(int(part.sum()) for part in labelled)
    right = sum(
        int((item.maps.prediction == item.maps.label)[part].sum())
        for item, part in zip(maps, labelled, strict=True)
    )
    hard = sum(
        int((item.p_true[part] <= np.float32(0.7)).sum())
        for item, part in zip(maps, labelled, strict=True)
    )
    void = 1 - count / sum(part.size for part in labelled)
    return {"right": right / count, "hard": hard / count, "void": void}


def measure_write(kind: type[Format], setting: Setting, root: Path) -> dict[str, float]:
    """Best of three writes of the two maps of all images, and their bytes."""
    maps = load(root)
    best = float("inf")
    for attempt in range(3):
        # The store that is read has more arrays and lies under the format's name.
        last = attempt == 2 and kind is not MapStore
        folder = root / (kind.__name__ if last else f"{kind.__name__}-{attempt}-{os.getpid()}")
        folder.mkdir(exist_ok=last)
        started = time.perf_counter()
        kind(setting, folder).write(maps)
        best = min(best, time.perf_counter() - started)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"ms": 1e3 * best / len(maps), "bytes": size / len(maps)}


def measure_read(kind: type[Format], setting: Setting, root: Path, crops: int) -> dict[str, float]:
    """Opening, random crops, and crops in two processes at once."""
    folder = root / (MapStore if issubclass(kind, MapStore) else kind).__name__
    kind.load()
    gain = MemoryGain()
    started = time.perf_counter()
    reader = kind(setting, folder)
    reader.open()
    reader.read(*next(random_crops(setting, 0, 1)))
    cold = time.perf_counter() - started
    times = [timed(reader.read, *crop) for crop in random_crops(setting, 1, crops)]
    peak = gain()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    workers = [
        context.Process(
            target=read_beside, args=(kind, setting, folder, n, crops, barrier, results)
        )
        for n in (2, 3)
    ]
    for worker in workers:
        worker.start()
    two = max(results.get() for _ in workers) / (2 * crops)
    for worker in workers:
        worker.join()
    return {"ms": 1e3 * float(np.median(times)), "two": 1e3 * two, "cold": 1e3 * cold, "peak": peak}


def read_beside(
    kind: type[Format],
    setting: Setting,
    folder: Path,
    seed: int,
    crops: int,
    barrier: Any,
    results: Any,
) -> None:
    """Read crops in a worker, from the moment when the other is ready too."""
    reader = kind(setting, folder)
    reader.open()
    reader.read(*next(random_crops(setting, 0, 1)))
    barrier.wait()
    started = time.perf_counter()
    for crop in random_crops(setting, seed, crops):
        reader.read(*crop)
    results.put(time.perf_counter() - started)


def measure_limits(setting: Setting, root: Path, crops: int) -> dict[str, float]:
    """Memcpy, decode, the reader and zarr-python in turns, on the same crops."""
    folder = root / MapStore.__name__
    kinds = {kind.__name__: kind(setting, folder) for kind in FORMATS if issubclass(kind, MapStore)}
    ours, zarr = kinds["MapStore"], kinds["MapStoreByZarr"]
    for reader in (ours, zarr):
        reader.open()
    touched = touched_chunks(setting, folder)
    plain = [item.maps.hardness for item in load(root)]
    codec = Zstd()
    times: dict[str, list[float]] = {name: [] for name in ("memcpy", "decode", "reader", "zarr")}
    for image, pixels, points in random_crops(setting, 4, crops):
        times["memcpy"].append(timed(plain[image][pixels].copy))
        chunks = touched(image, pixels, points)
        times["decode"].append(timed(lambda chunks=chunks: [codec.decode(c) for c in chunks]))
        times["reader"].append(timed(ours.read, image, pixels, points))
        times["zarr"].append(timed(zarr.read, image, pixels, points))
    entropy = np.mean(
        [
            order_0_bytes(item.maps.hardness) + order_0_bytes(item.maps.discrepancy.view(np.uint8))
            for item in load(root)
        ]
    )
    medians = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    return medians | {"entropy": float(entropy)}


def touched_chunks(
    setting: Setting, folder: Path
) -> Callable[[int, Window, Window], list[memoryview]]:
    """A function that gives the stored chunks, of both maps, that a crop touches."""
    specs = map_specs(setting.schema(), setting.images)
    stored = {}
    for name in ("hardness", "discrepancy"):
        layout = ChunkLayout.from_metadata(json.loads(array_metadata(specs[name])))
        shards = [
            (folder / object_key(specs[name], shard)).read_bytes()
            for shard in range(-(-setting.images // setting.shard_images))
        ]
        indices = [layout.decode_index(data[-layout.index_size :]) for data in shards]
        stored[name] = layout, shards, indices

    def touched(image: int, pixels: Window, points: Window) -> list[memoryview]:
        chunks = []
        for name, window in (("hardness", pixels), ("discrepancy", points)):
            layout, shards, indices = stored[name]
            for unit, parts in layout.parts((slice(image, image + 1), *window)).items():
                for part in parts:
                    offset, length = chunk_range(indices[unit[0]], part.number)
                    chunks.append(memoryview(shards[unit[0]])[offset : offset + length])
        return chunks

    return touched


def measure_build(setting: Setting, root: Path, shards: int) -> dict[str, float]:
    """Peak memory of a build of some shards of four images."""
    maps = load(root)[:4]
    smaller = replace(setting, images=4 * shards, shard_images=4)
    gain = MemoryGain()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        write_store(smaller, Path(folder) / "s.zarr", maps)
    return {"peak": gain()}


def measure_pass(setting: Setting, root: Path, images: int) -> dict[str, float]:
    """A teacher pass that waits for its GPU, with the writes in a thread beside it, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    maps = load(root)
    smaller = replace(setting, images=images, shard_images=min(8, images))
    shards = images // smaller.shard_images

    def run(writing: bool, folder: Path, shards: int = shards) -> tuple[float, float]:
        """Seconds that the teacher took, and seconds until the last shard was written."""
        writer = MapWriter.create(
            folder,
            schema=smaller.schema(),
            images=[smaller.record(index) for index in range(images)],
            identity={"teacher": "benchmark"},
        )
        queue: Queue[int | None] = Queue(1)

        def write() -> None:
            while (shard := queue.get()) is not None:
                writer.write_shard(shard, [named(maps, row) for row in writer.shard_rows(shard)])

        thread = threading.Thread(target=write)
        thread.start()
        started = time.perf_counter()
        for shard in range(shards):
            for _ in range(smaller.shard_images):
                time.sleep(TEACHER_SECONDS)
            if writing:
                queue.put(shard)
        teacher = time.perf_counter() - started
        queue.put(None)
        thread.join()
        return teacher, time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=root) as folder:
        run(True, Path(folder) / "warm.zarr", shards=1)
        alone, _ = run(False, Path(folder) / "a.zarr")
        started = time.process_time()
        _, whole = run(True, Path(folder) / "b.zarr")
        cpu = time.process_time() - started
        _, last = run(True, Path(folder) / "c.zarr", shards=1)
    # The last shard can only be written when the pass is over: once, whatever its length.
    last -= TEACHER_SECONDS * smaller.shard_images
    return {
        "overhead": (whole - last) / alone - 1,
        "last": last,
        "cpu": 1e3 * cpu / images,
    }


# -- helpers -------------------------------------------------------------------------------------


def load(root: Path) -> list[TeacherMaps]:
    """The maps that were prepared."""
    maps: list[TeacherMaps] = pickle.loads((root / "maps.pickle").read_bytes())
    return maps


def random_crops(setting: Setting, seed: int, count: int) -> Iterator[tuple[int, Window, Window]]:
    """Image, window of pixels and window of grid points."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        image = int(rng.integers(setting.images))
        pixels, points = [], []
        sizes = (setting.height, setting.width)
        for size, grid, crop in zip(sizes, setting.grid, setting.crop, strict=True):
            start = int(rng.integers(size - crop + 1))
            pixels.append(slice(start, start + crop))
            points.append(slice(start // STRIDE, min(-(-(start + crop) // STRIDE) + 1, grid)))
        yield image, (pixels[0], pixels[1]), (points[0], points[1])


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def order_0_bytes(values: np.ndarray[Any, Any]) -> float:
    """What an ideal coder that knows only the frequencies of the bytes would need."""
    counts = np.bincount(values.reshape(-1), minlength=256)
    share = counts[counts > 0] / values.size
    return float(-(share * np.log2(share)).sum() * values.size / 8)


class MemoryGain:
    """Most bytes that this process holds from here on, above what it holds now."""

    def __init__(self) -> None:
        self._exact = False
        with contextlib.suppress(OSError):  # Linux: make the peak what is held now
            Path("/proc/self/clear_refs").write_text("5")
            self._exact = True
        self._before = self._peak()

    def __call__(self) -> int:
        """The gain so far."""
        return self._peak() - self._before

    def _peak(self) -> int:
        if self._exact:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
