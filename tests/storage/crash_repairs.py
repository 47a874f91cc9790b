"""Repairs stores by processes that are killed, each just before another change of its store.

Started with the paths of equally damaged stores, which are repaired at once: the later in the
list, the later the repair is killed. Prints the exit statuses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import crash_builds

from rdd_storage import repair_store


def moment(place: int) -> int:
    """Closer at first, where steps are short; of the four changes of a written object, each."""
    return 4 + place + 2 * place**2


def repair(path: str) -> None:
    repair_store(path)


def started(path: str, changes: int) -> int:
    """Process id of a repair that is killed just before its n-th change of the store."""
    pid = os.fork()
    if pid == 0:
        crash_builds.die_as_told({"path": path, "deaths": {"repair": changes}}, "repair")
        os._exit(crash_builds.run(repair, path))
    return pid


def main(paths: list[str]) -> None:
    pids = [started(path, moment(place)) for place, path in enumerate(paths)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.stdout.write(" ".join(map(str, statuses)))


if __name__ == "__main__":
    main(sys.argv[1:])
