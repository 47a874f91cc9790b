"""Flows started by a command."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdd_flows.environment import quiet_prefect
from rdd_pipeline.processes import world_size
from rdd_storage.errors import RddError


def require_one_process() -> None:
    """Refuse a launcher of several processes.

    Raises:
        ConfigError: There are several.
    """
    from rdd_pipeline.errors import ConfigError

    if world_size() > 1:
        raise ConfigError(
            "torchrun and accelerate launch start 'rdd train' and 'rdd teach' alone; start this "
            "command once, without them"
        )


def with_log(path: Path, function: Callable[[], Any]) -> Any:
    """Call a flow; a failure names the log file."""
    from rdd_flows.server import lost_server, require_server

    quiet_prefect()
    require_server()
    try:
        return function()
    except RddError as error:
        raise LoggedError(path, error) from error
    except Exception as error:
        logging.getLogger("rdd").debug("unexpected error", exc_info=error)
        raise LoggedError(path, lost_server(error) or error) from error


class LoggedError(Exception):
    """An error of a flow, with its log file."""

    def __init__(self, log: Path, error: Exception) -> None:
        super().__init__(str(error))
        self.log = log
        self.error = error
