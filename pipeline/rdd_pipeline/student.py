"""A student made ready for training: network, loss, stream, and where the teacher's signals come
from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rdd_pipeline.config import NetworkConfig, RunConfig, StudentConfig
from rdd_pipeline.data import SegmentationDataset
from rdd_pipeline.errors import ConfigError, NetworkError
from rdd_pipeline.features import FeatureTaps, TappedStudent
from rdd_pipeline.live_teacher import LiveTeacher
from rdd_pipeline.methods import (
    CombinedLoss,
    build_loss,
    live_needs,
    map_needs,
    map_spans,
    tapped,
    taps_of,
)
from rdd_pipeline.networks import SegmentationNetwork, build_network
from rdd_pipeline.processes import world_size
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.stream import MapStream
from rdd_pipeline.teacher_views import TeacherViews
from rdd_pipeline.trainer import Loss, Signals
from rdd_storage import MapReader


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStudent:
    """What :func:`rdd_pipeline.trainer.train` takes."""

    model: SegmentationNetwork | TappedStudent
    loss: Loss
    stream: MapStream
    signals: Signals


def prepare_student(
    config: RunConfig,
    student: StudentConfig,
    dataset: SegmentationDataset,
    *,
    reader: MapReader | None,
    teacher: SegmentationNetwork | None,
    digests: Sequence[str] | None = None,
    start: SegmentationNetwork | None = None,
) -> PreparedStudent:
    """Build the student and everything its methods need.

    Args:
        config: The run.
        student: One of its students.
        dataset: Images and labels to train on.
        reader: The map store; needed where :attr:`StudentConfig.needs_maps`.
        teacher: The teacher with its weights; needed where :attr:`StudentConfig.needs_teacher`.
        digests: Of the data set's images, if they are known already.
        start: The network to train, with the weights to begin from; None builds it.

    Raises:
        NetworkError: The network cannot be built, or a feature tap does not exist.
        StoreMismatchError: The store does not fit the data set.
    """
    training, seed = config.student_training(student), config.student_seed(student)
    network = start
    if network is None:
        network = build_network(config.student_network(student), dataset.num_classes, seed=seed)
    grid_size = network.grid_size(*training.crop_size)
    decoder = SignalDecoder(None if reader is None else reader.schema.hardness_bits)
    signals: Signals = decoder
    model, loss = _model_and_loss(config, student, dataset, network, teacher)
    if teacher is not None:
        signals = LiveTeacher(
            TeacherViews(teacher, config.maps.discrepancy, config.maps.scales),
            needs=live_needs(student, has_aux=network.has_aux),
            grid_size=grid_size,
            taps=taps_of(student)[1],
            precision=training.precision,
            decoder=decoder,
        )
    images = training.accumulate * training.batch_size * world_size()
    stream = MapStream(
        dataset=dataset,
        reader=reader,
        crop_size=training.crop_size,
        scale=training.scale,
        flip=training.flip,
        jitter=training.jitter,
        shuffle=training.shuffle,
        shuffle_buffer=training.shuffle_buffer,
        shard_images=config.maps.shard_images,
        seed=seed,
        length=training.iterations * images,
        needs=map_needs(
            student, has_aux=network.has_aux, arrays=() if reader is None else reader.arrays
        ),
        spans=map_spans(loss, images),
        grid_size=grid_size,
        mark_padding=teacher is not None,
        allow_missing=config.student.allow_missing,
        digests=digests,
    )
    return PreparedStudent(model=model, loss=loss, stream=stream, signals=signals)


def _model_and_loss(
    config: RunConfig,
    student: StudentConfig,
    dataset: SegmentationDataset,
    network: SegmentationNetwork,
    teacher: SegmentationNetwork | None,
) -> tuple[SegmentationNetwork | TappedStudent, CombinedLoss]:
    """The network with the taps that its methods need, and their loss."""
    if config.student_training(student).compile and taps_of(student)[0]:
        raise ConfigError(
            f"students: '{student.name}' has training.compile: true, but takes features of its "
            "network, which a compiled one does not give; leave training.compile out"
        )
    channels = () if teacher is None else FeatureTaps(teacher, taps_of(student)[1]).channels()
    model = tapped(network, student, channels, seed=config.student_seed(student))
    loss = build_loss(
        student,
        config.student_training(student),
        num_classes=dataset.num_classes,
        class_weights=dataset.class_weights,
        teacher_channels=channels,
    )
    return model, loss


def check_networks(
    config: RunConfig, dataset: SegmentationDataset, students: Iterable[StudentConfig]
) -> None:
    """Build every network once, and see that each method finds what it needs.

    What is wrong with the last student would otherwise show after the teacher's training.

    Args:
        config: The run.
        dataset: Gives the classes.
        students: Those of the run's students that will be trained.

    Raises:
        NetworkError: A network cannot be built, or lacks a head, a module or features.
        ConfigError: A method's settings contradict the data set.
    """
    teacher = build_network(config.teacher.network, dataset.num_classes)
    TeacherViews(teacher, config.maps.discrepancy, config.maps.scales).check()
    built: list[tuple[NetworkConfig, SegmentationNetwork]] = [(config.teacher.network, teacher)]
    for student in students:
        wanted = config.student_network(student)
        try:
            network = next((known for described, known in built if described == wanted), None)
            if network is None:
                network = build_network(wanted, dataset.num_classes)
                built.append((wanted, network))
            _model_and_loss(config, student, dataset, network, teacher)
        except (NetworkError, ConfigError) as error:
            raise type(error)(f"students: '{student.name}': {error}") from error
