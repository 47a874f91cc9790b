"""What training from stored maps costs: supervised, cached RDD, + soft labels, teacher in the loop.

    python bench/train.py                       # about ten minutes on two cores, small images
    python bench/train.py --device cuda --precision bf16 --batch-size 8 --workers 16
    python bench/train.py --quick               # a minute; figures mean little
    python bench/train.py --soak 1000 --size tiny --batch-size 2 --networks PSPNet-R18

For each student the four ways of training take turns in blocks of steps, in one process, so that
all see the same moods of the machine. A step is what training does: take a batch from the loader,
forward, loss of the second stage, backward, optimiser. Online, the published way, the teacher sees
every crop. Then memory, each way in a process of its own. The number of students after which stored
maps have paid for themselves follows from the measured times. --soak measures memory over many
steps, and nothing else.

On a GPU images are 1024 x 2048 and crops 512 x 1024; on a CPU both are a quarter as long, unless
--size says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from _machine import machine
from _maps import Setting
from _steps import training_steps
from _training_data import CLASSES, TrainingData, draw_images, write_maps
from rdd_pipeline.build import ShardBuilder, ShardTask, create_writer, pass_options
from rdd_pipeline.config import NetworkConfig, RunConfig, parse_config
from rdd_pipeline.data import SegmentationDataset, dataset_digests
from rdd_pipeline.networks import build_network, save_weights

LARGE = Setting("1024 x 2048", 1024, 2048, CLASSES, (512, 1024), 32, 8)
SMALL = Setting("256 x 512", 256, 512, CLASSES, (128, 256), 32, 8)
TINY = Setting("128 x 256", 128, 256, CLASSES, (64, 128), 32, 8)
SIZES = {"large": LARGE, "small": SMALL, "tiny": TINY}
_DILATED = {"output_stride": 8, "auxiliary": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "DeepLabV3-R18": {"architecture": "DeepLabV3", "encoder": "resnet18", **_DILATED},
    "DeepLabV3-MobileNetV2": {"architecture": "DeepLabV3", "encoder": "mobilenet_v2", **_DILATED},
    "PSPNet-R18": {
        "architecture": "PSPNet",
        "encoder": "resnet18",
        **_DILATED,
        "options": {"encoder_depth": 5},
    },
}
TEACHER = {"architecture": "DeepLabV3", "encoder": "resnet101", **_DILATED}
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"method": "supervised"},
    "cached RDD": {"method": "rdd", "kd": {"weight": 0.0}},
    "cached RDD + soft labels": {"method": "rdd"},
    "online RDD": {"method": "rdd", "teacher": "online"},
}
CACHED = "cached RDD + soft labels"
GOALS = {"cpu": 1.05, "cuda": 1.03}
CITYSCAPES_IMAGES, PAPER_ITERATIONS = 2975, 40_000
_WARM_UP = 3


@dataclass
class Times:
    """Seconds of the steps of one way."""

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    """Median step of each block."""

    @property
    def step_ms(self) -> float:
        """Median step."""
        return 1e3 * statistics.median(self.steps)

    @property
    def wait_share(self) -> float:
        """Share of all time in which there was no batch."""
        return sum(self.waits) / sum(self.steps)

    def over(self, other: Times) -> tuple[float, float, float]:
        """How many times as long a step takes: median over the blocks, and the middle half.

        Blocks that follow each other are compared: the machine drifts less from one to the next
        than over the run.
        """
        ratios = [mine / theirs for mine, theirs in zip(self.blocks, other.blocks, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


class Bench:
    """Data, maps, teacher and settings in one folder."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        setting = SIZES[args.size or ("large" if args.device == "cuda" else "small")]
        self.data = TrainingData(folder=folder, setting=setting, suffix="png")

    def prepare(self) -> None:
        """Draw the images, write the maps, pack, and make the teacher."""
        draw_images(self.folder, self.data.setting)
        write_maps(self.data)
        if not self.args.files:
            self.data.pack()
        teacher = build_network(self.config().teacher.network, CLASSES, seed=0)
        save_weights(teacher, self.teacher_weights)

    @property
    def teacher_weights(self) -> Path:
        """Random ones: they take as long."""
        return self.folder / "teacher.safetensors"

    def config(self, network: str = "DeepLabV3-R18") -> RunConfig:
        """A run with one student for each way."""
        args = self.args
        return parse_config(
            {
                "name": "bench",
                "output": str(self.folder / "runs"),
                "device": args.device,
                "data": self.data.section | {"packed": "never" if args.files else "always"},
                "teacher": {"network": TEACHER, "checkpoint": str(self.teacher_weights)},
                "maps": {"precision": args.precision, "batch_size": args.pass_batch},
                "student": {
                    "network": NETWORKS[network],
                    "training": {
                        "iterations": 1000,
                        "batch_size": args.batch_size,
                        "crop_size": list(self.data.setting.crop),
                        "precision": args.precision,
                        "workers": args.workers,
                        "channels_last": args.channels_last,
                    },
                },
                "students": [
                    {"name": name.replace(" ", "-").replace("+", "and"), **way}
                    for name, way in METHODS.items()
                ],
            }
        )

    def dataset(self) -> SegmentationDataset:
        """The training images."""
        return self.data.dataset(packed=not self.args.files)

    def steps(self, network: str, method: str) -> Iterator[tuple[float, float]]:
        """Seconds of each training step, and of it those without a batch; endless."""
        config = self.config(network)
        return training_steps(
            config,
            config.students[list(METHODS).index(method)],
            self.dataset(),
            store=self.data.store,
            teacher_weights=self.teacher_weights,
        )

    def gigaflops(self, network: NetworkConfig) -> float:
        """Arithmetic of a forward pass of one crop, counted without computing anything."""
        images = torch.empty(2, 3, *self.data.setting.crop, dtype=torch.uint8, device="meta")
        with FlopCounterMode(display=False) as counter:
            build_network(network, CLASSES).to("meta")(images)
        return counter.get_total_flops() / len(images) / 1e9

    def pass_seconds(self, images: int) -> float:
        """Seconds that building the maps takes an image: the median of whole shards."""
        config = self.config()
        dataset, maps = self.dataset(), config.maps.model_copy(update={"shard_images": images})
        network = build_network(config.teacher.network, CLASSES)
        writer = create_writer(
            str(self.folder / "built.zarr"),
            dataset,
            network,
            maps,
            identity={"benchmark": "pass"},
            digests=dataset_digests(dataset),
        )
        task = ShardTask(
            writer=writer,
            dataset=dataset,
            network=config.teacher.network,
            weights=self.teacher_weights,
            options=pass_options(maps),
            device=self.args.device,
        )
        seconds = []
        with closing(ShardBuilder(task)) as builder, writer.lease():
            for shard in writer.pending_shards()[: 1 + self.args.pass_shards]:
                started = time.perf_counter()
                builder.build(shard)
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:]) / images


def measure(bench: Bench, network: str) -> dict[str, Times]:
    """Times of all ways, in turns."""
    args = bench.args
    sources = {method: bench.steps(network, method) for method in METHODS}
    times = {method: Times() for method in METHODS}
    # The teacher in the loop takes many times as long as the rest: fewer steps say as much.
    slow = "online RDD"
    for method, source in sources.items():
        # One pass over the images first, so that what is kept in memory is there.
        once = len(bench.dataset()) // args.batch_size
        list(itertools.islice(source, 1 if method == slow else _WARM_UP + once))
    for _ in range(args.blocks):
        for method, source in sources.items():
            # The loader ran ahead while the others were at work: let it come to its own pace.
            settle = 0 if method == slow else args.workers * 2 + 1
            count = max(1, args.steps // 8) if method == slow else args.steps
            list(itertools.islice(source, settle))
            seen = list(itertools.islice(source, count))
            times[method].steps += [step for step, _ in seen]
            times[method].waits += [waited for _, waited in seen]
            times[method].blocks.append(statistics.median(step for step, _ in seen))
    return times


def memory(args: argparse.Namespace, folder: Path, network: str, method: str, steps: int) -> Any:
    """Peaks in a process of its own: host bytes with its loaders, device bytes, resident course."""
    command = [sys.executable, *sys.argv, "--memory-of", network, method, str(steps), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> None:
    """Print what :func:`memory` returns."""
    network, method, steps, folder = args.memory_of
    process, host, course = psutil.Process(), 0, []
    every = max(1, int(steps) // 10)
    source = Bench(args, Path(folder)).steps(network, method)
    for number, _ in enumerate(itertools.islice(source, int(steps)), start=1):
        if number % every == 0:
            family = [process, *process.children(recursive=True)]
            sizes = [member.memory_full_info() for member in family]
            host = max(host, sum(size.pss for size in sizes))
            course.append([size.uss for size in sizes])
    device = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    print(json.dumps({"host": host, "device": device, "course": course}))


def report(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the report, as they are measured."""
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as name:
        bench = Bench(args, Path(name))
        bench.prepare()
        setting, goal = bench.data.setting, GOALS[args.device]
        hardware = machine()
        if args.device == "cuda":
            hardware = f"{torch.cuda.get_device_name()}, {hardware}"
        versions = ("segmentation-models-pytorch", "zarr", "tensorstore", "numpy")
        listed = ", ".join(f"{key} {importlib.metadata.version(key)}" for key in versions)
        yield "# Training from stored maps beside its alternatives\n"
        yield (
            f"Command: `{shlex.join(['python', 'bench/train.py', *sys.argv[1:]])}`, "
            f"{datetime.date.today()}, {hardware}, {torch.get_num_threads()} threads.\n"
            f"Python {platform.python_version()}, torch {torch.__version__}, {listed}\n"
        )
        yield (
            f"{setting.images} images of {setting.name} "
            f"({'files' if args.files else 'packed'}), crops of {setting.crop[0]} x "
            f"{setting.crop[1]}, batches of {args.batch_size}, {CLASSES} classes, precision "
            f"{args.precision}, {args.workers} loader processes. Online teacher: "
            "DeepLabV3-ResNet101. Blocks of the four ways alternate.\n"
        )
        if args.soak:
            yield from soak(args, bench)
            return
        found = {}
        for network in args.networks:
            times = found[network] = measure(bench, network)
            yield f"## {network}\n"
            yield (
                "| | step, ms (median) | images/s | data wait | over supervised: median of the "
                "blocks, middle half | device memory, "
                "MB | host memory, MB |\n|---|---:|---:|---:|---:|---:|---:|"
            )
            base = times["supervised"]
            for method, seen in times.items():
                peak = memory(args, bench.folder, network, method, 10)
                ratio, low, high = seen.over(base)
                device = "-" if peak["device"] is None else f"{peak['device'] / 1e6:.0f}"
                yield (
                    f"| {method} | {seen.step_ms:.1f} | {1e3 * args.batch_size / seen.step_ms:.1f} "
                    f"| {seen.wait_share:.1%} | {ratio:.3f}, {low:.3f} to {high:.3f} | {device} | "
                    f"{peak['host'] / 1e6:.0f} |"
                )
            ratio, _, _ = times[CACHED].over(base)
            online, _, _ = times["online RDD"].over(times[CACHED])
            yield (
                f"\nGoal: {CACHED} at most {goal:.2f} of supervised: {ratio:.3f}, "
                f"{'met' if ratio <= goal else '**missed**'}. With the teacher in the loop a step "
                f"takes {online:.2f} times as long."
            )
            config = bench.config(network)
            own = bench.gigaflops(config.student.network)
            teachers = bench.gigaflops(config.teacher.network)
            yield (
                f"A forward pass is {own:.0f} GFLOP a crop, the teacher's {teachers:.0f}: with "
                "twice as much for the gradient, a step with the teacher has "
                f"{1 + teachers / (3 * own):.2f} times the arithmetic.\n"
            )
        yield from break_even(bench, found)


def break_even(bench: Bench, found: dict[str, dict[str, Times]]) -> Iterator[str]:
    """Students after which the maps have paid for themselves."""
    args = bench.args
    each = bench.pass_seconds(args.pass_images)
    build = each * CITYSCAPES_IMAGES
    yield "## When maps have paid for themselves\n"
    yield (
        f"Building takes {each:.3g} s an image, {build / 3600:.2g} h for Cityscapes' "
        f"{CITYSCAPES_IMAGES} images at this size. A training of {PAPER_ITERATIONS} iterations "
        f"with batches of {args.batch_size} saves, against the teacher in the loop:\n"
    )
    yield "| student | saved, h | students after which maps have paid |\n|---|---:|---:|"
    for network, times in found.items():
        saved = (times["online RDD"].step_ms - times[CACHED].step_ms) / 1e3 * PAPER_ITERATIONS
        students = math.ceil(build / saved) if saved > 0 else "never"
        yield f"| {network} | {saved / 3600:.2g} | {students} |"
    yield ""


def soak(args: argparse.Namespace, bench: Bench) -> Iterator[str]:
    """Memory over many steps."""
    yield f"## Memory over {args.soak} steps\n"
    yield (
        f"{CACHED}: the training process, and its loader processes with their server, after each "
        "tenth of the steps: what is theirs alone, without pages that are shared. Goal: flat.\n"
    )
    for network in args.networks:
        course = memory(args, bench.folder, network, CACHED, args.soak)["course"]
        parts = {"training": [c[0] for c in course], "loader": [sum(c[1:]) for c in course]}
        for name, sizes in parts.items():
            listed = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
            growth = sizes[-1] / sizes[1] - 1
            yield f"- {network}, {name}, MB: {listed}; second tenth to last {growth:+.1%}"


def main() -> None:
    """Print the report in markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", action="store_true", help="read image files, not a pack")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="steps in a block")
    parser.add_argument("--pass-images", type=int, default=4, help="images in a measured shard")
    parser.add_argument("--pass-shards", type=int, default=3)
    parser.add_argument("--pass-batch", type=int, default=4)
    parser.add_argument("--size", choices=SIZES, help="of images and crops")
    parser.add_argument("--soak", type=int, default=0, metavar="STEPS", help="memory alone")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.networks, args.blocks, args.steps = ["PSPNet-R18"], 1, 4
    if args.memory_of:
        measure_memory(args)
        return
    for line in report(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
