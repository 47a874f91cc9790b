"""Networks of segmentation-models-pytorch with logits at output stride and our auxiliary head."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before anything that needs torchvision

# isort: split
import segmentation_models_pytorch as smp
import timm
from segmentation_models_pytorch.decoders.dpt.decoder import DPTSegmentationHead

from rdd_pipeline.config import AuxiliaryHead, SmpConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks.base import (
    FCNHead,
    SegLogits,
    SegmentationNetwork,
    first_line,
    remove_upsampling,
    suggest,
)

_ARCHITECTURES: dict[str, type[nn.Module]] = {
    architecture.__name__: architecture for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()
}

# Constructor arguments that `options` may not set, and what to use in their place.
_RESERVED = {
    "encoder_name": "use network.encoder",
    "encoder_weights": "use network.encoder_weights",
    "encoder_output_stride": "use network.output_stride",
    "output_stride": "use network.output_stride",
    "in_channels": "images are RGB",
    "classes": "the data set decides",
    "activation": "the network returns logits",
    "upsampling": "the network returns logits at its output stride",
    "aux_params": "that is a classification head; use network.auxiliary",
}


class SmpNetwork(SegmentationNetwork):
    """An architecture of segmentation-models-pytorch (smp), its final upsampling removed.

    The names in the state dict are smp's own (``encoder``, ``decoder``,
    ``segmentation_head``), so that checkpoints of the plain smp model fit; the auxiliary head
    adds ``auxiliary_head``.
    """

    encoder: nn.Module
    decoder: nn.Module
    segmentation_head: nn.Module

    def __init__(self, model: Any, config: SmpConfig, num_classes: int) -> None:
        super().__init__(
            num_classes=num_classes,
            divisor=model.encoder.output_stride,
            mean=config.mean,
            std=config.std,
        )
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.segmentation_head = model.segmentation_head
        # Vision transformers hand their class tokens to this decoder beside the features.
        self._encoder_gives_tokens = isinstance(model, smp.DPT)
        _remove_upsampling(self.segmentation_head)
        # Built last: the main path's initial weights do not depend on it.
        self.auxiliary_stage = -1
        self.auxiliary_head: FCNHead | None = None
        if config.auxiliary is not None:
            self.auxiliary_stage, channels = _auxiliary_stage(
                list(model.encoder.out_channels), config.auxiliary
            )
            self.auxiliary_head = FCNHead(
                channels,
                config.auxiliary.channels or max(channels // 4, 1),
                num_classes,
                config.auxiliary.dropout,
            )
        self.measure()
        if config.output_stride is not None:
            self._check_encoder_stride(config.output_stride)

    @property
    def has_aux(self) -> bool:
        """Whether there is an auxiliary head."""
        return self.auxiliary_head is not None

    @property
    def encoder_module(self) -> nn.Module:
        """smp's encoder."""
        return self.encoder

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Weight and bias of the last convolution of each head."""
        modules = [
            f"segmentation_head.{name}"
            for name, module in self.segmentation_head.named_modules()
            if isinstance(module, nn.Conv2d)
        ][-1:]
        if self.auxiliary_head is not None:
            modules.append("auxiliary_head.classifier")
        return tuple(f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias"))

    def raw_logits(self, x: Tensor) -> SegLogits:
        """Logits of both heads, each at the stride it works at."""
        if self._encoder_gives_tokens:
            features, tokens = self.encoder(x)
            decoded = self.decoder(features, tokens)
        else:
            features = self.encoder(x)
            decoded = self.decoder(features)
        main: Tensor = self.segmentation_head(decoded)
        if self.auxiliary_head is None:
            return SegLogits(main, None)
        return SegLogits(main, self.auxiliary_head(features[self.auxiliary_stage]))

    def _check_encoder_stride(self, expected: int) -> None:
        side = 4 * self.divisor
        training = self.training
        self.eval()
        with torch.no_grad():
            features = self.encoder(torch.zeros(1, 3, side, side))
        self.train(training)
        if self._encoder_gives_tokens:
            features = features[0]
        stride = side // features[-1].shape[-1]
        if stride != expected:
            raise NetworkError(
                f"network.output_stride: expected {expected}, but the encoder's last stage is at "
                f"stride {stride}; change output_stride or options.encoder_depth"
            )


def build_smp(config: SmpConfig, num_classes: int) -> SmpNetwork:
    """Build a network of segmentation-models-pytorch.

    Raises:
        NetworkError: The architecture, encoder, weights or options do not exist or do not go
            together; the pretrained weights cannot be had.
    """
    architecture = _ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise NetworkError(
            f"network.architecture: segmentation_models_pytorch has no '{config.architecture}'; "
            + suggest(config.architecture, _ARCHITECTURES)
        )
    _check_encoder(config.encoder)
    arguments = _arguments(architecture, config)
    label = f"{config.architecture} with encoder {config.encoder}"
    weights = _encoder_weights(config)
    try:
        model = architecture(**arguments, classes=num_classes, encoder_weights=weights)
    except Exception as error:
        if weights is not None and _builds(architecture, arguments, num_classes):
            raise NetworkError(
                f"network.encoder_weights: the weights '{config.encoder_weights}' of encoder "
                f"'{config.encoder}' could not be loaded ({type(error).__name__}: "
                f"{first_line(error)}); they are downloaded on first use. Go online once, or set "
                "encoder_weights: null to start from random weights or to load a checkpoint"
            ) from error
        raise NetworkError(f"network: cannot build {label}: {first_line(error)}") from error
    try:
        return SmpNetwork(model, config, num_classes)
    except NetworkError as error:
        hint = (
            "; encoders of a fixed input size need options: {dynamic_img_size: true} or "
            "{strict_img_size: false}"
            if "match model" in str(error)
            else ""
        )
        raise NetworkError(f"{label}: {error}{hint}") from error.__cause__


def _arguments(architecture: type[nn.Module], config: SmpConfig) -> dict[str, Any]:
    """Constructor arguments but ``classes`` and ``encoder_weights``."""
    # smp drops unknown arguments silently unless the encoder is timm's, which checks its own.
    known = set(inspect.signature(architecture).parameters) - {"kwargs", *_RESERVED}
    for name in config.options:
        if name in _RESERVED:
            raise NetworkError(f"network.options.{name}: cannot be set here; {_RESERVED[name]}")
        if name not in known and not config.encoder.startswith("tu-"):
            raise NetworkError(
                f"network.options.{name}: {config.architecture} has no such argument; "
                + suggest(name, known)
            )
    arguments = {"encoder_name": config.encoder, "in_channels": 3, **config.options}
    if config.output_stride is not None:
        own = "encoder_output_stride" in inspect.signature(architecture).parameters
        arguments["encoder_output_stride" if own else "output_stride"] = config.output_stride
    return arguments


def _check_encoder(encoder: str) -> None:
    if encoder.startswith("tu-"):
        name = encoder.removeprefix("tu-")
        if not timm.is_model(name):
            raise NetworkError(
                f"network.encoder: timm has no '{name}'; "
                + suggest(encoder, [f"tu-{model}" for model in timm.list_models()])
            )
        return
    names = smp.encoders.get_encoder_names()
    # These names were moved to timm's encoders, and smp still maps them.
    if encoder not in names and not encoder.startswith("timm-"):
        raise NetworkError(
            f"network.encoder: segmentation_models_pytorch has no '{encoder}'; "
            + suggest(encoder, [*names, *(f"tu-{model}" for model in timm.list_models())])
        )


def _encoder_weights(config: SmpConfig) -> str | bool | None:
    """The value smp expects: a name for its own encoders, a flag for timm's."""
    name = config.encoder_weights
    if name is None:
        return None
    if config.encoder.startswith("tu-"):
        # timm's weights are chosen by a tag of the encoder's name, tu-<model>.<tag>.
        if name != "imagenet":
            raise NetworkError(
                f"network.encoder_weights: expected imagenet or null for the timm encoder "
                f"'{config.encoder}', got '{name}'; name other weights as a tag, "
                f"encoder: {config.encoder.partition('.')[0]}.{name}"
            )
        return True
    known = smp.encoders.encoders.get(config.encoder, {}).get("pretrained_settings") or {}
    if known and name not in known:
        raise NetworkError(
            f"network.encoder_weights: encoder '{config.encoder}' has no weights '{name}'; "
            + suggest(name, known)
        )
    return name


def _builds(architecture: type[nn.Module], arguments: dict[str, Any], num_classes: int) -> bool:
    """Whether the network can be built with random weights."""
    try:
        architecture(**arguments, classes=num_classes, encoder_weights=None)
    except Exception:
        return False
    return True


def _auxiliary_stage(channels: list[int], auxiliary: AuxiliaryHead) -> tuple[int, int]:
    """Index and channels of the encoder stage that the auxiliary head works on."""
    # The image itself stands first in the pyramid, and empty stages where timm has none.
    usable = [i for i, count in enumerate(channels) if count > 0 and not (i == 0 and count == 3)]
    stage = auxiliary.stage
    index = stage + len(channels) if stage < 0 else stage
    if index not in usable:
        raise NetworkError(
            f"network.auxiliary.stage: expected one of {usable} or, counted from the end, "
            f"{[i - len(channels) for i in usable]}, got {stage}"
        )
    return index, channels[index]


def _remove_upsampling(head: nn.Module) -> None:
    remove_upsampling(head)
    if isinstance(head, DPTSegmentationHead):  # calls interpolate itself
        head.upsampling_factor = 1
