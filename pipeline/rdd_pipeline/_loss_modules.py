"""The losses as modules: settings, the schedule of the two stages and diagnostics.

Public names are imported from :mod:`rdd_pipeline.losses`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from rdd_pipeline._loss_functions import (
    Mining,
    SecondStage,
    cross_entropies,
    kd_loss,
    supervised_terms,
    tfe_term,
    tse_terms,
)
from rdd_pipeline.difficulty import IGNORE_INDEX, Relation
from rdd_pipeline.errors import ConfigError
from rdd_storage.errors import UnknownArrayError


class NetworkOutputs(Protocol):
    """What the losses read of a network's outputs, such as ``networks.SegLogits``."""

    @property
    def main(self) -> Tensor:
        """(B, C, h, w) logits of the main head."""

    @property
    def aux(self) -> Tensor | None:
        """(B, C, h', w') logits of the auxiliary head, if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSignals:
    """What the teacher says about a batch; only what the method uses has to be there."""

    weight: Tensor | None = None
    """(B, H, W) float, the first stage's weight ``up(exp(-D))``; array ``discrepancy``."""
    true_prob: Tensor | None = None
    """(B, H, W) float, probability of the label, 1 where ignored; array ``hardness``."""
    aux_true_prob: Tensor | None = None
    """(B, H, W) float, likewise under the auxiliary head; array ``aux_hardness``."""
    logits: Tensor | None = None
    """(B, C, h, w), any floating dtype, up to a constant per position; array ``logits``."""
    logits_valid: Tensor | None = None
    """(B, h, w) bool, False in padding; None: all positions count."""
    features: tuple[Tensor, ...] = ()
    """(B, F, h', w') features of a teacher in memory, in the order of the taps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """How the relative difficulty of one step looked: detached 0-d tensors.

    What a stage does not compute is NaN. Shares are of the valid pixels, main heads.
    """

    tfe_share: Tensor
    """Share of the first stage in the loss: 1 before the switch."""
    mean_weight: Tensor
    """Mean of the first stage's weight over valid pixels."""
    hard_teacher: Tensor
    """Share of pixels hard for the teacher."""
    hard_student: Tensor
    """Share of pixels hard for the student."""
    hard_both: Tensor
    """Share of pixels hard for both."""
    relative: Tensor
    """Share of pixels trained on in the second stage."""
    tau_teacher: Tensor
    """The teacher's hard threshold."""
    tau_student: Tensor
    """The student's hard threshold."""
    empty_masks: Tensor
    """How many masks of this step were empty: main and auxiliary head, 0 to 2."""

    def as_tensors(self) -> dict[str, Tensor]:
        """All values by name, still on the device."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_floats(self) -> dict[str, float]:
        """All values by name, in one transfer from the device; waits for it."""
        tensors = self.as_tensors()
        values = torch.stack([tensor.double() for tensor in tensors.values()]).tolist()
        return dict(zip(tensors, values, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss and what it is made of."""

    total: Tensor
    """0-d, to call ``backward`` on."""
    terms: dict[str, Tensor]
    """Detached 0-d terms by name, each before its weight in the total."""
    diagnostics: Diagnostics | None = None
    """Of relative difficulty distillation alone."""
    relative: Tensor | None = None
    """bool (B, H, W): pixels trained on in its second stage, main heads; None before it."""


class SupervisedLoss(nn.Module):
    """:func:`supervised_loss` with the interface of :class:`RDDLoss`; looks at no teacher.

    Terms: ``ce``, and ``ce_aux`` where the student has an auxiliary head.
    """

    def __init__(self, *, aux_weight: float = 0.4, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index

    def forward(
        self,
        outputs: NetworkOutputs,
        target: Tensor,
        teacher: TeacherSignals | None = None,
        iteration: int = 0,
    ) -> LossOutput:
        """Compute the loss; see :meth:`RDDLoss.forward` for the arguments."""
        ce = cross_entropies(outputs.main, outputs.aux, target, self.ignore_index)
        main, aux = supervised_terms(ce, target, self.ignore_index)
        terms = {"ce": main.detach()}
        if aux is None:
            return LossOutput(total=main, terms=terms)
        terms["ce_aux"] = aux.detach()
        return LossOutput(total=main + self.aux_weight * aux, terms=terms)


class KDLoss(nn.Module):
    """:class:`SupervisedLoss` plus ``kd_weight`` times :func:`kd_loss` on the main heads.

    Terms: those of :class:`SupervisedLoss`, and ``kd``.

    Raises:
        ConfigError: ``kd.weight`` or ``kd.temperature`` is out of range.
    """

    def __init__(
        self,
        *,
        aux_weight: float = 0.4,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        _check_kd(kd_weight, temperature)
        self.supervised = SupervisedLoss(aux_weight=aux_weight, ignore_index=ignore_index)
        self.kd_weight = kd_weight
        self.temperature = temperature

    def forward(
        self,
        outputs: NetworkOutputs,
        target: Tensor,
        teacher: TeacherSignals | None = None,
        iteration: int = 0,
    ) -> LossOutput:
        """Compute the loss; see :meth:`RDDLoss.forward` for the arguments."""
        supervised: LossOutput = self.supervised(outputs, target, teacher, iteration)
        if self.kd_weight == 0.0:
            return supervised
        kd = _kd_term(outputs, teacher, self.temperature)
        return LossOutput(
            total=supervised.total + self.kd_weight * kd,
            terms={**supervised.terms, "kd": kd.detach()},
        )


class RDDLoss(nn.Module):
    """Relative Difficulty Distillation (arXiv 2407.03719): both stages and their schedule.

    ``total = l * tfe + (1 - l) * tse + kd_weight * kd`` with ``l`` from :meth:`tfe_share`. A stage
    whose share is 0 is not computed. Terms: ``tfe``, ``tse`` and ``kd``, those that were computed.

    Args:
        iterations: Length of the training.
        switch: End of the first stage: an iteration (int), or a fraction of ``iterations`` in
            (0, 1). 0 leaves the first stage out.
        blend: ``hard``: the second stage replaces the first at the switch; ``linear``: the first
            fades out from the switch to the end.
        threshold: See :func:`rdd_pipeline.difficulty.hard_threshold`.
        min_kept: Likewise; a count or a fraction of the batch's pixels.
        relation: See :func:`rdd_pipeline.difficulty.relative_difficulty`.
        aux_weight: Weight of the auxiliary heads' terms.
        kd_weight: Weight of :func:`kd_loss`; 0 leaves it out.
        temperature: Of :func:`kd_loss`.
        class_weight: (C,), at least 0, in the second stage's mean; None for none.
        ignore_index: Label of pixels without a class.

    Raises:
        ConfigError: A setting is out of range or contradicts another; the key is named.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        iterations: int,
        switch: int | float = 0.1,
        blend: Literal["hard", "linear"] = "hard",
        threshold: float = 0.7,
        min_kept: int | float = 100_000,
        relation: Relation = "xor",
        aux_weight: float = 0.4,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        class_weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        _check_rdd(iterations, switch, blend, threshold, min_kept, relation)
        _check_kd(kd_weight, temperature)
        if aux_weight < 0.0:
            raise ConfigError(f"aux_weight: expected at least 0, got {aux_weight}")
        if class_weight is not None and (class_weight.dim() != 1 or bool((class_weight < 0).any())):
            raise ConfigError(
                "class_weight: expected one number for each class, none below 0, got shape "
                f"{tuple(class_weight.shape)}, least {class_weight.min().item()}"
            )
        self.iterations = iterations
        self.switch = round(switch * iterations) if isinstance(switch, float) else switch
        if blend == "linear" and self.switch >= iterations:
            raise ConfigError(
                f"rdd.switch: expected below iterations ({iterations}) with rdd.blend: linear, got "
                f"{switch}; the first stage fades out from the switch to the end, so some "
                "iterations have to be left"
            )
        self.blend = blend
        self.kd_weight = kd_weight
        self.temperature = temperature
        self._settings = Mining(threshold, min_kept, relation, aux_weight, ignore_index)
        # Not part of the state: it comes from the data set, not from training.
        self.register_buffer("class_weight", class_weight, persistent=False)

    def tfe_share(self, iteration: int) -> float:
        """Share of the first stage at an iteration (counted from 0): 1 before the switch."""
        if iteration < self.switch:
            return 1.0
        if self.blend == "hard":
            return 0.0
        return max(0.0, (self.iterations - iteration) / (self.iterations - self.switch))

    @property
    def stages(self) -> tuple[range, range]:
        """Iterations, counted from 0, in which each of the two stages is computed."""
        end = self.switch if self.blend == "hard" else self.iterations
        return range(end), range(self.switch, sys.maxsize)

    def forward(
        self,
        outputs: NetworkOutputs,
        target: Tensor,
        teacher: TeacherSignals | None,
        iteration: int,
    ) -> LossOutput:
        """Compute the loss of one step.

        Args:
            outputs: The student's logits: main (B, C, h, w), aux (B, C, h', w') or None.
            target: (B, H, W) labels, any integer dtype.
            teacher: What the teacher says about this batch.
            iteration: Counted from 0.

        Raises:
            UnknownArrayError: A signal that this stage needs is missing; its array is named.
            TensorArgumentError: Shapes do not fit, or a label lies outside the classes.
        """
        settings = self._settings
        signals = teacher if teacher is not None else TeacherSignals()
        share = self.tfe_share(iteration)
        # Before the expensive part, so that a mistake shows at once.
        if share > 0.0 and signals.weight is None:
            raise _missing("weight", "discrepancy", "the first stage (TFE-RDD)")
        if share < 1.0 and signals.true_prob is None and settings.relation != "student":
            raise _missing("true_prob", "hardness", "the second stage (TSE-RDD)")

        ce = cross_entropies(outputs.main, outputs.aux, target, settings.ignore_index)
        total = ce.main.new_zeros(())
        terms: dict[str, Tensor] = {}
        if share > 0.0 and signals.weight is not None:
            tfe = tfe_term(ce, target, signals.weight, settings.aux_weight)
            terms["tfe"] = tfe.detach()
            total = total + share * tfe
        second = None
        if share < 1.0:
            second = tse_terms(
                ce, target, signals.true_prob, signals.aux_true_prob, self.class_weight, settings
            )
            terms["tse"] = second.loss.detach()
            total = total + (1.0 - share) * second.loss
        if self.kd_weight > 0.0:
            kd = _kd_term(outputs, teacher, self.temperature)
            terms["kd"] = kd.detach()
            total = total + self.kd_weight * kd
        weight = signals.weight if share > 0.0 else None
        diagnostics = _diagnose(share, target != settings.ignore_index, weight, second)
        return LossOutput(
            total=total,
            terms=terms,
            diagnostics=diagnostics,
            relative=None if second is None else second.main.relative,
        )


def _kd_term(outputs: NetworkOutputs, teacher: TeacherSignals | None, temperature: float) -> Tensor:
    if teacher is None or teacher.logits is None:
        raise _missing("logits", "logits", "logit distillation (kd.weight above 0)")
    return kd_loss(outputs.main, teacher.logits, temperature, valid=teacher.logits_valid)


def _missing(signal: str, array: str, reader: str) -> UnknownArrayError:
    return UnknownArrayError(
        f"TeacherSignals.{signal}: {reader} expects the store's array '{array}', got None; build "
        f"maps that hold '{array}', or choose a method that does without"
    )


def _diagnose(
    share: float, valid: Tensor, weight: Tensor | None, second: SecondStage | None
) -> Diagnostics:
    nan = torch.full((), torch.nan, device=valid.device)
    count = valid.sum().clamp_min(1)

    def fraction(mask: Tensor | None) -> Tensor:
        return nan if mask is None else mask.sum() / count

    main = second.main if second is not None else None
    teacher = main.hard_teacher if main is not None else None
    tau_teacher = main.tau_teacher if main is not None else None
    return Diagnostics(
        tfe_share=torch.full((), share, device=valid.device),
        mean_weight=nan
        if weight is None
        else torch.where(valid, weight.detach().float(), 0.0).sum() / count,
        hard_teacher=fraction(teacher),
        hard_student=nan if main is None else fraction(main.hard_student),
        hard_both=nan if main is None or teacher is None else fraction(main.hard_student & teacher),
        relative=nan if main is None else main.trained / count,
        tau_teacher=nan if tau_teacher is None else tau_teacher,
        tau_student=nan if main is None else main.tau_student,
        empty_masks=torch.zeros((), device=valid.device) if second is None else second.empty_masks,
    )


def _check_kd(kd_weight: float, temperature: float) -> None:
    if not kd_weight >= 0.0:
        raise ConfigError(f"kd.weight: expected at least 0, got {kd_weight}")
    if not temperature > 0.0:
        raise ConfigError(f"kd.temperature: expected above 0, got {temperature}")


def _check_rdd(
    iterations: int,
    switch: int | float,
    blend: str,
    threshold: float,
    min_kept: int | float,
    relation: str,
) -> None:
    if iterations < 1:
        raise ConfigError(f"iterations: expected at least 1, got {iterations}")
    for key, value in (("rdd.switch", switch), ("rdd.min_kept", min_kept)):
        if isinstance(value, float):
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{key}: expected a fraction in (0, 1) or a count, got {value}")
        elif value < 0:
            raise ConfigError(f"{key}: expected at least 0, got {value}")
    if blend not in ("hard", "linear"):
        raise ConfigError(f"rdd.blend: expected hard or linear, got {blend!r}")
    if not 0.0 < threshold < 1.0:
        raise ConfigError(f"rdd.threshold: expected a number in (0, 1), got {threshold}")
    if relation not in get_args(Relation):
        raise ConfigError(
            f"rdd.relation: expected one of {', '.join(get_args(Relation))}, got {relation!r}"
        )
