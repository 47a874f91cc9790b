"""From a student's configuration to its loss, and to what that loss asks of store and teacher.

Every method adds its terms to one task loss: the plain cross-entropy, or that of relative
difficulty distillation, whose weight of each pixel stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.config import FEATURE_METHODS, StudentConfig, TrainingConfig
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.features import StudentOutputs, TappedStudent
from rdd_pipeline.losses import (
    CIRKDMemory,
    KDLoss,
    LossOutput,
    NetworkOutputs,
    RDDLoss,
    SupervisedLoss,
    TeacherSignals,
    attention_loss,
    centre_logits,
    cirkd_minibatch_loss,
    csd_loss,
    cwd_loss,
    dist_loss,
    ifvd_loss,
    pairwise_loss,
    psd_loss,
)
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.stream import ADD_SOFT_LABELS, Need
from rdd_storage import UnknownArrayError

_PROJECTED = ("cwd_features", "cirkd")
"""Methods that compare features channel by channel."""


Terms = Mapping[str, tuple[float, Tensor]]
"""Terms of a loss by name: weight in the total, and 0-d value."""

Method = Callable[[Any, Tensor, TeacherSignals], Terms]
"""Computes the terms of one method from the student's outputs, labels and the teacher."""


class CombinedLoss(nn.Module):
    """A task loss with the terms of further methods added, each by its weight.

    Args:
        task: :class:`SupervisedLoss`, :class:`KDLoss` or :class:`RDDLoss`.
        methods: What is added. Those that are modules, with a memory of earlier batches, become
            part of this one's state.
    """

    def __init__(self, task: nn.Module, methods: Sequence[Method]) -> None:
        super().__init__()
        self.task = task
        self.methods = tuple(methods)
        self.stateful = nn.ModuleList(m for m in methods if isinstance(m, nn.Module))

    def forward(
        self, outputs: NetworkOutputs, target: Tensor, teacher: TeacherSignals, iteration: int
    ) -> LossOutput:
        """Compute the loss of one step; see :meth:`RDDLoss.forward` for the arguments."""
        result: LossOutput = self.task(outputs, target, teacher, iteration)
        total, values = result.total, dict(result.terms)
        for method in self.methods:
            for name, (weight, value) in method(outputs, target, teacher).items():
                values[name] = value.detach()
                total = total + weight * value
        return LossOutput(
            total=total, terms=values, diagnostics=result.diagnostics, relative=result.relative
        )


def build_loss(
    student: StudentConfig,
    training: TrainingConfig,
    *,
    num_classes: int,
    class_weights: Sequence[float] | None = None,
    teacher_channels: Sequence[int] = (),
) -> CombinedLoss:
    """The loss of a student's methods.

    Args:
        student: Methods and their settings.
        training: Weight of the auxiliary head, and the number of iterations for the schedule.
        num_classes: Classes of the data set.
        class_weights: One for each class, for ``rdd.class_weights``; None where the data set has
            none.
        teacher_channels: Channels of the teacher's features by tap; needed for ``cirkd``.

    Raises:
        ConfigError: Settings contradict each other.
    """
    added: list[Method] = []
    for name in student.method:
        if name == "cirkd":
            added.append(_CIRKD(student, num_classes, teacher_channels[-1]))
        elif name in _METHODS:
            added.append(_METHODS[name](student, num_classes))
    return CombinedLoss(_task_loss(student, training, class_weights), added)


def map_needs(student: StudentConfig, *, has_aux: bool, arrays: Sequence[str]) -> frozenset[Need]:
    """Which of the stored maps a student's methods read.

    Args:
        student: Its methods.
        has_aux: Whether the student has an auxiliary head.
        arrays: Arrays of the store.
    """
    return _needs(student, has_aux, "aux_hardness" in arrays) if student.needs_maps else frozenset()


def map_spans(loss: CombinedLoss, images: int) -> dict[Need, range]:
    """Positions of the stream at which a loss looks at a map; at those left out, at all.

    Args:
        loss: Of the student.
        images: Samples that an iteration takes, all processes together.
    """
    task = loss.task
    if not isinstance(task, RDDLoss):
        return {}
    first, second = (range(stage.start * images, stage.stop * images) for stage in task.stages)
    return {"weight": first, "true_prob": second, "aux_true_prob": second}


def live_needs(student: StudentConfig, *, has_aux: bool) -> frozenset[Need]:
    """Which signals the teacher has to give for each crop, features apart."""
    return _needs(student, has_aux, True) if student.teacher == "online" else frozenset()


def taps_of(student: StudentConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Taps of student and teacher; none where no method compares features."""
    if FEATURE_METHODS.isdisjoint(student.method):
        return (), ()
    return (
        tuple(tap.student for tap in student.features),
        tuple(tap.teacher for tap in student.features),
    )


def tapped(
    network: SegmentationNetwork,
    student: StudentConfig,
    teacher_channels: Sequence[int],
    *,
    seed: int,
) -> SegmentationNetwork | TappedStudent:
    """The network, made to hand out the features that the student's methods compare.

    Raises:
        NetworkError: A tap is no module of the network, or gives no features.
    """
    taps, _ = taps_of(student)
    if not taps:
        return network
    methods: set[str] = set(student.method)
    project = {name: teacher_channels[-1] for name in _PROJECTED if name in methods}
    return TappedStudent(network, taps, project, seed=seed)


def _task_loss(
    student: StudentConfig, training: TrainingConfig, class_weights: Sequence[float] | None
) -> nn.Module:
    kd, rdd = student.kd, student.rdd
    if "rdd" in student.method:
        if rdd.class_weights and class_weights is None:
            raise ConfigError(
                f"students: '{student.name}' has rdd.class_weights: true, but this data set gives "
                "no class weights; leave it out"
            )
        return RDDLoss(
            iterations=training.iterations,
            switch=rdd.switch,
            blend=rdd.blend,
            threshold=rdd.threshold,
            min_kept=rdd.min_kept,
            relation=rdd.relation,
            aux_weight=training.aux_weight,
            kd_weight=kd.weight,
            temperature=kd.temperature,
            class_weight=torch.tensor(class_weights) if rdd.class_weights else None,
        )
    if "kd" in student.method:
        return KDLoss(
            kd_weight=kd.weight, temperature=kd.temperature, aux_weight=training.aux_weight
        )
    return SupervisedLoss(aux_weight=training.aux_weight)


def _needs(student: StudentConfig, has_aux: bool, aux_known: bool) -> frozenset[Need]:
    needs: set[Need] = set()
    if "rdd" in student.method:
        needs |= {"weight", "true_prob"}
        if has_aux and aux_known:
            needs.add("aux_true_prob")
    if student.distils_logits:
        needs.add("logits")
    return frozenset(needs)


def _logits(outputs: NetworkOutputs, teacher: TeacherSignals) -> tuple[Tensor, Tensor]:
    if teacher.logits is None:
        raise UnknownArrayError(
            "TeacherSignals.logits: expected (B, C, h, w), got None; set maps.soft_labels: true, "
            f"or choose a method that does without. {ADD_SOFT_LABELS}"
        )
    return outputs.main, teacher.logits


def _centred(outputs: NetworkOutputs, teacher: TeacherSignals) -> tuple[Tensor, Tensor]:
    """Logits without the constant of each position, which stored ones have lost."""
    student, logits = _logits(outputs, teacher)
    return centre_logits(student), centre_logits(logits)


def _on_grid(feature: Tensor, like: Tensor) -> Tensor:
    """The teacher's feature on the student's grid."""
    if feature.shape[-2:] == like.shape[-2:]:
        return feature
    return F.interpolate(feature.float(), like.shape[-2:], mode="bilinear", align_corners=True)


def _last(outputs: StudentOutputs, teacher: TeacherSignals) -> tuple[Tensor, Tensor]:
    student = outputs.features[-1]
    return student, _on_grid(teacher.features[-1], student)


def _cwd(student: StudentConfig, num_classes: int) -> Method:
    settings = student.cwd

    def terms(outputs: NetworkOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        s, t = _centred(outputs, teacher)
        value = cwd_loss(s, t, settings.temperature, valid=teacher.logits_valid)
        return {"cwd": (settings.weight, value)}

    return terms


def _dist(student: StudentConfig, num_classes: int) -> Method:
    settings = student.dist

    def terms(outputs: NetworkOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        s, t = _logits(outputs, teacher)
        value = dist_loss(
            s, t, settings.temperature, settings.inter, settings.intra, valid=teacher.logits_valid
        )
        return {"dist": (settings.weight, value)}

    return terms


def _skd(student: StudentConfig, num_classes: int) -> Method:
    settings = student.skd

    def terms(outputs: NetworkOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        s, t = _centred(outputs, teacher)
        value = pairwise_loss(s, t, settings.patch, valid=teacher.logits_valid)
        return {"skd": (settings.weight, value)}

    return terms


def _cwd_features(student: StudentConfig, num_classes: int) -> Method:
    settings = student.cwd_features

    def terms(outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        s = outputs.projected["cwd_features"]
        value = cwd_loss(s, _on_grid(teacher.features[-1], s), settings.temperature)
        return {"cwd_features": (settings.weight, value)}

    return terms


def _skd_features(student: StudentConfig, num_classes: int) -> Method:
    settings = student.skd_features

    def terms(outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        value = pairwise_loss(*_last(outputs, teacher), settings.patch)
        return {"skd_features": (settings.weight, value)}

    return terms


def _at(student: StudentConfig, num_classes: int) -> Method:
    settings = student.at

    def terms(outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        pairs = zip(outputs.features, teacher.features, strict=True)
        values = [attention_loss(s, _on_grid(t, s)) for s, t in pairs]
        return {"at": (settings.weight, sum(values[1:], values[0]))}

    return terms


def _ifvd(student: StudentConfig, num_classes: int) -> Method:
    settings = student.ifvd

    def terms(outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        value = ifvd_loss(*_last(outputs, teacher), target, num_classes)
        return {"ifvd": (settings.weight, value)}

    return terms


def _dsd(student: StudentConfig, num_classes: int) -> Method:
    settings = student.dsd

    def terms(outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        pairs = zip(outputs.features, teacher.features, strict=True)
        on_grid = [_on_grid(t, s) for s, t in pairs]
        s, t = _centred(outputs, teacher)
        return {
            "dsd_pixel": (settings.pixel_weight, psd_loss(outputs.features, on_grid)),
            "dsd_category": (
                settings.category_weight,
                csd_loss(s, t, settings.temperature, valid=teacher.logits_valid),
            ),
        }

    return terms


class _CIRKD(nn.Module):
    """Relations within the batch and to remembered embeddings; the memory is its state."""

    def __init__(self, student: StudentConfig, num_classes: int, teacher_channels: int) -> None:
        super().__init__()
        settings = self.settings = student.cirkd
        self.memory = CIRKDMemory(
            num_classes,
            teacher_channels,
            pixel_memory=settings.pixel_memory,
            region_memory=settings.region_memory,
            pixel_contrast=settings.pixel_contrast,
            region_contrast=settings.region_contrast,
            temperature=settings.temperature,
        )

    def forward(self, outputs: StudentOutputs, target: Tensor, teacher: TeacherSignals) -> Terms:
        settings = self.settings
        s, t = _last(outputs, teacher)
        pixel, region = self.memory(outputs.projected["cirkd"], t, target)
        batch = cirkd_minibatch_loss(s, t, settings.temperature, settings.patch)
        return {
            "cirkd_minibatch": (settings.minibatch_weight, batch),
            "cirkd_pixel": (settings.pixel_weight, pixel),
            "cirkd_region": (settings.region_weight, region),
        }


_METHODS: dict[str, Callable[[StudentConfig, int], Method]] = {
    "cwd": _cwd,
    "dist": _dist,
    "skd": _skd,
    "cwd_features": _cwd_features,
    "skd_features": _skd_features,
    "at": _at,
    "ifvd": _ifvd,
    "dsd": _dsd,
}
