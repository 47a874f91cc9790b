"""Adds logits to a store by processes that are killed, each a little later than the one before.

Started with the path of a store; prints the exit statuses. The last process is not killed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import build_store
import crash_builds

from rdd_storage import ImageLogits, MapAddition, MapReader


def add(path: str) -> None:
    writer = MapAddition.plan(path)
    with writer.lease():
        for shard in writer.pending_shards():
            logits = [
                ImageLogits(image_id=r.image_id, logits=build_store.maps_of(r).logits)
                for r in writer.shard_records(shard)
            ]
            writer.write_shard(shard, logits)
        writer.publish()


def killed_after(path: str, changes: int) -> int:
    """Exit status of a process that is killed just before its n-th change of the store."""
    pid = os.fork()
    if pid == 0:
        command = {"path": path, "deaths": {"adder": changes}}
        crash_builds.die_as_told(command, "adder")
        os._exit(crash_builds.run(add, path))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(path: str) -> dict[str, int]:
    return {
        str(file): file.stat().st_mtime_ns
        for file in Path(path).rglob("*")
        if "/c/" in str(file) and file.is_file() and file.suffix != ".partial"
    }


def main(path: str) -> None:
    statuses = []
    while not statuses or statuses[-1] != 0:
        before = finished(path)
        statuses.append(killed_after(path, 1 + len(statuses)))
        if not before.items() <= finished(path).items():
            raise SystemExit("an object that was there has been written again")
        with_logits = "logits" in MapReader(path).arrays
        if with_logits != (MapReader(path).version == 2):
            raise SystemExit("logits are visible in another version than their own")
    sys.stdout.write(" ".join(map(str, statuses)))


if __name__ == "__main__":
    main(sys.argv[1])
