"""Batches on the device, copied there while the step before is computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

Batch = dict[str, Tensor]

_POLL_SECONDS = 0.1
_CLOSE_SECONDS = 10.0


class _Staged(NamedTuple):
    """A batch on the device, or why there is none."""

    batch: Batch
    copied: torch.cuda.Event | None
    error: BaseException | None


class DevicePrefetcher:
    """Takes batches from a loader and hands them out on a device.

    On a CUDA device a thread takes them and copies them on a stream of its own, two batches ahead
    at most, so that copies from page-locked memory run beside the computation. Elsewhere a batch
    is taken when it is asked for: workers of the loader are ahead already.

    Args:
        loader: Gives dicts of tensors.
        device: Where they are wanted.
        threaded: Take them in a thread; None does so on CUDA devices alone.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Tensor]],
        device: torch.device,
        *,
        threaded: bool | None = None,
    ) -> None:
        self.waited = 0.0
        """Seconds for which there was no batch to compute on; work that the device still had in
        that time is left out."""
        self._loader, self._device = loader, device
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self._threaded = self._stream is not None if threaded is None else threaded
        self._source: Iterator[Mapping[str, Tensor]] | None = None
        self._queue: queue.Queue[_Staged] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._threaded:
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()
        else:
            self._source = iter(self._loader)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._source = None
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def take(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: There are no more.
        """
        if self._source is not None:
            started = time.perf_counter()
            batch = self._copy(next(self._source))
            self.waited += time.perf_counter() - started
            return batch
        if self._queue.empty() and self._stream is not None:
            # Nothing to give the device: what it still has to do is no waiting for data.
            torch.cuda.current_stream(self._device).synchronize()
        started = time.perf_counter()
        staged = self._queue.get()
        self.waited += time.perf_counter() - started
        if staged.error is not None:
            raise staged.error
        if staged.copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(staged.copied)
            for tensor in staged.batch.values():
                tensor.record_stream(computing)  # its memory must not be reused before
        return staged.batch

    def _copy(self, batch: Mapping[str, Tensor]) -> Batch:
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def _fill(self) -> None:
        try:
            for batch in self._loader:
                if not self._put(self._stage(batch)):
                    return
            self._put(_Staged({}, None, StopIteration()))
        except BaseException as error:  # raised where the batch is asked for
            self._put(_Staged({}, None, error))

    def _stage(self, batch: Mapping[str, Tensor]) -> _Staged:
        if self._stream is None:
            return _Staged(self._copy(batch), None, None)
        with torch.cuda.stream(self._stream):
            moved = self._copy(batch)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return _Staged(moved, copied, None)

    def _put(self, staged: _Staged) -> bool:
        """Hand a batch over; False if nobody wants it any more."""
        while not self._closed.is_set():
            try:
                self._queue.put(staged, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
