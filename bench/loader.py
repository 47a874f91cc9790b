"""Images a second that one core makes ready for training, beside the usual loader and the limits.

    python bench/loader.py                # about two minutes on one core
    python bench/loader.py --quick        # seconds; small images, figures mean little

A sample is a random crop under a random scale and flip, as training takes it. The usual loader
decodes the whole image and the whole label, resizes both, and crops. Ours draws scale and crop
first and reads, decodes and resizes the window alone: from the image files, or from a pack (`rdd
data pack`), with or without the teacher's maps. All take turns in one process with one thread, on
the same images; files are in the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from _machine import machine
from _maps import STRIDE, Setting
from _training_data import CLASSES, TrainingData, draw_images, write_maps
from rdd_pipeline.data.geometry import pixel_window, random_crop
from rdd_pipeline.stream import MapStream
from rdd_storage import MapReader

FULL = Setting("1024 x 2048", 1024, 2048, CLASSES, (512, 1024), 16, 8)
QUICK = Setting("256 x 512", 256, 512, CLASSES, (128, 256), 4, 2)
SCALE = (0.5, 2.0)
FLIP = 0.5
NEEDS = ("weight", "true_prob", "aux_true_prob", "logits")
GOAL = 5.0
Load = Callable[[int], object]


def usual(data: TrainingData) -> Load:
    """Decode all, resize all, crop: what most training code does, with Pillow."""
    crop = data.setting.crop
    names = [data.setting.record(index).image_id for index in range(data.setting.images)]

    def load(k: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        rng = np.random.default_rng(k)
        name = names[k % len(names)]
        image = Image.open(data.folder / f"images-{data.suffix}" / f"{name}.{data.suffix}")
        label = Image.open(data.folder / "labels" / f"{name}.png")
        scale = rng.uniform(*SCALE)
        size = (round(image.width * scale), round(image.height * scale))
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        classes = np.asarray(label.resize(size, Image.Resampling.NEAREST))
        short = [max(0, want - have) for want, have in zip(crop, classes.shape, strict=True)]
        if any(short):
            pixels = np.pad(pixels, ((0, short[0]), (0, short[1]), (0, 0)))
            classes = np.pad(classes, ((0, short[0]), (0, short[1])), constant_values=255)
        top, left = (
            int(rng.integers(0, have - want + 1))
            for have, want in zip(classes.shape, crop, strict=True)
        )
        window = (slice(top, top + crop[0]), slice(left, left + crop[1]))
        pixels, classes = pixels[window], classes[window]
        if rng.random() < 0.5:
            pixels, classes = pixels[:, ::-1], classes[:, ::-1]
        return np.ascontiguousarray(pixels), np.ascontiguousarray(classes)

    return load


def make_stream(data: TrainingData, *, packed: bool, maps: bool, kept: bool = False) -> MapStream:
    """The training stream; ``kept`` lets it keep maps in memory once read."""
    crop = data.setting.crop
    return MapStream(
        dataset=data.dataset(packed=packed),
        reader=MapReader(data.store) if maps else None,
        crop_size=crop,
        scale=SCALE,
        flip=FLIP,
        length=10**9,
        needs=NEEDS if maps else (),
        grid_size=(crop[0] // STRIDE, crop[1] // STRIDE),
        ram_budget=2**30 if kept else 0,
    )


def reading(stream: MapStream) -> Load:
    """The windows of image and label alone, decoded and not resized."""
    dataset, size = stream.dataset, stream.dataset.size(0)

    def load(k: int) -> object:
        window = random_crop(
            np.random.default_rng([0, k]),
            source_size=size,
            crop_size=stream.crop_size,
            scale=SCALE,
            flip=FLIP,
        )
        return dataset.read_window(k % len(dataset), *pixel_window(window))

    return load


def copying(stream: MapStream) -> Load:
    """A copy of a finished sample's bytes."""
    tensors = [value.contiguous() for value in stream[0].values()]
    return lambda k: [tensor.clone() for tensor in tensors]


def measure(loads: dict[str, Load], rounds: int, samples: int) -> dict[str, float]:
    """Mean milliseconds of a sample, all taking turns: scales differ, so the median hides work."""
    times: dict[str, list[float]] = {name: [] for name in loads}
    for load in loads.values():
        for k in range(min(samples, 4)):  # opens files and stores
            load(k)
    for number in range(rounds):
        for name, load in loads.items():
            for k in range(number * samples, (number + 1) * samples):
                started = time.perf_counter()
                load(k)
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.mean(seen) for name, seen in times.items()}


def main() -> None:
    """Print the table in markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16, help="samples of each in a round")
    args = parser.parse_args()
    setting = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as name:
        folder = Path(name)
        draw_images(folder, setting)
        png, jpg = (
            TrainingData(folder=folder, setting=setting, suffix=suffix) for suffix in ("png", "jpg")
        )
        write_maps(png)
        pack = png.pack()
        packed = make_stream(png, packed=True, maps=False)
        whole = make_stream(png, packed=True, maps=True)
        rows: dict[str, Load] = {
            "usual loader, PNG": usual(png),
            "usual loader, JPEG": usual(jpg),
            "ours, PNG": make_stream(png, packed=False, maps=False).__getitem__,
            "ours, JPEG": make_stream(jpg, packed=False, maps=False).__getitem__,
            "ours, PNG + maps": make_stream(png, packed=False, maps=True).__getitem__,
            "ours, packed": packed.__getitem__,
            "ours, packed + maps": whole.__getitem__,
            "ours, packed + maps kept in memory": make_stream(
                png, packed=True, maps=True, kept=True
            ).__getitem__,
            "limit: decode the window of the pack": reading(packed),
            "limit: copy the sample with its maps": copying(whole),
        }
        found = measure(rows, args.rounds, args.samples)
        print("# Images a second that one core makes ready\n")
        print(f"Command: `{shlex.join(['python', 'bench/loader.py', *sys.argv[1:]])}`, "
              f"{datetime.date.today()}, {machine()}.")  # fmt: skip
        versions = ("torch", "pillow", "zarr", "tensorstore", "numpy")
        listed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
        print(f"Python {platform.python_version()}, {listed}\n")
        print(
            f"{setting.images} images of {setting.name} pixels, crops of {setting.crop[0]} x "
            f"{setting.crop[1]}, scale {SCALE[0]} to {SCALE[1]}; "
            f"{args.rounds * args.samples} samples of each in turns, one thread. Megabytes an "
            f"image: PNG {png.bytes_an_image('images-png') / 1e6:.2f}, "
            f"JPEG {png.bytes_an_image('images-jpg') / 1e6:.2f}, "
            f"label {png.bytes_an_image('labels') / 1e6:.2f}, "
            f"pack {png.bytes_an_image(pack) / 1e6:.2f}, "
            f"maps with soft labels {png.bytes_an_image(png.store.name) / 1e6:.2f}.\n"
        )
        print("| | ms a sample | images/s a core | over the usual loader, PNG |")
        print("|---|---:|---:|---:|")
        base = found["usual loader, PNG"]
        for name, ms in found.items():
            print(f"| {name} | {ms:.1f} | {1e3 / ms:.1f} | {base / ms:.2f} |")
        ratio = base / found["ours, packed + maps"]
        print(
            f"\nGoal: packed + maps at least {GOAL:.0f} times the usual loader on PNG files: "
            f"{ratio:.1f} times, {'met' if ratio >= GOAL else '**missed**'}."
        )


if __name__ == "__main__":
    main()
