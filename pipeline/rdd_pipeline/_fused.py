"""Cross-entropy of upsampled logits without the upsampled logits.

At training sizes the logits at label resolution are by far the largest tensor of the loss: 19
classes at 4 x 512 x 1024 are 160 MB in float32, and the direct formulation (interpolate,
log-softmax, gather) holds three of them in its backward pass. The banded formulation interpolates
some rows, reduces them to two numbers a pixel (loss and log-sum-exp) and forgets them; its
backward pass makes each band again and applies the transposed interpolation to it. What is kept
is the small logits and the log-sum-exp.

Both passes are registered as operators, so that ``torch.compile`` sees one node and no unrolled
loop. No ``from __future__ import annotations`` here: the operators' schemas are read from the
annotations.

Shape suffixes: B batch, C classes, h w logits, H W labels, R rows of a band, n images of a band.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline._tensors import TensorArgumentError, at_least_float32, require_dims

_DIRECT_ELEMENTS = 2**23
"""Upsampled logits up to this size (32 MB in float32) are made whole. Memory does not matter
there, and the many short operations of the banded form lose to few long ones when processes
compete for cores, as loader and training do on a small machine (see bench/losses.py)."""

_BAND_ELEMENTS_CPU = 2**20
"""4 MB in float32: two bands stay in the last-level cache (measured with bench/losses.py)."""

_BAND_ELEMENTS_DEVICE = 2**23
"""32 MB in float32: few enough kernel launches, small beside the logits."""


def upsampled_cross_entropy(logits_BChw: Tensor, target_BHW: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of each pixel after bilinear upsampling (``align_corners=True``) to the labels.

    Whole or in bands, whichever suits the size. Computed in float32 (float64 for double logits)
    whatever autocast says.

    Args:
        logits_BChw: (B, C, h, w), any floating dtype.
        target_BHW: (B, H, W), any integer dtype; classes below C or ``ignore_index``.
        ignore_index: Label of pixels that have no class.

    Returns:
        (B, H, W), float32 or float64; 0 at ignored pixels, whose gradient is 0 as well.

    Raises:
        TensorArgumentError: Axes or batch sizes do not fit, the target is not integer, or (on the
            CPU, uncompiled) a label lies outside the classes.
    """
    require_dims("logits", logits_BChw, "BChw")
    require_dims("target", target_BHW, "BHW")
    if logits_BChw.shape[0] != target_BHW.shape[0]:
        raise TensorArgumentError(
            f"target: expected a batch of {logits_BChw.shape[0]} like the logits', got "
            f"{target_BHW.shape[0]}"
        )
    if target_BHW.is_floating_point() or target_BHW.is_complex():
        raise TensorArgumentError(
            f"target: expected an integer dtype, got {target_BHW.dtype}; hand over the class "
            "indices, not probabilities"
        )
    whole = logits_BChw.shape[1] * target_BHW.numel() <= _DIRECT_ELEMENTS
    compute = direct_cross_entropy if whole else banded_cross_entropy
    if torch.compiler.is_compiling():
        return compute(logits_BChw, target_BHW, ignore_index)
    try:
        return compute(logits_BChw, target_BHW, ignore_index)
    except (IndexError, RuntimeError) as error:
        _explain_classes(target_BHW, ignore_index, logits_BChw.shape[1], error)
        raise


def direct_cross_entropy(logits_BChw: Tensor, target_BHW: Tensor, ignore_index: int) -> Tensor:
    """:func:`upsampled_cross_entropy` by interpolating everything first."""
    with torch.autocast(logits_BChw.device.type, enabled=False):
        upsampled_BCHW = F.interpolate(
            at_least_float32(logits_BChw),
            size=target_BHW.shape[1:],
            mode="bilinear",
            align_corners=True,
        )
        return F.cross_entropy(
            upsampled_BCHW, target_BHW.long(), ignore_index=ignore_index, reduction="none"
        )


def banded_cross_entropy(logits_BChw: Tensor, target_BHW: Tensor, ignore_index: int) -> Tensor:
    """:func:`upsampled_cross_entropy` in bands of rows, which are made again for the gradient."""
    loss_BHW, _ = _forward_op(at_least_float32(logits_BChw), target_BHW, ignore_index)
    return cast(Tensor, loss_BHW)


@torch.library.custom_op("rdd_maps::upsampled_cross_entropy", mutates_args=())
def _forward_op(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored_BHW, class_BHW = _classes(target, ignore_index)
    loss_BHW = torch.empty(target.shape, dtype=logits.dtype, device=logits.device)
    lse_BHW = torch.empty_like(loss_BHW)
    with torch.autocast(logits.device.type, enabled=False):
        for band, at in Bands(logits, target.shape[1], target.shape[2]):
            logit_of_target = band.gather(1, class_BHW[at].unsqueeze(1).long())
            # In place, because a new band each time costs more in page faults than in arithmetic.
            largest = band.amax(1, keepdim=True)
            lse = band.sub_(largest).exp_().sum(1, keepdim=True).log_().add_(largest)
            lse_BHW[at] = lse[:, 0]
            loss_BHW[at] = lse.sub_(logit_of_target)[:, 0]
    # -log p cannot be negative; rounding can make it so by one unit in the last place.
    return loss_BHW.clamp_min_(0).masked_fill_(ignored_BHW, 0), lse_BHW


@torch.library.custom_op("rdd_maps::upsampled_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    h, w = logits.shape[2:]
    H, W = target.shape[1:]
    ignored_BHW, class_BHW = _classes(target, ignore_index)
    grad_BHW = grad.masked_fill(ignored_BHW, 0)
    with torch.autocast(logits.device.type, enabled=False):
        # The transposed interpolation as two products: no atomics, so the same bits every time.
        rows_hH = _matrix(H, h, logits).T.contiguous()
        grad_BChW = logits.new_zeros((*logits.shape[:3], W))
        for band, at in Bands(logits, H, W):
            grad_band = grad_BHW[at].unsqueeze(1)
            # d CE / d logit = softmax - one at the label's class
            band.sub_(lse[at].unsqueeze(1)).exp_().mul_(grad_band)
            band.scatter_add_(1, class_BHW[at].unsqueeze(1).long(), -grad_band)
            images, rows = at
            near = _source_rows(rows, H, h)
            grad_BChW[images, :, near] += rows_hH[near, rows] @ band
        return grad_BChW @ _matrix(W, w, logits)


@_forward_op.register_fake
def _forward_shapes(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    loss = torch.empty(target.shape, dtype=logits.dtype, device=logits.device)
    return loss, torch.empty_like(loss)


@_backward_op.register_fake
def _backward_shapes(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
    # The log-sum-exp never leaves this module, so its gradient is always zero.
    logits, target, lse = ctx.saved_tensors
    return _backward_op(grad, logits, target, lse, ctx.ignore_index), None, None


_forward_op.register_autograd(_gradient, setup_context=_save)


class Bands:
    """Upsampled logits, band by band, in one workspace: a band is overwritten by the next."""

    def __init__(self, logits_BChw: Tensor, H: int, W: int) -> None:
        B, C, h, _ = logits_BChw.shape
        budget = _BAND_ELEMENTS_CPU if logits_BChw.device.type == "cpu" else _BAND_ELEMENTS_DEVICE
        self._shape = (B, C, H, W)
        # Either whole images or equal bands of one image.
        self._images = min(B, max(1, budget // max(1, C * H * W)))
        bands = 1 if self._images > 1 else -(-(C * H * W) // budget)
        self._rows = -(-H // max(1, bands))
        # Across first: these are h rows instead of H.
        self._across_BChW = F.interpolate(
            logits_BChw.contiguous(), size=(h, W), mode="bilinear", align_corners=True
        )
        self._upper_H, self._lower_H, self._fraction_H = _taps(H, h, logits_BChw)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
        """Yield (n, C, R, W) and the (images, rows) where it belongs."""
        B, C, H, W = self._shape
        across = self._across_BChW
        top_buffer = across.new_empty(self._images * C * self._rows * W)
        bottom_buffer = torch.empty_like(top_buffer)
        for first in range(0, B, self._images):
            images = slice(first, min(B, first + self._images))
            for start in range(0, H, self._rows):
                rows = slice(start, min(H, start + self._rows))
                shape = (images.stop - images.start, C, rows.stop - rows.start, W)
                size = shape[0] * shape[1] * shape[2] * shape[3]
                top = top_buffer[:size].view(shape)
                bottom = bottom_buffer[:size].view(shape)
                torch.index_select(across[images], 2, self._upper_H[rows], out=top)
                torch.index_select(across[images], 2, self._lower_H[rows], out=bottom)
                yield top.lerp_(bottom, self._fraction_H[rows].unsqueeze(1)), (images, rows)


def _taps(size_out: int, size_in: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the fraction between them, for each output position.

    The position is computed in the logits' own dtype, as torch's interpolation does: at 1,000
    rows a more exact one would already differ from it by 1e-5 of a step.
    """
    step = like.new_full((), float(size_in - 1)) / max(1, size_out - 1)
    position = torch.arange(size_out, dtype=like.dtype, device=like.device) * step
    lower = position.long().clamp_(max=size_in - 1)
    upper = (lower + 1).clamp_(max=size_in - 1)
    return lower, upper, position - lower


def _matrix(size_out: int, size_in: int, like: Tensor) -> Tensor:
    """The interpolation along one axis as a (size_out, size_in) matrix."""
    lower, upper, fraction = _taps(size_out, size_in, like)
    matrix = like.new_zeros((size_out, size_in))
    matrix.scatter_add_(1, lower.unsqueeze(1), (1 - fraction).unsqueeze(1))
    return matrix.scatter_add_(1, upper.unsqueeze(1), fraction.unsqueeze(1))


def _source_rows(rows: slice, H: int, h: int) -> slice:
    """Rows of the small grid that these rows are made from, and at most two to spare."""
    step = (h - 1) / max(1, H - 1)
    return slice(max(0, int(rows.start * step) - 1), min(h, int((rows.stop - 1) * step) + 3))


def _classes(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where to ignore, and classes that can be gathered everywhere: 0 where ignored."""
    ignored = target == ignore_index
    return ignored, target.masked_fill(ignored, 0)


def _explain_classes(target: Tensor, ignore_index: int, num_classes: int, error: Exception) -> None:
    """Name the label outside the classes, if that is what an operator has stumbled over."""
    # A device reports it later, by an assertion of its own, after which it cannot be asked.
    if target.device.type != "cpu" or not target.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(_classes(target, ignore_index)[1]))
    if low < 0 or high >= num_classes:
        raise TensorArgumentError(
            f"target: expected classes 0 to {num_classes - 1} or ignore_index {ignore_index}, "
            f"got {low if low < 0 else high}; check the label mapping"
        ) from error
