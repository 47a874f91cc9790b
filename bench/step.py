"""What cached maps cost: a student's training step over a plain supervised one, taken in turns.

    python bench/step.py configs/quickstart.yaml    # after `rdd run` with the same configuration

Every student of the configuration trains from the run's store, in blocks of steps that alternate
with blocks of the supervised loss, so that both see the same moods of the machine. A step is what
training does: wait for the loader, forward, loss, backward, optimiser. Weights are thrown away.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from _steps import training_steps
from rdd_pipeline.config import RunConfig, StudentConfig, load_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.export import WEIGHTS_FILE
from rdd_pipeline.machine import resolve_device
from rdd_storage import find_store


def steps(config: RunConfig, student: StudentConfig, store: str) -> Iterator[float]:
    """Seconds of each training step, endlessly enough; from the middle of the schedule."""
    dataset = build_dataset(config.data, "train")
    weights = config.run_dir / "teacher" / WEIGHTS_FILE
    for seconds, _ in training_steps(
        config, student, dataset, store=store, teacher_weights=weights
    ):
        yield seconds


def main() -> None:
    """Print a table: median step of each student and of supervised training beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="steps per block")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    dataset = build_dataset(config.data, "train")
    store = find_store(config.maps_root, data=dataset.identity()).path
    plain = StudentConfig(name="plain", method=("supervised",))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"Python {platform.python_version()}, {resolve_device(config.device)}")  # fmt: skip
    print("| student | step, ms | supervised beside it, ms | ratio of medians | of fastest |")
    print("|---|---:|---:|---:|---:|")
    for student in config.students:
        if student.method == ("supervised",):
            continue
        sources = steps(config, student, store), steps(config, plain, store)
        # One pass over the images first, so that what is kept in memory is there.
        warm_up = len(dataset) // config.student_training(student).batch_size + 1
        for source in sources:
            list(itertools.islice(source, warm_up))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.blocks):
            for source, seen in zip(sources, times, strict=True):
                next(source)  # the loader ran ahead while the other was at work
                seen += itertools.islice(source, arguments.steps)
        ours, theirs = (1000 * statistics.median(seen) for seen in times)
        fastest = min(times[0]) / min(times[1])
        print(
            f"| {student.name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | {fastest:.2f} |"
        )


if __name__ == "__main__":
    main()
