"""Distillation losses on features: similarities between positions, layers, classes and images.

Everything is computed in float32 (float64 for double features), whatever autocast says. Teachers
take no gradient, and nothing waits for the device. Public names are imported from
:mod:`rdd_pipeline.losses`.

Shape suffixes: B batch, F channels, h w the features' grid, n its positions or patches, C classes,
H W the labels' pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rdd_pipeline._distil_logits import (
    mean_over_images,
    pool_patches,
    require_count,
    require_positive,
    rounding,
    unit,
)
from rdd_pipeline._tensors import (
    TensorArgumentError,
    at_least_float32,
    require_dims,
    require_shape,
)
from rdd_pipeline.difficulty import IGNORE_INDEX

_PAIR_ELEMENTS = 1 << 24
"""Entries of a similarity matrix made at once: 64 MiB in float32."""


def pairwise_loss(
    student: Tensor, teacher: Tensor, patch: int = 2, *, valid: Tensor | None = None
) -> Tensor:
    """Pair-wise distillation: how alike two places of an image are.

    ``mean over images and pairs of nodes of (a_s - a_t)^2`` with ``a`` the cosine similarity of
    two nodes (arXiv 1903.04197, sec. 3.2, over the fully connected graph); a node is the average
    over a patch. The published code pools by maximum instead. On logits it sees constants added
    to the classes of a position: see :func:`rdd_pipeline.losses.centre_logits`.

    Beyond 64 MiB the similarities are made some rows at a time, and once more in the backward
    pass instead of being kept.

    Args:
        student: (B, F, h, w) features or logits, any floating dtype.
        teacher: (B, F', h, w); F' may differ from F. Takes no gradient.
        patch: Side of the patches, at least 1; those at the lower and right edge may be smaller.
        valid: (B, h, w) bool; positions outside are not averaged, patches without any are no
            nodes. None keeps all.

    Returns:
        0-d; the mean is over the images with a node. 0, and connected to the student, where there
        is none. A node of zeros is like nothing, itself included, and has no gradient.

    Raises:
        TensorArgumentError: Shapes do not fit, or the patch is not at least 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(1, 4, 4, 6)
        >>> pairwise_loss(features, torch.cat([features, features], 1)).item() < 1e-6
        True
    """
    _require_same_grid(student, teacher)
    require_count("patch", patch)
    if valid is not None:
        require_shape("valid", valid, (len(student), *student.shape[2:]), "the student's grid")
    with torch.autocast(student.device.type, enabled=False):
        student_nodes, node_valid = pool_patches(at_least_float32(student), patch, valid)
        teacher_nodes, _ = pool_patches(at_least_float32(teacher.detach()), patch, valid)
        student_BnF = unit(student_nodes.flatten(2).mT, 2)
        teacher_BnF = unit(teacher_nodes.flatten(2).mT, 2)

        def difference(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
            similar = student_rows @ student_BnF.mT - teacher_rows @ teacher_BnF.mT
            return similar.square().sum((1, 2))

        nodes = student_BnF.shape[1]
        # Left-out nodes are zeros in both networks and add nothing.
        total_B = _sum_over_rows(difference, student_BnF, teacher_BnF, len(student) * nodes)
        if node_valid is None:
            return total_B.mean() / nodes**2
        count_B = node_valid.flatten(1).sum(1).clamp_min(1)
        return mean_over_images(total_B / count_B**2, node_valid)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: where in the image the features are strong.

    ``mean over images and positions of (q_s - q_t)^2`` with ``q`` the map ``sum over channels of
    F^2``, scaled to length 1 over the positions of its image (arXiv 1612.03928, activation-based;
    the mean is the published code's, the paper has a norm).

    Args:
        student: (B, F, h, w) features, any floating dtype.
        teacher: (B, F', h, w); F' may differ from F. Takes no gradient.

    Returns:
        0-d. A map of zeros stays zero and has no gradient.

    Raises:
        TensorArgumentError: Shapes do not fit.

    Example:
        >>> features = torch.arange(1.0, 5.0).view(1, 2, 1, 2)
        >>> attention_loss(features, 3 * features).item() < 1e-12
        True
    """
    _require_same_grid(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        grid = tuple(student.shape[2:])
        attention_student = _attention(at_least_float32(student), grid)
        attention_teacher = _attention(at_least_float32(teacher.detach()), grid)
        return (attention_student - attention_teacher).square().mean()


def ifvd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Intra-class feature variation: how far each position is from the mean of its class.

    ``mean over labelled positions of (v_s - v_t)^2`` with ``v`` the cosine similarity of a
    position's feature to the mean feature of its class in its image (Wang et al., Intra-class
    Feature Variation Distillation for Semantic Segmentation, ECCV 2020).

    A position ``(i, j)`` of the grid has the label of the pixel at ``floor((i + 0.5) * H / h)``,
    ``floor((j + 0.5) * W / w)``, the middle of what it covers (the published code takes the upper
    left corner). The published code averages over unlabelled positions too.

    Args:
        student: (B, F, h, w) features, any floating dtype.
        teacher: (B, F', h, w); F' may differ from F. Takes no gradient.
        target: (B, H, W) labels, any integer dtype.
        num_classes: C; a label outside 0..C-1 counts as ignored.
        ignore_index: Label of pixels without a class; positions that get it take no part.

    Returns:
        0-d; 0, and connected to the student, where no position has a label.

    Raises:
        TensorArgumentError: Shapes do not fit.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(1, 4, 2, 3)
        >>> target = torch.randint(0, 2, (1, 16, 24))
        >>> ifvd_loss(features, 2 * features, target, num_classes=2).item() < 1e-12
        True
    """
    _require_same_grid(student, teacher)
    require_dims("target", target, "BHW")
    require_shape("target", target, (len(student), *target.shape[1:]), "the features' batch")
    require_count("num_classes", num_classes)
    with torch.autocast(student.device.type, enabled=False):
        label_Bn = labels_on_grid(target, student, num_classes, ignore_index)
        member_BCn = members(label_Bn, num_classes)
        variation_student = _variation(at_least_float32(student), member_BCn)
        variation_teacher = _variation(at_least_float32(teacher.detach()), member_BCn)
        # Without a label both are 0.
        squared_Bn = (variation_student - variation_teacher).square()
        return squared_Bn.sum() / member_BCn.sum().clamp_min(1)


def psd_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Pixel-wise similarity distillation: how attention moves from layer to layer.

    ``mean over pairs of layers, images and positions of (r_s - r_t)^2`` with the residual
    attention ``r = normalised(q_j - q_i)`` of layers ``i < j`` and ``q`` as in
    :func:`attention_loss` (arXiv 2107.08591, the pixel-wise part of double similarity
    distillation). Maps of another size are brought to the grid of the student's first layer
    (bilinear, ``align_corners=True``) before they are normalised.

    Args:
        students: At least two layers (B, F, h, w), each with its own F, h and w, any floating
            dtype.
        teachers: As many layers of the teacher, with any F, h and w. They take no gradient.

    Returns:
        0-d. Two layers of one network with the same attention have no residual: it is 0 and has
        no gradient.

    Raises:
        TensorArgumentError: Fewer than two layers, not as many layers of both, or shapes do not
            fit.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = [torch.randn(1, 2, 4, 6), torch.randn(1, 8, 2, 3)]
        >>> psd_loss(layers, layers).item()
        0.0
    """
    if len(students) < 2 or len(students) != len(teachers):
        raise TensorArgumentError(
            f"students, teachers: expected at least two layers, as many of both, got "
            f"{len(students)} and {len(teachers)}"
        )
    for name, layers in (("students", students), ("teachers", teachers)):
        for index, layer in enumerate(layers):
            require_dims(f"{name}[{index}]", layer, "BFhw")
            shape = (len(students[0]), *layer.shape[1:])
            require_shape(f"{name}[{index}]", layer, shape, "the batch of students[0]")
    grid = tuple(students[0].shape[2:])
    with torch.autocast(students[0].device.type, enabled=False):
        maps_student = [_attention(at_least_float32(layer), grid) for layer in students]
        maps_teacher = [_attention(at_least_float32(layer.detach()), grid) for layer in teachers]
        terms = [
            _residual(maps_student[i], maps_student[j])
            - _residual(maps_teacher[i], maps_teacher[j])
            for i, j in combinations(range(len(students)), 2)
        ]
        return torch.stack(terms).square().mean()


def cirkd_minibatch_loss(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, patch: int = 4
) -> Tensor:
    """Cross-image relations in a batch: what in the other images a place is like.

    ``mean over pairs of images (i, j) and positions of i of KL(p_t || p_s)`` with ``p`` the
    softmax over the positions of ``j`` of their cosine similarity / temperature (arXiv 2204.06986,
    sec. 3.2, mini-batch pixel-to-pixel). Pairs are ordered, and an image makes one with itself, as
    in the published code; a batch of 1 is that pair alone. Features are averaged over patches.

    All pairs are one matrix product. Beyond 64 MiB the similarities are made some rows (positions
    of ``i``) at a time, and once more in the backward pass instead of being kept: 16 images on a
    64 x 128 grid in patches of 4 take 4 slices.

    Args:
        student: (B, F, h, w) features, any floating dtype.
        teacher: (B, F', h, w); F' may differ from F. Takes no gradient.
        temperature: Above 0.
        patch: Side of the patches, at least 1; those at the lower and right edge may be smaller.

    Returns:
        0-d. A patch of zeros is equally like everything and has no gradient.

    Raises:
        TensorArgumentError: Shapes do not fit, or a number is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(2, 4, 4, 8)
        >>> cirkd_minibatch_loss(features, 2 * features).abs().item() < 1e-5
        True
    """
    _require_same_grid(student, teacher)
    require_positive("temperature", temperature)
    require_count("patch", patch)
    with torch.autocast(student.device.type, enabled=False):
        images = len(student)
        student_nF, teacher_nF = (
            unit(pool_patches(maps, patch)[0].movedim(1, -1).flatten(0, -2), 1)
            for maps in (at_least_float32(student), at_least_float32(teacher.detach()))
        )
        positions = len(student_nF) // images

        def divergence(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
            log_student, log_teacher = (
                F.log_softmax((rows @ all_nF.mT).view(-1, images, positions) / temperature, 2)
                for rows, all_nF in ((student_rows, student_nF), (teacher_rows, teacher_nF))
            )
            return (log_teacher.exp() * (log_teacher - log_student)).sum()

        total = _sum_over_rows(divergence, student_nF, teacher_nF, len(student_nF), dim=0)
        return total / (len(student_nF) * images)


def _require_same_grid(student: Tensor, teacher: Tensor) -> None:
    require_dims("student", student, "BFhw")
    require_dims("teacher", teacher, "BFhw")
    shape = with_channels(student, teacher.shape[1])
    require_shape("teacher", teacher, shape, "the student's batch and grid")


def with_channels(features: Tensor, channels: int) -> tuple[int, ...]:
    return (len(features), channels, *features.shape[2:])


def _sum_over_rows(
    term: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    elements_per_row: int,
    dim: int = 1,
) -> Tensor:
    """Sum of ``term`` over slices of rows, each computed again in the backward pass."""
    step = max(1, _PAIR_ELEMENTS // elements_per_row)
    if step >= student.shape[dim]:
        return term(student, teacher)
    slices = zip(torch.split(student, step, dim), torch.split(teacher, step, dim), strict=True)
    terms = [
        checkpoint(term, *rows, use_reentrant=False, preserve_rng_state=False) for rows in slices
    ]
    return torch.stack(terms).sum(0)


def _attention(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, n) of length 1 over the grid."""
    map_B1hw = features.square().sum(1, keepdim=True)
    if tuple(map_B1hw.shape[2:]) != grid:
        map_B1hw = F.interpolate(map_B1hw, size=grid, mode="bilinear", align_corners=True)
    return unit(map_B1hw.flatten(1), 1)


def _residual(first_Bn: Tensor, second_Bn: Tensor) -> Tensor:
    # Both are of length 1: a difference of rounding size is none.
    return unit(second_Bn - first_Bn, 1, rounding(first_Bn.dtype))


def labels_on_grid(target: Tensor, features: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(B, n) int64: the label in the middle of each position, C where there is none."""
    rows, columns = (
        (2 * torch.arange(grid, device=target.device) + 1) * size // (2 * grid)
        for grid, size in zip(features.shape[2:], target.shape[1:], strict=True)
    )
    label_Bn = target[:, rows][:, :, columns].flatten(1).long()
    labelled = (label_Bn != ignore_index) & (label_Bn >= 0) & (label_Bn < num_classes)
    return torch.where(labelled, label_Bn, num_classes)


def members(label_Bn: Tensor, num_classes: int) -> Tensor:
    """(B, C, n) bool: which positions a class has."""
    classes_C1 = torch.arange(num_classes, device=label_Bn.device).unsqueeze(1)
    return label_Bn.unsqueeze(1) == classes_C1


def _variation(features: Tensor, member_BCn: Tensor) -> Tensor:
    """(B, n): cosine similarity to the mean of the own class; 0 without a label."""
    labelled_Bn1 = member_BCn.any(1).unsqueeze(2)
    features_BnF = torch.where(labelled_Bn1, features.flatten(2).mT, 0.0)
    # The mean's length does not matter, but it keeps large features from overflowing.
    weight_BCn = member_BCn / member_BCn.sum(2, keepdim=True).clamp_min(1)
    centre_BFC = unit(weight_BCn.to(features.dtype) @ features_BnF, 2).mT
    similar_BCn = (unit(features_BnF, 2) @ centre_BFC).mT
    return torch.where(member_BCn, similar_BCn, 0.0).sum(1)
