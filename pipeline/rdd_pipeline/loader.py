"""Loader processes: batches of the training stream, in order, whatever their number."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext

import torch
from torch.utils.data import DataLoader, Sampler

from rdd_pipeline.stream import MapStream


def make_loader(
    stream: MapStream,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches of a stream in order, from a position on; an incomplete last one is left out.

    With several training processes, each takes every ``processes``-th batch. Neither making nor
    using the loader draws from torch's global random numbers.

    Args:
        stream: What to load.
        batch_size: Samples per batch and process.
        start: Position of the first sample, counted over all processes.
        workers: Loader processes, started fresh (a fork would break open stores); 0 loads in this
            process.
        pin_memory: Put batches into page-locked memory, for asynchronous copies to a GPU.
        rank: Number of this process.
        processes: Number of training processes.

    Returns:
        A loader of dicts, as :class:`~rdd_pipeline.stream.MapStream` describes, with a batch
        dimension in front.
    """
    return DataLoader(
        stream,
        batch_sampler=_Batches(len(stream), batch_size, start, rank, processes),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context=_fresh_processes() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),
    )


class _Batches(Sampler[list[int]]):
    """Consecutive positions, dealt out to the processes batch by batch."""

    def __init__(self, length: int, batch_size: int, start: int, rank: int, processes: int) -> None:
        if not 0 <= rank < processes:
            raise ValueError(f"rank: expected 0 to {processes - 1}, got {rank}")
        self._batch_size, self._step = batch_size, batch_size * processes
        self._first = start + rank * batch_size
        self._count = max(0, (length - start) // self._step)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._count):
            first = self._first + batch * self._step
            yield list(range(first, first + self._batch_size))


def _fresh_processes() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once for all workers of all loaders: they then start in a fraction
    # of a second. Importing opens no store and starts no thread, so forking the server is safe.
    context.set_forkserver_preload([__name__])
    return context


def _end_with_training() -> None:
    """End this process when the training's was killed.

    A worker's parent is the server of :func:`_fresh_processes`, which lives as long as the worker
    does: torch's own watch over the parent would wait for ever.
    """
    training = multiprocessing.parent_process()
    if training is not None:
        multiprocessing.connection.wait([training.sentinel])
        os._exit(1)


def _start_worker(_: int) -> None:
    """Leave Ctrl-C to the training, and let a worker keep the memory it has freed.

    A terminal sends the signal to all processes, but the step under way needs its data. By
    default glibc hands the arrays of a sample back to the system and faults them in again for
    the next one, which costs about as much as resampling the image. Elsewhere nothing is done.
    """
    threading.Thread(target=_end_with_training, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**28)
        libc.mallopt(mmap_threshold, 2**25)
