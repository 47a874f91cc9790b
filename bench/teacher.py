"""What the teacher pass adds to the teacher: images a second over those of its bare forward loop.

    python bench/teacher.py
    python bench/teacher.py --device cuda --height 1024 --width 2048 --architecture DeepLabV3 \
        --encoder resnet101 --output-stride 8 --precision bf16 --batch-size auto

The pass is what a build does with one process: PNG files are decoded, the network runs, maps are
computed, quantised, written in shards and published. The bare loop runs the same network in the
same batches over images that lie ready on the device. The two take turns. Then each part of the
pass alone, one after another, and the peak memory of passes over few and many images, each in a
fresh process. Images are drawn scenes with noise, weights are random: neither changes the work.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdd_pipeline.build import ShardBuilder, ShardTask, create_writer, pass_options
from rdd_pipeline.config import CamVidData, MapsConfig, SmpConfig
from rdd_pipeline.data import Sample, SegmentationDataset, build_dataset
from rdd_pipeline.data.synthetic import SyntheticDataset
from rdd_pipeline.evaluate import stack_images
from rdd_pipeline.networks import SegmentationNetwork, build_network, save_weights
from rdd_pipeline.teacher_pass import evaluate_batch
from rdd_storage import MapWriter

GOALS = {"cpu": 0.95, "cuda": 0.97}
CLASSES = 11  # CamVid's, in whose layout the images are kept
_AUTO_BARE = 16  # the bare loop's batch where the pass chooses its own


class Times(NamedTuple):
    """Seconds of some work."""

    wall: float
    processor: float
    """Of all threads of this process: what other processes do matters less to it."""


@dataclass(frozen=True)
class Bench:
    """Data set, network and settings on a temporary folder."""

    folder: Path
    dataset: SegmentationDataset
    config: SmpConfig
    network: SegmentationNetwork
    maps: MapsConfig
    device: torch.device

    @classmethod
    def prepare(cls, args: argparse.Namespace, images: int, folder: Path) -> Bench:
        """Draw the images and make the network."""
        draw_images(folder, images, args.height, args.width)
        config = SmpConfig.model_validate(
            {
                "architecture": args.architecture,
                "encoder": args.encoder,
                "output_stride": args.output_stride,
                "auxiliary": {},
            }
        )
        torch.manual_seed(0)
        network = build_network(config, CLASSES, seed=0).eval()
        save_weights(network, folder / "teacher.safetensors")
        return cls(
            folder=folder,
            dataset=build_dataset(CamVidData(root=folder), "train"),
            config=config,
            network=network.to(args.device),
            maps=MapsConfig(
                batch_size=args.batch_size,
                precision=args.precision,
                shard_images=args.shard_images,
                workers=0,
            ),
            device=torch.device(args.device),
        )

    def writer(self, name: str) -> MapWriter:
        """A new, empty store."""
        return create_writer(
            str(self.folder / f"{name}.zarr"),
            self.dataset,
            self.network,
            self.maps,
            identity={"benchmark": name},
            digests=[f"{index:064x}" for index in range(len(self.dataset))],
        )

    def builder(self, writer: MapWriter) -> ShardBuilder:
        """The teacher in memory."""
        task = ShardTask(
            writer=writer,
            dataset=self.dataset,
            network=self.config,
            weights=self.folder / "teacher.safetensors",
            options=pass_options(self.maps),
            device=str(self.device),
        )
        return ShardBuilder(task)

    def run_pass(self, name: str) -> Times:
        """A whole pass; loading the teacher does not count."""
        writer = self.writer(name)
        with closing(self.builder(writer)) as builder, writer.lease():

            def build() -> None:
                builder.build_all(writer.pending_shards(), lambda shard, images: None)
                writer.publish()

            return self.timed(build)

    def batches(self, samples: list[Sample]) -> list[list[Sample]]:
        """The batches of the pass, shard by shard."""
        size = _AUTO_BARE if self.maps.batch_size == "auto" else self.maps.batch_size
        size = min(size, self.maps.shard_images)
        shards = range(0, len(samples), self.maps.shard_images)
        cut = [samples[start : start + self.maps.shard_images] for start in shards]
        return [shard[i : i + size] for shard in cut for i in range(0, len(shard), size)]

    def forward(self, images_B3HW: Tensor) -> None:
        """The network alone, in the pass's precision."""
        lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.maps.precision)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=lower, enabled=lower is not None),
        ):
            self.network(images_B3HW)

    def timed(self, work: Callable[[], object]) -> Times:
        """Time of some work, to its end on the device."""
        self._wait()
        started, used = time.perf_counter(), time.process_time()
        work()
        self._wait()
        return Times(time.perf_counter() - started, time.process_time() - used)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def draw_images(folder: Path, images: int, height: int, width: int) -> None:
    """Scenes with a photograph's noise, as PNG files in the layout of CamVid."""
    scenes = SyntheticDataset(split="train", images=images, height=height, width=width)
    for name in ("train", "trainannot"):
        (folder / name).mkdir(parents=True)
    for index, scene in enumerate(scenes):
        noise = np.random.default_rng(index).normal(0.0, 4.0, scene.image.shape)
        image = (scene.image + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "train" / f"{index:04d}.png")
        label = np.where(scene.label == 255, CLASSES, scene.label).astype(np.uint8)
        Image.fromarray(label).save(folder / "trainannot" / f"{index:04d}.png")


def print_ratio(bench: Bench, rounds: int) -> None:
    """Pass over bare forward loop, in turns."""
    images = len(bench.dataset)
    samples = list(bench.dataset)
    ready = [stack_images(batch, bench.device) for batch in bench.batches(samples)]

    def bare() -> None:
        for batch in ready:
            bench.forward(batch)

    bench.run_pass("warm-up")
    bench.timed(bare)
    loops, passes = [], []
    for number in range(rounds):
        loops.append(bench.timed(bare))
        passes.append(bench.run_pass(f"round{number}"))
    loop, whole = (statistics.median(t.wall for t in times) for times in (loops, passes))
    ratios = [a.wall / b.wall for a, b in zip(loops, passes, strict=True)]
    ratio = loop / whole
    goal = GOALS["cpu" if bench.device.type == "cpu" else "cuda"]
    print("| | images/s (median) | ms an image | processor time, ms an image |")
    print("|---|---:|---:|---:|")
    for name, times in (("bare forward loop", loops), ("teacher pass", passes)):
        wall, used = (1000 * statistics.median(t) / images for t in zip(*times, strict=True))
        print(f"| {name} | {1000 / wall:.1f} | {wall:.1f} | {used:.1f} |")
    print(
        f"\nRatio of medians **{ratio:.3f}** (single rounds {min(ratios):.3f} to "
        f"{max(ratios):.3f}, {rounds} rounds). Goal {goal}: "
        f"{'met' if ratio >= goal else 'missed'}.\n"
    )


def print_parts(bench: Bench) -> None:
    """Each part of the pass alone, one after another."""
    writer = bench.writer("parts")
    options = pass_options(bench.maps)
    views = options.views(bench.network)
    seconds = dict.fromkeys(("decode", "forward", "difficulty", "quantise", "write"), 0.0)
    with writer.lease():
        for shard in writer.pending_shards():
            rows = writer.shard_rows(shard)
            started = time.perf_counter()
            samples = [bench.dataset[row] for row in rows]
            seconds["decode"] += time.perf_counter() - started
            maps = []
            for batch in bench.batches(samples):
                images = stack_images(batch, bench.device)
                forward = bench.timed(lambda images=images: bench.forward(images)).wall
                pending = []
                both = bench.timed(
                    lambda batch=batch, pending=pending: pending.append(
                        evaluate_batch(views, batch, options, bench.device)
                    )
                ).wall
                seconds["forward"] += forward
                seconds["difficulty"] += both - forward
                started = time.perf_counter()
                maps += pending[0].result()
                seconds["quantise"] += time.perf_counter() - started
            started = time.perf_counter()
            writer.write_shard(shard, maps)
            seconds["write"] += time.perf_counter() - started
    print("Parts of the pass, each alone, in ms an image (difficulty: all that lies between the")
    print("logits and the maps in float, copies to and from the device included):\n")
    print(f"| {' | '.join(seconds)} |\n|{'---:|' * len(seconds)}")
    per_image = [f"{1000 * part / len(bench.dataset):.2f}" for part in seconds.values()]
    print(f"| {' | '.join(per_image)} |\n")


def print_memory(args: argparse.Namespace) -> None:
    """Peaks of passes over few and many images, in fresh processes."""
    print("| images | peak of the process, MB | peak of the device's allocator, MB |")
    print("|---:|---:|---:|")
    for images in args.memory:
        command = [sys.executable, *sys.argv, "--measure-memory", str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        host, device = json.loads(done.stdout.splitlines()[-1])
        print(f"| {images} | {host:.0f} | {'' if device is None else f'{device:.0f}'} |")


def measure_memory(args: argparse.Namespace) -> None:
    """Print the peak of one pass as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        Bench.prepare(args, args.measure_memory, Path(folder)).run_pass("memory")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    device = None
    if args.device.startswith("cuda"):
        device = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps([host, device]))


def main() -> None:
    """Print ratio, parts and memory in markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--architecture", default="FPN")
    parser.add_argument("--encoder", default="tu-resnet10t")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32))
    parser.add_argument("--batch-size", default="4", help="a number, or auto")
    # Half of the usual: nothing overlaps the writing of the last shard, and images are few here.
    parser.add_argument("--shard-images", type=int, default=8)
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[32, 128], metavar="IMAGES")
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size if args.batch_size == "auto" else int(args.batch_size)
    if args.measure_memory:
        measure_memory(args)
        return
    hardware = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        hardware = f"{torch.cuda.get_device_name()}, {hardware}"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("segmentation-models-pytorch", "zarr", "numpy", "pillow")
    )
    print(f"Command: `{shlex.join(['python', 'bench/teacher.py', *sys.argv[1:]])}`\n")
    print(
        f"{datetime.date.today()}, {hardware}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {versions}\n"
    )
    print(
        f"{args.architecture} with {args.encoder}, {args.images} images of {args.height} x "
        f"{args.width}, batches of {args.batch_size}, precision {args.precision}, "
        f"shards of {args.shard_images}.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(args, args.images, Path(folder))
        print_ratio(bench, args.rounds)
        print_parts(bench)
    if args.memory:
        print_memory(args)


if __name__ == "__main__":
    main()
