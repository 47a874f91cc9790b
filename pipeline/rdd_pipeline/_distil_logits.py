"""Distillation losses on logits: channel-wise, by correlation, and between categories.

Everything is computed in float32 (float64 for double logits), whatever autocast says, and nothing
waits for the device. Teachers take no gradient. Public names are imported from
:mod:`rdd_pipeline.losses`.

Shape suffixes: B batch, C classes or channels, h w the networks' output grid, n its positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline._tensors import (
    TensorArgumentError,
    at_least_float32,
    require_dims,
    require_shape,
)

_TINY = 1e-12
"""Vectors shorter than this have no direction."""

_ROUNDING = 16.0
"""What varies by less than this many units in the last place is constant."""


def centre_logits(logits: Tensor) -> Tensor:
    """Subtract from each position the mean over its classes.

    A softmax over classes does not see a constant added to all classes of a position, and stored
    soft labels have one subtracted (their largest class is 0). :func:`cwd_loss`,
    :func:`csd_loss` and :func:`rdd_pipeline.losses.pairwise_loss` compare positions with each
    other and do see it. Centring the student's and the teacher's logits alike removes what is
    arbitrary, so that stored and freshly computed logits give the same loss.

    Args:
        logits: (B, C, h, w), any floating dtype.

    Returns:
        (B, C, h, w), float32 (float64 for double logits), with mean 0 over classes.

    Raises:
        TensorArgumentError: The logits have not four axes.

    Example:
        >>> centre_logits(torch.tensor([3.0, 0.0, -6.0]).view(1, 3, 1, 1)).flatten()
        tensor([ 4.,  1., -5.])
    """
    require_dims("logits", logits, "BChw")
    exact = at_least_float32(logits)
    return exact - exact.mean(1, keepdim=True)


def cwd_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, *, valid: Tensor | None = None
) -> Tensor:
    """Channel-wise distillation: where in the image each channel looks.

    ``T^2 * KL(p_teacher || p_student)`` with ``p = softmax over positions of z / T`` in each
    channel (arXiv 2011.13256, eq. 3-4), summed over positions, mean over images and channels.
    It sees constants added to the classes of a position: see :func:`centre_logits`.

    Args:
        student: (B, C, h, w) logits, or features with the teacher's channels; any floating dtype.
        teacher: (B, C, h, w), likewise. Takes no gradient.
        temperature: T, above 0.
        valid: (B, h, w) bool; positions outside take no part in the softmax. None keeps all.

    Returns:
        0-d; the mean is over the images with a valid position. 0, and connected to the student,
        where there is none.

    Raises:
        TensorArgumentError: Shapes differ, or the temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 2, 2)
        >>> shifted = logits + torch.tensor([1.0, -2.0, 5.0]).view(1, 3, 1, 1)  # per channel
        >>> cwd_loss(logits, shifted).abs().item() < 1e-5
        True
    """
    _require_alike(student, teacher, valid)
    require_positive("temperature", temperature)
    with torch.autocast(student.device.type, enabled=False):
        log_student = _log_softmax_over_positions(at_least_float32(student), temperature, valid)
        log_teacher = _log_softmax_over_positions(
            at_least_float32(teacher.detach()), temperature, valid
        )
        divergence_BCn = log_teacher.exp() * (log_teacher - log_student)
        if valid is not None:
            divergence_BCn = torch.where(valid.flatten(1).unsqueeze(1), divergence_BCn, 0.0)
        return mean_over_images(divergence_BCn.sum(2).mean(1), valid) * temperature**2


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """DIST: probabilities that correlate with the teacher's, not ones that equal them.

    ``T^2 * (inter_weight * inter + intra_weight * intra)`` on ``softmax(z / T)`` over classes
    (arXiv 2205.10536): ``inter = mean over positions of 1 - Pearson over classes``,
    ``intra = mean over classes of 1 - Pearson over all valid positions of the batch``.

    Args:
        student: (B, C, h, w) logits, any floating dtype.
        teacher: (B, C, h, w) logits, any floating dtype; any constant may have been subtracted
            from a position's classes. Takes no gradient.
        temperature: T, above 0.
        inter_weight: Weight of the relation between the classes of a position.
        intra_weight: Weight of the relation between the positions of a class.
        valid: (B, h, w) bool; positions outside take no part. None keeps all.

    Returns:
        0-d; 0, and connected to the student, where no position is valid. What is constant
        (all classes equally likely, a class equally likely everywhere) correlates with nothing:
        its term is 1 and has no gradient.

    Raises:
        TensorArgumentError: Shapes differ, or the temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 2, 2)
        >>> dist_loss(logits, logits - 5.0).abs().item() < 1e-5
        True
    """
    _require_alike(student, teacher, valid)
    require_positive("temperature", temperature)
    with torch.autocast(student.device.type, enabled=False):
        kept_n = None if valid is None else valid.flatten()
        student_nC = _probabilities(at_least_float32(student), temperature, kept_n)
        teacher_nC = _probabilities(at_least_float32(teacher.detach()), temperature, kept_n)
        similar_n = (_standardised(student_nC, 1) * _standardised(teacher_nC, 1)).sum(1)
        similar_C = (
            _standardised(student_nC, 0, kept_n) * _standardised(teacher_nC, 0, kept_n)
        ).sum(0)
        intra = 1.0 - similar_C.mean()
        if kept_n is None:
            inter = 1.0 - similar_n.mean()
        else:
            count = kept_n.sum()
            inter = torch.where(kept_n, 1.0 - similar_n, 0.0).sum() / count.clamp_min(1)
            intra = torch.where(count > 0, intra, 0.0)
        return (inter_weight * inter + intra_weight * intra) * temperature**2


def csd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    patch: int = 2,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Category-wise similarity distillation: which classes are seen in the same places.

    ``mean over images and C x C entries of (P_s P_s' - P_t P_t')^2`` with ``P = softmax over
    positions of z / T`` in each class, the logits averaged over patches before (arXiv 2107.08591,
    the category-wise part of double similarity distillation). It sees constants added to the
    classes of a position: see :func:`centre_logits`.

    Args:
        student: (B, C, h, w) logits, any floating dtype.
        teacher: (B, C, h, w) logits, any floating dtype. Takes no gradient.
        temperature: T, above 0.
        patch: Side of the patches, at least 1; those at the lower and right edge may be smaller.
        valid: (B, h, w) bool; positions outside are not averaged, patches without any take no
            part. None keeps all.

    Returns:
        0-d; the mean is over the images with a valid position. 0, and connected to the student,
        where there is none.

    Raises:
        TensorArgumentError: Shapes differ, or a number is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(1, 3, 4, 5)
        >>> csd_loss(logits, logits).item(), csd_loss(logits, -logits).item() > 0
        (0.0, True)
    """
    _require_alike(student, teacher, valid)
    require_positive("temperature", temperature)
    require_count("patch", patch)
    with torch.autocast(student.device.type, enabled=False):
        pooled_student, pooled_valid = pool_patches(at_least_float32(student), patch, valid)
        pooled_teacher, _ = pool_patches(at_least_float32(teacher.detach()), patch, valid)
        relation_student, relation_teacher = (
            probs_BCn @ probs_BCn.mT
            for probs_BCn in (
                _log_softmax_over_positions(pooled, temperature, pooled_valid).exp()
                for pooled in (pooled_student, pooled_teacher)
            )
        )
        return mean_over_images((relation_student - relation_teacher).square().mean((1, 2)), valid)


# --- shared with the losses on features -----------------------------------------------------


def require_positive(name: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0.0:
        raise TensorArgumentError(f"{name}: expected a number above 0, got {value}")


def require_count(name: str, value: int) -> None:
    """Refuse what is not at least 1."""
    if value < 1:
        raise TensorArgumentError(f"{name}: expected at least 1, got {value}")


def unit(vectors: Tensor, dim: int, floor: Tensor | float = 0.0) -> Tensor:
    """Vectors along ``dim`` scaled to length 1.

    One not longer than ``floor`` has no direction that means anything: it becomes 0 and takes no
    gradient, where a division by a small number would give it a huge one.
    """
    length = vectors.square().sum(dim, keepdim=True)
    lowest = floor**2 + _TINY**2
    directed = length > lowest
    # The root is taken of 1 instead: its derivative at 0 is infinite.
    return torch.where(directed, vectors, 0.0) / torch.where(directed, length, 1.0).sqrt()


def rounding(dtype: torch.dtype) -> float:
    """Relative difference that rounding alone explains."""
    return _ROUNDING * torch.finfo(dtype).eps


def pool_patches(
    maps: Tensor, patch: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Average (B, C, h, w) over patches, of valid positions only; and which patches have any."""
    if valid is None:
        return F.avg_pool2d(maps, patch, ceil_mode=True), None
    valid_B1hw = valid.unsqueeze(1)
    share = F.avg_pool2d(valid_B1hw.to(maps.dtype), patch, ceil_mode=True)
    pooled = F.avg_pool2d(torch.where(valid_B1hw, maps, 0.0), patch, ceil_mode=True)
    some = share > 0
    return pooled / torch.where(some, share, 1.0), some.squeeze(1)


def mean_over_images(loss_B: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the images with a valid position; 0 where there is none."""
    if valid is None:
        return loss_B.mean()
    some_B = valid.flatten(1).any(1)
    return torch.where(some_B, loss_B, 0.0).sum() / some_B.sum().clamp_min(1)


def _require_alike(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    require_dims("student", student, "BChw")
    require_shape("teacher", teacher, student.shape, "the student's")
    if valid is not None:
        require_shape("valid", valid, (len(student), *student.shape[2:]), "the student's grid")


def _log_softmax_over_positions(maps: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    scaled_BCn = maps.flatten(2) / temperature
    if valid is not None:
        # Not minus infinity: an image without valid positions would become NaN.
        lowest = torch.finfo(maps.dtype).min / 2
        scaled_BCn = torch.where(valid.flatten(1).unsqueeze(1), scaled_BCn, lowest)
    return F.log_softmax(scaled_BCn, dim=2)


def _probabilities(logits: Tensor, temperature: float, kept_n: Tensor | None) -> Tensor:
    """(n, C), n over all images."""
    logits_nC = logits.movedim(1, -1).flatten(0, -2)
    if kept_n is not None:
        logits_nC = torch.where(kept_n.unsqueeze(1), logits_nC, 0.0)
    return F.softmax(logits_nC / temperature, dim=1)


def _standardised(probs_nC: Tensor, dim: int, kept_n: Tensor | None = None) -> Tensor:
    """Centred and of length 1 along ``dim``: the product of two is Pearson's correlation."""
    if kept_n is None:
        centred = probs_nC - probs_nC.mean(dim, keepdim=True)
    else:
        kept_n1 = kept_n.unsqueeze(1)
        probs_nC = torch.where(kept_n1, probs_nC, 0.0)
        mean = probs_nC.sum(dim, keepdim=True) / kept_n.sum().clamp_min(1)
        centred = torch.where(kept_n1, probs_nC - mean, 0.0)
    size = torch.linalg.vector_norm(probs_nC.detach(), dim=dim, keepdim=True)
    return unit(centred, dim, rounding(probs_nC.dtype) * size)
