"""What a stage leaves beside what it made, and when that is taken instead of doing it again.

``settings.json`` is there from the beginning, ``result.json`` when the stage is done.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdd_pipeline.config import TrainingConfig
from rdd_pipeline.export import WEIGHTS_FILE
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.machine import now
from rdd_pipeline.processes import is_main_process, wait_for_everyone
from rdd_pipeline.progress import Reporter
from rdd_storage import identity_difference

RESULT_FILE = "result.json"

# Settings that change how a training is watched or loaded, but not its outcome.
_NOT_DECISIVE = {
    *("workers", "checkpoint_every", "log_every"),
    *("evaluate_every", "evaluation", "keep_best", "overlays", "snapshots"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedNetwork:
    """A trained (or loaded) network on disk."""

    name: str
    weights: Path
    reused: bool
    """Whether an earlier run's result was taken."""
    result: dict[str, Any]
    """Metrics, timings and curves; see :class:`rdd_pipeline.trainer.TrainingResult`."""


def decisive_settings(training: TrainingConfig) -> dict[str, Any]:
    """The settings of a training that decide its outcome."""
    # At their defaults, which are what was done before there were these settings, they go unsaid:
    # earlier results stay valid.
    unsaid = {"jitter"} if training.jitter is None else set()
    if training.shuffle == "images":
        unsaid |= {"shuffle", "shuffle_buffer"}
    defaults = TrainingConfig.model_fields
    unsaid |= {
        key
        for key in ("accumulate", "channels_last", "compile", "ema")
        if getattr(training, key) == defaults[key].default
    }
    return training.model_dump(mode="json", exclude=_NOT_DECISIVE | unsaid)


def reuse_result(
    directory: Path, settings: dict[str, Any], name: str, reporter: Reporter
) -> TrainedNetwork | None:
    """The finished result in ``directory`` if it has these settings.

    A folder begun with other settings is set aside under a free name, never overwritten.
    """
    settings_file = directory / "settings.json"
    result_file = directory / RESULT_FILE
    if settings_file.exists():
        found = read_json(settings_file)
        if found == settings:
            if result_file.exists():
                result = read_json(result_file)
                reporter.say(
                    f"{name}: reused from {directory} (mIoU {result['metrics']['miou']:.4f})"
                )
                return TrainedNetwork(
                    name=directory.name,
                    weights=directory / WEIGHTS_FILE,
                    reused=True,
                    result=result,
                )
            return None
        # What was trained from an earlier version of the store is found by that version.
        version = found.get("store_version")
        aside = _set_aside(directory, None if version == settings.get("store_version") else version)
        difference = "; ".join(identity_difference(settings, found)[:5])
        reporter.say(f"{name}: settings changed ({difference}); earlier result kept in {aside}")
    write_json(settings_file, settings)
    return None


def _set_aside(directory: Path, version: int | None) -> Path:
    """Rename a folder to a free name: ``.previous/NAME@vVERSION``, or ``.previous/NAME-NUMBER``."""
    previous = directory.parent / ".previous"
    previous.mkdir(exist_ok=True)
    names = [] if version is None else [f"{directory.name}@v{version}"]
    numbered = (f"{directory.name}-{number}" for number in itertools.count(1))
    free = (previous / name for name in itertools.chain(names, numbered))
    aside = next(path for path in free if not path.exists())
    directory.rename(aside)
    return aside


def finish_stage(
    directory: Path, settings: dict[str, Any], result: dict[str, Any], name: str
) -> TrainedNetwork:
    """Write ``result.json``, with the settings that decided it: the stage is done."""
    result = result | {"finished": now(), "settings": settings}
    if is_main_process():
        write_json(directory / RESULT_FILE, result)
    wait_for_everyone()
    return TrainedNetwork(name=name, weights=directory / WEIGHTS_FILE, reused=False, result=result)
