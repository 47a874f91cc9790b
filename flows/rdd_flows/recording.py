"""What a flow leaves beside its results: log lines and progress, for people who watch."""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler

from rdd_flows.environment import log_to_file, stop_logging_to_file
from rdd_pipeline.config import RunConfig, load_config, parse_config
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.progress import current_reporter
from rdd_pipeline.run_images import forget_digests

logger = logging.getLogger("rdd.flows")

LOG_FILE = Path("logs") / "rdd.log"

_EVERY_SECONDS = 2.0  # between two updates of Prefect's progress
_SHARD_SECONDS = 1.0  # between two lines about shards
_LAST_SECONDS = 5.0  # for the last update when the work is over
_ALWAYS_SHOWN = frozenset({"teacher pass", "soft labels"})


def settings_of(
    config: RunConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] | None = None
) -> RunConfig:
    """The configuration that a flow was given.

    Prefect hands over what its page or a deployment says as JSON; it is checked here, so that a
    mistake reads the same as on the command line.

    Args:
        config: A configuration, its keys and values, or the path of its YAML file.
        overrides: ``key.path=value`` for a YAML file.

    Raises:
        ConfigError: Keys or values are wrong; all of them are listed.
    """
    if isinstance(config, str | Path):
        return load_config(Path(config), overrides or ())
    if overrides:
        raise ConfigError("overrides: expected none where config is no file; change config itself")
    return config if isinstance(config, RunConfig) else parse_config(dict(config))


@contextmanager
def recorded(config: RunConfig) -> Iterator[None]:
    """Log to the run's file and to the flow run, and show bars as Prefect's progress artifacts.

    Files are digested anew within it.
    """
    forget_digests()  # an earlier run in this process may have seen other images
    said = logging.getLogger("rdd")
    if said.level == logging.NOTSET:  # under a Prefect worker nobody has set it
        said.setLevel(logging.DEBUG)
    in_file = log_to_file(config.run_dir / LOG_FILE)
    to_prefect = _FlowRunHandler()
    said.addHandler(to_prefect)
    reporter = current_reporter()
    progress = _ProgressArtifacts()
    reporter.watch = progress
    try:
        yield
    finally:
        reporter.watch = None
        progress.close()
        said.removeHandler(to_prefect)
        stop_logging_to_file(in_file)


class _FlowRunHandler(APILogHandler):
    """Sends log lines to the flow run, also those of threads that know nothing of it.

    Of the lines about single shards, which the log file has all of, one a second.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        context = FlowRunContext.get()
        run = None if context is None else context.flow_run
        self._run_id = None if run is None else run.id
        self._last_shard = 0.0
        self.addFilter(self._is_wanted)

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.INFO:
            return True
        if record.name != "rdd.maps" or record.created - self._last_shard < _SHARD_SECONDS:
            return False
        self._last_shard = record.created
        return True

    def prepare(self, record: logging.LogRecord) -> dict[str, Any]:
        if self._run_id is not None and not hasattr(record, "flow_run_id"):
            record.flow_run_id = self._run_id
        prepared: dict[str, Any] = super().prepare(record)
        return prepared


class _ProgressArtifacts:
    """Progress artifacts of the bars of a flow run.

    A thread of its own talks to the server: a slow or lost one never holds up the work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, tuple[int, int]] = {}
        self._shown: dict[str, tuple[int, int]] = {}
        self._artifacts: dict[str, UUID] = {}
        self._ended = threading.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._keep,), name="rdd-progress", daemon=True
        )
        self._thread.start()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Note how far a bar is."""
        with self._lock:
            self._latest[name] = done, total

    def close(self) -> None:
        """Show the last state, if the server takes it soon."""
        self._ended.set()
        self._thread.join(_LAST_SECONDS)

    def _keep(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self._show(everything=True)
        # Bars that came and went within one interval are of no interest, but for the main ones.
        self._show(everything=False)

    def _show(self, *, everything: bool) -> None:
        with self._lock:
            latest = dict(self._latest)
        for name, (done, total) in latest.items():
            known = name in self._artifacts or name in _ALWAYS_SHOWN
            if self._shown.get(name) == (done, total) or not (known or everything):
                continue
            try:
                self._send(name, 100.0 * done / max(total, 1), f"{done} of {total}")
            except Exception as error:
                logger.debug("the progress of '%s' could not be shown: %s", name, error)
                return
            self._shown[name] = done, total

    def _send(self, name: str, percent: float, text: str) -> None:
        description = f"{name}: {text}"
        if name in self._artifacts:
            update_progress_artifact(self._artifacts[name], percent, description)
            return
        key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        created = create_progress_artifact(percent, f"progress-{key}", description)
        if isinstance(created, UUID):
            self._artifacts[name] = created
