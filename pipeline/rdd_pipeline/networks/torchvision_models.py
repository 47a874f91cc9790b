"""Segmentation networks of torchvision with logits at output stride."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before anything that needs torchvision

# isort: split
import torchvision

from rdd_pipeline.config import TorchvisionConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks.base import SegLogits, SegmentationNetwork, first_line, suggest

logger = logging.getLogger("rdd.networks")

# Name of the builder: name of the backbone, stride of its deepest features.
_ARCHITECTURES = {
    "deeplabv3_resnet50": ("resnet50", 8),
    "deeplabv3_resnet101": ("resnet101", 8),
    "deeplabv3_mobilenet_v3_large": ("mobilenet_v3_large", 16),
    "fcn_resnet50": ("resnet50", 8),
    "fcn_resnet101": ("resnet101", 8),
    "lraspp_mobilenet_v3_large": ("mobilenet_v3_large", 16),
}
_ONE_HEAD = "lraspp_mobilenet_v3_large"


class TorchvisionNetwork(SegmentationNetwork):
    """A segmentation network of torchvision, its final upsampling left out.

    The names in the state dict are torchvision's own (``backbone``, ``classifier``,
    ``aux_classifier``), so that checkpoints of the plain model fit.
    """

    backbone: nn.Module
    classifier: nn.Module
    aux_classifier: nn.Module | None

    def __init__(self, model: Any, config: TorchvisionConfig, num_classes: int) -> None:
        super().__init__(
            num_classes=num_classes,
            divisor=_ARCHITECTURES[config.architecture][1],
            mean=config.mean,
            std=config.std,
        )
        self.backbone = model.backbone
        self.classifier = model.classifier
        self.aux_classifier = model.aux_classifier if config.auxiliary else None
        self.measure()

    @property
    def has_aux(self) -> bool:
        """Whether there is torchvision's auxiliary classifier."""
        return self.aux_classifier is not None

    @property
    def encoder_module(self) -> nn.Module:
        """torchvision's backbone."""
        return self.backbone

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Weight and bias of the last convolutions of each head."""
        heads = {"classifier": self.classifier}
        if self.aux_classifier is not None:
            heads["aux_classifier"] = self.aux_classifier
        return tuple(
            f"{head}.{layer}.{tensor}"
            for head, module in heads.items()
            for layer in _last_layers(module)
            for tensor in ("weight", "bias")
        )

    def raw_logits(self, x: Tensor) -> SegLogits:
        """Logits of both heads at the strides they work at."""
        features = self.backbone(x)
        # LR-ASPP joins features of two strides in its head.
        main: Tensor = self.classifier(features if "low" in features else features["out"])
        if self.aux_classifier is None:
            return SegLogits(main, None)
        return SegLogits(main, self.aux_classifier(features["aux"]))


def build_torchvision(config: TorchvisionConfig, num_classes: int) -> TorchvisionNetwork:
    """Build a segmentation network of torchvision.

    Where pretrained weights are of another number of classes, the last layer of each head is
    made anew; that is logged.

    Raises:
        NetworkError: The architecture or the weights do not exist or cannot be had; there is no
            auxiliary classifier.
    """
    if config.architecture not in _ARCHITECTURES:
        raise NetworkError(
            f"network.architecture: torchvision has no '{config.architecture}'; "
            + suggest(config.architecture, _ARCHITECTURES)
        )
    if config.auxiliary and config.architecture == _ONE_HEAD:
        others = ", ".join(name for name in _ARCHITECTURES if name != _ONE_HEAD)
        raise NetworkError(
            f"network.auxiliary: {_ONE_HEAD} has one head; leave it out, or use one of {others}"
        )
    if config.weights is None:
        model = _build(config.architecture, num_classes, auxiliary=config.auxiliary)
        if config.weights_backbone is not None:
            _load_backbone(model, config)
        return TorchvisionNetwork(model, config, num_classes)

    weights = _find(config.architecture, config.weights, "network.weights")
    classes = len(weights.meta["categories"])
    # All of torchvision's weights but those of LR-ASPP hold the auxiliary classifier.
    model = _build(config.architecture, classes, auxiliary=config.architecture != _ONE_HEAD)
    model.load_state_dict(_fetch(weights, "weights", config.architecture))
    if classes != num_classes:
        rebuilt = _rebuild_heads(model, num_classes)
        logger.warning(
            "%s: weights %s are of %d classes, the data set has %d; starting from random weights: "
            "%s",
            config.architecture, config.weights, classes, num_classes, ", ".join(rebuilt),
        )  # fmt: skip
    network = TorchvisionNetwork(model, config, num_classes)
    network.pretrained_whole = classes == num_classes
    return network


def _build(architecture: str, num_classes: int, *, auxiliary: bool) -> Any:
    arguments: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if architecture != _ONE_HEAD:
        arguments["aux_loss"] = auxiliary
    model = torchvision.models.get_model(architecture, num_classes=num_classes, **arguments)
    if architecture == _ONE_HEAD:
        model.aux_classifier = None
    return model


def _find(model: str, name: str, key: str) -> Any:
    """The weights of that name."""
    known = torchvision.models.get_model_weights(model).__members__
    if name not in known:
        raise NetworkError(f"{key}: {model} has no weights '{name}'; {suggest(name, known)}")
    return known[name]


def _fetch(weights: Any, key: str, model: str) -> dict[str, Tensor]:
    """The state dict, downloaded on first use; read without running code from it."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    # A download fails in many ways, and so does reading what a broken one has left.
    except Exception as error:
        raise NetworkError(
            f"network.{key}: the weights '{weights.name}' of {model} could not be loaded "
            f"({type(error).__name__}: {first_line(error)}); they are downloaded on first use. "
            f"Go online once, or set {key}: null to start from random weights or to load a "
            "checkpoint"
        ) from error
    return state


def _load_backbone(model: Any, config: TorchvisionConfig) -> None:
    assert config.weights_backbone is not None  # the caller has looked
    name, _ = _ARCHITECTURES[config.architecture]
    weights = _find(name, config.weights_backbone, "network.weights_backbone")
    state = _fetch(weights, "weights_backbone", name)
    expected = model.backbone.state_dict()
    # MobileNet's backbone is the part called features; the rest classifies whole images.
    state = {key.removeprefix("features."): tensor for key, tensor in state.items()}
    model.backbone.load_state_dict({key: t for key, t in state.items() if key in expected})


def _last_layers(head: nn.Module) -> list[str]:
    """Names of the convolutions that give the classes."""
    names = [name for name, module in head.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in names if name.endswith("_classifier")] or names[-1:]


def _rebuild_heads(model: Any, num_classes: int) -> list[str]:
    rebuilt = []
    for head in ("classifier", "aux_classifier"):
        module = getattr(model, head)
        for name in [] if module is None else _last_layers(module):
            old = module.get_submodule(name)
            module.set_submodule(name, nn.Conv2d(old.in_channels, num_classes, old.kernel_size))
            rebuilt.append(f"{head}.{name}")
    return rebuilt
