"""Threads and forks: what a process may do once libraries have started threads of their own.

Tensorstore ends a process that was forked after its threads started, and obstore hangs in one. The
check here turns both into an error that says what to do.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from rdd_storage.errors import ForkedProcessError

_REQUESTS = 32  # waiting for an object store costs a thread and no processor
_started_in: int | None = None  # process in which the libraries' threads run


def check_process() -> None:
    """Refuse to go on in a process forked from one that has read or written a store.

    Raises:
        ForkedProcessError: This process is such a one.
    """
    global _started_in
    pid = os.getpid()
    if _started_in is None:
        _started_in = pid
    elif _started_in != pid:
        raise ForkedProcessError(
            f"a map store was used in process {_started_in}, which was then forked into {pid}: "
            "expected workers started by 'forkserver' or 'spawn', got 'fork'; give "
            "multiprocessing_context='forkserver' to the DataLoader, or use "
            "multiprocessing.get_context('forkserver')"
        )


@cache
def request_pool() -> ThreadPoolExecutor:
    """The threads of this process that wait for object stores.

    Call :func:`check_process` first: the threads do not live on in a fork.
    """
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="rdd-storage")
