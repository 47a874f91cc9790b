"""Parameters of a network, counted and grouped for the optimiser."""

from __future__ import annotations

from typing import Any

from rdd_pipeline.networks.base import SegmentationNetwork


def parameter_count(network: SegmentationNetwork) -> int:
    """Number of parameter values that the logits depend on, trained or frozen."""
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if name not in network.unused_parameters
    )


def parameter_groups(
    network: SegmentationNetwork, lr: float, head_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: the encoder at ``lr``, the rest at a multiple of it.

    Args:
        network: Frozen parameters are left out.
        lr: Learning rate of the encoder.
        head_lr_factor: Learning rate of decoder and heads as a multiple of ``lr``.

    Returns:
        Up to two groups with the keys ``name`` (``encoder``, ``heads``), ``params`` and ``lr``;
        a group without parameters is left out.
    """
    encoder = {id(parameter) for parameter in network.encoder_module.parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "encoder", "params": [p for p in trained if id(p) in encoder], "lr": lr},
        {
            "name": "heads",
            "params": [p for p in trained if id(p) not in encoder],
            "lr": lr * head_lr_factor,
        },
    ]
    return [group for group in groups if group["params"]]
