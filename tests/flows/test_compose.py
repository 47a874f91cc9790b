"""docker-compose.yml, Dockerfile and .env.example fit together; no containers are run."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compose_checks import problems

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("Dockerfile", ".dockerignore", ".env.example")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return tree


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PREFECT_"):
            monkeypatch.delenv(name)


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "check-jsonschema"
    return subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_follows_the_schema(compose: dict[str, Any], tmp_path: Path) -> None:
    done = validate(ROOT / "docker-compose.yml")
    assert done.returncode == 0, done.stdout
    wrong = copy.deepcopy(compose)
    wrong["services"]["redis"]["healthcheck"]["intervall"] = "5s"
    path = tmp_path / "docker-compose.yml"
    path.write_text(yaml.safe_dump(wrong))
    refused = validate(path)
    assert refused.returncode == 1
    assert "intervall" in refused.stdout


def test_everything_it_names_exists(compose: dict[str, Any]) -> None:
    assert problems(compose, ROOT) == []


def _fault(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def plant(services: dict[str, Any]) -> None:
        for key in keys[:-1]:
            services = services[key]
        services[keys[-1]] = value

    return plant


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def plant(services: dict[str, Any]) -> None:
        for key in keys[:-1]:
            services = services[key]
        del services[keys[-1]]

    return plant


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "volume": (_fault("redis", "volumes", value=["redis:/data"]),
               "redis: volume redis is not declared"),
    "setting": (_fault("prefect-server", "environment", "PREFECT_SERVER_DOCKET_ADDRESS", value="x"),
                "prefect-server: PREFECT_SERVER_DOCKET_ADDRESS is no setting of Prefect"),
    "missing setting": (_without("prefect-services", "environment", "PREFECT_REDIS_MESSAGING_URL"),
                        "prefect-services: PREFECT_REDIS_MESSAGING_URL is missing"),
    "module": (_fault("prefect-server", "environment", "PREFECT_SERVER_EVENTS_MESSAGING_CACHE",
                      value="prefect_redis.caching"),
               "PREFECT_SERVER_EVENTS_MESSAGING_CACHE: no module prefect_redis.caching"),
    "port": (_fault("jupyter", "ports", value=["${JUPYTER_PORT:-8888}:8888"]),
             "jupyter: port ${JUPYTER_PORT:-8888}:8888 is not on 127.0.0.1"),
    "program": (_fault("dask-scheduler", "command", value=["dask-scheduler-of-ours"]),
                "command dask-scheduler-of-ours is none of the installed ones"),
    "entry point": (_fault("init", "command", value=["python", "-m", "rdd_flows.stack.begin"]),
                    "init: no module rdd_flows.stack.begin"),
    "option": (_fault("prefect-worker", "command", value=["prefect", "worker", "start", "--pul"]),
               "prefect-worker: --pul is not what 'rdd stack up' runs"),
    "file": (_fault("init", "command", value=["python", "-m", "json", "--prefect-file", "x.yaml"]),
             "init: no file x.yaml"),
    "dockerfile": (_fault("init", "build", "dockerfile", value="docker/Dockerfile"),
                   "docker/Dockerfile: no such Dockerfile"),
    "build argument": (_fault("init", "build", "args", value={"TORCH_VERSION": "cpu"}),
                       "build argument TORCH_VERSION is not in the Dockerfile"),
    "tag": (_fault("redis", "image", value="redis:latest"), "redis: image redis:latest is not"),
    "dependency": (_fault("jupyter", "depends_on", value={"minio": {"condition": "x"}}),
                   "jupyter: depends on minio, which does not exist"),
    "profile": (_fault("jupyter", "depends_on", "dask-worker",
                       value={"condition": "service_healthy"}),
                "jupyter: depends on dask-worker, which is in other profiles"),
    "condition": (_fault("prefect-worker", "depends_on", "init",
                         value={"condition": "service_healthy"}),
                  "prefect-worker: waits for init to be healthy, which has no health check"),
    "health": (_without("postgres", "healthcheck"), "postgres: has no health check"),
    "host": (_fault("prefect-server", "environment", "PREFECT_SERVER_DOCKET_URL",
                    value="redis://default:${REDIS_PASSWORD:?x}@cache:6379/1"),
             "prefect-server: address of cache, which is no service"),
    "variable": (_fault("redis", "environment", "REDISCLI_AUTH", value="${REDIS_AUTH:?x}"),
                 "REDIS_AUTH is not in .env.example"),
    "secret": (_fault("jupyter", "environment", "JUPYTER_TOKEN", value="${JUPYTER_TOKEN:-rdd}"),
               "JUPYTER_TOKEN has to be required"),
    "authentication": (_without("prefect-server", "environment", "PREFECT_SERVER_API_AUTH_STRING"),
                       "serves the Prefect API without"),
    "gpu": (_fault("dask-worker-gpu", "profiles", value=["cpu"]), "GPU without the profile gpu"),
    "limits": (_without("s3", "deploy", "resources", "limits"), "s3: has no limits"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(compose: dict[str, Any], fault: str) -> None:
    # By way of YAML: anchors make services share dictionaries.
    tree = {**compose, "services": {k: copy.deepcopy(v) for k, v in compose["services"].items()}}
    plant, expected = FAULTS[fault]
    plant(tree["services"])
    found = problems(tree, ROOT)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("Dockerfile", "COPY pipeline ", "COPY pipelines ", "no file pipelines"),
        ("Dockerfile", "USER rdd", "USER root", "runs as root"),
        ("Dockerfile", "--from=build", "--from=builder", "no stage --from=builder"),
        ("Dockerfile", "slim-bookworm\n\n", "slim-bookworm\n\nFROM debian:12\n", "neither"),
        ("Dockerfile", "python:3.11.14-slim", "python:3-slim", "is not pinned"),
        (".dockerignore", "!flows\n", "", "flows is left out"),
        (".env.example", "REDIS_PASSWORD=", "REDIS_PASSWORD=secret", "holds a value"),
        (".env.example", "GPUS=1", "GPU_COUNT=1", "GPU_COUNT is not used"),
        (".env.example", "COMPOSE_PROFILES=cpu", "COMPOSE_PROFILES=cpus", "no profile cpus"),
    ],
)
def test_a_fault_in_the_files_beside_it_is_found(
    compose: dict[str, Any], tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    # What Dockerfile and commands name.
    for path in ROOT.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    found = problems(compose, tmp_path)
    assert any(expected in problem for problem in found), found
