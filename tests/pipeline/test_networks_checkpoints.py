"""Checkpoints in folders, of other code bases, and those that fit in part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from rdd_pipeline.config import SmpConfig
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    checkpoint_files,
    load_state,
    load_weights,
    state_hash,
    weights_hash,
)

SETTINGS: dict[str, Any] = {
    "architecture": "PSPNet",
    "encoder": "tu-mobilenetv3_small_050",
    "options": {"psp_out_channels": 16},
}


def build(seed: int = 0, num_classes: int = 5, **settings: Any) -> SegmentationNetwork:
    return build_network(SmpConfig.model_validate(SETTINGS | settings), num_classes, seed)


def write_shards(folder: Path, state: dict[str, Tensor], shards: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    names, files = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        safetensors.torch.save_file(part, folder / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TestFolders:
    def test_shards_and_a_single_file_give_the_same(self, tmp_path: Path) -> None:
        network = build(seed=1)
        state = network.state_dict()
        write_shards(tmp_path / "sharded", state)
        (tmp_path / "whole").mkdir()
        safetensors.torch.save_file(state, tmp_path / "whole" / "model.safetensors")
        torch.save(dict(reversed(state.items())), tmp_path / "network.pth")
        for name in ("sharded", "whole", "network.pth"):
            assert state_hash(load_state(tmp_path / name)) == weights_hash(network)
            other = build()
            assert load_weights(other, tmp_path / name) == []
            assert weights_hash(other) == weights_hash(network)
        assert len(checkpoint_files(tmp_path / "sharded")) == 3

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        write_shards(tmp_path, build().state_dict())
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"1 of 3 files .*: model-00002-of-00003"):
            load_state(tmp_path)

    @pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
    def test_a_damaged_index_is_named(self, index: str, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"index\.json: expected JSON with a weight_map"):
            load_state(tmp_path)

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname"])
    def test_an_index_leads_nowhere_else(self, shard: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
        index = {"weight_map": {"a": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="files that are not in its folder"):
            load_state(folder)


class TestNotStrict:
    def test_what_fits_is_loaded_and_the_rest_is_listed(self, tmp_path: Path) -> None:
        state = build(seed=1, num_classes=19).state_dict()
        missing = next(iter(state))
        left = {name: tensor for name, tensor in state.items() if name != missing}
        torch.save(left | {"extra.weight": torch.zeros(1)}, tmp_path / "city.pth")
        network = build()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

        lines = load_weights(network, tmp_path / "city.pth", strict=False)

        assert [line.split(":")[0].strip() for line in lines] == [
            "1 missing",
            "1 unexpected",
            "2 of another shape",
        ]
        assert missing in lines[0]
        assert "extra.weight" in lines[1]
        assert (
            "segmentation_head.0.weight (checkpoint [19, 16, 3, 3], network [5, 16, 3, 3])"
            in (lines[2])
        )
        kept = {missing, "segmentation_head.0.weight", "segmentation_head.0.bias"}
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name] if name in kept else state[name])

    def test_a_checkpoint_of_which_nothing_fits_is_refused(self, tmp_path: Path) -> None:
        torch.save({"extra.weight": torch.zeros(1)}, tmp_path / "other.pth")
        network = build()
        before = weights_hash(network)
        with pytest.raises(CheckpointError, match="not one tensor fits the network"):
            load_weights(network, tmp_path / "other.pth", strict=False)
        assert weights_hash(network) == before


class PublishedDeepLabV3:
    """The published network's forward pass, written out from the names in its state dict.

    Blue, green, red in 0..255 minus the mean; ResNet with a stem of three convolutions, the last
    two stages dilated instead of strided, atrous pooling at 12, 24 and 36.
    """

    MEAN = (104.00698793, 116.66876762, 122.67891434)

    def __init__(self, blocks: tuple[int, ...], num_classes: int) -> None:
        self.blocks = blocks
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        self._convolution("pretrained.conv1", 64, 3, 3)
        self._norm("pretrained.bn1", 64)
        self._convolution("pretrained.conv2", 64, 64, 3)
        self._norm("pretrained.bn2", 64)
        self._convolution("pretrained.conv3", 128, 64, 3)
        self._norm("pretrained.bn3", 128)
        channels = 128
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for block in range(count):
                name = f"pretrained.layer{stage + 1}.{block}"
                for i, shape in enumerate(
                    [(width, channels, 1), (width, width, 3), (4 * width, width, 1)], 1
                ):
                    self._convolution(f"{name}.conv{i}", *shape)
                    self._norm(f"{name}.bn{i}", shape[0])
                if block == 0:
                    self._convolution(f"{name}.downsample.0", 4 * width, channels, 1)
                    self._norm(f"{name}.downsample.1", 4 * width)
                channels = 4 * width
        self._pair("head.aspp.b0.0", "head.aspp.b0.1", 512, 2048, 1)
        for i in (1, 2, 3):
            self._pair(f"head.aspp.b{i}.block.0", f"head.aspp.b{i}.block.1", 512, 2048, 3)
        self._pair("head.aspp.b4.gap.1", "head.aspp.b4.gap.2", 512, 2048, 1)
        self._pair("head.aspp.project.0", "head.aspp.project.1", 512, 5 * 512, 1)
        self._pair("head.block.0", "head.block.1", 512, 512, 3)
        self._convolution("head.block.4", num_classes, 512, 1, bias=True)
        self._pair("auxlayer.block.0", "auxlayer.block.1", 256, 1024, 3)
        self._convolution("auxlayer.block.4", num_classes, 256, 1, bias=True)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Main and auxiliary logits of RGB images in [0, 1]."""
        x = 255.0 * images.flip(1) - torch.tensor(self.MEAN).view(1, 3, 1, 1)
        x = self._step(x, "pretrained.conv1", "pretrained.bn1", stride=2)
        x = self._step(x, "pretrained.conv2", "pretrained.bn2")
        x = self._step(x, "pretrained.conv3", "pretrained.bn3")
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for stage, count in enumerate(self.blocks):
            dilation = (1, 1, 2, 4)[stage]
            for block in range(count):
                first = block == 0
                x = self._bottleneck(
                    x,
                    f"pretrained.layer{stage + 1}.{block}",
                    stride=2 if first and stage == 1 else 1,
                    dilation=max(1, dilation // 2) if first else dilation,
                )
            stages.append(x)
        branches = [self._step(x, "head.aspp.b0.0", "head.aspp.b0.1")]
        branches += [
            self._step(x, f"head.aspp.b{i}.block.0", f"head.aspp.b{i}.block.1", dilation=12 * i)
            for i in (1, 2, 3)
        ]
        pooled = x.mean(dim=(2, 3), keepdim=True)
        pooled = self._step(pooled, "head.aspp.b4.gap.1", "head.aspp.b4.gap.2")
        branches.append(pooled.expand(-1, -1, *x.shape[-2:]))
        x = self._step(torch.cat(branches, 1), "head.aspp.project.0", "head.aspp.project.1")
        x = self._step(x, "head.block.0", "head.block.1")
        aux = self._step(stages[2], "auxlayer.block.0", "auxlayer.block.1")
        return self._conv(x, "head.block.4"), self._conv(aux, "auxlayer.block.4")

    def _bottleneck(self, x: Tensor, name: str, stride: int, dilation: int) -> Tensor:
        y = self._step(x, f"{name}.conv1", f"{name}.bn1")
        y = self._step(y, f"{name}.conv2", f"{name}.bn2", stride=stride, dilation=dilation)
        y = self._normalise(self._conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.state:
            x = self._conv(x, f"{name}.downsample.0", stride=stride)
            x = self._normalise(x, f"{name}.downsample.1")
        return F.relu(x + y)

    def _step(self, x: Tensor, conv: str, norm: str, stride: int = 1, dilation: int = 1) -> Tensor:
        return F.relu(self._normalise(self._conv(x, conv, stride, dilation), norm))

    def _conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    def _normalise(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def _convolution(self, name: str, out: int, into: int, side: int, bias: bool = False) -> None:
        scale = (2.0 / (into * side**2)) ** 0.5
        self.state[f"{name}.weight"] = scale * self._random(out, into, side, side)
        if bias:
            self.state[f"{name}.bias"] = self._random(out)

    def _norm(self, name: str, count: int) -> None:
        self.state[f"{name}.weight"] = 1.0 + 0.1 * self._random(count)
        self.state[f"{name}.bias"] = 0.1 * self._random(count)
        self.state[f"{name}.running_mean"] = 0.1 * self._random(count)
        self.state[f"{name}.running_var"] = 1.0 + 0.1 * self._random(count).abs()
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def _pair(self, conv: str, norm: str, out: int, into: int, side: int) -> None:
        self._convolution(conv, out, into, side)
        self._norm(norm, out)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


class TestPublishedTeacher:
    def test_logits_are_those_of_the_published_network(self, tmp_path: Path) -> None:
        published = PublishedDeepLabV3((3, 4, 6, 3), num_classes=5)
        torch.save(published.state, tmp_path / "published.pth")
        network = build(
            architecture="DeepLabV3",
            encoder="tu-resnet50s",  # the published one has 101 layers, of the same kinds
            output_stride=8,
            auxiliary=True,
            options={"decoder_channels": 512},
            mean=[channel / 255 for channel in reversed(published.MEAN)],
            std=[1 / 255] * 3,
        ).eval()
        assert load_weights(network, tmp_path / "published.pth", layout="cirkd") == []

        x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            main, aux = network(x)
            expected_main, expected_aux = published(x)
        assert main.shape == (1, 5, 8, 12)
        torch.testing.assert_close(main, expected_main, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(aux, expected_aux, rtol=1e-3, atol=1e-3)

    def test_a_checkpoint_of_another_layout_is_refused(self, tmp_path: Path) -> None:
        torch.save(build().state_dict(), tmp_path / "ours.pth")
        with pytest.raises(CheckpointError, match="expected names of the CIRKD code base"):
            load_weights(build(), tmp_path / "ours.pth", layout="cirkd")
        with pytest.raises(CheckpointError, match="expected native or cirkd, got 'mmseg'"):
            load_weights(build(), tmp_path / "ours.pth", layout="mmseg")
