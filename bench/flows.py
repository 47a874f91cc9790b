"""What orchestration costs: Prefect round a build with nothing to do, Dask per shard, scaling from
one worker to two, a killed worker, and a client with 64 workers and 100,000 shards.

Times of one machine in one run; compare the figures of a table with each other, not with those of
other machines. Writes ``bench/results/flows.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client, LocalCluster

from rdd_pipeline.cluster import open_client, run_tasks
from rdd_pipeline.config import ClusterConfig, RunConfig, parse_config
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import TrainedNetwork, machine, peak_memory_bytes, run_maps

OUT = Path(__file__).parent / "results" / "flows.md"
QUIET = Reporter(quiet=True)
_NETWORK: dict[str, Any] = {
    "architecture": "FPN",
    "encoder": "tu-mobilenetv3_small_050",
    "auxiliary": {},
}


def nothing(number: int) -> int:
    """A shard that takes no time."""
    return number


def busy(number: int) -> float:
    """A shard that keeps one core busy for about a third of a second, with its GIL released."""
    a = np.random.default_rng(number).random((700, 700))
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        a = a @ a / np.linalg.norm(a)
    return float(a[0, 0])


def fixed(number: int) -> float:
    """A shard of a fixed amount of work."""
    torch.set_num_threads(1)
    a = torch.rand(400, 400)
    for _ in range(60):
        a = a @ a / a.norm()
    return float(a[0, 0])


def configuration(folder: Path, images: int, **maps: Any) -> tuple[RunConfig, TrainedNetwork]:
    """A small build with a teacher of random weights."""
    config = parse_config(
        {
            "name": "bench",
            "output": str(folder),
            "device": "cpu",
            "data": {"type": "synthetic", "train_images": images, "val_images": 2,
                     "height": 128, "width": 192},
            "teacher": {"network": _NETWORK, "checkpoint": str(folder / "teacher.safetensors")},
            "maps": {"shard_images": 4, "workers": 0} | maps,
            "student": {"network": _NETWORK, "training": {"iterations": 1}},
            "students": [{"name": "kd", "method": "kd"}],
        }
    )  # fmt: skip
    weights = folder / "teacher.safetensors"
    if not weights.exists():
        save_weights(build_network(config.teacher.network, 8, seed=0), weights)
    return config, TrainedNetwork(name="teacher", weights=weights, reused=True, result={})


def empty_build(folder: Path) -> dict[str, float]:
    """Seconds of a build that finds everything done: the plain function, and the flow round it."""
    from prefect.testing.utilities import prefect_test_harness

    from rdd_flows.flows import build_maps_flow

    config, teacher = configuration(folder, 16)
    run_maps(config, teacher, QUIET)
    started = time.perf_counter()
    run_maps(config, teacher, QUIET)
    plain = time.perf_counter() - started
    with prefect_test_harness(server_startup_timeout=180):
        build_maps_flow(config)  # teacher and caches
        started = time.perf_counter()
        build_maps_flow(config)
        flow = time.perf_counter() - started
    return {"plain function": plain, "flow build_maps": flow}


def tasks(client: Client, count: int, name: str) -> float:
    """Seconds for so many tasks that do nothing."""
    started = time.perf_counter()
    run_tasks(client, nothing, range(count), lambda item, result: None, name=name)
    return time.perf_counter() - started


def scaling(count: int) -> dict[int, float]:
    """Seconds of the same CPU-bound work with one worker process and with two."""
    seconds = {}
    for workers in (1, 2):
        with open_client(ClusterConfig(), workers=workers, threads=1) as client:
            run_tasks(client, fixed, range(4), lambda item, result: None, name="warm")
            started = time.perf_counter()
            run_tasks(client, fixed, range(count), lambda item, result: None, name="work")
            seconds[workers] = time.perf_counter() - started
    return seconds


def killed_worker(count: int) -> tuple[float, float]:
    """Seconds of work on two workers, alone and with one of them killed in the middle."""
    times = []
    for kill in (False, True):
        with open_client(ClusterConfig(), workers=2, threads=1) as client:
            run_tasks(client, busy, range(4), lambda item, result: None, name="warm")
            pids = list(client.run(os.getpid).values())
            timer = threading.Timer(count * 0.3 / 4, os.kill, (pids[0], signal.SIGKILL))
            if kill:
                timer.start()
            started = time.perf_counter()
            run_tasks(client, busy, range(count), lambda item, result: None, name="work")
            times.append(time.perf_counter() - started)
            timer.cancel()
    return times[0], times[1]


@contextlib.contextmanager
def many_workers(count: int) -> Iterator[Client]:
    """Workers that share this process: the scheduler and the client see as many as on a cluster."""
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=False, dashboard_address=None,
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=100_000, help="Shards of the 64 workers.")
    many = parser.parse_args().many
    lines = [
        "# Orchestration",
        "",
        "`make bench-flows`: what Prefect and Dask add. Compare figures of one table only.",
        "",
    ]
    with tempfile.TemporaryDirectory() as name:
        empty = empty_build(Path(name))
    lines += ["| a build that has nothing to do | s |", "|---|---|"]
    lines += [f"| {what} | {seconds:.2f} |" for what, seconds in empty.items()]

    with open_client(ClusterConfig(), workers=2, threads=2) as client:
        tasks(client, 50, "warm")
        seconds = tasks(client, 1000, "thousand")
    lines += ["", "| 1,000 shards that do nothing, 2 workers | |", "|---|---|"]
    lines += [f"| ms a shard | {seconds:.2f} |"]

    times = scaling(40)
    lines += ["", "| CPU-bound work | s | speed |", "|---|---|---|"]
    lines += [
        f"| {workers} worker(s) | {taken:.2f} | {times[1] / taken:.2f} |"
        for workers, taken in times.items()
    ]

    alone, killed = killed_worker(60)
    lines += ["", "| 60 shards of 0.3 s on two workers | s |", "|---|---|"]
    lines += [f"| undisturbed | {alone:.1f} |", f"| one worker killed on the way | {killed:.1f} |"]

    before = peak_memory_bytes()
    with many_workers(64) as client:
        tasks(client, 1000, "warm")
        warm = peak_memory_bytes()
        seconds = tasks(client, many, "many")
        after = peak_memory_bytes()
    lines += ["", f"| {many:,} shards that do nothing, 64 workers in one process | |", "|---|---|"]
    lines += [
        f"| ms a shard | {1000 * seconds / many:.2f} |",
        f"| peak memory: before, after 1,000, after all | {before / 1e6:.0f}, {warm / 1e6:.0f}, "
        f"{after / 1e6:.0f} MB |",
    ]
    details = machine()
    lines += ["", f"{details['platform']}, {details['cpus']} CPUs, Python {details['python']}; "
              + ", ".join(f"{k} {v}" for k, v in details["versions"].items())]  # fmt: skip
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
