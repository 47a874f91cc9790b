"""A Dask worker for each GPU of this machine or container: ``... gpu_workers tcp://HOST:PORT``.

Each is a process that sees its own GPU alone and offers the resource ``GPU``. When one ends, all
are ended, so that whatever watches over this process starts all of them again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

FIRST_DASHBOARD = 8790
"""Port of 127.0.0.1 on which the first worker answers; the others have the following ones."""
_GRACE = 30.0


def run_workers(address: str, gpus: Sequence[str], options: Sequence[str] = ()) -> int:
    """Run the workers until one ends or this process is asked to end; returns an exit code.

    Args:
        address: Address of the Dask scheduler.
        gpus: What ``CUDA_VISIBLE_DEVICES`` is to be for each worker.
        options: Further options of ``dask worker``.
    """
    running: list[subprocess.Popen[bytes]] = []
    try:
        for index, gpu in enumerate(gpus):
            dashboard = f"127.0.0.1:{FIRST_DASHBOARD + index}"
            command = [sys.executable, "-m", "dask", "worker", address, "--nthreads", "2",
                       "--resources", "GPU=1", "--dashboard-address", dashboard,
                       "--local-directory", "/tmp", *options]  # fmt: skip
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            running.append(subprocess.Popen(command, env=environment))
        while all(worker.poll() is None for worker in running):
            time.sleep(0.5)
        return 1
    finally:
        for worker in running:
            worker.terminate()
        deadline = time.monotonic() + _GRACE
        for worker in running:
            try:
                worker.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.kill()


def _visible() -> list[str]:
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> int:
    """Command line; further options go to ``dask worker``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="address of the Dask scheduler")
    parser.add_argument("--gpus", help="such as 0,1; by default all that torch sees")
    options, others = parser.parse_known_args()
    gpus = options.gpus.split(",") if options.gpus else _visible()
    if not gpus:
        sys.exit("expected a GPU, but torch sees none: check the driver, and TORCH=cuda")
    signal.signal(signal.SIGTERM, _terminate)
    return run_workers(options.address, gpus, others)


if __name__ == "__main__":
    sys.exit(main())
