"""Sections that name a network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rdd_pipeline.config._base import Count, Model


class AuxiliaryHead(Model):
    """FCN auxiliary head on an encoder stage (PSPNet, arXiv 1612.01105, section 3.3)."""

    stage: int = -2
    """Index into the encoder's feature pyramid; -2 is the second-last stage."""
    channels: Count | None = None
    """Hidden channels; a quarter of the stage's channels when not given."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


def _head_or_switch(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


RGB = tuple[float, float, float]
_IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
_IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


class SmpConfig(Model):
    """A segmentation-models-pytorch architecture with an optional auxiliary head of ours."""

    type: Literal["smp"] = "smp"
    architecture: str
    """Class name in segmentation_models_pytorch, such as DeepLabV3, PSPNet or FPN."""
    encoder: str
    """Encoder name, such as resnet18, mobilenet_v2 or tu-<timm name>."""
    encoder_weights: str | None = None
    """Name of pretrained encoder weights, such as imagenet; downloaded on first use."""
    output_stride: Literal[8, 16, 32] | None = None
    """Stride of the dilated encoder; None keeps the architecture's default."""
    auxiliary: Annotated[AuxiliaryHead | None, BeforeValidator(_head_or_switch)] = None
    """``true`` is the head with its defaults."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the architecture's constructor."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return False


class TorchvisionConfig(Model):
    """A segmentation network of torchvision, with its own auxiliary classifier."""

    type: Literal["torchvision"] = "torchvision"
    architecture: str
    """Name of the builder, such as deeplabv3_resnet101 or lraspp_mobilenet_v3_large."""
    weights: str | None = None
    """Name of pretrained weights, such as COCO_WITH_VOC_LABELS_V1; downloaded on first use."""
    weights_backbone: str | None = None
    """Name of the backbone's pretrained weights, such as IMAGENET1K_V1, where ``weights`` is
    null."""
    auxiliary: bool = False
    """Whether there is torchvision's auxiliary classifier (``aux_loss``)."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.weights is not None

    @model_validator(mode="after")
    def _weights_are_named_once(self) -> TorchvisionConfig:
        if self.weights is not None and self.weights_backbone is not None:
            raise ValueError("weights already hold the backbone; leave out weights_backbone")
        return self


class TransformersConfig(Model):
    """A segmentation network of Hugging Face transformers (extra ``huggingface``)."""

    type: Literal["transformers"] = "transformers"
    model: Annotated[str, Field(min_length=1)]
    """Local folder written by ``save_pretrained``, or a name on the hub."""
    pretrained: bool = True
    """False takes the architecture alone and starts from random weights."""
    auxiliary: bool = False
    """Whether to take the logits of the model's own auxiliary head."""
    ignore_mismatched_head: bool = False
    """Start the last layers from random weights where the model has other classes."""
    mean: RGB | None = None
    """RGB mean of the input normalisation, images in [0, 1]; None takes the model's."""
    std: RGB | None = None
    """RGB standard deviation of the input normalisation; None takes the model's."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.pretrained and not self.ignore_mismatched_head


class CustomConfig(Model):
    """A network that a function of the user's builds."""

    type: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    """``package.module:function``; called with ``num_classes`` and ``options``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""
    auxiliary: bool = False
    """Whether to take the auxiliary logits that the network returns."""
    pretrained: bool = False
    """Whether the function returns a trained network, which can teach as it is."""
    divisor: Count = 32
    """The network is given images whose sides are multiples of this, in pixels."""
    mean: RGB = _IMAGENET_MEAN
    """RGB mean of the input normalisation, images in [0, 1]."""
    std: RGB = _IMAGENET_STD
    """RGB standard deviation of the input normalisation."""

    @property
    def pretrained_whole(self) -> bool:
        """Whether heads come trained too, so that the network can teach as it is."""
        return self.pretrained


def _network_type(value: object) -> object:
    """The type of a network, as it stands in YAML or in a model; smp where none is named."""
    if isinstance(value, dict):
        return value.get("type", "smp")
    return getattr(value, "type", None)


NetworkConfig = Annotated[
    Annotated[SmpConfig, Tag("smp")]
    | Annotated[TorchvisionConfig, Tag("torchvision")]
    | Annotated[TransformersConfig, Tag("transformers")]
    | Annotated[CustomConfig, Tag("custom")],
    Discriminator(
        _network_type,
        custom_error_type="network_type",
        custom_error_message="expected keys and values with type: smp, torchvision, transformers "
        "or custom",
    ),
]


def without_pretrained(network: NetworkConfig) -> NetworkConfig:
    """The same network, its library's pretrained weights left out: for weights of one's own.

    A function of the user's is left as it is.
    """
    match network:
        case SmpConfig():
            return network.model_copy(update={"encoder_weights": None})
        case TorchvisionConfig():
            return network.model_copy(update={"weights": None, "weights_backbone": None})
        case TransformersConfig():
            return network.model_copy(update={"pretrained": False})
        case CustomConfig():
            return network
