"""A team's stack in trouble: cancelled and lost flow runs, wrong input, a database that stops."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rdd_flows.deployments import ZOMBIES
from rdd_flows.limits import limit_name
from rdd_flows.stack.processes import find, marked, stop
from rdd_flows.stack.state import Stack, load_stack
from rdd_pipeline.config import parse_config
from rdd_pipeline.networks import build_network, save_weights
from rdd_storage import StoreError, lease_holder, store_status, verify_store
from real_processes import other_version, processes_of_session, wait_for
from tiny import tiny_tree

ROOT = Path(__file__).resolve().parents[2]
RDD = Path(sys.executable).parent / "rdd"
pytestmark = pytest.mark.slow
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

Finished = subprocess.CompletedProcess[str]


class Team:
    """A running stack, and what a team does with it."""

    def __init__(self, stack: Stack, folder: Path, environment: dict[str, str]) -> None:
        self.stack = stack
        self.folder = folder
        self.config = folder / "run.yaml"
        self.environment = environment | stack.client_environment()
        user, password = self.environment["PREFECT_API_AUTH_STRING"].split(":")
        self.api = httpx.Client(
            base_url=self.environment["PREFECT_API_URL"], auth=(user, password), timeout=30
        )
        self.weights = folder / "teacher.safetensors"
        network = parse_config(tiny_tree(folder)).teacher.network
        save_weights(build_network(network, 8, seed=3), self.weights)

    def command(self, *words: str | Path, **settings: str) -> Finished:
        """Run ``rdd`` as a user does who has read the stack's file ``env``."""
        return subprocess.run(
            [RDD, *words],
            env=self.environment | settings,
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )

    def write(self, name: str, images: int, workers: int) -> Path:
        """Write the configuration that the deployments run; returns the folder of its stores."""
        tree = tiny_tree(self.folder / "runs") | {"name": name}
        tree["teacher"] = {
            "network": tree["teacher"]["network"],
            "checkpoint": str(self.weights),
        }
        tree["data"]["train_images"] = images
        tree["maps"] = {"shard_images": 1, "workers": workers}
        self.config.write_text(yaml.safe_dump(tree))
        return self.folder / "runs" / name / "maps"

    def start(self) -> str:
        """Run the deployment that builds maps; returns the run's id."""
        found = self.api.get("/deployments/name/build_maps/build-maps").raise_for_status().json()
        made = self.api.post(f"/deployments/{found['id']}/create_flow_run", json={})
        return str(made.raise_for_status().json()["id"])

    def run(self, run: str) -> dict[str, Any]:
        """A flow run."""
        found: dict[str, Any] = self.api.get(f"/flow_runs/{run}").raise_for_status().json()
        return found

    def ended(self, run: str) -> str:
        """The state in which a run has ended."""
        wait_for(lambda: self.run(run)["state_type"] in ENDED)
        return str(self.run(run)["state_type"])

    def store_of(self, run: str, root: Path, images: int) -> Path:
        """The store in a folder, once the run has made so many of its images."""

        def found() -> Path | None:
            now = self.run(run)["state"]
            assert now["type"] not in ENDED, now
            for path in root.glob("*.zarr"):
                with contextlib.suppress(StoreError):  # it is just being made
                    return path if store_status(path).images_done >= images else None
            return None

        store: Path = wait_for(found)
        return store

    def session(self, run: str) -> int:
        """The session of a run's processes; its first process has the same number."""
        return int(self.run(run)["infrastructure_pid"].rpartition(":")[2])


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """A stack with the deployments of prefect.yaml."""
    folder = Path(tempfile.mkdtemp(prefix="rdd-trouble-"))
    folder.chmod(0o711)  # the database's account has to pass
    foreign = ("PREFECT_", "AWS_", "DASK_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {
        "COLUMNS": "200",
        # The tests wait for these intervals.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_CLIENT_MAX_RETRIES": "1",
        "RDD_REQUEST_RETRIES": "1",
    }

    def stack(*words: str | Path) -> Finished:
        return subprocess.run(
            [RDD, "stack", *words, "--state", folder / "stack"],
            env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT,
        )  # fmt: skip

    (folder / "run.yaml").touch()
    try:
        done = stack("up", "--s3", "none", "--workers", "1", "--config", folder / "run.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        running = load_stack(folder / "stack")
        assert running is not None
        team = Team(running, folder, environment)
        yield team
        team.api.close()
        ended = stack("down")
        assert ended.returncode == 0, ended.stderr
        assert marked(running.mark) == []
    finally:
        stack("down")
        shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def lost_run(team: Team) -> str:
    """A run over which nobody watched when its process was killed.

    The server notices after a minute and a half; the other tests are done in the meantime.
    """
    tree = tiny_tree(team.folder / "runs") | {"name": "lost"}
    tree["teacher"]["training"]["iterations"] = 100_000
    config = team.folder / "lost.yaml"
    config.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [RDD, "maps", "build", config],
        env=team.environment, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:

        def heartbeat() -> str | None:
            query = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
            events = team.api.post("/events/filter", json=query).raise_for_status().json()
            found = [event["resource"]["prefect.resource.id"] for event in events["events"]]
            return found[0].removeprefix("prefect.flow-run.") if found else None

        run: str = wait_for(heartbeat)
        assert team.run(run)["state_type"] == "RUNNING"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return run


def test_automations_are_installed_once(team: Team) -> None:
    # By 'rdd stack up'. A change would make the server forget which runs it waits for.
    before = team.api.post("/automations/filter", json={}).json()
    done = team.command("flows", "install-automations")
    assert done.stdout == f"up to date: {ZOMBIES}\n", done.stderr
    after = team.api.post("/automations/filter", json={}).json()
    assert after == before
    [found] = [automation for automation in after if automation["name"] == ZOMBIES]
    assert found["trigger"]["within"] == 90


def test_a_cancelled_build_ends_in_order_and_goes_on(team: Team) -> None:
    root = team.write("cancelled", images=200, workers=2)
    run = team.start()
    store = team.store_of(run, root, 10)
    session = team.session(run)
    assert len(processes_of_session(session)) >= 3, "the flow and two Dask workers"
    # As the page's button and 'prefect flow-run cancel' do.
    state = {"state": {"type": "CANCELLING"}}
    team.api.post(f"/flow_runs/{run}/set_state", json=state).raise_for_status()
    assert team.ended(run) == "CANCELLED"
    assert processes_of_session(session) == []
    assert lease_holder(store) is None
    limit = team.api.get(f"/v2/concurrency_limits/{limit_name(str(store))}").json()
    assert limit["active_slots"] == 0
    count = store_status(store).images_done
    assert 10 <= count < 200
    # What was under way was finished: nothing is written that is not done.
    arrays = [folder for folder in store.iterdir() if (folder / "c").is_dir()]
    written = {
        path: path.stat().st_mtime_ns
        for array in arrays
        for path in (array / "c").rglob("*")
        if path.is_file()
    }
    shards = [path for path in written if path.parts[len(store.parts)] == "hardness"]
    assert len(shards) == count

    assert team.ended(team.start()) == "COMPLETED"
    assert store_status(store).complete
    assert verify_store(store).ok
    assert [path for path, time in written.items() if path.stat().st_mtime_ns != time] == []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def s3() -> Iterator[str]:
    """An object store without buckets."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/moto-api/data.json").is_success
        return False

    try:
        wait_for(answers)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def worker_of_another_version(team: Team, tmp_path: Path) -> Iterator[None]:
    """A worker beside that of the stack."""
    counts = f"http://127.0.0.1:{team.stack.ports['dask-dashboard']}/json/counts.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", team.stack.dask_url, "--no-nanny",
         "--no-dashboard", "--host", "127.0.0.1", "--local-directory", tmp_path],
        env=team.environment | {"PYTHONPATH": other_version(tmp_path / "shim")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    try:
        wait_for(lambda: httpx.get(counts).json()["workers"] == 2)
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.usefixtures("worker_of_another_version")
def test_wrong_input_is_told_in_a_line(team: Team, s3: str) -> None:
    team.write("wrong", images=7, workers=0)
    build: tuple[str | Path, ...] = ("maps", "build", team.config)
    bucket = (*build, "--set", "maps.root=s3://nowhere/maps")
    keys = {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example-secret",
        "AWS_REGION": "eu-central-1",
    }
    url = team.environment["PREFECT_API_URL"]

    def refused(case: tuple[tuple[str | Path, ...], dict[str, str], str]) -> None:
        words, settings, expected = case
        done = team.command(*words, **settings)
        assert done.returncode == 1, done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert "example-secret" not in done.stderr
        assert line

    with ThreadPoolExecutor(2) as two:
        cases = [
            (
                build,
                {"PREFECT_API_AUTH_STRING": "rdd:guessed"},
                f"the server at {url} refuses the credentials; set PREFECT_API_AUTH_STRING",
            ),
            (bucket, keys, "there is no bucket 'nowhere'"),
            (
                (*build, "--set", f"cluster={team.stack.dask_url}"),
                {},
                "has rdd-maps 9.9.9 (here",
            ),
        ]
        list(two.map(refused, cases))
    # From now on the server asks for credentials.
    httpx.post(f"{s3}/moto-api/reset-auth", content=b"0").raise_for_status()
    refused((bucket, keys, "cannot be written (403 Forbidden: InvalidAccessKeyId"))


def test_a_database_that_stops_costs_nothing(team: Team) -> None:
    root = team.write("unrecorded", images=200, workers=0)
    run = team.start()
    store = team.store_of(run, root, 5)
    session = team.session(run)
    postgres = find(team.stack.root / "pids" / "postgres.json")
    assert postgres is not None
    stop(postgres, number=signal.SIGINT, grace=20)
    assert not store_status(store).complete, "it was stopped too late"
    done = team.command("maps", "build", team.config)
    assert done.returncode == 1
    assert "does not reach its database" in done.stderr
    # The work goes on to its end.
    wait_for(lambda: store_status(store).complete)
    wait_for(lambda: processes_of_session(session) == [])

    up = team.command("stack", "up", "--state", team.stack.root, "--config", team.config)
    assert up.returncode == 0, up.stderr
    assert "postgres: ready in" in up.stdout
    again = team.command("maps", "build", team.config)
    assert again.returncode == 0, again.stderr
    assert "maps: reused, all 200 images" in again.stderr
    assert verify_store(store).ok


def test_a_run_whose_process_is_gone_becomes_crashed(team: Team, lost_run: str) -> None:
    assert team.ended(lost_run) == "CRASHED"
    assert team.run(lost_run)["state"]["message"].startswith("No heartbeat any more")
