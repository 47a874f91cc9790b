"""Checks of tensor arguments, shared by the difficulty maps and the losses."""

from collections.abc import Sequence

from torch import Tensor, float32, float64

from rdd_storage.errors import RddError


class TensorArgumentError(RddError, ValueError):
    """A tensor or a number handed to a function has a wrong shape, dtype or range."""


def require_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Refuse a tensor of another shape.

    Args:
        name: The argument, for the message.
        tensor: What was handed in.
        shape: What it has to be.
        meaning: How the expected shape came about, for the message.

    Raises:
        TensorArgumentError: The shapes differ.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise TensorArgumentError(
            f"{name}: expected shape {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}"
        )


def require_dims(name: str, tensor: Tensor, dims: str) -> None:
    """Refuse a tensor that has not one axis for each letter of ``dims``.

    Raises:
        TensorArgumentError: The number of axes differs.
    """
    if tensor.dim() != len(dims):
        raise TensorArgumentError(
            f"{name}: expected {len(dims)} axes ({', '.join(dims)}), got shape "
            f"{tuple(tensor.shape)}"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 as it is, everything else as float32: sums over classes overflow in float16."""
    return tensor if tensor.dtype == float64 else tensor.to(float32)
