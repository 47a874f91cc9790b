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
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from rdd_pipeline.build import BuildResult, build_maps
from rdd_pipeline.config import (
    DataConfig,
    EvaluationConfig,
    NetworkConfig,
    RunConfig,
    StudentConfig,
    TrainingConfig,
    without_pretrained,
)
from rdd_pipeline.data import (
    SegmentationDataset,
    build_dataset,
    check_dataset,
    dataset_digests,
    from_pack,
)
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.evaluate import Metrics, evaluate
from rdd_pipeline.export import WEIGHTS_FILE, describe_network
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.methods import taps_of
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    checkpoint_files,
    load_weights,
    network_identity,
    parameter_count,
    save_weights,
    weights_hash,
)
from rdd_pipeline.overlays import overlay_pictures
from rdd_pipeline.processes import (
    is_main_process,
    join_processes,
    main_process_first,
    peak_memory_bytes,
    rank,
    wait_for_everyone,
    world_size,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stream import mapped_images, require_arrays
from rdd_pipeline.student import PreparedStudent, prepare_student
from rdd_pipeline.teacher_views import discrepancy_definition
from rdd_pipeline.trainer import TrainingResult, train
from rdd_pipeline.training_state import BEST_FOLDER
from rdd_storage import (
    MapReader,
    StoreMismatchError,
    StoreWriteError,
    identity_difference,
    record_use,
)

RESULT_FILE = "result.json"
RESULTS_FILE = "results.json"

# Settings that change how a training is watched or loaded, but not its outcome.
_NOT_DECISIVE = {
    *("workers", "checkpoint_every", "log_every"),
    *("evaluate_every", "evaluation", "keep_best", "overlays"),
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


def run_teacher(config: RunConfig, reporter: Reporter, *, keep: bool = False) -> TrainedNetwork:
    """Train the teacher, or load its checkpoint, or both, unless that was done before.

    Args:
        config: The run.
        reporter: Where progress is shown.
        keep: Take a teacher that is trained already although images were added or changed since.
    """
    join_processes(resolve_device(config.device))
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
        settings["images"] = (keep and _trained_on(directory)) or images_digest(config.data)
        settings |= {"heads_only": True} if teacher.heads_only else {}
    if teacher.checkpoint is not None:
        settings["checkpoint"] = _checkpoint_digest(teacher.checkpoint)
        settings |= teacher.model_dump(
            mode="json", include={"checkpoint_layout", "strict"}, exclude_defaults=True
        )
    network: SegmentationNetwork | None = None
    if teacher.checkpoint is None and teacher.training is None:
        network = _ready_teacher(config, train_set.num_classes, reporter)
        settings["weights"] = weights_hash(network)
    evaluation = EvaluationConfig() if teacher.training is None else teacher.training.evaluation
    with main_process_first():
        reused = _reuse(directory, settings, "teacher", reporter)
    if reused is not None:
        return _evaluated_as_asked(config, reused, teacher.network, evaluation, val_set, reporter)

    val_set = _from_pack(config, val_set, "val", reporter)
    if teacher.training is None:
        network = network or _ready_teacher(config, train_set.num_classes, reporter)
        metrics = _evaluate(
            network.to(resolve_device(config.device)), val_set, evaluation, reporter, "teacher"
        )
        if is_main_process():
            save_weights(network, directory / WEIGHTS_FILE)
        result = {"metrics": dataclasses.asdict(metrics),
                  "parameters": parameter_count(network)}  # fmt: skip
    else:
        start, training = None, teacher.training
        if teacher.checkpoint is not None or teacher.heads_only:
            start = _ready_teacher(config, train_set.num_classes, reporter)
        if teacher.heads_only and start is not None:
            start.train_auxiliary_head_alone()
            # There is no other loss that its weight would have to balance.
            training = training.model_copy(update={"aux_weight": 1.0})
        prepared = prepare_student(
            config,
            StudentConfig(
                name="teacher", method=("supervised",), network=teacher.network, training=training
            ),
            _from_pack(config, train_set, "train", reporter),
            reader=None,
            teacher=None,
            start=start,
        )
        outcome = _train(
            config,
            prepared,
            val_set,
            teacher.training,
            config.seed,
            directory,
            "teacher",
            reporter,
            _in_words(teacher.network),
        )
        result = dataclasses.asdict(outcome)
    _describe(directory, teacher.network, train_set)
    return _finish(directory, settings, result, "teacher")


def _trained_on(directory: Path) -> str | None:
    """Digest of the images that a finished training saw; None where there is none."""
    file = directory / RESULT_FILE
    return read_json(file)["settings"].get("images") if file.exists() else None


def _ready_teacher(config: RunConfig, num_classes: int, reporter: Reporter) -> SegmentationNetwork:
    """The teacher with the weights of its checkpoint, or those that its network comes with.

    Where it is trained further, its auxiliary head may be a new one.
    """
    teacher = config.teacher
    network = build_network(teacher.network, num_classes, seed=config.seed)
    if teacher.checkpoint is not None:
        left_out = load_weights(
            network,
            teacher.checkpoint,
            layout=teacher.checkpoint_layout,
            strict=teacher.strict,
            may_lack=network.auxiliary_tensors() if teacher.training is not None else (),
        )
        if left_out:
            what = "; ".join(line.strip() for line in left_out)
            reporter.say(f"teacher: not all of {teacher.checkpoint} was loaded: {what}")
    elif not network.pretrained_whole:
        raise ConfigError(
            "teacher.network: not all of its layers have pretrained weights of these "
            f"{num_classes} classes; give teacher.checkpoint, or teacher.training to train it"
        )
    return network


def ready_teacher(config: RunConfig, reporter: Reporter) -> SegmentationNetwork | None:
    """The teacher with its final weights, if that needs no training; None if it does."""
    num_classes = build_dataset(config.data, "train").num_classes
    directory = config.run_dir / "teacher"
    if (directory / RESULT_FILE).exists():
        network = build_network(without_pretrained(config.teacher.network), num_classes)
        load_weights(network, directory / WEIGHTS_FILE)
        return network
    if config.teacher.training is not None:
        return None
    return _ready_teacher(config, num_classes, reporter)


def run_maps(
    config: RunConfig,
    teacher: TrainedNetwork,
    reporter: Reporter,
    guard: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> BuildResult:
    """Build, resume or reuse the map store of the training split.

    Args:
        config: The run.
        teacher: Its teacher.
        reporter: Where progress is shown.
        guard: What to hold while the store is built, see :func:`rdd_pipeline.build.build_maps`.
    """
    return build_maps(
        build_dataset(config.data, "train"),
        config.teacher.network,
        teacher.weights,
        maps=config.maps,
        root=config.maps_root,
        device=maps_device(config),
        reporter=reporter,
        digests=image_digests(config.data),
        cluster=config.cluster,
        guard=guard,
    )


def maps_device(config: RunConfig) -> str:
    """Device of the teacher pass; at a cluster elsewhere each worker says what ``auto`` is."""
    if config.cluster.gpus:
        return "cuda"
    if config.cluster.address is not None:
        return config.device
    return str(resolve_device(config.device))


def run_student(
    config: RunConfig,
    student: StudentConfig,
    store: str | None,
    reporter: Reporter,
    teacher: Path | None = None,
) -> TrainedNetwork:
    """Train one student. From stored maps alone the teacher is neither built nor loaded.

    Args:
        config: The run.
        student: One of its students.
        store: Path of the map store; needed where :attr:`StudentConfig.needs_maps`.
        reporter: Where progress is shown.
        teacher: The teacher's weights; needed where :attr:`StudentConfig.needs_teacher`.

    Raises:
        ConfigError: The store or the teacher is needed and not given.
        StoreMismatchError: The store does not fit the data, or comes from another teacher than
            the one that is loaded.
    """
    join_processes(resolve_device(config.device))
    directory = config.run_dir / "students" / student.name
    train_set, val_set = build_dataset(config.data, "train"), build_dataset(config.data, "val")
    training = config.student_training(student)
    network_config = config.student_network(student)
    seed = config.student_seed(student)
    reader = None
    if student.needs_maps:
        if store is None:
            raise ConfigError(
                f"students: '{student.name}' is distilled and needs a map store; "
                "run 'rdd maps build' first"
            )
        reader = MapReader(store)
        if student.distils_logits:  # before an earlier result is set aside
            require_arrays(reader, ["logits"])
    live, live_weights = None, ""
    if student.needs_teacher:
        if teacher is None:
            raise ConfigError(
                f"students: '{student.name}' needs the teacher's weights beside the maps; give the "
                "path of its weights, or use methods that work on stored maps"
            )
        live = build_network(without_pretrained(config.teacher.network), train_set.num_classes)
        load_weights(live, teacher)
        live_weights = weights_hash(live)
        if reader is not None:
            _require_same_teacher(reader, live_weights)
    settings = {
        "network": network_config.model_dump(mode="json"),
        "training": _decisive(training),
        "seed": seed,
        "method": list(student.method),
        "methods": {
            name: section.model_dump(mode="json") for name, section in student.sections.items()
        },
        "teacher": None if live is None else _live_settings(config, student, live_weights),
        "store": reader.fingerprint if reader is not None else None,
        # Arrays that were added since are no reason to train again.
        "store_version": reader.images_version if reader is not None else None,
        "data": train_set.identity(),
        "images": images_digest(config.data),
    }
    if training.shuffle == "shards":
        settings["shard_images"] = (
            config.maps.shard_images if reader is None else reader.schema.shard_images
        )
    left_out = 0
    if reader is not None and config.student.allow_missing:
        trained = len(mapped_images(train_set, reader))
        left_out = len(train_set) - trained
        settings |= {"trained_images": trained} if left_out else {}
    with main_process_first():
        reused = _reuse(directory, settings, f"student {student.name}", reporter)
    if reused is not None:
        return _evaluated_as_asked(
            config, reused, network_config, training.evaluation, val_set, reporter
        )

    if reader is not None and is_main_process():
        try:
            record_use(
                reader.path, reader.version, run=f"{config.name}/{student.name}", details=settings
            )
        except StoreWriteError as error:  # a shared store may well be read-only for its users
            reporter.say(f"{student.name}: the store does not record this use ({error})")
    if left_out:
        reporter.say(
            f"{student.name}: {left_out} of {len(train_set)} images have no maps in {store} and "
            "are left out of its training"
        )
    if live is not None:
        reporter.say(f"{student.name}: {'+'.join(student.method)} runs the teacher on every crop")
    train_set = _from_pack(config, train_set, "train", reporter)
    val_set = _from_pack(config, val_set, "val", reporter)
    prepared = prepare_student(
        config,
        student,
        train_set,
        reader=reader,
        teacher=live,
        digests=None if reader is None else image_digests(config.data),
    )
    outcome = _train(
        config,
        prepared,
        val_set,
        training,
        seed,
        directory,
        student.name,
        reporter,
        _in_words(network_config),
    )
    _describe(directory, network_config, train_set)
    return _finish(directory, settings, dataclasses.asdict(outcome), student.name)


def _require_same_teacher(reader: MapReader, loaded: str) -> None:
    stored = reader.identity["teacher"]["weights"]
    if stored != loaded:
        raise StoreMismatchError(
            f"{reader.path}: its teacher has weights {stored[:12]}, the one loaded beside it "
            f"{loaded[:12]}; give the store of this teacher, or its weights"
        )


def _live_settings(config: RunConfig, student: StudentConfig, weights: str) -> dict[str, Any]:
    """What decides the signals of a teacher in memory."""
    settings: dict[str, Any] = {
        "network": network_identity(config.teacher.network),
        "weights": weights,
        "signals": student.teacher,
    }
    if taps_of(student)[0]:
        settings["features"] = [tap.model_dump(mode="json") for tap in student.features]
    if student.teacher == "online" and "rdd" in student.method:
        settings["discrepancy"] = discrepancy_definition(
            config.maps.discrepancy, config.maps.scales
        )
    return settings


def _train(
    config: RunConfig,
    prepared: PreparedStudent,
    val_set: SegmentationDataset,
    training: TrainingConfig,
    seed: int,
    directory: Path,
    name: str,
    reporter: Reporter,
    network: str,
) -> TrainingResult:
    def evaluate_on_val(candidate: SegmentationNetwork, device: torch.device) -> Metrics:
        return _evaluate(candidate, val_set, training.evaluation, reporter, name)

    def overlays_of_val(
        candidate: SegmentationNetwork, device: torch.device
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        return overlay_pictures(candidate, val_set, training.overlays, device)

    return train(
        prepared.model,
        prepared.loss,
        prepared.stream,
        signals=prepared.signals,
        config=training,
        seed=seed,
        directory=directory,
        evaluate=evaluate_on_val,
        reporter=reporter,
        name=name,
        device=str(resolve_device(config.device)),
        overlays=overlays_of_val if training.overlays else None,
        network=network,
    )


def _evaluate(
    network: SegmentationNetwork,
    dataset: SegmentationDataset,
    evaluation: EvaluationConfig,
    reporter: Reporter,
    name: str,
) -> Metrics:
    """Evaluate a network where it is; all training processes share the images."""
    return evaluate(
        network,
        dataset,
        device=network.mean.device,
        reporter=reporter,
        name=f"evaluate {name}",
        batch_size=evaluation.batch_size,
        flip=evaluation.flip,
        scales=evaluation.scales,
        rank=rank(),
        processes=world_size(),
    )


def _evaluated_as_asked(
    config: RunConfig,
    reused: TrainedNetwork,
    network: NetworkConfig,
    evaluation: EvaluationConfig,
    val_set: SegmentationDataset,
    reporter: Reporter,
) -> TrainedNetwork:
    """An earlier result, evaluated anew if it was evaluated in another way."""
    metrics = reused.result["metrics"]
    known = metrics.get("flip", False), metrics.get("scales", [1.0])
    if known == (evaluation.flip, list(evaluation.scales)):
        return reused
    reporter.say(f"{reused.name}: its evaluation changed, so it is evaluated again")
    candidate = build_network(without_pretrained(network), val_set.num_classes)
    load_weights(candidate, reused.weights)
    candidate.to(resolve_device(config.device))
    found = _evaluate(candidate, val_set, evaluation, reporter, reused.name)
    result = reused.result | {"metrics": dataclasses.asdict(found)}
    if is_main_process():
        write_json(reused.weights.with_name(RESULT_FILE), result)
    wait_for_everyone()
    return dataclasses.replace(reused, result=result)


def _in_words(network: NetworkConfig) -> str:
    """A network's settings in one line, for messages."""
    settings = network.model_dump(mode="json", exclude_defaults=True)
    return ", ".join([network.type, *(f"{key} {value}" for key, value in settings.items())])


def _describe(directory: Path, network: NetworkConfig, dataset: SegmentationDataset) -> None:
    """Make the folders of last and best weights loadable."""
    if is_main_process():
        describe_network(directory, network, dataset)
        if (directory / BEST_FOLDER).is_dir():
            describe_network(directory / BEST_FOLDER, network, dataset)


def _decisive(training: TrainingConfig) -> dict[str, Any]:
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


@functools.lru_cache(maxsize=8)
def _cached_digests(data_json: str, split: Literal["train", "val"]) -> tuple[str, ...]:
    config: DataConfig = TypeAdapter(DataConfig).validate_json(data_json)
    return dataset_digests(build_dataset(config, split))


def image_digests(data: DataConfig, split: Literal["train", "val"] = "train") -> tuple[str, ...]:
    """Digests of a split's images and labels, read once per process: a run takes its data as
    they were at its start."""
    return _cached_digests(data.model_dump_json(), split)


def _from_pack(
    config: RunConfig,
    dataset: SegmentationDataset,
    split: Literal["train", "val"],
    reporter: Reporter,
) -> SegmentationDataset:
    """A split that is about to be read many times, from its pack as far as that fits."""
    return from_pack(
        dataset,
        config.data,
        digests=lambda: image_digests(config.data, split),
        say=reporter.say,
    )


def forget_digests() -> None:
    """Read files anew at the next question for their digests, as a later run would."""
    _cached_digests.cache_clear()


def images_digest(data: DataConfig) -> str:
    """One digest over the content of all training images and labels (hex)."""
    return hashlib.sha256("\n".join(image_digests(data)).encode()).hexdigest()


def _checkpoint_digest(path: Path) -> str:
    """Digest of a checkpoint's file, or of the digests of its files."""
    digests = []
    try:
        for part in checkpoint_files(path):
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise ConfigError(
            f"teacher.checkpoint: {path} cannot be read ({error.strerror})"
        ) from error
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


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


def _finish(
    directory: Path, settings: dict[str, Any], result: dict[str, Any], name: str
) -> TrainedNetwork:
    result = result | {"finished": now(), "settings": settings}
    if is_main_process():
        write_json(directory / RESULT_FILE, result)
    wait_for_everyone()
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
    named = {student.name: student.reused for student in students}
    path = config.run_dir / RESULTS_FILE
    write_json(
        path,
        {
            "name": config.name,
            "finished": now(),
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
            "students": _student_rows(config, maps.fingerprint, named),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
    return path


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
        rows.append(
            entry
            | {
                "name": name,
                "method": entry["settings"]["method"],
                "label": _method_label(entry["settings"]),
                "in_this_run": name in named,
                "reused": name not in named or named[name],
            }
        )
    return rows


def _method_label(settings: dict[str, Any]) -> str:
    """The methods of a student as tables show them."""
    teacher = settings["teacher"]
    online = teacher is not None and teacher["signals"] == "online"
    return "+".join(settings["method"]) + (", online" if online else "")


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


def now() -> str:
    """The time as results hold it."""
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
