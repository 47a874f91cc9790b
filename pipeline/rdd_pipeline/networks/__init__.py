"""Segmentation networks with logits of a main and an auxiliary head at output stride.

Importing this package is cheap; the library behind a network is imported when one is built.
"""

from __future__ import annotations

from typing import Any

import torch

from rdd_pipeline.config import (
    CustomConfig,
    NetworkConfig,
    SmpConfig,
    TorchvisionConfig,
    TransformersConfig,
)
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks.base import FCNHead, SegLogits, SegmentationNetwork
from rdd_pipeline.networks.optimisation import parameter_count, parameter_groups
from rdd_pipeline.networks.weights import (
    checkpoint_files,
    load_state,
    load_weights,
    save_weights,
    state_differences,
    state_hash,
    weights_hash,
)

__all__ = [
    "FCNHead",
    "SegLogits",
    "SegmentationNetwork",
    "build_network",
    "checkpoint_files",
    "load_state",
    "load_weights",
    "network_identity",
    "parameter_count",
    "parameter_groups",
    "save_weights",
    "state_differences",
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
    with torch.device("cpu"):
        if seed is None:
            return _build(config, num_classes)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too, whose state is not restored.
            torch.default_generator.manual_seed(seed)
            return _build(config, num_classes)


def network_identity(config: NetworkConfig) -> dict[str, Any]:
    """What decides a network's logits besides its weights, as stores and results record it.

    Where pretrained weights came from does not matter once the weights are hashed.

    Raises:
        NetworkError: The model of a :class:`TransformersConfig` cannot be read.
    """
    if isinstance(config, TransformersConfig):
        from rdd_pipeline.networks.transformers_models import transformers_identity

        return transformers_identity(config)
    sources = {"encoder_weights", "weights", "weights_backbone", "pretrained"}
    return config.model_dump(mode="json", exclude=sources)


def _build(config: NetworkConfig, num_classes: int) -> SegmentationNetwork:
    match config:
        case SmpConfig():
            from rdd_pipeline.networks.smp import build_smp

            return build_smp(config, num_classes)
        case TorchvisionConfig():
            from rdd_pipeline.networks.torchvision_models import build_torchvision

            return build_torchvision(config, num_classes)
        case TransformersConfig():
            from rdd_pipeline.networks.transformers_models import build_transformers

            return build_transformers(config, num_classes)
        case CustomConfig():
            from rdd_pipeline.networks.custom import build_custom

            return build_custom(config, num_classes)
