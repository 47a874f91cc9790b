"""Segmentation networks with logits of a main and an auxiliary head at output stride.

Importing this package is cheap; the library behind a network is imported when one is built.
"""

from __future__ import annotations

import torch

from rdd_pipeline.config import NetworkConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks.base import FCNHead, SegLogits, SegmentationNetwork
from rdd_pipeline.networks.optimisation import parameter_count, parameter_groups
from rdd_pipeline.networks.weights import (
    load_state,
    load_weights,
    save_weights,
    state_hash,
    weights_hash,
)

__all__ = [
    "FCNHead",
    "SegLogits",
    "SegmentationNetwork",
    "build_network",
    "load_state",
    "load_weights",
    "parameter_count",
    "parameter_groups",
    "save_weights",
    "state_hash",
    "weights_hash",
]


def build_network(
    config: NetworkConfig, num_classes: int, seed: int | None = None
) -> SegmentationNetwork:
    """Build a network on the CPU, in training mode.

    Args:
        config: The network's description.
        num_classes: Classes of the data set, without the ignored one; 2 to 255.
        seed: Makes the initial weights a function of ``config``, ``num_classes`` and this seed
            alone, and leaves torch's global generator as it was. None draws from the global
            generator.

    Raises:
        NetworkError: The network cannot be built as described; names the key to change.
    """
    if not 2 <= num_classes <= 255:
        raise NetworkError(
            f"num_classes: expected 2 to 255 (255 marks ignored pixels), got {num_classes}"
        )
    from rdd_pipeline.networks.smp import build_smp

    with torch.device("cpu"):
        if seed is None:
            return build_smp(config, num_classes)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too, whose state is not restored.
            torch.default_generator.manual_seed(seed)
            return build_smp(config, num_classes)
