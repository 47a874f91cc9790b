"""Where the teacher and the student find a pixel hard: weights, hard masks and their relation.

Relative Difficulty Distillation (Liang et al., arXiv 2407.03719) asks of a teacher not what to
imitate but where to look. These are its maps, as pure functions of logits and labels;
:mod:`rdd_pipeline.losses` makes losses of them, the teacher pass writes them to stores.

Shape suffixes: B batch, C classes, h w the network's output grid, H W the labels' pixels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline._fused import upsampled_cross_entropy
from rdd_pipeline._tensors import (
    TensorArgumentError,
    at_least_float32,
    require_dims,
    require_shape,
)

__all__ = [
    "IGNORE_INDEX",
    "Relation",
    "TensorArgumentError",
    "entropy_discrepancy",
    "hard_mask",
    "hard_threshold",
    "margin_discrepancy",
    "prediction_discrepancy",
    "relative_difficulty",
    "scale_discrepancy",
    "tfe_weight",
    "true_class_probability",
]

IGNORE_INDEX = 255
"""Label of pixels that have no class."""

Relation = Literal["xor", "or", "and", "student"]
"""How the student's and the teacher's hard pixels are combined."""

_SMALLEST_MARGIN = 2.0**-23  # a unit in the last place of float32 probabilities near 1


def prediction_discrepancy(main: Tensor, aux: Tensor) -> Tensor:
    """How far a network's auxiliary head is from its main head, for each grid position.

    ``D = KL(softmax(aux) || softmax(main)) = sum_c p_aux (log p_aux - log p_main)`` in nats
    (arXiv 2407.03719, the prediction discrepancy of TFE-RDD). Low where the network has decided
    early, which is where its pixels are easy.

    Args:
        main: (B, C, h, w) logits of the main head, any floating dtype.
        aux: (B, C, h, w) logits of the auxiliary head.

    Returns:
        (B, h, w), float32 (float64 for double logits), at least 0. Labels play no part.

    Raises:
        TensorArgumentError: The shapes differ or have not four axes.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> main = torch.randn(1, 3, 2, 2)
        >>> prediction_discrepancy(main, main).abs().max().item()
        0.0
        >>> bool((prediction_discrepancy(main, torch.randn(1, 3, 2, 2)) > 0).all())
        True
    """
    require_dims("main", main, "BChw")
    require_shape("aux", aux, main.shape, "the main head's")
    with torch.autocast(main.device.type, enabled=False):
        log_main = F.log_softmax(at_least_float32(main), dim=1)
        log_aux = F.log_softmax(at_least_float32(aux), dim=1)
        # Rounding leaves a sum of signed terms a little below zero where the heads agree.
        return (log_aux.exp() * (log_aux - log_main)).sum(1).clamp_min(0.0)


def scale_discrepancy(probs: Sequence[Tensor]) -> Tensor:
    """How far a network's predictions at several scales are from their mean.

    ``D = mean_s KL(p_s || mean_s p_s)`` in nats, the Jensen-Shannon divergence of the scales: at
    most ``ln S`` for S scales. It stands in for the prediction discrepancy (arXiv 2407.03719)
    where a network has one head; the paper has no such term.

    Args:
        probs: S tensors (B, C, h, w), probabilities over the classes at each scale, brought to one
            grid, any floating dtype; at least two.

    Returns:
        (B, h, w), float32 (float64 for double probabilities), in [0, ln S]. Labels play no part.

    Raises:
        TensorArgumentError: Fewer than two tensors, or their shapes differ or have not four axes.

    Example:
        >>> sure = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
        >>> scale_discrepancy([sure, sure]).item(), scale_discrepancy([sure, 1 - sure]).item()
        (0.0, 0.6931471824645996)
    """
    if len(probs) < 2:
        raise TensorArgumentError(f"probs: expected at least two scales, got {len(probs)}")
    require_dims("probs[0]", probs[0], "BChw")
    for index, other in enumerate(probs[1:], 1):
        require_shape(f"probs[{index}]", other, probs[0].shape, "that of probs[0]")
    with torch.autocast(probs[0].device.type, enabled=False):
        scales = [at_least_float32(p) for p in probs]
        mean = torch.stack(scales).mean(0)
        # The mean of a subnormal probability may be 0, and its share of the sum is none.
        log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        total = torch.zeros_like(mean[:, 0])
        for p in scales:
            total += (torch.xlogy(p, p) - p * log_mean).sum(1)
        return (total / len(scales)).clamp_min(0.0)


def entropy_discrepancy(logits: Tensor) -> Tensor:
    """How undecided a network is, from one forward pass.

    ``D = -sum_c p ln p`` with ``p = softmax(logits)``, in nats: at most ``ln C``. It stands in for
    the prediction discrepancy (arXiv 2407.03719) where a network has one head; the paper has no
    such term.

    Args:
        logits: (B, C, h, w), any floating dtype.

    Returns:
        (B, h, w), float32 (float64 for double logits), in [0, ln C]. Labels play no part.

    Raises:
        TensorArgumentError: The logits have not four axes.

    Example:
        >>> entropy_discrepancy(torch.tensor([[0.0, 0.0], [0.0, 9.0]]).reshape(1, 2, 1, 2))
        tensor([[[0.6931, 0.0012]]])
    """
    require_dims("logits", logits, "BChw")
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(at_least_float32(logits), dim=1)
        return (log_p.exp() * -log_p).sum(1).clamp_min(0.0)


def margin_discrepancy(logits: Tensor) -> Tensor:
    """How near a network's second choice is to its first, from one forward pass.

    ``D = -ln(p1 - p2)`` with the two largest of ``softmax(logits)``, so that ``exp(-D)`` is the
    margin itself. Margins below ``2**-23`` count as ``2**-23`` (D = 15.9), so that D is finite
    where classes tie. It stands in for the prediction discrepancy (arXiv 2407.03719) where a
    network has one head; the paper has no such term.

    Args:
        logits: (B, C, h, w), any floating dtype; at least two classes.

    Returns:
        (B, h, w), float32 (float64 for double logits), in [0, 23 ln 2]. Labels play no part.

    Raises:
        TensorArgumentError: The logits have not four axes, or one class only.

    Example:
        >>> probs = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1)
        >>> margin_discrepancy(probs.log()).exp().reciprocal()
        tensor([[[0.5000]]])
    """
    require_dims("logits", logits, "BChw")
    if logits.shape[1] < 2:
        raise TensorArgumentError(
            f"logits: expected at least two classes, got shape {tuple(logits.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        first, second = at_least_float32(logits).softmax(1).topk(2, dim=1).values.unbind(1)
        # Subtracted from 0, so that a margin of 1 gives 0 and not -0.
        return 0.0 - (first - second).clamp_min(_SMALLEST_MARGIN).log()


def tfe_weight(discrepancy: Tensor, size: tuple[int, int]) -> Tensor:
    """The first stage's weight of each pixel: 1 for easy, towards 0 for hard.

    ``W = up(exp(-D))``, the exponent before the interpolation (bilinear, ``align_corners=True``).

    Args:
        discrepancy: (B, h, w), at least 0, any floating dtype; see :func:`prediction_discrepancy`.
        size: H and W of the labels.

    Returns:
        (B, H, W), float32 (float64 for double), in (0, 1].

    Raises:
        TensorArgumentError: The discrepancy has not three axes.

    Example:
        >>> tfe_weight(torch.tensor([[[0.0, 2.0]]]), (1, 3))
        tensor([[[1.0000, 0.5677, 0.1353]]])
    """
    require_dims("discrepancy", discrepancy, "Bhw")
    with torch.autocast(discrepancy.device.type, enabled=False):
        easiness_B1hw = torch.exp(-at_least_float32(discrepancy)).unsqueeze(1)
        weight_BHW = F.interpolate(
            easiness_B1hw, size=tuple(size), mode="bilinear", align_corners=True
        ).squeeze(1)
        # exp underflows beyond a discrepancy of about 100, and the two interpolation weights may
        # sum to one unit in the last place above 1.
        return weight_BHW.clamp(torch.finfo(weight_BHW.dtype).tiny, 1.0)


def true_class_probability(
    logits: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Probability that the network gives to the label: ``p = softmax(up(z))[y]``.

    ``up`` is bilinear with ``align_corners=True``. The upsampled softmax is not kept, and beyond
    32 MB not even made at once.

    Args:
        logits: (B, C, h, w), any floating dtype.
        target: (B, H, W), any integer dtype.
        ignore_index: Label of pixels without a class.

    Returns:
        (B, H, W), float32 (float64 for double logits), in [0, 1]; 1 at ignored pixels.

    Raises:
        TensorArgumentError: Shapes do not fit, or a label lies outside the classes.

    Example:
        >>> logits = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
        >>> true_class_probability(logits, torch.tensor([[[1, 0, 255]]]))
        tensor([[[0.7311, 0.2689, 1.0000]]])
    """
    return torch.exp(-upsampled_cross_entropy(logits, target, ignore_index))


def hard_threshold(
    true_prob: Tensor,
    valid: Tensor,
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
) -> Tensor:
    """The probability up to which a pixel of this batch counts as hard.

    ``tau = max(threshold, p at position min_kept)`` of the ascending order of all B*H*W pixels,
    positions counted from 1, ignored pixels with p = 1. One selection, no sort.

    Args:
        true_prob: (B, H, W), in [0, 1].
        valid: (B, H, W) bool, False at ignored pixels.
        threshold: In [0, 1].
        min_kept: Least number of hard pixels: a count (0 lets the threshold decide alone) or a
            fraction of B*H*W in (0, 1). With fewer valid pixels than this, tau is 1 (or the
            largest p), so that every valid pixel is hard.

    Returns:
        0-d, float32 (float64 for double probabilities), on the input's device.

    Raises:
        TensorArgumentError: Shapes differ, or a number is out of range.
    """
    require_shape("valid", valid, true_prob.shape, "true_prob's")
    if not 0.0 <= threshold <= 1.0:
        raise TensorArgumentError(f"threshold: expected a number from 0 to 1, got {threshold}")
    position = _position(min_kept, true_prob.numel())
    prob = torch.where(valid, at_least_float32(true_prob.detach()), 1.0).flatten()
    if position == 0:
        return prob.new_full((), threshold)
    if position == prob.numel():
        kth = prob.amax()
    elif prob.device.type == "cpu":
        # Once enough pixels lie below the threshold it decides, and counting them is several
        # times cheaper than the selection. (A compiled graph must not branch on data.)
        if (
            not torch.compiler.is_compiling()
            and int(torch.count_nonzero(prob <= threshold)) >= position
        ):
            return prob.new_full((), threshold)
        kth = prob.kthvalue(position).values
    else:
        # On a device kthvalue puts one block of threads to work; topk puts all.
        kth = prob.topk(position, largest=False, sorted=False).values.amax()
    return kth.clamp_min(threshold)


def hard_mask(
    true_prob: Tensor,
    valid: Tensor,
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
) -> Tensor:
    """Pixels that a network finds hard: ``valid & (p <= tau)``.

    The threshold of online hard example mining over the per-device batch (arXiv 2407.03719,
    TSE-RDD); see :func:`hard_threshold` for tau and the arguments.

    Returns:
        (B, H, W) bool, False at ignored pixels.

    Raises:
        TensorArgumentError: Shapes differ, or a number is out of range.

    Example:
        >>> p = torch.tensor([[[0.1, 0.6, 0.8, 0.9]]])
        >>> valid = torch.tensor([[[True, False, True, True]]])
        >>> hard_mask(p, valid, threshold=0.7, min_kept=1)
        tensor([[[ True, False, False, False]]])
        >>> hard_mask(p, valid, threshold=0.7, min_kept=2)
        tensor([[[ True, False,  True, False]]])
    """
    tau = hard_threshold(true_prob, valid, threshold, min_kept)
    return valid & (at_least_float32(true_prob.detach()) <= tau)


def relative_difficulty(
    hard_student: Tensor, hard_teacher: Tensor, relation: Relation = "xor"
) -> Tensor:
    """Pixels to train on in the second stage, from what the two networks find hard.

    Args:
        hard_student: (B, H, W) bool.
        hard_teacher: (B, H, W) bool.
        relation: ``xor``: one of the two alone (published); ``or``; ``and``; ``student``: the
            student's, whatever the teacher's (ordinary online hard example mining).

    Returns:
        (B, H, W) bool.

    Raises:
        TensorArgumentError: Shapes differ, masks are not bool, or the relation is unknown.

    Example:
        >>> student = torch.tensor([[[True, True, False]]])
        >>> teacher = torch.tensor([[[True, False, False]]])
        >>> relative_difficulty(student, teacher)
        tensor([[[False,  True, False]]])
    """
    require_shape("hard_teacher", hard_teacher, hard_student.shape, "hard_student's")
    for name, mask in (("hard_student", hard_student), ("hard_teacher", hard_teacher)):
        if mask.dtype != torch.bool:
            raise TensorArgumentError(f"{name}: expected a bool mask, got {mask.dtype}")
    if relation == "xor":
        return hard_student ^ hard_teacher
    if relation == "or":
        return hard_student | hard_teacher
    if relation == "and":
        return hard_student & hard_teacher
    if relation == "student":
        return hard_student
    raise TensorArgumentError(
        f"relation: expected one of {', '.join(get_args(Relation))}, got {relation!r}"
    )


def _position(min_kept: int | float, pixels: int) -> int:
    """Position in the ascending order, counted from 1; 0 when the threshold decides alone."""
    if isinstance(min_kept, float):
        if not 0.0 < min_kept < 1.0:
            raise TensorArgumentError(
                f"min_kept: expected a count (int) or a fraction in (0, 1), got {min_kept}"
            )
        return min(pixels, max(1, round(min_kept * pixels)))
    count = operator.index(min_kept)
    if count < 0:
        raise TensorArgumentError(f"min_kept: expected at least 0 pixels, got {count}")
    return min(pixels, count)
