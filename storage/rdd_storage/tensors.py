"""Arrays opened for reading, in local folders through tensorstore."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy.typing as npt

from rdd_storage.chunks import Slices
from rdd_storage.errors import StoreDamagedError
from rdd_storage.location import Location
from rdd_storage.processes import check_process
from rdd_storage.ranged import RangedArray


class Pending(Protocol):
    """A read under way."""

    def result(self) -> npt.NDArray[Any]:
        """Wait for the data.

        Raises:
            ValueError, OSError: It is missing or damaged.
            StoreUnavailableError, StoreAccessError: The place cannot be read.
        """


class OpenArray(Protocol):
    """An array that is ready to be read."""

    def read(self, selection: Slices) -> Pending:
        """Start to read; one slice of step 1 within the shape for each axis."""


class _TensorstoreArray:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def read(self, selection: Slices) -> Pending:
        pending: Pending = self._tensor[selection].read()
        return pending


def open_array(location: Location, name: str, metadata: dict[str, Any] | None) -> OpenArray:
    """An array that is read lazily; use it in this process only.

    Args:
        location: The store.
        name: Name of the array.
        metadata: Its consolidated metadata, which makes opening free of reads; None reads the
            array's own.

    Raises:
        ForkedProcessError: See :func:`~rdd_storage.processes.check_process`.
        StoreDamagedError: The metadata cannot be read.
    """
    check_process()
    kvstore = location.kvstore(name)
    try:
        if kvstore is None:
            return RangedArray(location, name, metadata)
        return _TensorstoreArray(_open_tensor(kvstore, metadata))
    except ValueError as error:
        raise StoreDamagedError(f"{location}: array '{name}' cannot be opened: {error}") from error


def _open_tensor(kvstore: dict[str, Any], metadata: dict[str, Any] | None) -> Any:
    import tensorstore  # after the check: a forked child must not get as far as its threads

    request: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": kvstore,
        # A missing chunk is an error here and never a block of fill values.
        "fill_missing_data_reads": False,
    }
    if metadata is not None:
        request["metadata"] = {k: v for k, v in metadata.items() if k != "attributes"}
    return tensorstore.open(
        request, open=True, read=True, assume_metadata=metadata is not None, context=_context()
    ).result()


@cache
def _context() -> Any:
    """One set of threads for all stores of a process.

    No cache of chunks: in training no image comes back soon, and each worker would hold its own.
    """
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
