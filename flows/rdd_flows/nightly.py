"""The flow ``nightly``: bring the store up to date with its images, and tell the students."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from rdd_flows.checks import check_places
from rdd_flows.events import announce_maps
from rdd_flows.faults import RETRIES
from rdd_flows.flows import build_summary, maps_task, teacher_task
from rdd_flows.limits import store_slot
from rdd_flows.recording import recorded, settings_of
from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import RunConfig
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.progress import current_reporter
from rdd_pipeline.run_images import check_data
from rdd_storage import find_stores

logger = logging.getLogger("rdd.flows")

LEDGER_FILE = "nightly.json"
"""Versions that need no announcement any more, by the stores' fingerprints."""


@flow(name="nightly", validate_parameters=False)
def nightly(config: RunConfig | str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Find new, changed and removed images, build the store's next version, and announce it.

    Where nothing has changed, nothing is built and nothing announced. A teacher that is trained
    stays as it is: new images get its maps. A version whose announcement was cut off is announced
    by the next run.

    Args:
        config: The run, or the path of its YAML file.
        overrides: Changes to the file, as ``key.path=value``.

    Returns:
        ``path``, ``version``, ``images``, ``images_built`` and ``announced``.
    """
    settings = settings_of(config, overrides)
    with recorded(settings):
        check_places(settings)
        ledger = _ledger(settings)
        teacher = teacher_task(settings, keep=True)
        maps: BuildResult = maps_task(settings, teacher, functools.partial(_checked_slot, settings))
        is_new = maps.version > ledger.get(maps.fingerprint, 0)
        if is_new:
            announce_task(settings, maps, ledger)
        else:
            logger.info("%s: still version %d, nothing to announce", maps.path, maps.version)
        return build_summary(maps) | {"announced": is_new}


@task(name="announce", cache_policy=NO_CACHE, **RETRIES)
def announce_task(config: RunConfig, maps: BuildResult, ledger: dict[str, int]) -> None:
    """Emit ``maps.complete``, and note that it was."""
    announce_maps(maps, config.name)
    write_json(config.run_dir / LEDGER_FILE, ledger | {maps.fingerprint: maps.version})


@contextmanager
def _checked_slot(config: RunConfig, path: str) -> Iterator[None]:
    """Where there is something to build, look at the data first; other nights skip that."""
    with store_slot(path):
        check_data(config, current_reporter())
        yield


def _ledger(config: RunConfig) -> dict[str, int]:
    """Versions announced so far; on the first night those that are there already.

    It is written before anything is built, so that a version that is published later is new even if
    this run does not come to announce it.
    """
    file = config.run_dir / LEDGER_FILE
    if not file.exists():
        found = find_stores(config.maps_root, complete=True)
        write_json(file, {status.fingerprint: status.version for status in found})
    ledger: dict[str, int] = read_json(file)
    return ledger
