"""The service stack without containers: real servers, real processes, killed one after another."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from rdd_flows.stack.processes import find, marked
from rdd_flows.stack.state import Stack, load_stack, write_private
from tiny import tiny_tree

ROOT = Path(__file__).resolve().parent.parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command ``rdd``, as a user without any settings types it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "AWS_", "DASK_"))
    }
    environment |= {
        "COLUMNS": "200",
        # The test waits for these intervals.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
        "RDD_REQUEST_RETRIES": "3",
    }

    def run(
        *words: str | Path, path: str = "", settings: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / "rdd"), *map(str, words)],
            env=environment | {"PATH": f"{path}{os.environ['PATH']}"} | (settings or {}),
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )

    return run


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that the database's account can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="rdd-stack-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def test_a_stack_that_does_not_start_says_why_and_leaves_nothing(
    command: Command, place: Path
) -> None:
    root = place / "broken"
    programs = place / "bin"
    programs.mkdir()
    weed = programs / "weed"
    weed.write_text("#!/bin/sh\necho no space left on device >&2\nexit 3\n")
    weed.chmod(0o755)
    done = command("stack", "up", "--state", root, "--s3", "weed", path=f"{programs}:")
    assert done.returncode == 1
    assert "s3: ended while starting" in done.stderr
    assert "no space left on device" in done.stderr
    stack = load_stack(root)
    assert stack is not None
    assert marked(stack.mark) == []
    assert [port for port in stack.ports.values() if _listens(port)] == []

    other = subprocess.Popen(["sleep", "60"])
    try:
        # The number of a service that has ended is another program's now.
        known = root / "pids" / "redis.json"
        known.write_text(json.dumps({"pid": other.pid, "started": time.time() - 3600}))
        assert find(known) is None
        assert command("stack", "down", "--state", root, "--purge").returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert not root.exists()
    missing = command("stack", "status", "--state", root)
    assert missing.returncode == 1
    assert "make one with 'rdd stack up'" in missing.stderr


def _listens(port: int) -> bool:
    return any(
        connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
        for connection in psutil.net_connections("tcp")
    )


def test_private_files_are_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


class Team:
    """A running stack, and what a team does with it."""

    def __init__(
        self, stack: Stack, folder: Path, up: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        self.stack = stack
        self.up = up
        self.folder = folder
        self.config = folder / "team.yaml"
        self.environment = stack.client_environment()
        user, password = self.environment["PREFECT_API_AUTH_STRING"].split(":")
        self.api = httpx.Client(
            base_url=self.environment["PREFECT_API_URL"], auth=(user, password), timeout=30
        )
        self.s3 = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def close(self) -> None:
        """Close the connections."""
        self.api.close()
        self.s3.close()

    def objects(self, prefix: str) -> list[str]:
        """Keys in the bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket="rdd", Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def write_config(self) -> None:
        """A run on the stack's workers with its images and its store in the bucket."""
        tree = tiny_tree(self.folder / "runs") | {
            "name": "team",
            "cluster": self.stack.dask_url,
            "data": {
                "type": "folder",
                "root": "s3://rdd/data",
                "train": {"images": "train/images", "labels": "train/labels"},
                "val": {"images": "val/images", "labels": "val/labels"},
                "classes": ["road", "tree", "sky"],
            },
        }
        tree["maps"] |= {"root": "s3://rdd/maps", "shard_images": 4}
        tree["students"] = [{"name": "rdd", "method": "rdd", "rdd": {"min_kept": 0.05}}]
        self.config.write_text(yaml.safe_dump(tree))

    def upload(self, split: str, first: int, count: int) -> None:
        """Put images and labels into the bucket."""
        generator = np.random.default_rng(first)
        for number in range(first, first + count):
            label = (
                generator.integers(0, 3, size=(8, 12), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
            )
            noise = generator.integers(0, 60, size=(*label.shape, 3), dtype=np.uint8)
            image = noise + (60 * label)[..., None]
            for kind, pixels in (("images", image), ("labels", label)):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                key = f"data/{split}/{kind}/{number:03d}.png"
                self.s3.put_object(Bucket="rdd", Key=key, Body=file.getvalue())

    def start(self, deployment: str) -> str:
        """Run a deployment; returns the run's id."""
        found = self.api.get(f"/deployments/name/{deployment}").raise_for_status().json()
        created = self.api.post(f"/deployments/{found['id']}/create_flow_run", json={})
        return str(created.raise_for_status().json()["id"])

    def runs(self, flow: str, *, scheduled: bool = False) -> list[dict[str, Any]]:
        """The runs of a flow that were asked for, or those of its schedule; the first first."""
        answer = self.api.post(
            "/flow_runs/filter",
            json={"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"},
        )
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return [run for run in found if run["auto_scheduled"] == scheduled]

    def wait_for(self, run: str, *states: str) -> dict[str, Any]:
        """Wait until a run is in one of the states; another final state is a failure."""

        def reached() -> dict[str, Any] | None:
            found = self.look_at(run, states)
            return found if found["state_type"] in states else None

        return until(reached)

    def look_at(self, run: str, expected: Iterable[str] = ()) -> dict[str, Any]:
        """A run; one that has ended otherwise than expected is a failure."""
        found: dict[str, Any] = self.api.get(f"/flow_runs/{run}").raise_for_status().json()
        ended = found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        if ended and found["state_type"] not in expected:
            wanted = {"logs": {"flow_run_id": {"any_": [run]}}}
            logs = self.api.post("/logs/filter", json=wanted).json()
            said = [str(found["state"]["message"]), *(line["message"] for line in logs)]
            pytest.fail("\n".join(said))
        return found

    def wait_for_shards(self, run: str, more_than: int) -> None:
        """Wait until a run has written some, before it ends."""
        until(lambda: self.look_at(run) and self.shards() > more_than)

    def students_of(self, version: int) -> list[dict[str, Any]]:
        """Runs that trained students from a version of the store."""
        return [run for run in self.runs("students") if run["parameters"].get("version") == version]

    def process_of(self, run: str) -> psutil.Process:
        """The process in which a flow runs."""
        found = self.wait_for(run, "RUNNING")
        return psutil.Process(int(found["infrastructure_pid"].rpartition(":")[2]))

    def shards(self) -> int:
        """Shards of one array that are in the bucket."""
        return sum("/hardness/c/" in key for key in self.objects("maps/"))

    def dask_worker(self) -> psutil.Process:
        """The process that computes, below the one that watches over it."""
        watching = find(self.stack.root / "pids" / "dask-worker-0.json")
        assert watching is not None
        return max(watching.children(), key=lambda process: process.memory_info().rss)


def until(question: Callable[[], Any], seconds: float = 400) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, question
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def team(command: Command, place: Path) -> Iterator[Team]:
    """A stack with the deployments of prefect.yaml; nothing of it is left behind."""
    root = place / "stack"
    config = place / "team.yaml"
    config.touch()  # its content names the stack's ports
    up = ("stack", "up", "--state", root, "--s3", "moto", "--config", config)
    done = command(*up)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        stack = load_stack(root)
        assert stack is not None
        team = Team(stack, place, lambda: command(*up))
        team.write_config()
        yield team
        team.close()
    finally:
        ended = command("stack", "down", "--state", root)
        assert ended.returncode == 0, ended.stderr
    assert marked(stack.mark) == []
    assert [port for port in stack.ports.values() if _listens(port)] == []


def test_only_this_machine_and_its_owner_get_in(team: Team) -> None:
    processes = marked(team.stack.mark)
    assert len(processes) >= 9
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    words = " ".join(word for process in processes for word in process.cmdline())
    assert not [name for name, secret in team.stack.secrets.items() if secret in words]
    for name in ("stack.json", "env", "redis/redis.conf"):
        assert stat.S_IMODE((team.stack.root / name).stat().st_mode) == 0o600
    assert httpx.get(f"{team.stack.prefect_url}/api/work_pools/rdd").status_code == 401
    assert team.api.get("/work_pools/rdd").json()["type"] == "process"


def test_the_nights_are_scheduled(team: Team) -> None:
    night = until(lambda: team.runs("nightly", scheduled=True))[0]
    assert night["expected_start_time"][10:19] == "T02:00:00"
    assert night["parameters"]["config"] == str(team.config)


def test_each_gpu_has_a_worker_that_sees_no_other(team: Team) -> None:
    counts = f"http://127.0.0.1:{team.stack.ports['dask-dashboard']}/json/counts.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "rdd_flows.stack.gpu_workers", team.stack.dask_url,
         "--gpus", "0,1", "--host", "127.0.0.1"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: httpx.get(counts).json()["workers"] == 4)
        workers = psutil.Process(process.pid).children()
        assert [worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0", "1"]
        assert all("GPU=1" in worker.cmdline() for worker in workers)
        # A container's restart begins with the end of all.
        workers[0].terminate()
        assert process.wait(120) == 1
        until(lambda: httpx.get(counts).json()["workers"] == 2)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_growing_data_set_becomes_one_complete_store_whoever_is_killed(
    team: Team, command: Command
) -> None:
    team.upload("train", 0, 48)
    team.upload("val", 100, 3)

    first = team.start("nightly/nightly")
    team.wait_for_shards(first, more_than=0)
    team.dask_worker().kill()
    assert team.shards() < 12, "the worker was killed too late"
    team.wait_for(first, "COMPLETED")
    trained = until(lambda: team.students_of(1))[0]
    team.wait_for(trained["id"], "COMPLETED")

    team.upload("train", 48, 24)
    before = team.shards()
    killed = team.start("nightly/nightly")
    flow = team.process_of(killed)
    team.wait_for_shards(killed, more_than=before)
    flow.kill()
    team.wait_for(killed, "CRASHED")

    # A flow goes on without the worker that started it; 'up' starts another worker.
    again = team.start("nightly/nightly")
    team.process_of(again)
    worker = find(team.stack.root / "pids" / "prefect-worker.json")
    assert worker is not None
    worker.kill()
    done = team.up()
    assert done.returncode == 0, done.stderr
    assert "prefect-worker: ready in" in done.stdout
    assert "prefect-server: ready runs already" in done.stdout
    team.wait_for(again, "COMPLETED")

    # A night without new images, while the student trains: no version, no event, no student.
    idle = team.start("nightly/nightly")
    trained = until(lambda: team.students_of(2))[0]
    team.wait_for(trained["id"], "COMPLETED")
    team.wait_for(idle, "COMPLETED")
    assert [len(team.students_of(version)) for version in (1, 2, 3)] == [1, 1, 0]
    log = (team.folder / "runs/team/logs/rdd.log").read_text()
    assert log.count(" 0 of 72 images are read for their digests") >= 1
    assert {run["state_type"] for run in team.runs("students")} == {"COMPLETED"}

    (name,) = {key.split("/")[1] for key in team.objects("maps/") if ".zarr/" in key}
    store = f"s3://rdd/maps/{name}"
    checked = command("maps", "verify", store, settings=team.environment)
    assert checked.returncode == 0, checked.stderr
    assert "0 damaged" in checked.stdout
    status = command("maps", "status", store, settings=team.environment)
    for expected in ("72 of 72 done", "complete"):
        assert expected in status.stdout
    result = json.loads((team.folder / "runs/team/students/rdd/result.json").read_text())
    assert result["settings"]["store_version"] == 2
