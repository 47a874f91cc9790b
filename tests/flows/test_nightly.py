"""The flows on a real Prefect server: what they announce, show, wait for and try again."""

from __future__ import annotations

import contextvars
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    temporary_settings,
)

from prefect_servers import ask
from rdd_flows.deployments import ZOMBIES, install_automations
from rdd_flows.faults import RETRIES, is_transient
from rdd_flows.flows import train_student_flow
from rdd_flows.limits import limit_name, store_slot
from rdd_flows.nightly import LEDGER_FILE, nightly
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.errors import ClusterUnavailableError, ConfigError, DataError
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.run_images import forget_digests
from rdd_storage import StoreMismatchError, StoreUnavailableError, StoreWriteError
from real_processes import wait_for
from tiny import tiny_tree


@pytest.fixture
def server(prefect_server: str) -> Iterator[str]:
    """Flows of this process run on the tests' server."""
    # Heartbeats would round every flow up to a whole second.
    settings = {PREFECT_API_URL: prefect_server, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings):
        yield prefect_server


def write_image(root: Path, split: str, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for folder, shape, high in ((split, (48, 80, 3), 256), (f"{split}annot", (48, 80), 11)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, high, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run over a folder of images, with a ready teacher."""
    root = tmp_path / "camvid"
    for number in range(4):
        write_image(root, "train", number, seed=number)
    write_image(root, "val", 0, seed=100)
    weights = tmp_path / "teacher.safetensors"
    tree = tiny_tree(tmp_path) | {"name": f"run-{tmp_path.name.replace('_', '-')}"}
    save_weights(build_network(parse_config(tree).teacher.network, 11, seed=3), weights)
    del tree["teacher"]["training"]
    tree["teacher"]["checkpoint"] = str(weights)
    tree["data"] = {"type": "camvid", "root": str(root)}
    return parse_config(tree)


def night(config: RunConfig) -> dict[str, Any]:
    forget_digests()  # each night is a process of its own
    result: dict[str, Any] = nightly(config)
    return result


def found(server: str, what: str, **query: Any) -> list[Any]:
    answer = ask(f"{server}/{what}/filter", query)
    return list(answer["events"] if what == "events" else answer)


def logged(server: str, text: str) -> bool:
    """Whether a line with this text has reached the server, which has those of other tests too."""
    lines: list[str] = []
    while len(lines) % 200 == 0:  # as many as an answer holds
        page = found(server, "logs", sort="TIMESTAMP_DESC", limit=200, offset=len(lines))
        if not page:
            break
        lines += [entry["message"] for entry in page]
    return any(text in line for line in lines)


def announced(server: str, config: RunConfig, expected: int) -> list[int]:
    """Versions in the events of a run, in the order of their occurrence; the server writes them
    down some seconds after it has them."""
    query = {"event": {"name": ["maps.complete"]}, "order": "ASC"}
    deadline = time.monotonic() + 30
    while True:
        events = found(server, "events", filter=query)
        own = [e["payload"] for e in events if e["resource"]["rdd.run"] == config.name]
        if len(own) >= expected or time.monotonic() > deadline:
            return [payload["version"] for payload in own]
        time.sleep(0.2)


def test_nights(server: str, config: RunConfig) -> None:
    first = night(config)
    assert (first["version"], first["images_built"], first["announced"]) == (1, 4, True)

    # What the run shows in Prefect.
    key = f"maps-{config.name}"
    [shown] = found(server, "artifacts", artifacts={"key": {"any_": [key]}})
    assert f"`{first['path']}`" in shown["data"]
    assert "4 built in" in shown["data"]
    assert "images/s" in shown["data"]
    assert shown["data"].count("data:image/") == 8, "four images and their hardness"
    run = shown["flow_run_id"]
    progress = found(
        server,
        "artifacts",
        artifacts={"key": {"any_": ["progress-teacher-pass"]}, "flow_run_id": {"any_": [run]}},
    )
    assert [artifact["data"] for artifact in progress] == [100.0]

    second = night(config)
    assert (second["version"], second["images_built"], second["announced"]) == (1, 0, False)

    root = Path(config.data.root)  # type: ignore[union-attr]
    write_image(root, "train", 9, seed=9)
    third = night(config)
    assert (third["version"], third["images_built"], third["announced"]) == (2, 1, True)

    # The announcement was cut off: the next night makes it.
    write_json(config.run_dir / LEDGER_FILE, {})
    fourth = night(config)
    assert (fourth["version"], fourth["images_built"], fourth["announced"]) == (2, 0, True)
    assert announced(server, config, 3) == [1, 2, 2]

    wait_for(lambda: logged(server, f"{third['path']}: shard"))  # store and shard
    wait_for(lambda: logged(server, f"{second['path']}: still version 1"))

    # A student of each version; the earlier one is found by its version.
    def student() -> dict[str, Any]:
        forget_digests()
        done: dict[str, Any] = train_student_flow(
            config, "kd", store=first["path"], version=first["version"]
        )
        return done

    assert student()["store_version"] == 2
    write_image(root, "train", 10, seed=10)
    night(config)
    newest = student()
    assert newest["store_version"] == 3
    folder = config.run_dir / "students"
    assert read_json(folder / "kd" / "result.json")["settings"]["store_version"] == 3
    kept = read_json(folder / ".previous" / "kd@v2" / "result.json")
    assert kept["settings"]["store_version"] == 2


def test_bad_data_is_found_before_anything_is_built(server: str, config: RunConfig) -> None:
    night(config)
    root = Path(config.data.root)  # type: ignore[union-attr]
    write_image(root, "train", 9, seed=9)
    Image.new("L", (20, 20)).save(root / "trainannot" / "009.png")
    with pytest.raises(DataError, match=r"009\.png"):
        night(config)
    assert announced(server, config, 1) == [1]


def test_store_that_is_there_already_is_not_announced(server: str, config: RunConfig) -> None:
    first = night(config)
    (config.run_dir / LEDGER_FILE).unlink()  # as if it had been built by hand
    assert not night(config)["announced"]
    assert announced(server, config, 1) == [first["version"]]


def test_one_build_of_a_store_at_a_time(server: str) -> None:
    path = "s3://bucket/maps/camvid-train-0123456789ab.zarr"
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def build() -> None:
        with store_slot(path):
            inside.set()
            leave.wait(60)
            order.append("first")

    # Settings of this test hold in a copy of its context.
    holder = threading.Thread(target=contextvars.copy_context().run, args=(build,))
    holder.start()
    assert inside.wait(60)
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(limit_name(path))
    assert (limit.limit, limit.active_slots) == (1, 1)
    threading.Timer(3.0, leave.set).start()
    with store_slot(path):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_what_is_tried_again(server: str) -> None:
    attempts: dict[str, int] = {"away": 0, "wrong": 0}

    @task(**(RETRIES | {"retry_delay_seconds": 0}))
    def away() -> str:
        attempts["away"] += 1
        if attempts["away"] < 3:
            raise StoreUnavailableError("s3://bucket: does not answer")
        return "done"

    @task(**(RETRIES | {"retry_delay_seconds": 0}))
    def wrong() -> None:
        attempts["wrong"] += 1
        raise ConfigError("maps.root: wrong")

    @flow
    def both() -> str:
        with pytest.raises(ConfigError):
            wrong()
        return str(away())

    assert both() == "done"
    assert attempts == {"away": 3, "wrong": 1}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def answered(status: int) -> Exception:
    """An answer of the Prefect server that is no success."""
    request = httpx.Request("POST", "http://prefect/api/events")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailableError("away"), True),
        (ClusterUnavailableError("away"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (caused(StoreWriteError("cannot"), OSError(errno.ETIMEDOUT, "timed out")), True),
        (caused(StoreWriteError("cannot"), OSError(errno.ENOSPC, "disk full")), False),
        (caused(ConfigError("file"), OSError(errno.ETIMEDOUT, "timed out")), False),
        (StoreMismatchError("other teacher"), False),
        (FileNotFoundError(errno.ENOENT, "no such file"), False),
        (ValueError("bug"), False),
        (answered(500), True),
        (answered(404), False),
    ],
)
def test_which_faults_pass_by_themselves(error: Exception, expected: bool) -> None:
    assert is_transient(error) == expected


def test_zombie_automation_is_installed_once(server: str) -> None:
    install_automations()  # another test may have done it before
    assert install_automations().startswith("up to date")
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 60}):
        assert install_automations().startswith("updated")
    names = [automation["name"] for automation in found(server, "automations")]
    assert names.count(ZOMBIES) == 1
