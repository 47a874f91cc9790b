"""One build of a store at a time, for all flow runs of a Prefect server."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency

from rdd_flows.server import server_url

logger = logging.getLogger("rdd.flows")

_LEASE_SECONDS = 60.0  # the least that Prefect takes; the slot of a killed run is free after it
_PATIENCE = 1.0


def limit_name(path: str) -> str:
    """Name of the concurrency limit of a store.

    Args:
        path: Path or URL of the store.
    """
    name = path.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    # Two folders may hold stores of one name.
    return f"rdd-store-{name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


@contextmanager
def store_slot(path: str) -> Iterator[None]:
    """Hold the store's slot; waits while another flow run has it.

    It shows in Prefect who waits for whom, and lets a second build wait where the store's own lease
    would refuse it. That lease is what guards the store: a build goes on when the server is lost.
    A server of this process's own has nobody to share with; there the lease alone does.

    Args:
        path: Path or URL of the store.
    """
    if server_url() is None:
        yield
        return
    name = limit_name(path)
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 1)

    def slot(timeout: float | None) -> AbstractContextManager[None]:
        return concurrency(
            name,
            strict=True,
            timeout_seconds=timeout,
            lease_duration=_LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )

    held = slot(_PATIENCE)
    try:
        held.__enter__()
    except TimeoutError:
        logger.info("another flow run builds %s; waiting for it (limit %s)", path, name)
        held = slot(None)
        held.__enter__()
    try:
        yield
    finally:
        try:
            held.__exit__(None, None, None)
        except Exception as error:  # what is built is built; the slot is free after a minute
            logger.warning("the limit %s could not be given back: %s", name, error)
