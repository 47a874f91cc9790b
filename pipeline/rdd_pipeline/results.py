"""``results.json`` of a run: its stages, and every finished student of its folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import DataConfig, RunConfig
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.machine import machine, now
from rdd_pipeline.processes import peak_memory_bytes
from rdd_pipeline.reuse import RESULT_FILE, TrainedNetwork
from rdd_pipeline.run_images import images_digest, open_split

RESULTS_FILE = "results.json"


def write_results(
    config: RunConfig,
    teacher: TrainedNetwork,
    maps: BuildResult,
    named: Mapping[str, bool],
    seconds: dict[str, float],
) -> Path:
    """Write ``results.json``: this run's stages, and every finished student of its folder.

    Students trained earlier from the same data are listed too, marked ``in_this_run: false``.

    Args:
        config: The run.
        teacher: Its teacher.
        maps: Its build.
        named: Finished students of this run, and whether an earlier one had finished them.
        seconds: Wall time of each stage.
    """
    path = config.run_dir / RESULTS_FILE
    write_json(
        path,
        {
            "name": config.name,
            "finished": now(),
            "machine": machine(),
            "config": config.model_dump(mode="json"),
            "data": data_facts(config.data),
            "teacher": teacher.result | {"reused": teacher.reused},
            "maps": dataclasses.asdict(maps),
            "students": _student_rows(config, maps.fingerprint, named),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
    return path


def data_facts(data: DataConfig) -> dict[str, Any]:
    """What results say of the data set."""
    train_set = open_split(data, "train")
    return {
        "name": train_set.name,
        "class_names": list(train_set.class_names),
        "train_images": len(train_set),
        "val_images": len(open_split(data, "val")),
    }


def update_students(config: RunConfig, named: Mapping[str, bool]) -> Path | None:
    """List students that were trained since in ``results.json``; None where no run made one.

    Args:
        config: The run.
        named: Students of this command, and whether an earlier one had finished them.
    """
    path = config.run_dir / RESULTS_FILE
    if not path.exists():
        return None
    results = read_json(path)
    rows = _student_rows(config, results["maps"]["fingerprint"], named)
    write_json(path, results | {"students": rows})
    return path


def _student_rows(config: RunConfig, store: str, named: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The finished students of a run's folder, those of this command first."""
    folder = config.run_dir / "students"
    rows = []
    for name in [*named, *sorted(p.name for p in folder.iterdir() if p.name not in named)]:
        file = folder / name / RESULT_FILE
        if name.startswith(".") or not file.exists():
            continue
        entry = read_json(file)
        if entry["settings"]["images"] != images_digest(config.data):
            continue
        if entry["settings"]["store"] not in (None, store):
            continue
        rows.append(student_row(name, entry, named.get(name)))
    return rows


def student_row(name: str, result: Mapping[str, Any], reused: bool | None) -> dict[str, Any]:
    """A finished student as results list it.

    Args:
        name: Of the student.
        result: Content of its ``result.json``.
        reused: Whether an earlier command had finished it; None for one that this command did not
            ask for.
    """
    return {
        **result,
        "name": name,
        "method": result["settings"]["method"],
        "label": _method_label(result["settings"]),
        "in_this_run": reused is not None,
        "reused": reused is not False,
    }


def _method_label(settings: dict[str, Any]) -> str:
    """The methods of a student as tables show them."""
    teacher = settings["teacher"]
    online = teacher is not None and teacher["signals"] == "online"
    return "+".join(settings["method"]) + (", online" if online else "")


class Stopwatch:
    """Seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, function: Any, *args: Any) -> Any:
        """Call ``function(*args)`` and add its wall time to ``name``."""
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
