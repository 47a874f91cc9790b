"""Folders of tiny segmentation models of transformers, as ``save_pretrained`` leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before transformers

# isort: split
import transformers

CLASSES = 5

_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
         "window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 64, "patch_size": 16}  # fmt: skip


def _segformer(**settings: Any) -> Any:
    return transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, mlp_ratios=[2, 2, 2, 2], **settings,
    )  # fmt: skip


def _upernet(**settings: Any) -> Any:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=16,
        **settings,
    )  # fmt: skip


def _mask2former(**settings: Any) -> Any:
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=6, **settings,
    )  # fmt: skip


def _maskformer(**settings: Any) -> Any:
    decoder = transformers.DetrConfig(
        d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
        encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16, num_queries=6,
    )  # fmt: skip
    return transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN), decoder_config=decoder,
        fpn_feature_size=32, mask_feature_size=32, **settings,
    )  # fmt: skip


def _oneformer(**settings: Any) -> Any:
    return transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN), conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=3,
        num_attention_heads=2, num_queries=6, query_dec_layers=1, task_seq_len=77,
        text_encoder_width=16, text_encoder_num_layers=1, text_encoder_vocab_size=600,
        **settings,
    )  # fmt: skip


def _beit(**settings: Any) -> Any:
    return transformers.BeitConfig(
        **_VIT, out_indices=[1, 2, 3, 4], auxiliary_channels=8, use_relative_position_bias=True,
        vocab_size=10, pool_scales=[1, 2], **settings,
    )  # fmt: skip


def _dpt(**settings: Any) -> Any:
    return transformers.DPTConfig(
        **_VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, is_hybrid=False, **settings,
    )  # fmt: skip


def _mobilevit(**settings: Any) -> Any:
    return transformers.MobileViTConfig(
        hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 16, 16, 16],
        num_attention_heads=2, expand_ratio=2.0, aspp_out_channels=16, output_stride=16,
        image_size=64, **settings,
    )  # fmt: skip


def _mobilenet(**settings: Any) -> Any:
    return transformers.MobileNetV2Config(
        depth_multiplier=0.25, min_depth=8, output_stride=8, **settings
    )


FAMILIES: dict[str, tuple[Callable[..., Any], str]] = {
    "segformer": (_segformer, "SegformerForSemanticSegmentation"),
    "upernet": (_upernet, "UperNetForSemanticSegmentation"),
    "mask2former": (_mask2former, "Mask2FormerForUniversalSegmentation"),
    "maskformer": (_maskformer, "MaskFormerForInstanceSegmentation"),
    "oneformer": (_oneformer, "OneFormerForUniversalSegmentation"),
    "beit": (_beit, "BeitForSemanticSegmentation"),
    "dpt": (_dpt, "DPTForSemanticSegmentation"),
    "mobilevit": (_mobilevit, "MobileViTForSemanticSegmentation"),
    "mobilenet_v2": (_mobilenet, "MobileNetV2ForSemanticSegmentation"),
}


def require_family(family: str) -> None:
    """Skip where the library needs a package for this family that is not installed."""
    if family.endswith("former") and family != "segformer":
        pytest.importorskip("scipy", reason="transformers builds networks of masks with scipy")


def tiny_model(family: str, num_classes: int = CLASSES, seed: int = 0, **settings: Any) -> Any:
    """A model of the family with random weights."""
    configure, name = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, name)(configure(num_labels=num_classes, **settings)).eval()


def save_tiny(
    folder: Path,
    family: str,
    num_classes: int = CLASSES,
    preprocessor: dict[str, Any] | None = None,
    shards: str | None = None,
    **settings: Any,
) -> Any:
    """Write a model's folder and return the model."""
    model = tiny_model(family, num_classes, **settings)
    model.save_pretrained(folder, **({} if shards is None else {"max_shard_size": shards}))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if family == "oneformer":
        _tiny_tokenizer(folder).save_pretrained(folder)
    return model


def _tiny_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with letters alone as its vocabulary."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
