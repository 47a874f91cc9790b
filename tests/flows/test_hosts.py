"""Dask workers on hosts of their own: network namespaces, each with an address and a cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed import Client

from rdd_pipeline.config import parse_config
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.stages import run_maps
from rdd_storage import StoreError, store_status, verify_store
from real_processes import wait_for
from tiny import tiny_tree


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A network namespace; this machine is at the other end of its cable."""

    name: str
    gateway: str
    address: str

    def connect(self) -> None:
        """Make it; cables and addresses end with it."""
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth", "netns", self.name)
        ip("addr", "add", f"{self.gateway}/30", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/30", "dev", "eth")
        for device in ("lo", "eth"):
            ip("-n", self.name, "link", "set", device, "up")

    @property
    def cable(self) -> str:
        return f"v{self.name}"

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        ip("-n", self.name, "link", "set", "eth", "down")

    def disconnect(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "delete", self.name)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that reach this machine, but not each other."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (Debian: iproute2)")
    # 198.18.0.0/15 is set aside for tests of networks (RFC 2544).
    found = [
        Host(
            name=f"rdd{os.getpid()}{letter}",
            gateway=f"198.18.7.{first + 1}",
            address=f"198.18.7.{first + 2}",
        )
        for letter, first in (("a", 0), ("b", 4))
    ]
    try:
        for host in found:
            try:
                host.connect()
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield found
    finally:
        for host in found:
            host.disconnect()


@pytest.fixture
def address(hosts: list[Host], tmp_path: Path) -> Iterator[str]:
    """A scheduler on this machine, with a worker on each host."""
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        port = free.getsockname()[1]
    # How long a connection may be silent before its host is given up: by default 30 s, at least 11.
    environment = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "11s"}
    common = ("--no-dashboard",)
    with contextlib.ExitStack() as stack:

        def start(name: str, *words: str) -> None:
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen([*words, *common], env=environment, stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)

        python = (sys.executable, "-m")
        start("scheduler", *python, "distributed.cli.dask_scheduler", "--host", "0.0.0.0",
              "--port", str(port))  # fmt: skip
        for host in hosts:
            start(host.name, "ip", "netns", "exec", host.name, *python,
                  "distributed.cli.dask_worker", f"tcp://{host.gateway}:{port}",
                  "--host", host.address, "--nthreads", "1", "--no-nanny")  # fmt: skip
        yield f"tcp://127.0.0.1:{port}"


def test_a_host_that_is_cut_off_costs_its_unfinished_shards(
    hosts: list[Host], address: str, tmp_path: Path
) -> None:
    tree = tiny_tree(tmp_path) | {"cluster": {"address": address, "workers": 2}}
    tree["data"]["train_images"] = 120
    config = parse_config(tree)
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, 8, seed=3), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})

    with Client(address, timeout=60, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=90)
        seen = {worker["host"] for worker in client.scheduler_info()["workers"].values()}
    assert seen == {host.address for host in hosts}

    left: list[int] = []

    def under_way() -> bool:
        for store in Path(config.maps_root).glob("*.zarr"):
            with contextlib.suppress(StoreError):  # it is just being made
                return store_status(store).images_done >= 8
        return False

    def disturb() -> None:
        wait_for(under_way)
        hosts[1].cut()
        [store] = Path(config.maps_root).glob("*.zarr")
        left.append(120 - store_status(store).images_done)

    disturbance = threading.Thread(target=disturb)
    disturbance.start()
    built = run_maps(config, teacher, Reporter(quiet=True))
    disturbance.join()
    assert left[0] > 10, "the cable was cut too late"
    assert built.images_built == 120
    assert verify_store(built.path).ok
