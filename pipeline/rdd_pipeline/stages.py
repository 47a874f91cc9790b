"""The stages of a run as plain functions: teacher, maps, students, results.

Each stage leaves a ``result.json`` beside what it made, written last, with the settings that
decided it. A stage whose settings are unchanged is reused; one whose settings changed is done
anew and its earlier folder is kept under another name.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from rdd_pipeline.build import BuildResult, build_maps
from rdd_pipeline.config import DataConfig, RunConfig, StudentConfig, TrainingConfig
from rdd_pipeline.data import (
    SegmentationDataset,
    build_dataset,
    check_dataset,
    dataset_digests,
)
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.evaluate import Metrics, evaluate
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.losses import KDLoss, RDDLoss, SupervisedLoss
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    load_weights,
    parameter_count,
    save_weights,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.stream import MapStream, Need
from rdd_pipeline.trainer import Loss, TrainingResult, train
from rdd_storage import MapReader, StoreWriteError, identity_difference, record_use

RESULT_FILE = "result.json"
WEIGHTS_FILE = "weights.safetensors"

# Settings that change how a training is watched or loaded, but not its outcome.
_NOT_DECISIVE = {"workers", "checkpoint_every", "evaluate_every", "log_every"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedNetwork:
    """A trained (or loaded) network on disk."""

    name: str
    weights: Path
    reused: bool
    """Whether an earlier run's result was taken."""
    result: dict[str, Any]
    """Metrics, timings and curves; see :class:`rdd_pipeline.trainer.TrainingResult`."""


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device: auto|cpu|cuda`` means here.

    Raises:
        ConfigError: ``cuda`` is asked for but torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU; use device: auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def check_data(config: RunConfig, reporter: Reporter) -> None:
    """Check both splits before anything long starts.

    Raises:
        DataError: With every problem found in either split.
    """
    for split in ("train", "val"):
        dataset = build_dataset(config.data, split)
        with reporter.bar(f"check {split}", len(dataset)) as bar:
            check_dataset(dataset, progress=bar.advance)


def run_teacher(config: RunConfig, reporter: Reporter) -> TrainedNetwork:
    """Train the teacher, or load its checkpoint, unless that was done before."""
    directory = config.run_dir / "teacher"
    train_set, val_set = build_dataset(config.data, "train"), build_dataset(config.data, "val")
    teacher = config.teacher
    settings: dict[str, Any] = {
        "network": teacher.network.model_dump(mode="json"),
        "data": train_set.identity(),
        "seed": config.seed,
    }
    if teacher.training is not None:
        settings["training"] = _decisive(teacher.training)
        settings["images"] = images_digest(config.data)
    else:
        assert teacher.checkpoint is not None  # the configuration requires one of the two
        settings["checkpoint"] = _file_digest(teacher.checkpoint)
    reused = _reuse(directory, settings, "teacher", reporter)
    if reused is not None:
        return reused

    network = build_network(teacher.network, train_set.num_classes, seed=config.seed)
    if teacher.training is None:
        assert teacher.checkpoint is not None
        load_weights(network, teacher.checkpoint)
        device = resolve_device(config.device)
        metrics = evaluate(
            network.to(device), val_set, device=device, reporter=reporter, name="evaluate teacher"
        )
        save_weights(network, directory / WEIGHTS_FILE)
        result = {"metrics": dataclasses.asdict(metrics),
                  "parameters": parameter_count(network)}  # fmt: skip
    else:
        outcome = _train(
            config, network, SupervisedLoss(aux_weight=teacher.training.aux_weight),
            train_set, val_set, None, frozenset(), teacher.training, config.seed, directory,
            "teacher", reporter,
        )  # fmt: skip
        result = dataclasses.asdict(outcome)
    return _finish(directory, settings, result, "teacher")


def run_maps(config: RunConfig, teacher: TrainedNetwork, reporter: Reporter) -> BuildResult:
    """Build, resume or reuse the map store of the training split."""
    return build_maps(
        build_dataset(config.data, "train"),
        config.teacher.network,
        teacher.weights,
        maps=config.maps,
        root=config.maps_root,
        device=str(resolve_device(config.device)),
        reporter=reporter,
        digests=image_digests(config.data),
    )


def run_student(
    config: RunConfig, student: StudentConfig, store: str | None, reporter: Reporter
) -> TrainedNetwork:
    """Train one student from the stored maps; the teacher is neither built nor loaded.

    Args:
        config: The run.
        student: One of its students.
        store: Path of the map store; needed unless the method is ``supervised``.
        reporter: Where progress is shown.
    """
    directory = config.run_dir / "students" / student.name
    train_set, val_set = build_dataset(config.data, "train"), build_dataset(config.data, "val")
    training = config.student_training(student)
    network_config = config.student_network(student)
    seed = config.student_seed(student)
    reader = None
    if student.method != ("supervised",):
        if store is None:
            raise ConfigError(
                f"students: '{student.name}' is distilled and needs a map store; "
                "run 'rdd maps build' first"
            )
        reader = MapReader(store)
    settings = {
        "network": network_config.model_dump(mode="json"),
        "training": _decisive(training),
        "seed": seed,
        "method": list(student.method),
        "rdd": student.rdd.model_dump(mode="json") if "rdd" in student.method else None,
        "kd": student.kd.model_dump(mode="json") if reader is not None else None,
        "store": reader.fingerprint if reader is not None else None,
        "store_version": reader.version if reader is not None else None,
        "data": train_set.identity(),
        "images": images_digest(config.data),
    }
    reused = _reuse(directory, settings, f"student {student.name}", reporter)
    if reused is not None:
        return reused

    network = build_network(network_config, train_set.num_classes, seed=seed)
    if reader is not None:
        try:
            record_use(
                reader.path, reader.version, run=f"{config.name}/{student.name}", details=settings
            )
        except StoreWriteError as error:  # a shared store may well be read-only for its users
            reporter.say(f"{student.name}: the store does not record this use ({error})")
    outcome = _train(
        config, network, build_loss(student, training), train_set, val_set, reader,
        map_needs(student, network, reader), training, seed, directory, student.name, reporter,
    )  # fmt: skip
    return _finish(directory, settings, dataclasses.asdict(outcome), student.name)


def map_needs(
    student: StudentConfig, network: SegmentationNetwork, reader: MapReader | None
) -> frozenset[Need]:
    """Which of the stored maps a student's method reads."""
    needs: set[Need] = set()
    if "rdd" in student.method:
        needs |= {"weight", "true_prob"}
        if network.has_aux and reader is not None and "aux_hardness" in reader.arrays:
            needs.add("aux_true_prob")
    if student.distils_logits:
        needs.add("logits")
    return frozenset(needs)


def build_loss(student: StudentConfig, training: TrainingConfig) -> Loss:
    """The loss of a student's method."""
    kd_weight = student.kd.weight if student.distils_logits else 0.0
    if "rdd" in student.method:
        rdd = student.rdd
        return RDDLoss(
            iterations=training.iterations,
            switch=rdd.switch,
            blend=rdd.blend,
            threshold=rdd.threshold,
            min_kept=rdd.min_kept,
            relation=rdd.relation,
            aux_weight=training.aux_weight,
            kd_weight=kd_weight,
            temperature=student.kd.temperature,
        )
    if "kd" in student.method:
        return KDLoss(
            kd_weight=kd_weight,
            temperature=student.kd.temperature,
            aux_weight=training.aux_weight,
        )
    return SupervisedLoss(aux_weight=training.aux_weight)


def _train(
    config: RunConfig,
    network: SegmentationNetwork,
    loss: Loss,
    train_set: SegmentationDataset,
    val_set: SegmentationDataset,
    reader: MapReader | None,
    needs: frozenset[Need],
    training: TrainingConfig,
    seed: int,
    directory: Path,
    name: str,
    reporter: Reporter,
) -> TrainingResult:
    stream = MapStream(
        dataset=train_set,
        reader=reader,
        crop_size=training.crop_size,
        scale=training.scale,
        flip=training.flip,
        seed=seed,
        length=training.iterations * training.batch_size * int(os.environ.get("WORLD_SIZE", "1")),
        needs=needs,
        grid_size=network.grid_size(*training.crop_size),
        digests=None if reader is None else image_digests(config.data),
    )

    def evaluate_on_val(candidate: SegmentationNetwork, device: torch.device) -> Metrics:
        return evaluate(
            candidate, val_set, device=device, reporter=reporter, name=f"evaluate {name}"
        )

    return train(
        network,
        loss,
        stream,
        signals=SignalDecoder(None if reader is None else reader.schema.hardness_bits),
        config=training,
        seed=seed,
        directory=directory,
        evaluate=evaluate_on_val,
        reporter=reporter,
        name=name,
        device=str(resolve_device(config.device)),
    )


def _decisive(training: TrainingConfig) -> dict[str, Any]:
    return training.model_dump(mode="json", exclude=_NOT_DECISIVE)


@functools.lru_cache(maxsize=8)
def _cached_digests(data_json: str, split: Literal["train", "val"]) -> tuple[str, ...]:
    config: DataConfig = TypeAdapter(DataConfig).validate_json(data_json)
    return dataset_digests(build_dataset(config, split))


def image_digests(data: DataConfig, split: Literal["train", "val"] = "train") -> tuple[str, ...]:
    """Digests of a split's images and labels, read once per process: a run takes its data as
    they were at its start."""
    return _cached_digests(data.model_dump_json(), split)


def forget_digests() -> None:
    """Read files anew at the next question for their digests, as a later run would."""
    _cached_digests.cache_clear()


def images_digest(data: DataConfig) -> str:
    """One digest over the content of all training images and labels (hex)."""
    return hashlib.sha256("\n".join(image_digests(data)).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"teacher.checkpoint: {path} cannot be read ({error.strerror})"
        ) from error


def _reuse(
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
        aside = _set_aside(directory)
        difference = "; ".join(identity_difference(settings, found)[:5])
        reporter.say(f"{name}: settings changed ({difference}); earlier result kept in {aside}")
    write_json(settings_file, settings)
    return None


def _set_aside(directory: Path) -> Path:
    previous = directory.parent / ".previous"
    previous.mkdir(exist_ok=True)
    number = 1
    while (aside := previous / f"{directory.name}-{number}").exists():
        number += 1
    directory.rename(aside)
    return aside


def _finish(
    directory: Path, settings: dict[str, Any], result: dict[str, Any], name: str
) -> TrainedNetwork:
    write_json(directory / RESULT_FILE, result | {"finished": _now(), "settings": settings})
    return TrainedNetwork(name=name, weights=directory / WEIGHTS_FILE, reused=False, result=result)


def write_results(
    config: RunConfig,
    teacher: TrainedNetwork,
    maps: BuildResult,
    students: Sequence[TrainedNetwork],
    seconds: dict[str, float],
) -> Path:
    """Write ``results.json``: this run's stages, and every finished student of its folder.

    Students trained earlier from the same data are listed too, marked ``in_this_run: false``.
    """
    train_set = build_dataset(config.data, "train")
    named = {student.name: student for student in students}
    folder = config.run_dir / "students"
    rows = []
    for name in [*named, *sorted(p.name for p in folder.iterdir() if p.name not in named)]:
        file = folder / name / RESULT_FILE
        if name.startswith(".") or not file.exists():
            continue
        entry = read_json(file)
        if entry["settings"]["images"] != images_digest(config.data):
            continue
        if entry["settings"]["store"] not in (None, maps.fingerprint):
            continue
        rows.append(
            entry
            | {
                "name": name,
                "method": entry["settings"]["method"],
                "in_this_run": name in named,
                "reused": name not in named or named[name].reused,
            }
        )
    path = config.run_dir / "results.json"
    write_json(
        path,
        {
            "name": config.name,
            "finished": _now(),
            "machine": machine(),
            "config": config.model_dump(mode="json"),
            "data": {
                "name": train_set.name,
                "class_names": list(train_set.class_names),
                "train_images": len(train_set),
                "val_images": len(build_dataset(config.data, "val")),
            },
            "teacher": teacher.result | {"reused": teacher.reused},
            "maps": dataclasses.asdict(maps),
            "students": rows,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
    return path


def machine() -> dict[str, Any]:
    """What a result was measured on: processor, device, versions."""
    packages = ("rdd-maps", "torch", "torchvision", "segmentation-models-pytorch", "zarr",
                "tensorstore", "prefect", "distributed", "numpy")  # fmt: skip
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def peak_memory_bytes() -> int:
    """Largest resident memory of this process, or of one of its children, so far."""
    usage = max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    )
    return usage * (1 if sys.platform == "darwin" else 1024)


def _now() -> str:
    return datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")


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
