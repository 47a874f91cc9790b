"""CIRKD's relations through a memory of the teacher's embeddings (arXiv 2204.06986, sec. 3.3).

Computed in float32 (float64 for double features), whatever autocast says. Unlike the other losses
the memory waits for the device. Public names are imported from :mod:`rdd_pipeline.losses`.

Shape suffixes: B batch, C classes, D channels, n positions of the grid, N anchors, M embeddings to
compare with, K pixels of a class, S candidates of all images.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline._distil_features import labels_on_grid, members, with_channels
from rdd_pipeline._distil_logits import require_count, require_positive, unit
from rdd_pipeline._tensors import at_least_float32, require_dims, require_shape
from rdd_pipeline.difficulty import IGNORE_INDEX


def cirkd_memory_loss(
    student_anchors: Tensor,
    teacher_anchors: Tensor,
    contrast: Tensor,
    temperature: float = 0.1,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Cross-image relations through a memory: what a place is like among remembered embeddings.

    ``T^2 * mean over anchors of KL(p_t || p_s)`` with ``T = kd_temperature`` and ``p`` the softmax
    over the embeddings of their cosine similarity to the anchor / temperature / T
    (arXiv 2204.06986, sec. 3.3).

    Args:
        student_anchors: (N, D), any floating dtype; the student's embeddings in the teacher's D
            channels.
        teacher_anchors: (N, D) of the same positions. Takes no gradient.
        contrast: (M, D) embeddings of the teacher, compared with both. Takes no gradient.
        temperature: Above 0.
        kd_temperature: T, above 0.

    Returns:
        0-d; 0, and connected to the student, without anchors (N = 0) or embeddings (M = 0).

    Raises:
        TensorArgumentError: Shapes do not fit, or a temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> anchors, contrast = torch.randn(5, 4), torch.randn(7, 4)
        >>> cirkd_memory_loss(anchors, 2 * anchors, contrast).abs().item() < 1e-5
        True
    """
    require_dims("student_anchors", student_anchors, "ND")
    require_shape("teacher_anchors", teacher_anchors, student_anchors.shape, "the student's")
    require_dims("contrast", contrast, "MD")
    shape = (len(contrast), student_anchors.shape[1])
    require_shape("contrast", contrast, shape, "with the anchors' D channels")
    require_positive("temperature", temperature)
    require_positive("kd_temperature", kd_temperature)
    with torch.autocast(student_anchors.device.type, enabled=False):
        student_ND = at_least_float32(student_anchors)
        if len(student_anchors) == 0 or len(contrast) == 0:
            return student_ND[:0].sum()
        contrast_MD = unit(at_least_float32(contrast.detach()), 1)
        log_student, log_teacher = (
            F.log_softmax(
                unit(anchors, 1) @ contrast_MD.to(anchors.dtype).mT / temperature / kd_temperature,
                dim=1,
            )
            for anchors in (student_ND, at_least_float32(teacher_anchors.detach()))
        )
        divergence_N = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
        return divergence_N.mean() * kd_temperature**2


class CIRKDMemory(nn.Module):
    """Memory bank of the teacher's embeddings, and the losses that compare with it.

    For each class a queue of pixel embeddings and one of region embeddings (a region is the mean
    of a class's positions in an image), and :func:`cirkd_memory_loss` with what is drawn from them
    (arXiv 2204.06986, sec. 3.3). A step first remembers its own embeddings (in training mode),
    then compares, in the published order. Unlike there, random vectors never stand in for what
    has not been seen, the pixels remembered for a class are pixels of that class, and a queue
    wraps round wherever it is full.

    Draws come from torch's global generator of the CPU: a training that restores it repeats them.
    With ``torch.distributed`` initialised all processes remember what all of them saw and hold the
    same bank; their batches have to be of the same size. Which anchors and embeddings a process
    compares is its own draw.

    The bank is part of the state: ``C * (pixel_memory + region_memory) * D`` float32 values,
    156 MB at 19 classes and 512 channels.

    Args:
        num_classes: C.
        dim: D, the teacher's channels.
        pixel_memory: Pixel embeddings remembered for each class.
        region_memory: Region embeddings remembered for each class.
        pixel_contrast: Pixel embeddings compared with, evenly over the classes:
            ``pixel_contrast // C`` (at least 1) of each, as far as it has them.
        region_contrast: Region embeddings compared with, likewise.
        pixels_per_class: Pixels remembered of each class and image, at most.
        temperature: See :func:`cirkd_memory_loss`.
        kd_temperature: Likewise.
        ignore_index: Label of pixels without a class.
        anchors: Labelled positions compared in a step, drawn at random where there are more. It
            bounds the memory: similarities are ``anchors * pixel_contrast`` values. None: all.

    Raises:
        TensorArgumentError: A number is out of range.
    """

    pixel_queue: Tensor
    pixel_position: Tensor
    pixel_count: Tensor
    region_queue: Tensor
    region_position: Tensor
    region_count: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        pixel_memory: int = 2000,
        region_memory: int = 2000,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        pixels_per_class: int = 16,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
        anchors: int | None = 4096,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("dim", dim),
            ("pixel_memory", pixel_memory),
            ("region_memory", region_memory),
            ("pixel_contrast", pixel_contrast),
            ("region_contrast", region_contrast),
            ("pixels_per_class", pixels_per_class),
            ("anchors", 1 if anchors is None else anchors),
        ):
            require_count(name, value)
        require_positive("temperature", temperature)
        require_positive("kd_temperature", kd_temperature)
        self.num_classes = num_classes
        self.dim = dim
        self.pixel_contrast = pixel_contrast
        self.region_contrast = region_contrast
        self.pixels_per_class = pixels_per_class
        self.temperature = temperature
        self.kd_temperature = kd_temperature
        self.ignore_index = ignore_index
        self.anchors = anchors
        for kind, size in (("pixel", pixel_memory), ("region", region_memory)):
            self.register_buffer(f"{kind}_queue", torch.zeros(num_classes, size, dim))
            self.register_buffer(f"{kind}_position", torch.zeros(num_classes, dtype=torch.long))
            self.register_buffer(f"{kind}_count", torch.zeros(num_classes, dtype=torch.long))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the teacher's embeddings, then compare the student's with the bank.

        Args:
            student: (B, D, h, w) features projected to the teacher's channels, any floating dtype.
            teacher: (B, D, h, w) features. Takes no gradient.
            target: (B, H, W) labels, any integer dtype; brought to the grid as by
                :func:`ifvd_loss`, a label outside 0..C-1 counts as ignored.

        Returns:
            The pixel and the region loss, 0-d; 0, and connected to the student, where no position
            has a label or the bank is empty.

        Raises:
            TensorArgumentError: Shapes do not fit.
        """
        require_dims("student", student, "BDhw")
        require_shape("student", student, with_channels(student, self.dim), "dim channels")
        require_shape("teacher", teacher, student.shape, "the student's")
        require_dims("target", target, "BHW")
        require_shape("target", target, (len(student), *target.shape[1:]), "the features' batch")
        with torch.autocast(student.device.type, enabled=False):
            label_Bn = labels_on_grid(target, student, self.num_classes, self.ignore_index)
            teacher_BnD = unit(at_least_float32(teacher.detach()).flatten(2).mT, 2)
            image, position = self._draw_anchors(label_Bn)
            if self.training:
                self._remember(teacher_BnD, label_Bn)
            student_ND = student.flatten(2).mT[image, position]
            teacher_ND = teacher_BnD[image, position]
            pixel = _draw_contrast(self.pixel_queue, self.pixel_count, self.pixel_contrast)
            region = _draw_contrast(self.region_queue, self.region_count, self.region_contrast)
            temperatures = (self.temperature, self.kd_temperature)
            return (
                cirkd_memory_loss(student_ND, teacher_ND, pixel, *temperatures),
                cirkd_memory_loss(student_ND, teacher_ND, region, *temperatures),
            )

    def _draw_anchors(self, label_Bn: Tensor) -> tuple[Tensor, Tensor]:
        image, position = (label_Bn < self.num_classes).nonzero(as_tuple=True)
        if self.anchors is not None and len(image) > self.anchors:
            drawn = torch.randperm(len(image))[: self.anchors].to(image.device)
            image, position = image[drawn], position[drawn]
        return image, position

    @torch.no_grad()
    def _remember(self, teacher_BnD: Tensor, label_Bn: Tensor) -> None:
        member_BCn = members(label_Bn, self.num_classes)
        size_BC = member_BCn.sum(2)
        # The mean's length does not matter: the sum has the same direction.
        region_BCD = unit(member_BCn.to(teacher_BnD.dtype) @ teacher_BnD, 2)
        _write(
            self.region_queue,
            self.region_position,
            self.region_count,
            _from_all_processes(region_BCD),
            _from_all_processes(size_BC > 0),
        )
        position_BCK, kept_BCK = self._draw_pixels(label_Bn, size_BC)
        pixel_BCKD = teacher_BnD[
            torch.arange(len(label_Bn), device=label_Bn.device).view(-1, 1, 1), position_BCK
        ]
        _write(
            self.pixel_queue,
            self.pixel_position,
            self.pixel_count,
            _from_all_processes(pixel_BCKD.transpose(1, 2).flatten(0, 1)),
            _from_all_processes(kept_BCK.transpose(1, 2).flatten(0, 1)),
        )

    def _draw_pixels(self, label_Bn: Tensor, size_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Random positions of each class and image, and which of the table's entries are some."""
        shuffled_Bn = torch.stack([torch.randperm(label_Bn.shape[1]) for _ in label_Bn])
        shuffled_Bn = shuffled_Bn.to(label_Bn.device)
        # Grouped by class, in each class still in random order.
        order = label_Bn.gather(1, shuffled_Bn).argsort(dim=1, stable=True)
        grouped_Bn = shuffled_Bn.gather(1, order)
        rank_K = torch.arange(self.pixels_per_class, device=label_Bn.device)
        first_BC = size_BC.cumsum(1) - size_BC
        index_BCK = (first_BC.unsqueeze(2) + rank_K).clamp_max(label_Bn.shape[1] - 1)
        position_BCK = grouped_Bn.gather(1, index_BCK.flatten(1)).view_as(index_BCK)
        return position_BCK, rank_K < size_BC.unsqueeze(2)


def _from_all_processes(tensor: Tensor) -> Tensor:
    """Those of all processes along the first axis, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


def _write(
    queue_CMD: Tensor, position_C: Tensor, count_C: Tensor, values_SCD: Tensor, kept_SC: Tensor
) -> None:
    """Append to each class's queue the kept values, in order; the oldest give way."""
    size = queue_CMD.shape[1]
    rank_SC = kept_SC.cumsum(0) - 1
    total_C = kept_SC.sum(0)
    # Of more than a queue holds only the last, so that each slot is written once.
    entry, of_class = (kept_SC & (rank_SC >= total_C - size)).nonzero(as_tuple=True)
    slot = (position_C[of_class] + rank_SC[entry, of_class]) % size
    queue_CMD[of_class, slot] = values_SCD[entry, of_class].to(queue_CMD.dtype)
    position_C.copy_((position_C + total_C) % size)
    count_C.copy_((count_C + total_C).clamp_max(size))


def _draw_contrast(queue_CMD: Tensor, count_C: Tensor, contrast: int) -> Tensor:
    """(M, D): as many random embeddings of each class, or all that it has."""
    per_class = max(1, contrast // len(queue_CMD))
    slots = [torch.randperm(filled)[:per_class] for filled in count_C.tolist()]
    of_class = torch.arange(len(slots)).repeat_interleave(torch.tensor([len(s) for s in slots]))
    return queue_CMD[of_class.to(queue_CMD.device), torch.cat(slots).to(queue_CMD.device)]
