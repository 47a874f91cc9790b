"""Checkpoints of other code bases under the names of the networks they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rdd_pipeline.errors import CheckpointError

# DeepLabV3 of the CIRKD code base (arXiv 2204.06986), which the published RDD trainer builds on:
# a ResNet whose stem is three 3x3 convolutions, 512 channels in the head. The network it fits:
# smp's DeepLabV3 on timm's resnet50s or resnet101s with decoder_channels: 512, output_stride: 8.
_CIRKD = (
    (r"pretrained\.conv1\.(.+)", r"encoder.model.conv1.0.\1"),
    (r"pretrained\.bn1\.(.+)", r"encoder.model.conv1.1.\1"),
    (r"pretrained\.conv2\.(.+)", r"encoder.model.conv1.3.\1"),
    (r"pretrained\.bn2\.(.+)", r"encoder.model.conv1.4.\1"),
    (r"pretrained\.conv3\.(.+)", r"encoder.model.conv1.6.\1"),
    (r"pretrained\.bn3\.(.+)", r"encoder.model.bn1.\1"),
    (r"pretrained\.(layer\d\..+)", r"encoder.model.\1"),
    (r"head\.aspp\.b0\.(.+)", r"decoder.aspp.convs.0.\1"),
    (r"head\.aspp\.b([123])\.block\.(.+)", r"decoder.aspp.convs.\1.\2"),
    (r"head\.aspp\.b4\.gap\.(.+)", r"decoder.aspp.convs.4.\1"),
    (r"head\.aspp\.project\.(.+)", r"decoder.aspp.project.\1"),
    (r"head\.block\.0\.(.+)", r"decoder.conv.\1"),
    (r"head\.block\.1\.(.+)", r"decoder.bn.\1"),
    (r"head\.block\.4\.(.+)", r"segmentation_head.0.\1"),
    (r"auxlayer\.block\.0\.(.+)", r"auxiliary_head.conv.\1"),
    (r"auxlayer\.block\.1\.(.+)", r"auxiliary_head.norm.\1"),
    (r"auxlayer\.block\.4\.(.+)", r"auxiliary_head.classifier.\1"),
)
_CIRKD_STEM = "encoder.model.conv1.0.weight"


def rename(state: Mapping[str, Tensor], layout: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of the network that it fits.

    Args:
        state: Tensors by name.
        layout: ``cirkd``. Its networks see blue, green, red: the first convolution's input
            channels are reversed, so that it takes RGB. Names without a counterpart stay.
        path: Where the tensors were read, for the error.

    Raises:
        CheckpointError: No name is of that layout, or the layout is unknown.
    """
    if layout != "cirkd":
        raise CheckpointError(f"checkpoint_layout: expected native or cirkd, got '{layout}'")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        matches = ((re.fullmatch(pattern, name), new) for pattern, new in _CIRKD)
        renamed[next((m.expand(new) for m, new in matches if m is not None), name)] = tensor
    if renamed.keys() == state.keys():
        raise CheckpointError(
            f"{path}: expected names of the CIRKD code base (pretrained.*, head.*, auxlayer.*), "
            f"got {', '.join(sorted(state)[:3])}; leave out checkpoint_layout"
        )
    if _CIRKD_STEM in renamed:
        renamed[_CIRKD_STEM] = renamed[_CIRKD_STEM].flip(1)
    return renamed
