"""Deployments, ``rdd serve``, and a Prefect server that is away: real processes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from prefect_servers import ask, running_server
from rdd_flows.deployments import check_prefect_file, check_schedule
from rdd_pipeline.errors import ConfigError
from rdd_storage import StoreError, store_status
from real_processes import wait_for
from tiny import tiny_tree, write_tiny

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).parent / "rdd"

Rdd = Callable[..., subprocess.CompletedProcess[str]]


def test_deployments_of_the_project() -> None:
    names = check_prefect_file(ROOT / "prefect.yaml")
    assert names == ["nightly", "students", "distill", "build-maps"]
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        module, _, flow = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), flow)
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)
        for trigger in deployment.get("triggers", ()):
            assert set(trigger["parameters"]) <= set(flow.parameters.properties)
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_mistakes_in_deployments_are_all_told(rdd: Rdd, tmp_path: Path) -> None:
    one = {"name": "nightly", "entrypoint": "rdd_flows.nightly.nightly"}
    wrong = one | {"schedules": [{"cron": "0 25 * * *"}]}
    zone = one | {"name": "b", "schedules": [{"cron": "0 2 * * *", "timezone": "Europe/Bärlin"}]}
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [one, wrong, zone]}))
    done = rdd("flows", "check", path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for expected in (
        "3 problem(s)",
        "two deployments 'rdd_flows.nightly.nightly/nightly'",
        "'nightly': cron: expected five fields",
        "'b': timezone: expected a name such as Europe/Berlin",
    ):
        assert expected in done.stderr
    path.write_text("deployments: 3")
    with pytest.raises(ConfigError, match="expected the deployments of a prefect"):
        check_prefect_file(path)


@pytest.mark.parametrize("cron", ["0 2 * *", "61 2 * * *", "at night", ""])
def test_cron_that_is_none(cron: str) -> None:
    with pytest.raises(ConfigError, match="cron: expected five fields"):
        check_schedule(cron, "UTC")


def test_serve_refuses_a_wrong_schedule(rdd: Rdd, tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "runs")
    for option, wrong, expected in (
        ("--timezone", "Mars/Olympus", "timezone: expected a name such as Europe/Berlin or UTC"),
        ("--cron", "0 25 * * *", "cron: expected five fields (minute, hour, day, month, weekday)"),
    ):
        done = rdd("serve", config, option, wrong)
        assert done.returncode == 1
        assert expected in done.stderr
        assert f"got '{wrong}'" in done.stderr
        assert "Traceback" not in done.stderr


def test_server_that_does_not_answer_is_told_before_anything_runs(tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "runs")
    url = "http://127.0.0.1:9/api"
    done = subprocess.run(
        [COMMAND, "maps", "build", config],
        env=os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"PREFECT_API_URL: no Prefect server answers at {url}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "teacher").exists()


def test_server_lost_in_mid_run_costs_nothing(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "runs")
    tree["data"]["train_images"] = 150
    tree["maps"]["shard_images"] = 1
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    maps = tmp_path / "runs" / "tiny" / "maps"

    def under_way() -> bool:
        try:
            return any(store_status(path).images_done for path in maps.glob("*.zarr"))
        except StoreError:  # it is just being made
            return False

    home = tmp_path / "home"
    home.mkdir()
    settings = {"PREFECT_HOME": str(home), "PREFECT_CLIENT_MAX_RETRIES": "1"}
    with running_server(home) as (url, server), (tmp_path / "log").open("wb") as log:
        build = subprocess.Popen(
            [COMMAND, "maps", "build", config],
            env=os.environ | settings | {"PREFECT_API_URL": url},
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(under_way)
            server.kill()
            build.wait(200)
        finally:
            build.kill()
    said = (tmp_path / "log").read_text()
    [store] = maps.glob("*.zarr")
    assert store_status(store).complete, said
    assert build.returncode == 1, said
    assert f"the Prefect server at {url} was lost" in said


def test_serve_builds_trains_and_stops_its_schedule(prefect_server: str, tmp_path: Path) -> None:
    """One machine: a night that is cancelled, a whole one, the event, the students of the new
    version; then SIGTERM."""
    tree = tiny_tree(tmp_path / "runs") | {"name": "served"}
    tree["students"] = tree["students"][1:2]
    config = tmp_path / "run.yaml"

    def write(**training: int) -> None:
        teacher = tree["teacher"] | {"training": tree["teacher"]["training"] | training}
        config.write_text(yaml.safe_dump(tree | {"teacher": teacher}))

    write(iterations=100_000, workers=1)

    def post(path: str, content: Any) -> Any:
        return ask(f"{prefect_server}/{path}", content)

    def deployment(flow: str) -> Any:
        return ask(f"{prefect_server}/deployments/name/{flow}/served")

    query = {"deployments": {"name": {"any_": ["served"]}}}

    def states() -> list[str]:
        return [run["state_type"] for run in post("flow_runs/filter", query)]

    environment = os.environ | {
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [COMMAND, "serve", config, "--cron", "0 2 * * *", "--timezone", "Europe/Berlin"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(lambda: "serving nightly/served" in (tmp_path / "log").read_text())
        nightly = deployment("nightly")
        [schedule] = nightly["schedules"]
        assert schedule["schedule"]["timezone"] == "Europe/Berlin"
        assert (schedule["active"], nightly["paused"]) == (True, False)

        again = subprocess.run(
            [COMMAND, "serve", config], env=environment, capture_output=True, text=True, timeout=120
        )
        assert again.returncode == 1
        assert "deployment 'nightly/served': another process serves it" in again.stderr

        def start() -> str:
            state = {"state": {"type": "SCHEDULED"}}
            return str(post(f"deployments/{nightly['id']}/create_flow_run", state)["id"])

        long = start()
        checkpoints = tmp_path / "runs" / "served" / "teacher" / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("0*")))
        serving = psutil.Process(process.pid)
        assert len(serving.children(recursive=True)) >= 2, "the flow and a loader"
        post(f"flow_runs/{long}/set_state", {"state": {"type": "CANCELLING"}})
        wait_for(lambda: "CANCELLED" in states())
        wait_for(lambda: serving.children(recursive=True) == [])

        write()  # the file is read anew by each run
        start()
        students = tmp_path / "runs" / "served" / "students.json"
        wait_for(students.exists)
        wait_for(lambda: states().count("COMPLETED") == 2)
        [trained] = [
            run
            for run in post("flow_runs/filter", query)
            if run["deployment_id"] == deployment("students")["id"]
        ]
        assert trained["parameters"]["version"] == 1
        result = (students.parent / "students" / "kd" / "result.json").read_text()
        assert '"store_version": 1' in result
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
    assert code == 0, (tmp_path / "log").read_text()
    assert deployment("nightly")["paused"]
    assert "SCHEDULED" not in states()
