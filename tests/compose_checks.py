"""What the compose schema cannot say about docker-compose.yml, Dockerfile and .env.example.

Names that refer to something must refer to something that exists: services, volumes, conditions,
profiles, variables, settings of Prefect, commands, files; and nothing may be open to the network.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields
from prefect_redis.cleanup_queue import RedisWorkerCleanupQueueSettings
from prefect_redis.client import RedisMessagingSettings

from rdd_flows.stack.services import waves
from rdd_flows.stack.state import Stack

Tree = dict[str, Any]

ONE_SHOT = {"init"}
ALWAYS = "default"
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)((?::[-?])[^}]*)?\}")
_ADDRESS = re.compile(r"\b(?:https?|tcp|redis|postgresql(?:\+\w+)?)://(?:[^@/\s]*@)?([\w.-]+):\d+")
_HERE = {"127.0.0.1", "0.0.0.0", "localhost"}


def problems(compose: Tree, root: Path) -> list[str]:
    """Everything that is wrong with a compose file and the files beside it."""
    found: list[str] = []
    services: dict[str, Tree] = compose["services"]
    for name, service in services.items():
        for check in (_image, _volumes, _dependencies, _settings, _exposure, _command, _limits):
            found += [f"{name}: {text}" for text in check(name, service, compose, root)]
    used = {source for service in services.values() for source in _named_volumes(service)}
    found += [f"volume {name} is not used" for name in compose["volumes"] if name not in used]
    found += _variables(compose, root)
    found += dockerfile_problems(root)
    found += _native_parity(services)
    return found


def _profiles(service: Tree) -> set[str]:
    return set(service.get("profiles", [ALWAYS]))


def _ours(service: Tree) -> bool:
    return "build" in service


def _image(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    if _ours(service):
        build = service["build"]
        path = root / build["context"] / build["dockerfile"]
        if not path.is_file():
            yield f"{path}: no such Dockerfile"
            return
        declared = set(re.findall(r"^ARG (\w+)", path.read_text(), re.MULTILINE))
        for argument in set(build["args"]) - declared:
            yield f"build argument {argument} is not in the Dockerfile"
    elif not re.fullmatch(r"[\w./-]+:\d[\w.-]*", service["image"]):
        yield f"image {service['image']} is not pinned to a version"


def _named_volumes(service: Tree) -> list[str]:
    sources = [volume.rpartition("}:")[0] + volume.rpartition("}:")[2].partition(":")[0]
               for volume in service.get("volumes", [])]  # fmt: skip
    return [source for source in sources if not source.startswith((".", "/", "$"))]


def _volumes(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    for source in _named_volumes(service):
        if source not in compose["volumes"]:
            yield f"volume {source} is not declared"


def _dependencies(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    services = compose["services"]
    for other, how in service.get("depends_on", {}).items():
        if other not in services:
            yield f"depends on {other}, which does not exist"
            continue
        target = services[other]
        if ALWAYS not in _profiles(target) and not _profiles(service) <= _profiles(target):
            yield f"depends on {other}, which is in other profiles"
        condition = how["condition"]
        if condition == "service_healthy" and "healthcheck" not in target:
            yield f"waits for {other} to be healthy, which has no health check"
        if (condition == "service_completed_successfully") != (other in ONE_SHOT):
            yield f"waits for {other} by the wrong condition {condition}"
    strings = json.dumps([service.get("environment", {}), service.get("command", "")])
    for host in _ADDRESS.findall(_VARIABLE.sub("x", strings)):
        if host not in services and host not in _HERE:
            yield f"address of {host}, which is no service"


def _prefect_names() -> set[str]:
    names = set(_get_settings_fields(Settings))
    for model in (RedisMessagingSettings, RedisWorkerCleanupQueueSettings):
        prefix = str(model.model_config["env_prefix"])
        names |= {f"{prefix}{field}".upper() for field in model.model_fields}
    return names


_KNOWN = _prefect_names()


def _settings(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    environment: Mapping[str, str] = service.get("environment", {})
    for variable, value in environment.items():
        if variable.startswith("PREFECT_") and variable not in _KNOWN:
            yield f"{variable} is no setting of Prefect"
        if str(value).startswith("prefect_redis.") and not importlib.util.find_spec(str(value)):
            yield f"{variable}: no module {value}"
    if "PREFECT_API_URL" in environment and "PREFECT_API_AUTH_STRING" not in environment:
        yield "uses the Prefect API without PREFECT_API_AUTH_STRING"
    command = service.get("command", [])
    if command[:3] == ["prefect", "server", "start"] and (
        "PREFECT_SERVER_API_AUTH_STRING" not in environment
    ):
        yield "serves the Prefect API without PREFECT_SERVER_API_AUTH_STRING"
    if command[:1] == ["jupyter"] and "JUPYTER_TOKEN" not in environment:
        yield "serves JupyterLab without JUPYTER_TOKEN"


def _exposure(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"port {port} is not on 127.0.0.1"
    if service.get("privileged") or service.get("network_mode") == "host":
        yield "is not kept apart from the machine"
    if _ours(service) and service.get("cap_drop") != ["ALL"]:
        yield "keeps capabilities"


def _command(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    if not _ours(service):
        return
    checked = service.get("healthcheck", {}).get("test", ["CMD", "python", "-m", "json"])
    for command in (service["command"], checked[1:]):
        program = command[0]
        if not shutil.which(program, path=str(Path(sys.executable).parent)):
            yield f"command {program} is none of the installed ones"
        if program == "python" and not importlib.util.find_spec(command[2]):
            yield f"no module {command[2]}"
        for option, value in itertools.pairwise(command):
            if option == "--prefect-file" and not (root / value).is_file():
                yield f"no file {value}"


def _limits(name: str, service: Tree, compose: Tree, root: Path) -> Iterator[str]:
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    if not {"cpus", "memory"} <= set(limits):
        yield "has no limits of CPUs and memory"
    if name not in ONE_SHOT:
        if "healthcheck" not in service:
            yield "has no health check"
        if service.get("restart") != "unless-stopped":
            yield "is not started again"
    devices = service["deploy"]["resources"].get("reservations", {}).get("devices", [])
    if ("gpu" in _profiles(service)) != any("gpu" in each["capabilities"] for each in devices):
        yield "has a GPU without the profile gpu, or the profile without a GPU"


def _variables(compose: Tree, root: Path) -> Iterator[str]:
    text = json.dumps(compose)
    used = {name: default or "" for name, default in _VARIABLE.findall(text)}
    lines = (root / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    profiles = {name for service in compose["services"].values() for name in _profiles(service)}
    for profile in given.pop("COMPOSE_PROFILES", "").split(","):
        if profile not in profiles:
            yield f".env.example: no profile {profile}"
    for name in sorted(used.keys() - given.keys()):
        yield f"{name} is not in .env.example"
    for name in sorted(given.keys() - used.keys()):
        yield f".env.example: {name} is not used"
    for name, default in sorted(used.items()):
        secret = name.endswith(("PASSWORD", "TOKEN", "KEY"))
        if secret and not default.startswith(":?"):
            yield f"{name} has to be required"
        if secret and given.get(name):
            yield f".env.example: {name} holds a value"


def dockerfile_problems(root: Path) -> Iterator[str]:
    """What is wrong with the Dockerfile and .dockerignore."""
    text = (root / "Dockerfile").read_text().replace("\\\n", " ")
    ignored = [line for line in (root / ".dockerignore").read_text().splitlines()
               if line and not line.startswith("#")]  # fmt: skip
    stages: list[str] = []
    user = "root"
    for line in text.splitlines():
        words = line.split()
        match words[:1]:
            case ["ARG"] if words[1].startswith("PYTHON_IMAGE="):
                if not re.fullmatch(r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-[\w-]+", words[1]):
                    yield f"Dockerfile: {words[1]} is not pinned"
            case ["FROM"]:
                if words[1] != "${PYTHON_IMAGE}" and words[1] not in stages:
                    yield f"Dockerfile: {words[1]} is neither the pinned base nor a stage"
                stages += words[3:4]
                user = "root"
            case ["COPY"]:
                source = next((w for w in words if w.startswith("--from=")), None)
                if source is not None:
                    if source.removeprefix("--from=") not in stages:
                        yield f"Dockerfile: no stage {source}"
                    continue
                for path in [word for word in words[1:-1] if not word.startswith("--")]:
                    if not (root / path).exists():
                        yield f"Dockerfile: no file {path}"
                    if _is_ignored(path, ignored):
                        yield f"Dockerfile: {path} is left out by .dockerignore"
            case ["USER"]:
                user = words[1]
    if user in ("root", "0"):
        yield "Dockerfile: the image runs as root"


def _is_ignored(path: str, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        if fnmatch.fnmatch(path.removeprefix("./"), pattern.removeprefix("!")):
            ignored = not pattern.startswith("!")
    return ignored


def _native_parity(services: dict[str, Tree]) -> Iterator[str]:
    """The containers run what ``rdd stack up`` runs, which is tested with real processes."""
    stack = Stack(
        root=Path("/stack"),
        mark="mark",
        ports=dict.fromkeys(("postgres", "redis", "s3", "prefect", "worker", "dask",
                             "dask-dashboard"), 1),
        secrets=dict.fromkeys(("postgres", "redis", "prefect", "s3"), "secret"),
        workers=1,
        s3="moto",
    )  # fmt: skip
    native = {service.name: service for wave in waves(stack) for service in wave}
    pairs = {"prefect-server": "prefect-server", "prefect-services": "prefect-services",
             "prefect-worker": "prefect-worker", "dask-scheduler": "dask-scheduler",
             "dask-worker": "dask-worker-0"}  # fmt: skip
    for name, twin in pairs.items():
        command = services[name]["command"]
        known = native[twin].command()
        for word in command[1:]:
            if (word.startswith("--") or word.isalpha()) and word not in known:
                yield f"{name}: {word} is not what 'rdd stack up' runs"
    ignored = {"PREFECT_HOME", "PREFECT_PROFILES_PATH"}
    for name in ("prefect-server", "prefect-services", "prefect-worker"):
        own = native[name].environment.items() - os.environ.items()
        wanted = {key for key, _ in own if key in _KNOWN} - ignored
        for key in sorted(wanted - services[name]["environment"].keys()):
            yield f"{name}: {key} is missing, which 'rdd stack up' sets"
