"""Dask workers: processes started by hand on loopback, killed, of other versions, without GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from rdd_pipeline import cluster as cluster_module
from rdd_pipeline.cluster import (
    CheckedPlugin,
    open_client,
    own_versions,
    prepared_workers,
    require_readable,
    run_tasks,
    visible_gpus,
)
from rdd_pipeline.config import ClusterConfig, parse_config
from rdd_pipeline.errors import ClusterError, ClusterUnavailableError, ConfigError
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.stages import run_maps
from rdd_storage import MapReader, StoreError, lease_holder, store_status, verify_store
from real_processes import other_version, wait_for
from tiny import tiny_tree

QUIET = Reporter(quiet=True)


class Cluster:
    """A scheduler and workers, each a process as on a host of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        self._start("scheduler", "dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
                    "--no-dashboard")  # fmt: skip

    def worker(self, name: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        return self._start(name, "dask_worker", self.address, "--name", name, "--nthreads", "2",
                           "--no-dashboard", *options, **environment)  # fmt: skip

    def _start(
        self, name: str, module: str, *arguments: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
                stdout=log, stderr=log, env=os.environ | environment, cwd=self.folder,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in reversed(self.processes):  # a nanny ends its worker, the scheduler goes last
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    running = Cluster(folder)
    yield running
    running.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("local", ClusterConfig()),
        ("tcp://dask:8786", ClusterConfig(address="tcp://dask:8786")),
        ({"workers": 3, "threads": 1}, ClusterConfig(workers=3, threads=1)),
        ({"gpus": 2}, ClusterConfig(gpus=2)),
    ],
)
def test_cluster_in_the_configuration(
    given: object, expected: ClusterConfig, tmp_path: Path
) -> None:
    config = parse_config(tiny_tree(tmp_path) | {"device": "auto", "cluster": given})
    assert config.cluster == expected
    assert parse_config(config.model_dump(mode="json")).cluster == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dask:8786", "expected local, tcp://HOST:PORT"),
        ({"address": "tcp://dask:8786", "threads": 2}, "threads: workers at an address"),
        ({"gpus": 2, "workers": 3}, "one is started for each of the 2 GPUs"),
        ({"gpu": 1}, "cluster.gpu: unknown key; did you mean 'gpus'"),
        ({"gpus": 1}, "cluster.gpus: expected 0 with device: cpu"),
    ],
)
def test_contradictions_are_told(given: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_tree(tmp_path) | {"cluster": given})
    assert message in str(caught.value)


def test_no_scheduler_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1.0)
    config = ClusterConfig(address="tcp://127.0.0.1:9")
    with (
        pytest.raises(ClusterUnavailableError, match=r"no Dask scheduler answers at tcp://127"),
        open_client(config, workers=1, threads=1),
    ):
        pass


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(ClusterError, match=r"cluster\.gpus: expected at most the \d+ GPU"):
        visible_gpus(1000)


def test_workers_by_hand_one_killed_one_late_one_of_another_version(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One build over all of it: same bytes as alone, and only unfinished shards done again."""
    tree = tiny_tree(tmp_path / "a")
    tree["data"] |= {"train_images": 60, "seed": 1}
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(parse_config(tree).teacher.network, 8, seed=3), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})
    alone = run_maps(parse_config(tree), teacher, QUIET)

    cluster.worker("first")
    victim = cluster.worker("victim", "--no-nanny")
    config = parse_config(
        tree | {"output": str(tmp_path / "b"),
                "cluster": {"address": cluster.address, "workers": 2}}
    )  # fmt: skip
    store = Path(config.maps_root) / Path(alone.path).name
    late: list[subprocess.Popen[bytes]] = []

    def under_way() -> bool:
        with contextlib.suppress(StoreError):  # it is just being made
            return store_status(store).images_done >= 4
        return False

    def disturb() -> None:
        wait_for(under_way, 90)
        victim.send_signal(signal.SIGKILL)
        late.append(cluster.worker("late", PYTHONPATH=other_version(tmp_path / "shim")))

    disturbance = threading.Thread(target=disturb)
    disturbance.start()
    with caplog.at_level(logging.INFO, logger="rdd"):
        built = run_maps(config, teacher, QUIET)
    disturbance.join()
    assert victim.wait(10) == -signal.SIGKILL
    assert (built.images_built, built.fingerprint) == (60, alone.fingerprint)
    assert verify_store(built.path).ok
    assert lease_holder(built.path) is None
    for image in ("train-000000", "train-000059"):
        for array in ("hardness", "discrepancy"):
            same = MapReader(built.path).read(array, image) == MapReader(alone.path).read(
                array, image
            )
            assert same.all()
    assert "dashboard" in caplog.text
    late[0].wait(60)  # sent away, with its nanny
    assert "has rdd-maps 9.9.9 (here" in cluster.log("late")

    # The teacher was let go of: the next build loads its own.
    with Client(cluster.address, set_as_default=False) as client:
        plugins = client.run(lambda dask_worker: list(dask_worker.plugins))
    assert len(plugins) == 1
    assert not any(name.startswith("rdd-") for names in plugins.values() for name in names)


def test_worker_of_another_version_and_gpus_that_nobody_has(
    cluster: Cluster, tmp_path: Path
) -> None:
    here = own_versions()["rdd-maps"]
    wrong = cluster.worker("wrong", PYTHONPATH=other_version(tmp_path / "shim"))
    config = ClusterConfig(address=cluster.address)
    with (
        pytest.raises(ClusterError) as caught,
        open_client(config, workers=1, threads=1),
    ):
        pass
    assert "worker tcp://127.0.0.1:" in str(caught.value)
    assert f"has rdd-maps 9.9.9 (here {here})" in str(caught.value)
    wrong.terminate()
    wrong.wait(20)

    cluster.worker("right")
    with (
        pytest.raises(ClusterError, match=r"expected 2 GPU\(s\), but the 1 worker\(s\)"),
        open_client(ClusterConfig(address=cluster.address, gpus=2), workers=1, threads=1),
    ):
        pass
    with (
        pytest.raises(ClusterError, match="--resources GPU=1"),
        open_client(config, workers=1, threads=1, gpus_each=0.5),
    ):
        pass

    class Needs(CheckedPlugin):
        """Weights that are not where this worker looks."""

        def start(self, worker: object) -> None:
            require_readable(Path("/nowhere/weights"), "the teacher's weights")

    with (
        open_client(config, workers=1, threads=1) as client,
        pytest.raises(ClusterError, match=r"weights /nowhere/weights cannot be read on"),
        prepared_workers(client, Needs(), "rdd-test"),
    ):
        pass


def test_one_gpu_for_each_worker_process() -> None:
    with (
        cluster_module._gpu_cluster(["3", "GPU-5"], 2) as gpus,
        Client(gpus, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        offered = [w["resources"] for w in client.scheduler_info()["workers"].values()]
    assert sorted(seen.values()) == ["3", "GPU-5"]
    assert offered == [{"GPU": 1}, {"GPU": 1}]


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


def touch(number: int, *, folder: Path) -> int:
    (folder / f"{number}-begun").touch()
    time.sleep(0.3)
    (folder / f"{number}-ended").touch()
    return number


def fail(number: int) -> int:
    if number == 2:
        raise ValueError(f"number {number} is not wanted")
    return number


def test_cancelled_work_ends_what_is_under_way_and_begins_nothing_else(
    threads: Client, tmp_path: Path
) -> None:
    def interrupt(number: int, result: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(threads, partial(touch, folder=tmp_path), range(50), interrupt, name="cancelled")
    names = {path.name for path in tmp_path.iterdir()}
    begun = {name.removesuffix("-begun") for name in names if name.endswith("-begun")}
    assert begun == {name.removesuffix("-ended") for name in names if name.endswith("-ended")}
    assert 1 <= len(begun) <= 6
    time.sleep(0.5)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_first_error_ends_the_work(threads: Client) -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="number 2 is not wanted"):
        run_tasks(threads, fail, range(1000), lambda item, result: done.append(result), name="fail")
    assert 2 not in done
    assert len(done) < 1000


def test_work_in_flight_is_bounded(threads: Client) -> None:
    begun = 0
    most = 0

    def numbers() -> Iterator[int]:
        nonlocal begun
        for number in range(200):
            begun += 1
            yield number + 10

    done: list[int] = []

    def count(item: int, result: int) -> None:
        nonlocal most
        most = max(most, begun - len(done))
        done.append(result)

    run_tasks(threads, fail, numbers(), count, name="bounded")
    assert sorted(done) == list(range(10, 210))
    assert most <= 5  # two for each of two threads, and the one that is just taken
