"""What orchestration costs: Prefect round a build with nothing to do, Dask per shard, scaling from
one worker to two, recovery when a process is killed, and a client with 64 workers and 100,000
shards.

Times of one machine in one run; compare the figures of a table with each other, not with those of
other machines. Writes ``bench/results/flows.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from distributed import Client, LocalCluster

from _machine import machine as processor
from _recovery import recoveries
from rdd_flows.stack.errors import StackError
from rdd_pipeline.cluster import open_client, run_tasks
from rdd_pipeline.config import ClusterConfig, RunConfig, parse_config
from rdd_pipeline.machine import machine
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.stages import run_maps

OUT = Path(__file__).parent / "results" / "flows.md"
QUIET = Reporter(quiet=True)
_NETWORK: dict[str, Any] = {
    "architecture": "FPN",
    "encoder": "tu-mobilenetv3_small_050",
    "auxiliary": {},
}
_TIMES = 3


class Results:
    """Lines of Markdown, printed and written as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def add(self, *lines: str) -> None:
        """Add some lines."""
        print(*lines, sep="\n", flush=True)
        self._lines += lines
        self._path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def table(self, *rows: tuple[str, ...]) -> None:
        """Add a table; the first row is its head."""
        head, *others = rows
        self.add("", _row(head), _row(("---",) * len(head)), *map(_row, others))


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def say(line: str) -> None:
    """Print what happens, for those who wait."""
    print(f"  {line}", file=sys.stderr, flush=True)


def nothing(number: int) -> int:
    """A shard that takes no time."""
    return number


def fixed(number: int) -> float:
    """A shard of a fixed amount of work."""
    torch.set_num_threads(1)
    a = torch.rand(400, 400)
    for _ in range(60):
        a = a @ a / a.norm()
    return float(a[0, 0])


def tree_of(folder: Path, *, images: int, height: int, width: int, shard: int) -> dict[str, Any]:
    """The configuration of a build with a teacher of random weights."""
    return {
        "name": "bench",
        "output": str(folder),
        "device": "cpu",
        "data": {"type": "synthetic", "train_images": images, "val_images": 2,
                 "height": height, "width": width},
        "teacher": {"network": _NETWORK, "checkpoint": str(folder / "teacher.safetensors")},
        "maps": {"shard_images": shard, "workers": 0},
        "student": {"network": _NETWORK, "training": {"iterations": 1}},
        "students": [{"name": "kd", "method": "kd"}],
    }  # fmt: skip


def empty_build(folder: Path) -> dict[str, float]:
    """Seconds of a build that finds everything done: as a function, as a flow, as a command."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    from rdd_flows.environment import quiet_prefect
    from rdd_flows.flows import build_maps_flow

    quiet_prefect()
    tree = tree_of(folder, images=16, height=128, width=192, shard=4)
    config: RunConfig = parse_config(tree)
    weights = Path(tree["teacher"]["checkpoint"])
    save_weights(build_network(config.teacher.network, 8, seed=0), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    run_maps(config, teacher, QUIET)
    command = [str(Path(sys.executable).parent / "rdd"), "maps", "build", str(file), "--quiet"]
    with prefect_test_harness(server_startup_timeout=180):
        environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}

        def run_command() -> None:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        build_maps_flow(config)  # teacher and caches
        return {
            "plain function": median_seconds(lambda: run_maps(config, teacher, QUIET)),
            "flow `build_maps`": median_seconds(lambda: build_maps_flow(config)),
            "command `rdd maps build`, imports included": median_seconds(run_command),
        }


def median_seconds(function: Callable[[], object]) -> float:
    """Median of the times of a few calls."""
    taken = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def tasks(client: Client, count: int, name: str) -> float:
    """Seconds for so many tasks that do nothing."""
    started = time.perf_counter()
    run_tasks(client, nothing, range(count), lambda item, result: None, name=name)
    return time.perf_counter() - started


def scaling(count: int) -> dict[str, dict[int, float]]:
    """Seconds of the same CPU-bound work with one worker process and with two: Dask's, and plain
    processes, which show what the machine's cores can do side by side."""
    seconds: dict[str, dict[int, float]] = {"Dask": {}, "plain processes": {}}
    for workers in (1, 2):
        with open_client(ClusterConfig(), workers=workers, threads=1) as client:
            run_tasks(client, fixed, range(4), lambda item, result: None, name="warm")
            started = time.perf_counter()
            run_tasks(client, fixed, range(count), lambda item, result: None, name="work")
            seconds["Dask"][workers] = time.perf_counter() - started
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(fixed, range(4), chunksize=1)
            started = time.perf_counter()
            pool.map(fixed, range(count), chunksize=1)
            seconds["plain processes"][workers] = time.perf_counter() - started
    return seconds


@contextlib.contextmanager
def many_workers(count: int) -> Iterator[tuple[Client, psutil.Process]]:
    """A client of a scheduler with so many workers, which share one other process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_workers, args=(count, there))
    process.start()
    try:
        assert process.pid is not None
        with Client(here.recv(), set_as_default=False) as client:
            yield client, psutil.Process(process.pid)
    finally:
        with contextlib.suppress(OSError):
            here.send(None)
        process.join(60)
        process.kill()


def _serve_workers(count: int, parent: Connection) -> None:
    with LocalCluster(
        n_workers=count, threads_per_worker=1, processes=False, dashboard_address=None,
        memory_limit=0, protocol="tcp://",
    ) as cluster:  # fmt: skip
        parent.send(cluster.scheduler_address)
        parent.recv()


def many_shards(count: int) -> tuple[float, list[tuple[str, ...]]]:
    """Seconds of so many shards on 64 workers, and rows of the memory of both processes."""
    rows: list[tuple[str, ...]] = []
    own = psutil.Process()
    done = 0
    with many_workers(64) as (client, others):

        def look(item: int, result: int) -> None:
            nonlocal done
            done += 1
            if done in marks:
                memory = [f"{p.memory_info().rss / 1e6:.0f}" for p in (own, others)]
                rows.append((f"{done:,}", *memory))
                say(f"{done:,} shards, {time.perf_counter() - started:.0f} s, MB: {memory}")

        marks = {max(1, count * part // 100) for part in (1, 10, 25, 50, 75, 100)}
        tasks(client, 500, "warm")
        started = time.perf_counter()
        run_tasks(client, nothing, range(count), look, name="many")
        return time.perf_counter() - started, rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=100_000, help="Shards of the 64 workers.")
    parser.add_argument(
        "--images", type=int, default=200, help="Images of each build in which something is killed."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="File of the tables.")
    options = parser.parse_args()
    # What was started is ended, however this ends.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results = Results(options.out)
    details = machine()
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    results.add(
        "# Orchestration",
        "",
        "`make bench-flows`: what Prefect and Dask add. Compare figures of one table only.",
        "",
        f"{processor()}, Python {details['python']}; {versions}",
    )

    with tempfile.TemporaryDirectory() as name:
        empty = empty_build(Path(name))
        plain, *_ = empty.values()
        results.table(
            ("a build that has nothing to do", "s", "beyond the function (goal: below 2)"),
            *((what, f"{taken:.2f}", f"{taken - plain:.2f}") for what, taken in empty.items()),
        )

    with open_client(ClusterConfig(), workers=2, threads=2) as client:
        tasks(client, 50, "warm")
        seconds = tasks(client, 1000, "thousand")
    results.table(
        ("1,000 shards that do nothing, 2 workers", "goal"),
        (f"{seconds:.2f} ms a shard", "below 10"),
    )

    results.table(
        ("CPU-bound work", "one worker, s", "two, s", "speed (goal: 1.8)"),
        *((what, f"{times[1]:.2f}", f"{times[2]:.2f}", f"{times[1] / times[2]:.2f}")
          for what, times in scaling(100).items()),
    )  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        tree = tree_of(Path(name), images=options.images, height=256, width=384, shard=1)
        try:
            shard, found = recoveries(tree, say)
        except StackError as error:
            results.add("", f"Recovery is left out: {error}")
        else:
            results.table(
                (f"killed ({options.images} shards of {shard:.0f} ms on two Dask workers)",
                 "shards left", "until the store is complete, s", "of it work", "the rest"),
                *((f"{r.killed}", f"{r.left}", f"{r.seconds:.1f}", f"{r.work:.1f}",
                   f"{r.rest:.1f}") for r in found),
            )  # fmt: skip

    seconds, rows = many_shards(options.many)
    results.add("", f"{options.many:,} shards that do nothing on 64 workers in one other process: "
                f"{1000 * seconds / options.many:.2f} ms a shard.")  # fmt: skip
    results.table(("shards done", "client, MB", "scheduler and 64 workers, MB"), *rows)


if __name__ == "__main__":
    main()
