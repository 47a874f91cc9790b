"""Several training processes, as ``torchrun`` or ``accelerate launch`` start them.

Importing this module is cheap. With one process every function here does nothing.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """Number of training processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, counted from 0 over all machines."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def join_processes(device: torch.device) -> None:
    """Connect the processes: through gloo on the CPU, NCCL on GPUs."""
    if world_size() > 1:
        from accelerate.state import PartialState

        PartialState(cpu=device.type == "cpu")


def leave_processes() -> None:
    """Undo :func:`join_processes` at the end of the work."""
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run a block in the main process, then in all others; after :func:`join_processes`."""
    if world_size() == 1:
        yield
        return
    from accelerate.state import PartialState

    with PartialState().main_process_first():
        yield


def wait_for_everyone() -> None:
    """Wait until all processes are here; after :func:`join_processes`."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def peak_memory_bytes() -> int:
    """Largest resident memory of this process, or of one of its children, so far."""
    usage = max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    )
    return usage * (1 if sys.platform == "darwin" else 1024)
