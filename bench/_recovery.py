"""How long a build takes to recover when one of the processes it relies on is killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from rdd_flows.stack.processes import find
from rdd_flows.stack.running import stack_down, stack_up
from rdd_flows.stack.state import Stack
from rdd_pipeline.config import parse_config
from rdd_pipeline.networks import build_network, save_weights
from rdd_storage import StoreError, store_status

_ROOT = Path(__file__).parent.parent
_LIMIT = 180.0  # seconds for anything to happen


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """A build that lost a process."""

    killed: str
    left: int
    """Shards that were not done when it was killed."""
    seconds: float
    """From the kill to the published store."""
    work: float
    """Seconds that these shards take undisturbed."""

    @property
    def rest(self) -> float:
        """Seconds that were no work."""
        return self.seconds - self.work


class Team:
    """A stack of services, and builds on it, each of a store of its own."""

    def __init__(self, folder: Path, stack: Stack, tree: dict[str, Any]) -> None:
        self.folder = folder
        self.stack = stack
        self.tree = tree
        self.builds = 0
        settings = stack.client_environment()
        user, password = settings["PREFECT_API_AUTH_STRING"].split(":")
        self.api = httpx.Client(
            base_url=settings["PREFECT_API_URL"], auth=(user, password), timeout=30
        )

    def start(self) -> str:
        """Start a run of the build; returns its id."""
        found = self.api.get("/deployments/name/build_maps/build-maps").raise_for_status().json()
        made = self.api.post(f"/deployments/{found['id']}/create_flow_run", json={})
        return str(made.raise_for_status().json()["id"])

    def start_new(self) -> str:
        """Start a run that builds a new store."""
        self.builds += 1
        tree = self.tree | {"cluster": self.stack.dask_url, "output": str(self.folder / "runs")}
        tree["data"] = tree["data"] | {"seed": self.builds}
        tree["maps"] = tree["maps"] | {"root": str(self._stores)}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return self.start()

    @property
    def _stores(self) -> Path:
        return self.folder / f"maps-{self.builds}"

    def wait(self, run: str) -> None:
        """Wait until a run has ended."""
        ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        _until(lambda: self.api.get(f"/flow_runs/{run}").json()["state_type"] in ended)

    def flow(self, run: str) -> psutil.Process:
        """The process of a run."""
        found = self.api.get(f"/flow_runs/{run}").json()
        return psutil.Process(int(found["infrastructure_pid"].rpartition(":")[2]))

    def service(self, name: str) -> psutil.Process:
        """The process of a service."""
        found = find(self.stack.root / "pids" / f"{name}.json")
        assert found is not None, name
        return found

    def dask_worker(self) -> psutil.Process:
        """The process that computes, below the one that watches over it."""
        children = self.service("dask-worker-0").children()
        return max(children, key=lambda process: process.memory_info().rss)

    def done(self) -> int:
        """Images of the new store that are done."""
        for path in self._stores.glob("*.zarr"):
            with contextlib.suppress(StoreError):  # it is just being made
                return store_status(path).images_done
        return 0

    def complete(self) -> bool:
        """Whether the new store is published."""
        return any(store_status(path).complete for path in self._stores.glob("*.zarr"))


def _until(answer: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT
    while not answer():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing has happened for {_LIMIT:.0f} s")
        time.sleep(0.2)


@contextlib.contextmanager
def running_team(tree: dict[str, Any], say: Callable[[str], object]) -> Iterator[Team]:
    """A stack with two Dask workers, with a teacher of random weights.

    Args:
        tree: The configuration that is built; data set, teacher and maps count.
        say: Called with a line for each service.

    Raises:
        StackError: PostgreSQL or Redis is not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix="rdd-bench-"))
    folder.chmod(0o711)  # the database's account has to pass
    try:
        weights = Path(tree["teacher"]["checkpoint"])
        if not weights.exists():
            network = parse_config(tree).teacher.network
            save_weights(build_network(network, 8, seed=0), weights)
        config = folder / "run.yaml"
        config.touch()  # its content names the stack's ports
        stack = stack_up(
            folder / "stack",
            workers=2,
            s3="none",
            prefect_file=_ROOT / "prefect.yaml",
            config=config,
            say=say,
        )
        try:
            yield Team(folder, stack, tree)
        finally:
            stack_down(folder / "stack")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recoveries(tree: dict[str, Any], say: Callable[[str], object]) -> tuple[float, list[Recovery]]:
    """Kill a Dask worker, the flow's process and the Prefect worker, each in a build of its own.

    The killed flow is started again at once, by another run; it begins when Prefect has noticed.

    Args:
        tree: The configuration that is built, with ``maps.shard_images: 1``.
        say: Called with a line for each build.

    Returns:
        Milliseconds that a shard takes undisturbed, and the recoveries.
    """
    images = tree["data"]["train_images"]
    with running_team(tree, say) as team:
        run = team.start_new()
        _until(lambda: team.done() > 0)
        first, started = team.done(), time.perf_counter()
        _until(team.complete)
        shard = (time.perf_counter() - started) / (images - first)
        team.wait(run)
        say(f"undisturbed: {1000 * shard:.1f} ms a shard")
        found = []
        victims: dict[str, Callable[[str], psutil.Process]] = {
            "a Dask worker": lambda run: team.dask_worker(),
            "the flow's process": team.flow,
            "the Prefect worker": lambda run: team.service("prefect-worker"),
        }
        for name, victim in victims.items():
            run = team.start_new()
            _until(lambda: team.done() > images // 4)
            process = victim(run)
            left = images - team.done()
            process.kill()
            killed = time.perf_counter()
            again = team.start() if name == "the flow's process" else run
            _until(team.complete)
            seconds = time.perf_counter() - killed
            found.append(Recovery(killed=name, left=left, seconds=seconds, work=left * shard))
            say(f"{name}: {seconds:.1f} s from the kill to the complete store")
            if name != "the Prefect worker":  # nobody is left to see to the end of its flow
                team.wait(again)
    return 1000 * shard, found
