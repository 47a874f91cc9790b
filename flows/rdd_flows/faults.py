"""Which faults pass by themselves, and how a task waits for that."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from rdd_flows.server import is_away
from rdd_pipeline.errors import ClusterUnavailableError
from rdd_storage import RddError, StoreUnavailableError

_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether trying again later may help: a network, an object store or a cluster is away.

    A wrong configuration, damaged data, a full disk or refused access are not of that kind, nor is
    a bug.
    """
    return any(_is_transient(link) for link in _chain(error))


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, StoreUnavailableError | ClusterUnavailableError) or is_away(error):
        return True
    if isinstance(error, RddError):
        return False  # what it stands for is decided by its cause
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return isinstance(error, ConnectionError | TimeoutError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # An error that says what is wrong with the input stays, whatever led to it.
        if isinstance(error, RddError) and not isinstance(error, OSError):
            return
        error = error.__cause__


def _retry(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    error = state.data
    return isinstance(error, BaseException) and is_transient(error)


RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(15),
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": _retry,
}
"""Arguments of a task: again after 15, 30, 60 and 120 seconds, after transient faults only."""
