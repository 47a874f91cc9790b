"""The stages of a run as plain functions: teacher, maps, students.

Each stage leaves a ``result.json`` beside what it made, written last, with the settings that
decided it. A stage whose settings are unchanged is reused; one whose settings changed is done
anew and its earlier folder is kept under another name.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdd_pipeline.build import BuildResult, build_maps
from rdd_pipeline.config import (
    EvaluationConfig,
    NetworkConfig,
    RunConfig,
    StudentConfig,
    TrainingConfig,
    without_pretrained,
)
from rdd_pipeline.data import SegmentationDataset
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.evaluate import Metrics, evaluate
from rdd_pipeline.export import WEIGHTS_FILE, describe_network
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.machine import maps_device, resolve_device
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
    rank,
    wait_for_everyone,
    world_size,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import (
    RESULT_FILE,
    TrainedNetwork,
    decisive_settings,
    finish_stage,
    reuse_result,
)
from rdd_pipeline.run_images import image_digests, images_digest, open_split, packed_split
from rdd_pipeline.stream import mapped_images, require_arrays
from rdd_pipeline.student import PreparedStudent, prepare_student
from rdd_pipeline.teacher_views import discrepancy_definition
from rdd_pipeline.trainer import TrainingResult, train
from rdd_pipeline.training_state import BEST_FOLDER, snapshot_folders
from rdd_storage import MapReader, RddError, StoreMismatchError, StoreWriteError, record_use


def run_teacher(config: RunConfig, reporter: Reporter, *, keep: bool = False) -> TrainedNetwork:
    """Train the teacher, or load its checkpoint, or both, unless that was done before.

    Args:
        config: The run.
        reporter: Where progress is shown.
        keep: Take a teacher that is trained already although images were added or changed since.
    """
    join_processes(resolve_device(config.device))
    directory = config.run_dir / "teacher"
    train_set, val_set = open_split(config.data, "train"), open_split(config.data, "val")
    teacher = config.teacher
    settings: dict[str, Any] = {
        "network": teacher.network.model_dump(mode="json"),
        "data": train_set.identity(),
        "seed": config.seed,
    }
    if teacher.training is not None:
        settings["training"] = decisive_settings(teacher.training)
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
        reused = reuse_result(directory, settings, "teacher", reporter)
    if reused is not None:
        return _evaluated_as_asked(config, reused, teacher.network, evaluation, val_set, reporter)

    val_set = packed_split(config, val_set, "val", reporter)
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
            packed_split(config, train_set, "train", reporter),
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
    return finish_stage(directory, settings, result, "teacher")


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
    num_classes = open_split(config.data, "train").num_classes
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
        open_split(config.data, "train"),
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
    train_set, val_set = open_split(config.data, "train"), open_split(config.data, "val")
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
        "training": decisive_settings(training),
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
        reused = reuse_result(directory, settings, f"student {student.name}", reporter)
    if reused is not None:
        if training.snapshots and not snapshot_folders(directory):
            reporter.say(
                f"{student.name}: was trained without training.snapshots; they take effect when it "
                f"is trained anew, which deleting {directory} brings about"
            )
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
    train_set = packed_split(config, train_set, "train", reporter)
    val_set = packed_split(config, val_set, "val", reporter)
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
    result = dataclasses.asdict(outcome)
    if training.snapshots and store is not None and is_main_process():
        result["difficulty_history"] = _difficulty_history(
            config, student, directory, store, train_set, reporter
        )
    return finish_stage(directory, settings, result, student.name)


def _difficulty_history(
    config: RunConfig,
    student: StudentConfig,
    directory: Path,
    store: str,
    dataset: SegmentationDataset,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """The student's difficulty against the teacher's at its snapshots and at the end, as JSON."""
    from rdd_pipeline.inspection import Maps  # trainings without snapshots start sooner

    try:
        maps = Maps(store, dataset)
        history = maps.student_history(directory, device=str(resolve_device(config.device)))
    except RddError as error:  # the student is trained all the same
        reporter.warn(f"{student.name}: its difficulty over time cannot be told: {error}")
        return []
    end = config.student_training(student).iterations
    return [
        {name: None if value != value else value for name, value in row.items()}
        | {"iteration": end if row["iteration"] is None else row["iteration"]}
        for row in history.table()
    ]


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
    """Make the folders of last, best and earlier weights loadable."""
    if is_main_process():
        describe_network(directory, network, dataset)
        others = [directory / BEST_FOLDER, *snapshot_folders(directory)]
        for folder in (other for other in others if other.is_dir()):
            describe_network(folder, network, dataset)


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
