"""Starts builds of several processes by fork, so that hundreds can be killed in a test's time.

Run as a script, it imports everything once and then obeys one JSON command a line:
``{"do": "build", ...}`` starts a build and answers its process id, which is also the id of its
process group; ``{"do": "wait"}`` answers the exit statuses of all processes once they have ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import build_store

from rdd_storage import ImageRecord, LeaseLostError, MapWriter, StoreLockedError

SCHEMA = replace(build_store.SCHEMA, aux_hardness=False, logits=False)
IMAGES = 9
WORKERS = 2
LEASE_LOST = 40  # exit status of a process that was told to stop
LOCKED = 42  # exit status of a process that another build kept out
ALONE = 41  # exit status of a process whose coordinator or worker was killed
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
_WRITES = {"os.rename", "os.link", "os.mkdir", "os.remove"}


def images(version: int) -> list[ImageRecord]:
    """Version 2 removes an image, changes one and adds four."""
    records = build_store.records(IMAGES)
    if version == 1:
        return records
    records[3] = replace(records[3], digest=f"{99:064x}")
    return records[:1] + records[2:] + build_store.records(IMAGES + 4)[IMAGES:]


def maps_of(writer: MapWriter, shard: int) -> list[Any]:
    return [
        replace(build_store.maps_of(record), aux_hardness=None, logits=None)
        for record in writer.shard_records(shard)
    ]


def plan(path: str, version: int) -> MapWriter:
    return MapWriter.create(
        path,
        schema=SCHEMA,
        images=images(version),
        identity=build_store.IDENTITY,
        grow=version > 1,
    )


def build(path: str, version: int) -> None:
    """The same without processes or interruptions."""
    writer = plan(path, version)
    for shard in writer.pending_shards():
        writer.write_shard(shard, maps_of(writer, shard))
    writer.publish()


def die_as_told(command: dict[str, Any], name: str) -> None:
    """Kill this process just before it changes the store for the n-th time from now."""
    left = command["deaths"].get(name, 0)
    path = command["path"]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event in _WRITES or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wx+")
        )
        if writes and str(arguments[0]).startswith(path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def work(command: dict[str, Any], index: int, orders: int, answers: int) -> None:
    with open(orders, "rb") as pipe:
        content = pipe.read()
    if not content:
        return  # the coordinator was killed before it had anything to do
    writer: MapWriter
    writer, shards = pickle.loads(content)
    die_as_told(command, f"worker {index}")
    for shard in shards:
        writer.write_shard(shard, maps_of(writer, shard))
    os.write(answers, b"1")


def coordinate(command: dict[str, Any]) -> int:
    """Plan, let the workers write under one lease, publish."""
    os.setsid()
    answers, answering = os.pipe()
    orders = []
    for index in range(WORKERS):
        reading, writing = os.pipe()
        if os.fork() == 0:  # before any thread is started
            for descriptor in (writing, answers, *orders):
                os.close(descriptor)
            os._exit(run(work, command, index, reading, answering))
        os.close(reading)
        orders.append(writing)
    os.close(answering)
    die_as_told(command, "coordinator")
    writer = plan(command["path"], command["version"])
    with writer.lease(wait=command["wait"]):
        pending = writer.pending_shards()
        for index, descriptor in enumerate(orders):
            os.write(descriptor, pickle.dumps((writer, pending[index::WORKERS])))
            os.close(descriptor)
        with open(answers, "rb") as pipe:  # noqa: PTH123
            if len(pipe.read()) < WORKERS:
                return ALONE
        writer.publish()
    return 0


def run(function: Any, *arguments: Any) -> int:
    try:
        return function(*arguments) or 0
    except LeaseLostError:
        return LEASE_LOST
    except StoreLockedError:
        return LOCKED
    except BrokenPipeError:
        return ALONE
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> None:
    gc.freeze()  # so that collections in the forks do not copy what was imported
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "build":
            pid = os.fork()
            if pid == 0:
                os._exit(run(coordinate, command))
            answer: Any = pid
        else:
            answer = []
            while True:
                try:
                    _, status = os.wait()
                except ChildProcessError:
                    break
                answer.append(os.waitstatus_to_exitcode(status))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
