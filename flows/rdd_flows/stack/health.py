"""Whether a service answers; as ``python -m rdd_flows.stack.health URL`` for containers, too.

Of ``http`` and ``https`` URLs the answer must be a success; ``docket`` asks whether Prefect's
background services have shown themselves in the Redis of ``PREFECT_SERVER_DOCKET_URL``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

_TIMEOUT = 5.0
_ALIVE = 15.0  # seconds; they show themselves every two
# Prefect's background services name their queue so, whatever PREFECT_SERVER_DOCKET_NAME says.
_WORKERS = "prefect:workers"


def http_answers(url: str) -> bool:
    """Whether a GET of the URL succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return bool(200 <= answer.status < 300)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def http_json(url: str) -> Any:
    """The JSON that a URL answers with; None where it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return json.load(answer)
    except (OSError, urllib.error.URLError, ValueError):
        return None


def redis_answers(url: str) -> bool:
    """Whether Redis answers, with the password in the URL."""
    from redis import Redis, RedisError

    try:
        with Redis.from_url(url, socket_timeout=_TIMEOUT) as redis:
            return bool(redis.ping())
    except (RedisError, OSError):
        return False


def background_services_run(docket_url: str) -> bool:
    """Whether Prefect's background services have shown themselves in Redis lately."""
    from redis import Redis, RedisError

    try:
        with Redis.from_url(docket_url, socket_timeout=_TIMEOUT) as redis:
            return bool(redis.zcount(_WORKERS, time.time() - _ALIVE, "+inf"))
    except (RedisError, OSError):
        return False


def main(what: str) -> int:
    """Exit code for a container's health check."""
    if what == "docket":
        return 0 if background_services_run(os.environ["PREFECT_SERVER_DOCKET_URL"]) else 1
    return 0 if http_answers(what) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
