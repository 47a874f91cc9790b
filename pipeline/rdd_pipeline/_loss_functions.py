"""The losses as pure functions, and the terms that functions and modules share.

Everything is computed in float32 (float64 for double logits), whatever autocast says, and nothing
waits for the device. Public names are imported from :mod:`rdd_pipeline.losses`.

Shape suffixes: B batch, C classes, h w the networks' output grid, H W the labels' pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline._fused import upsampled_cross_entropy
from rdd_pipeline._tensors import at_least_float32, require_dims, require_shape
from rdd_pipeline.difficulty import (
    IGNORE_INDEX,
    Relation,
    TensorArgumentError,
    hard_threshold,
    relative_difficulty,
)


def tfe_loss(
    student_main: Tensor,
    target: Tensor,
    weight: Tensor,
    student_aux: Tensor | None = None,
    aux_weight: float = 0.4,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """First stage (TFE-RDD): cross-entropy weighted by how easy the teacher finds each pixel.

    ``mean over all B*H*W pixels of W * (CE(up(main), y) + aux_weight * CE(up(aux), y))``
    (arXiv 2407.03719, stage 1). As in the published code the mean counts ignored pixels, whose CE
    is 0, in its denominator.

    Args:
        student_main: (B, C, h, w) logits, any floating dtype.
        target: (B, H, W) labels, any integer dtype.
        weight: (B, H, W), see :func:`rdd_pipeline.difficulty.tfe_weight`; takes no gradient.
        student_aux: (B, C, h', w') logits of the auxiliary head; None leaves its term out.
        aux_weight: Weight of that term.
        ignore_index: Label of pixels without a class; they have no gradient.

    Returns:
        0-d; 0, and connected to the logits, where every pixel is ignored.

    Raises:
        TensorArgumentError: Shapes do not fit, or a label lies outside the classes.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 2, 2)
        >>> target = torch.randint(0, 3, (1, 9, 9))
        >>> plain = supervised_loss(logits, target)
        >>> torch.allclose(tfe_loss(logits, target, torch.full((1, 9, 9), 0.5)), 0.5 * plain)
        True
    """
    ce = cross_entropies(student_main, student_aux, target, ignore_index)
    return tfe_term(ce, target, weight, aux_weight)


def tse_loss(
    student_main: Tensor,
    target: Tensor,
    teacher_true_prob: Tensor | None,
    student_aux: Tensor | None = None,
    teacher_aux_true_prob: Tensor | None = None,
    aux_weight: float = 0.4,
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    relation: Relation = "xor",
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Second stage (TSE-RDD): cross-entropy on the pixels that only one network finds hard.

    ``sum(m w_y CE) / sum(m w_y)`` with the mask ``m = relative_difficulty(hard_s, hard_t)`` and
    the class weights ``w`` (1 without them), plus ``aux_weight`` times the same on the auxiliary
    heads, where both networks have one (arXiv 2407.03719, stage 2). Masks take no gradient.

    Args:
        student_main: (B, C, h, w) logits, any floating dtype.
        target: (B, H, W) labels, any integer dtype.
        teacher_true_prob: (B, H, W), see
            :func:`rdd_pipeline.difficulty.true_class_probability`; may be None where the relation
            is ``student``, which does not look at it.
        student_aux: (B, C, h', w') logits of the student's auxiliary head, or None.
        teacher_aux_true_prob: (B, H, W) under the teacher's auxiliary head, or None.
        aux_weight: Weight of the auxiliary term.
        threshold: See :func:`rdd_pipeline.difficulty.hard_threshold`.
        min_kept: Likewise; a count or a fraction.
        relation: See :func:`rdd_pipeline.difficulty.relative_difficulty`.
        class_weight: (C,), at least 0, or None.
        ignore_index: Label of pixels without a class; they have no gradient.

    Returns:
        0-d; 0, and connected to the logits, where the mask is empty.

    Raises:
        TensorArgumentError: Shapes do not fit, a number is out of range, or the teacher's
            probability is missing.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 9, 9))
        >>> from rdd_pipeline.difficulty import true_class_probability
        >>> twin = true_class_probability(logits, target)
        >>> tse_loss(logits, target, twin, min_kept=5).item()  # they agree: nothing to learn
        0.0
    """
    ce = cross_entropies(student_main, student_aux, target, ignore_index)
    settings = Mining(threshold, min_kept, relation, aux_weight, ignore_index)
    return tse_terms(
        ce, target, teacher_true_prob, teacher_aux_true_prob, class_weight, settings
    ).loss


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, valid: Tensor | None = None
) -> Tensor:
    """Logit distillation (Hinton et al., arXiv 1503.02531) at each grid position.

    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, summed over classes, mean over
    positions. In float32 also under autocast: in float16 the sum over positions overflows.

    Args:
        student: (B, C, h, w) logits, any floating dtype.
        teacher: (B, C, h, w) logits, any floating dtype; any constant may have been subtracted
            from a position's classes. Takes no gradient.
        temperature: T, above 0.
        valid: (B, h, w) bool; positions outside are left out of the mean. None keeps all.

    Returns:
        0-d; 0, and connected to the logits, where no position is valid.

    Raises:
        TensorArgumentError: Shapes differ, or the temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 2, 2)
        >>> kd_loss(logits, logits - 5.0, temperature=2.0).abs().item() < 1e-6
        True
    """
    require_dims("student", student, "BChw")
    require_shape("teacher", teacher, student.shape, "the student's logits")
    if not temperature > 0.0:
        raise TensorArgumentError(f"temperature: expected a number above 0, got {temperature}")
    with torch.autocast(student.device.type, enabled=False):
        log_student = F.log_softmax(at_least_float32(student) / temperature, dim=1)
        log_teacher = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
        divergence_Bhw = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
        if valid is None:
            mean = divergence_Bhw.mean()
        else:
            require_shape("valid", valid, divergence_Bhw.shape, "the student's grid")
            mean = torch.where(valid, divergence_Bhw, 0.0).sum() / valid.sum().clamp_min(1)
        return mean * temperature**2


def supervised_loss(
    student_main: Tensor,
    target: Tensor,
    student_aux: Tensor | None = None,
    aux_weight: float = 0.4,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross-entropy at label resolution, mean over the valid pixels: the baseline.

    Args:
        student_main: (B, C, h, w) logits, any floating dtype.
        target: (B, H, W) labels, any integer dtype.
        student_aux: (B, C, h', w') logits of the auxiliary head; None leaves its term out.
        aux_weight: Weight of that term.
        ignore_index: Label of pixels without a class; they have no gradient.

    Returns:
        0-d; 0, and connected to the logits, where every pixel is ignored.

    Raises:
        TensorArgumentError: Shapes do not fit, or a label lies outside the classes.

    Example:
        >>> supervised_loss(torch.zeros(1, 2, 1, 1), torch.tensor([[[0, 1, 255]]]))
        tensor(0.6931)
    """
    ce = cross_entropies(student_main, student_aux, target, ignore_index)
    main, aux = supervised_terms(ce, target, ignore_index)
    return main if aux is None else main + aux_weight * aux


class CrossEntropies(NamedTuple):
    """Per-pixel losses (B, H, W), 0 where ignored."""

    main: Tensor
    aux: Tensor | None
    num_classes: int


class Mining(NamedTuple):
    """Settings of the second stage."""

    threshold: float
    min_kept: int | float
    relation: Relation
    aux_weight: float
    ignore_index: int


class Head(NamedTuple):
    """One head's second-stage loss and how it came about."""

    loss: Tensor
    hard_student: Tensor
    hard_teacher: Tensor | None
    relative: Tensor
    trained: Tensor
    """Pixels in ``relative``."""
    tau_student: Tensor
    tau_teacher: Tensor | None


class SecondStage(NamedTuple):
    loss: Tensor
    main: Head
    empty_masks: Tensor


def cross_entropies(
    main: Tensor, aux: Tensor | None, target: Tensor, ignore_index: int
) -> CrossEntropies:
    return CrossEntropies(
        upsampled_cross_entropy(main, target, ignore_index),
        None if aux is None else upsampled_cross_entropy(aux, target, ignore_index),
        main.shape[1],
    )


def tfe_term(ce: CrossEntropies, target: Tensor, weight: Tensor, aux_weight: float) -> Tensor:
    require_shape("weight", weight, target.shape, "the target's")
    both = ce.main if ce.aux is None else ce.main + aux_weight * ce.aux
    return (weight.detach().to(both.dtype) * both).mean()


def supervised_terms(
    ce: CrossEntropies, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    count = (target != ignore_index).sum().clamp_min(1)
    return ce.main.sum() / count, None if ce.aux is None else ce.aux.sum() / count


def tse_terms(
    ce: CrossEntropies,
    target: Tensor,
    teacher_true_prob: Tensor | None,
    teacher_aux_true_prob: Tensor | None,
    class_weight: Tensor | None,
    settings: Mining,
) -> SecondStage:
    valid = target != settings.ignore_index
    if class_weight is not None:
        require_shape("class_weight", class_weight, (ce.num_classes,), "one for each class")
    pixel_weight = _pixel_weight(class_weight, target, valid)
    main = _tse_head("true_prob", ce.main, valid, teacher_true_prob, pixel_weight, settings)
    with_aux = teacher_aux_true_prob is not None or settings.relation == "student"
    if ce.aux is None or not with_aux:
        return SecondStage(main.loss, main, _empty(main))
    aux = _tse_head("aux_true_prob", ce.aux, valid, teacher_aux_true_prob, pixel_weight, settings)
    loss = main.loss + settings.aux_weight * aux.loss
    return SecondStage(loss, main, _empty(main) + _empty(aux))


def _tse_head(
    name: str,
    ce: Tensor,
    valid: Tensor,
    teacher_true_prob: Tensor | None,
    pixel_weight: Tensor | None,
    settings: Mining,
) -> Head:
    # CE is -log p, and 0 where ignored: the probability comes without a second softmax.
    student_true_prob = torch.exp(-ce.detach())
    hard_student, tau_student = _mine(student_true_prob, valid, settings)
    hard_teacher = tau_teacher = None
    if teacher_true_prob is not None:
        require_shape(f"teacher_{name}", teacher_true_prob, valid.shape, "the target's")
        hard_teacher, tau_teacher = _mine(teacher_true_prob, valid, settings)
        relative = relative_difficulty(hard_student, hard_teacher, settings.relation)
    elif settings.relation == "student":
        relative = hard_student
    else:
        raise TensorArgumentError(
            f"teacher_{name}: expected (B, H, W) probabilities, got None; only the relation "
            f"'student' does without, not '{settings.relation}'"
        )
    # where, not a product: an infinite loss outside the mask must not turn into NaN.
    inside = torch.where(relative, ce, 0.0)
    count = relative.sum()
    if pixel_weight is None:
        numerator, denominator = inside.sum(), count.to(ce.dtype)
    else:
        numerator = (inside * pixel_weight).sum()
        denominator = torch.where(relative, pixel_weight, 0.0).sum()
    # The numerator is 0 whenever the denominator is; dividing by 1 keeps loss and gradient 0.
    loss = numerator / torch.where(denominator > 0, denominator, 1.0)
    return Head(loss, hard_student, hard_teacher, relative, count, tau_student, tau_teacher)


def _empty(head: Head) -> Tensor:
    """1 where a head had nothing to train on, else 0."""
    return (head.trained == 0).to(head.loss.dtype)


def _mine(true_prob: Tensor, valid: Tensor, settings: Mining) -> tuple[Tensor, Tensor]:
    """Hard mask and its threshold, as :func:`rdd_pipeline.difficulty.hard_mask`."""
    tau = hard_threshold(true_prob, valid, settings.threshold, settings.min_kept)
    return valid & (at_least_float32(true_prob) <= tau), tau


def _pixel_weight(class_weight: Tensor | None, target: Tensor, valid: Tensor) -> Tensor | None:
    if class_weight is None:
        return None
    weight = at_least_float32(class_weight.detach())
    return weight[torch.where(valid, target, 0).long()]
