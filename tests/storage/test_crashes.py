from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rdd_storage import MapReader, MapWriter, StoreNotFoundError, lease_holder, verify_store
from rdd_storage.layout import done_spec
from rdd_storage.marks import read_done

SCRIPT = Path(__file__).with_name("crash_builds.py")
KILLS = 200


class Builds:
    """A process that forks builds; see crash_builds.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        path: Path,
        version: int,
        *,
        deaths: dict[str, int] | None = None,
        wait: float = 60,
    ) -> int:
        """Start a build; its processes die at their n-th change of the store, as given."""
        return self.ask(
            do="build",
            path=str(path),
            version=version,
            deaths=deaths or {},
            wait=wait,
        )

    def wait(self) -> list[int]:
        """Exit statuses of all processes of all builds, once they have ended."""
        return self.ask(do="wait")


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Builds(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def crash_builds(building: ModuleType) -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash_builds", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(path: Path) -> dict[str, bytes]:
    """Every object but the lease, which says who built last."""
    return {
        name: file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not (name := file.relative_to(path).as_posix()).startswith("lease/")
    }


def finished(path: Path) -> dict[str, tuple[int, int]]:
    """Objects of all shards whose rows have a mark, with what tells that they were rewritten."""
    try:
        writer = MapWriter.open(path)
    except StoreNotFoundError:
        return {}
    size = writer.schema.shard_images
    rows = 10 * size  # more than any version has
    done = read_done(writer._head.location, done_spec(writer.schema, rows))
    shards = {str(row // size) for row in done.nonzero()[0]}
    return {
        name: (stat.st_ino, stat.st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
        and (name := file.relative_to(path).as_posix()).split("/")[0]
        in ("hardness", "discrepancy", "prediction", "confidence", "statistics", "done")
        and name.partition("/c/")[2].split("/")[0] in shards
        and file.suffix != ".partial"
        and "/discrepancy_bin/" not in name
        and "/region/" not in name
        and "/outcome/" not in name
        and "/quantity/" not in name
        and (stat := file.stat())
    }


def test_killed_builds_resume_to_the_same_bytes(
    builds: Builds, crash_builds: ModuleType, tmp_path: Path
) -> None:
    """Builds and extensions by three processes; SIGKILL of one of them, or of all, at any point."""
    expected: dict[int, dict[str, bytes]] = {}
    for version in (1, 2):
        began = time.perf_counter()
        crash_builds.build(str(tmp_path / "whole.zarr"), version)
        duration = time.perf_counter() - began
        expected[version] = contents(tmp_path / "whole.zarr")
        assert MapReader(tmp_path / "whole.zarr").summary() is not None
    allowed = {0, -signal.SIGKILL, crash_builds.ALONE, crash_builds.LEASE_LOST}
    rng = random.Random(20)
    kills = {"operation": 0, "all": 0, "orphans": 0}
    number = 0
    while sum(kills.values()) < KILLS:
        number += 1
        path = tmp_path / f"{number}.zarr"
        for version in (1, 2):
            kept: dict[str, tuple[int, int]] = finished(path)
            while True:
                way = rng.choice(["operation", "operation", "all", "orphans"])
                deaths = {
                    name: rng.randint(1, 130)
                    for name in ("coordinator", "worker 0", "worker 1")
                    if rng.random() < 0.6
                }
                if way == "operation":
                    builds.start(path, version, deaths=deaths)
                else:
                    group = builds.start(path, version)
                    time.sleep(rng.uniform(0, 0.7) * duration)
                    try:
                        if way == "all":
                            os.killpg(group, signal.SIGKILL)
                        else:
                            os.kill(group, signal.SIGKILL)
                            # The workers live on beside those of the next build.
                            builds.start(path, version, deaths=deaths)
                    except ProcessLookupError:
                        pass  # not yet a group of its own, or at its end
                statuses = builds.wait()
                assert set(statuses) <= allowed
                killed = statuses.count(-signal.SIGKILL)
                kills[way] += min(killed, 1) if way == "all" else killed
                now = finished(path)
                assert kept.items() <= now.items(), "a finished shard was written again"
                kept = now
                for name in kept:
                    assert (path / name).read_bytes() == expected[version].get(
                        name, expected[1].get(name)
                    )
                if 0 in statuses and is_published(path, version):
                    break
            assert contents(path) == expected[version]
    assert min(kills.values()) >= KILLS // 10, kills
    assert verify_store(path).ok


def test_a_second_build_is_kept_out_or_waits(
    builds: Builds, crash_builds: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "s.zarr"
    writer = crash_builds.plan(str(path), 1)
    with writer.lease():
        builds.start(path, 1, wait=0)
        assert builds.wait().count(crash_builds.LOCKED) == 1
        assert writer.pending_shards() == list(range(writer.num_shards))
        builds.start(path, 1, wait=60)
        for shard in writer.pending_shards()[1:]:
            writer.write_shard(shard, crash_builds.maps_of(writer, shard))
    assert set(builds.wait()) == {0}
    assert is_published(path, 1)
    assert lease_holder(path) is None


def test_two_builds_at_once_make_one_store(
    builds: Builds, crash_builds: ModuleType, tmp_path: Path
) -> None:
    crash_builds.build(str(tmp_path / "whole.zarr"), 1)
    for wait in (0, 60):
        path = tmp_path / f"{wait}.zarr"
        for _ in range(2):
            builds.start(path, 1, wait=wait)
        statuses = set(builds.wait())
        assert 0 in statuses
        assert statuses <= ({0} if wait else {0, crash_builds.LOCKED})
        assert contents(path) == contents(tmp_path / "whole.zarr")


def is_published(path: Path, version: int) -> bool:
    try:
        return MapReader(path).version == version
    except StoreNotFoundError:
        return False
