from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
import zarr

from rdd_storage import (
    LeaseInfo,
    LeaseLostError,
    MapWriter,
    StoreIncompleteError,
    StoreLockedError,
    StoreMismatchError,
    lease_holder,
    store_status,
)
from rdd_storage.lease import LEASE_KEY, hold_lease, read_lease
from rdd_storage.location import Location, locate

PLACES = ["local", "memory"]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A local path, or the URL of an object store, with the same name for one test."""
    if request.param == "local":
        return str(tmp_path / "s.zarr")
    return f"memory://{tmp_path.name}/s.zarr"


def begin(building: ModuleType, path: str | Path) -> MapWriter:
    return MapWriter.create(
        path, schema=building.SCHEMA, images=building.records(), identity=building.IDENTITY
    )


def write(building: ModuleType, writer: MapWriter, *shards: int) -> None:
    for shard in shards:
        writer.write_shard(shard, [building.maps_of(r) for r in writer.shard_records(shard)])


def elsewhere(seconds: float) -> LeaseInfo:
    """The lease of a process of another machine that is never renewed."""
    now = datetime.now(UTC)
    return LeaseInfo(
        host="node7",
        pid=4711,
        since=now,
        expires=now + timedelta(seconds=seconds),
        token="theirs",
        machine="another",
        started="1",
    )


def take_over(location: Location, by: LeaseInfo) -> None:
    current = location.get_with_token(LEASE_KEY)
    assert current is not None
    assert location.replace_if(LEASE_KEY, by.encode(), current[1])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning and publishing give up at once where another holds the store."""
    monkeypatch.setattr("rdd_storage.open_version.BRIEF_WAIT", 0.0)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_one_holds_the_store_and_others_learn_who(building: ModuleType, place: str) -> None:
    writer, other = begin(building, place), begin(building, place)
    with writer.lease() as lease:
        assert lease_holder(place) == lease.info
        assert store_status(place).holder == lease.info
        message = rf"process {lease.info.pid} on .* \(since 20.* UTC, lease until 20.* UTC\)"
        with pytest.raises(StoreLockedError, match=message), other.lease():
            pass
        with pytest.raises(StoreLockedError), other.lease(wait=0.2):
            pass
    assert lease_holder(place) is None
    with other.lease():
        assert lease_holder(place) is not None


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.usefixtures("impatient")
def test_the_lease_of_a_holder_that_went_silent_runs_out(building: ModuleType, place: str) -> None:
    writer = begin(building, place)
    take_over(locate(place), elsewhere(seconds=3600))
    with pytest.raises(StoreLockedError, match="process 4711 on node7"), writer.lease():
        pass
    with pytest.raises(StoreLockedError, match="process 4711 on node7"):
        begin(building, place).reopen_shards([0])
    take_over(locate(place), elsewhere(seconds=1))
    with writer.lease(wait=60):
        holder = lease_holder(place)
        assert holder is not None
        assert holder.host != "node7"


def test_a_dead_process_of_this_machine_holds_nothing(building: ModuleType, tmp_path: Path) -> None:
    script = (
        "import os, sys; from rdd_storage.lease import hold_lease; "
        "from rdd_storage.location import locate\n"
        "with hold_lease(locate(sys.argv[1]), ttl=3600) as lease: os._exit(0)"
    )
    path = tmp_path / "s.zarr"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=120)
    left = read_lease(locate(path))
    assert left is not None
    assert left.expires > datetime.now(UTC) + timedelta(seconds=1800)
    assert lease_holder(path) is None
    writer = begin(building, path)
    with writer.lease() as lease:
        # A process id that was given to another process since is no sign of life either.
        reused = replace(lease.info, started="12")
        assert lease.info.in_force
        assert not reused.in_force


def test_a_lease_is_renewed(tmp_path: Path) -> None:
    location = locate(tmp_path / "s.zarr")
    with hold_lease(location, ttl=1.0) as lease:
        first = lease.info.expires
        deadline = time.monotonic() + 60
        while (info := read_lease(location)) is not None and info.expires <= first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert info is not None
        assert info.token == lease.info.token


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_who_lost_the_lease_stops_writing(building: ModuleType, place: str) -> None:
    writer = begin(building, place)
    with writer.lease():
        worker: MapWriter = pickle.loads(pickle.dumps(writer))
        write(building, worker, 0)
        take_over(locate(place), elsewhere(seconds=3600))
        for each in (writer, worker):
            with pytest.raises(LeaseLostError, match=r"node7.* took it over") as caught:
                write(building, each, 1)
            assert "shard 1" in caught.value.__notes__[0]
        with pytest.raises(LeaseLostError):
            writer.reopen_shards([0])
        assert writer.pending_shards() == [1, 2]
        take_over(locate(place), elsewhere(seconds=0))
        write(building, begin(building, place), 1, 2)  # no lease, no check
        with pytest.raises(LeaseLostError):
            writer.publish()
    assert not store_status(place).complete
    with pytest.raises(LeaseLostError, match="took it over"):
        write(building, worker, 1)


def test_workers_of_an_ended_build_stop(building: ModuleType, tmp_path: Path) -> None:
    writer = begin(building, tmp_path / "s.zarr")
    with writer.lease():
        worker: MapWriter = pickle.loads(pickle.dumps(writer))
    with pytest.raises(LeaseLostError, match="given back"):
        write(building, worker, 0)
    with writer.lease() as lease:
        ended = replace(lease.info, expires=datetime.now(UTC) - timedelta(seconds=1))
        take_over(locate(writer.path), ended)
        with pytest.raises(LeaseLostError, match="ran out"):
            write(building, writer, 0)
    write(building, writer, 0)
    assert writer.pending_shards() == [1, 2]


@pytest.mark.usefixtures("impatient")
def test_publishing_takes_the_lease_itself(building: ModuleType, tmp_path: Path) -> None:
    writer, other = begin(building, tmp_path / "s.zarr"), begin(building, tmp_path / "s.zarr")
    with pytest.raises(StoreIncompleteError):
        writer.publish()
    write(building, writer, 0, 1, 2)
    with other.lease():
        before = (tmp_path / "s.zarr" / "zarr.json").read_bytes()
        take_over(locate(writer.path), elsewhere(seconds=3600))
        with pytest.raises(StoreLockedError, match="node7"):
            writer.publish()
        assert (tmp_path / "s.zarr" / "zarr.json").read_bytes() == before
        take_over(locate(writer.path), elsewhere(seconds=0))
        writer.publish()
        assert not other.complete
    other.publish()  # finds that it is done
    assert other.complete


def test_who_waited_sees_what_was_published_meanwhile(building: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer, same = begin(building, path), begin(building, path)
    write(building, writer, 0, 1, 2)
    writer.publish()
    with same.lease():
        assert same.complete
        assert same.pending_shards() == []
    stale = MapWriter.extend(path, images=building.records(6))
    MapWriter.extend(path, images=building.records(7))
    with pytest.raises(StoreMismatchError, match="extend the store again"), stale.lease():
        pass


def test_a_damaged_lease_guards_nothing_and_zarr_knows_every_lease(
    building: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "s.zarr"
    writer = begin(building, path)
    (path / LEASE_KEY).write_bytes(b"{")
    assert lease_holder(path) is None
    with writer.lease():
        names = {name for name, _ in zarr.open_group(path, use_consolidated=False).members()}
        assert "lease" in names


@pytest.mark.parametrize(("wait", "ttl"), [(-1.0, 60.0), (0.0, 0.0)])
def test_bad_times(building: ModuleType, tmp_path: Path, wait: float, ttl: float) -> None:
    writer = begin(building, tmp_path / "s.zarr")
    lease = writer.lease(wait=wait, ttl=ttl)
    with pytest.raises(ValueError, match="expected wait >= 0 and ttl > 0"), lease:
        pass
