"""Networks: shapes, strides, seeds, single images, and the errors of what cannot be built."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import rdd_pipeline.networks.torchvision_ops as torchvision_ops
from rdd_pipeline.config import SmpConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    parameter_count,
    parameter_groups,
    weights_hash,
)
from rdd_pipeline.networks.base import FCNHead, PooledBatchNorm2d

TINY = "tu-mobilenetv3_small_050"
VIT = {
    "dynamic_img_size": True,
    "decoder_intermediate_channels": [16, 16, 16, 16],
    "decoder_fusion_channels": 16,
}


def build(
    architecture: str = "PSPNet",
    encoder: str = TINY,
    *,
    num_classes: int = 5,
    seed: int | None = 0,
    auxiliary: dict[str, Any] | None = None,
    **settings: Any,
) -> SegmentationNetwork:
    config = SmpConfig.model_validate(
        {
            "architecture": architecture,
            "encoder": encoder,
            "auxiliary": {} if auxiliary is None else auxiliary,
            **settings,
        }
    )
    return build_network(config, num_classes, seed)


def image(height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


class TestArchitectures:
    @pytest.mark.parametrize(
        ("architecture", "encoder", "options", "stride"),
        [
            ("Unet", TINY, {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}, 1),
            ("UnetPlusPlus", TINY, {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}, 1),
            ("MAnet", TINY, {}, 1),
            ("Linknet", TINY, {}, 1),
            ("FPN", TINY, {}, 4),
            ("PSPNet", TINY, {}, 8),
            ("DeepLabV3", TINY, {"decoder_channels": 16}, 8),
            ("DeepLabV3Plus", TINY, {"decoder_channels": 16}, 4),
            ("UPerNet", TINY, {"decoder_channels": 16}, 4),
            ("Segformer", TINY, {"decoder_segmentation_channels": 16}, 4),
            ("DPT", "tu-vit_tiny_patch16_224", VIT, 2),
            ("Segformer", "mit_b0", {"decoder_segmentation_channels": 16}, 4),
            ("FPN", "tu-convnext_atto", {}, 4),
        ],
    )
    def test_one_image_of_odd_size_trains_both_heads(
        self, architecture: str, encoder: str, options: dict[str, Any], stride: int
    ) -> None:
        network = build(architecture, encoder, options=options)
        assert network.training
        assert network.output_stride == stride

        main, aux = network(image(45, 61))

        h, w = network.grid_size(45, 61)
        assert (h * stride, w * stride) == (
            -(-45 // network.divisor) * network.divisor,
            -(-61 // network.divisor) * network.divisor,
        )
        assert main.shape == (1, 5, h, w)
        assert aux is not None
        assert aux.shape == main.shape
        (main.square().mean() + aux.square().mean()).backward()
        untrained = [
            name
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        assert untrained == []

    def test_divisor_grows_where_the_decoder_needs_more_than_the_encoder(self) -> None:
        network = build("PAN")
        assert network.divisor > 16  # its encoder's stride
        main, aux = network.eval()(image(45, 61))
        assert main.shape[-2:] == network.grid_size(45, 61)
        assert aux is not None

    @pytest.mark.parametrize("architecture", ["FPN", "Unet", "DeepLabV3Plus"])
    def test_upsampled_logits_are_those_of_the_plain_smp_model(self, architecture: str) -> None:
        import segmentation_models_pytorch as smp

        plain = getattr(smp, architecture)(TINY, encoder_weights=None, classes=5).eval()
        network = build(architecture, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
        result = network.load_state_dict(plain.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert all(name.startswith("auxiliary_head.") for name in result.missing_keys)

        x = image(64, 96) / 255.0
        with torch.no_grad():
            up = F.interpolate(network(x).main, (64, 96), mode="bilinear", align_corners=True)
            torch.testing.assert_close(up, plain(x), rtol=1e-5, atol=1e-6)

    def test_upsampling_of_a_vision_transformers_head_is_removed(self) -> None:
        import segmentation_models_pytorch as smp

        encoder = "tu-vit_tiny_patch16_224"
        plain = smp.DPT(encoder, encoder_weights=None, classes=5, **VIT).eval()
        network = build("DPT", encoder, options=VIT, mean=(0, 0, 0), std=(1, 1, 1)).eval()
        network.load_state_dict(plain.state_dict(), strict=False)
        x = image(64, 96) / 255.0
        with torch.no_grad():
            up = F.interpolate(network(x).main, (64, 96), mode="bilinear", align_corners=True)
            torch.testing.assert_close(up, plain(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("architecture", "encoder", "options"),
        [
            ("DeepLabV3", "resnet101", {}),
            ("DeepLabV3", "resnet18", {}),
            ("DeepLabV3", "mobilenet_v2", {}),
            ("PSPNet", "resnet18", {"encoder_depth": 5}),
        ],
    )
    def test_networks_of_the_paper(
        self, architecture: str, encoder: str, options: dict[str, Any]
    ) -> None:
        network = build(
            architecture, encoder, num_classes=19, output_stride=8, options=options
        ).eval()
        assert network.output_stride == 8
        assert network.unused_parameters == frozenset()
        with torch.no_grad():
            main, aux = network(image(40, 72))
        assert main.shape == (1, 19, 5, 9)
        assert aux is not None
        assert aux.shape == (1, 19, 5, 9)

    def test_heads_are_at_the_deepest_features_with_a_dilated_encoder(self) -> None:
        network = build("PSPNet", "resnet18", output_stride=8, options={"encoder_depth": 5})
        with torch.no_grad():
            features = network.encoder_module(torch.zeros(2, 3, 64, 64))
        assert [f.shape[-1] for f in features] == [64, 32, 16, 8, 8, 8]
        head = network.get_submodule("auxiliary_head")
        assert isinstance(head, FCNHead)
        assert (head.conv.in_channels, head.conv.out_channels) == (256, 64)

    def test_parameters_that_no_logits_depend_on_are_frozen_and_not_counted(self) -> None:
        network = build("PSPNet", "resnet18")  # three of five encoder stages
        assert {name.split(".")[1] for name in network.unused_parameters} == {"layer3", "layer4"}
        named = dict(network.named_parameters())
        assert all(not named[name].requires_grad for name in network.unused_parameters)
        used = sum(p.numel() for p in named.values() if p.requires_grad)
        assert parameter_count(network) == used < sum(p.numel() for p in named.values())


class TestInput:
    @pytest.mark.parametrize("size", [(8, 8), (7, 9), (45, 61), (65, 130)])
    def test_grid_size_is_the_size_of_the_logits(self, size: tuple[int, int]) -> None:
        network = build().eval()
        with torch.no_grad():
            assert network(image(*size)).main.shape[-2:] == network.grid_size(*size)

    def test_bytes_and_floats_give_equal_logits(self) -> None:
        network = build("FPN").eval()
        x = image(48, 64, batch=2)
        with torch.no_grad():
            from_bytes, from_floats = network(x), network(x.float() / 255.0)
        assert torch.equal(from_bytes.main, from_floats.main)
        assert from_bytes.aux is not None
        assert torch.equal(from_bytes.aux, from_floats.aux)

    def test_input_is_normalised_with_the_mean_and_deviation_of_the_configuration(self) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
        network = build(mean=mean, std=std).eval()
        x = image(32, 32)
        by_hand = torch.stack(
            [(x[:, c].float() / 255.0 - mean[c]) / std[c] for c in range(3)], dim=1
        )
        with torch.no_grad():
            torch.testing.assert_close(network(x).main, network.raw_logits(by_hand).main)
        assert not {"mean", "std"} & set(network.state_dict())

    def test_image_between_multiples_is_stretched_to_the_next(self) -> None:
        network = build("FPN", mean=(0, 0, 0), std=(1, 1, 1)).eval()
        x = image(45, 61) / 255.0
        stretched = F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)
        with torch.no_grad():
            assert torch.equal(network(x).main, network(stretched).main)

    def test_aux_logits_are_resized_to_the_grid_of_the_main_ones(self) -> None:
        network = build("FPN", auxiliary={"stage": 2, "channels": 8}).eval()
        assert network.get_submodule("auxiliary_head.conv").out_channels == 8
        x = image(64, 96)
        with torch.no_grad():
            raw = network.raw_logits((x / 255.0 - network.mean) / network.std)
            main, aux = network(x)
        assert raw.aux is not None
        assert raw.aux.shape[-2:] == raw.main.shape[-2:] == (16, 24)  # stage 2 is at stride 4

        deep = build("FPN", auxiliary={"stage": -1}).eval()
        with torch.no_grad():
            raw = deep.raw_logits((x / 255.0 - deep.mean) / deep.std)
            main, aux = deep(x)
        assert raw.aux is not None
        assert raw.aux.shape[-2:] == (2, 3)
        expected = F.interpolate(raw.aux, (16, 24), mode="bilinear", align_corners=True)
        assert aux is not None
        torch.testing.assert_close(aux, expected)
        assert main.shape == aux.shape

    def test_no_auxiliary_head_gives_no_aux_logits(self) -> None:
        network = build_network(SmpConfig(architecture="PSPNet", encoder=TINY), 5, 0).eval()
        assert not network.has_aux
        with torch.no_grad():
            assert network(image(32, 32)).aux is None

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(3, 32, 32), r"expected shape \(B, 3, H, W\), got \(3, 32, 32\)"),
            (torch.zeros(1, 32, 32, 3), r"got \(1, 32, 32, 3\)"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "got torch.int64"),
        ],
    )
    def test_wrong_input_is_named(self, images: torch.Tensor, message: str) -> None:
        with pytest.raises(NetworkError, match=message):
            build()(images)

    def test_network_survives_pickling(self) -> None:
        network = build("FPN").eval()
        copy = pickle.loads(pickle.dumps(network))
        x = image(32, 64)
        with torch.no_grad():
            assert torch.equal(network(x).main, copy(x).main)
        assert (copy.output_stride, copy.divisor) == (network.output_stride, network.divisor)


class TestOneImageTraining:
    def test_global_pooling_accepts_one_image(self) -> None:
        network = build("DeepLabV3", options={"decoder_channels": 16})
        pooled = [m for m in network.modules() if isinstance(m, PooledBatchNorm2d)]
        assert len(pooled) == 1
        before = pooled[0].running_mean.clone()
        network(image(64, 64)).main.mean().backward()
        assert torch.equal(pooled[0].running_mean, before)
        network(image(64, 64, batch=2))
        assert not torch.equal(pooled[0].running_mean, before)

    def test_pooled_batch_norm_equals_batch_norm_but_for_one_value(self) -> None:
        plain = nn.BatchNorm2d(4)
        with torch.no_grad():
            plain.weight.uniform_()
            plain.running_mean.uniform_()
        twin = PooledBatchNorm2d.from_batch_norm(plain)
        x = torch.rand(3, 4, 1, 1)
        plain.eval()
        one = plain(x[:1])
        assert torch.equal(twin(x[:1]), one)
        plain.train()
        state = {name: value.clone() for name, value in plain.state_dict().items()}
        expected = plain(x)
        twin.load_state_dict(state)
        assert torch.equal(twin(x), expected)
        assert list(twin.state_dict()) == list(state)

    def test_too_small_an_image_is_a_clear_error(self) -> None:
        network = build("FPN", "resnet18")
        with pytest.raises(NetworkError, match=r"1 image of 32x20 pixels; use a larger crop"):
            network(image(32, 20))
        assert network(image(32, 20, batch=2)).main.shape == (2, 5, 8, 8)


class TestSeed:
    def test_equal_seeds_give_equal_weights(self) -> None:
        first = weights_hash(build(seed=3))
        torch.rand(7)
        assert weights_hash(build(seed=3)) == first
        assert weights_hash(build(seed=4)) != first

    def test_seeding_leaves_the_global_generator_alone(self) -> None:
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        build(seed=3)
        assert torch.equal(torch.rand(3), expected)

    def test_without_a_seed_weights_come_from_the_global_generator(self) -> None:
        torch.manual_seed(5)
        first = weights_hash(build(seed=None))
        torch.manual_seed(5)
        assert weights_hash(build(seed=None)) == first
        assert weights_hash(build(seed=None)) != first

    def test_auxiliary_head_does_not_change_the_main_weights(self) -> None:
        config = SmpConfig(architecture="PSPNet", encoder=TINY)
        alone = build_network(config, 5, 0).state_dict()
        both = build(seed=0).state_dict()
        assert set(alone) < set(both)
        assert all(torch.equal(alone[name], both[name]) for name in alone)


class TestParameterGroups:
    def test_encoder_and_heads_partition_the_trained_parameters(self) -> None:
        network = build("PSPNet", "resnet18")
        encoder, heads = parameter_groups(network, lr=0.1, head_lr_factor=10.0)
        assert (encoder["name"], encoder["lr"]) == ("encoder", 0.1)
        assert (heads["name"], heads["lr"]) == ("heads", 1.0)
        names = {id(p): name for name, p in network.named_parameters()}
        in_encoder = {names[id(p)] for p in encoder["params"]}
        in_heads = {names[id(p)] for p in heads["params"]}
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        assert in_encoder == {name for name in trained if name.startswith("encoder.")}
        assert in_heads == trained - in_encoder
        assert any(name.startswith("auxiliary_head.") for name in in_heads)

        optimiser = torch.optim.SGD([encoder, heads], lr=0.1, momentum=0.9, weight_decay=1e-4)
        assert [group["lr"] for group in optimiser.param_groups] == [0.1, 1.0]

    def test_a_frozen_encoder_gives_one_group(self) -> None:
        network = build()
        network.encoder_module.requires_grad_(False)
        (heads,) = parameter_groups(network, lr=0.1)
        assert (heads["name"], heads["lr"]) == ("heads", 0.1)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"architecture": "deeplabv3"}, r"network.architecture: .*'deeplabv3'.*DeepLabV3"),
            ({"architecture": "Transformer9000"}, r"did you mean|valid names: DeepLabV3"),
            ({"encoder": "resnt18"}, r"network.encoder: .*'resnt18'; did you mean resnet18"),
            ({"encoder": "tu-resnt18"}, r"timm has no 'resnt18'; did you mean tu-resnet18"),
            (
                {"encoder": "resnet18", "options": {"psp_chanels": 8}},
                r"network.options.psp_chanels: PSPNet has no such argument; .*psp_out_channels",
            ),
            (
                {"options": {"psp_chanels": 8}},  # timm encoders take arguments of their own
                r"cannot build PSPNet with encoder tu-mobilenetv3.*psp_chanels",
            ),
            ({"options": {"classes": 3}}, r"network.options.classes: .*the data set decides"),
            ({"options": {"encoder_output_stride": 8}}, r"use network.output_stride"),
            ({"options": {"encoder_depth": 9}}, r"cannot build PSPNet.*\[1, 5\], got 9"),
            ({"output_stride": 16}, r"expected 16, but the encoder's last stage is at stride 8"),
            ({"architecture": "FPN", "output_stride": 8}, r"FPN with .*does not run"),
            ({"auxiliary": {"stage": 0}}, r"network.auxiliary.stage: expected one of \[1, 2, 3\]"),
            ({"auxiliary": {"stage": -9}}, r"\[-3, -2, -1\], got -9"),
            (
                {"encoder": "tu-convnext_atto", "auxiliary": {"stage": 1}},  # an empty stage
                r"network.auxiliary.stage: expected one of \[2, 3\]",
            ),
            ({"std": (0.2, 0.0, 0.2)}, r"network.std"),
            ({"encoder": "tu-vit_tiny_patch16_224", "architecture": "DPT"}, r"dynamic_img_size"),
            (
                {"encoder": "resnet18", "encoder_weights": "imagnet"},
                r"network.encoder_weights: .*no weights 'imagnet'; did you mean imagenet",
            ),
            ({"encoder_weights": "a1_in1k"}, r"encoder: tu-mobilenetv3_small_050.a1_in1k"),
            ({"encoder": f"{TINY}.nonsense", "encoder_weights": "imagenet"}, r"nonsense"),
        ],
    )
    def test_what_cannot_be_built_is_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(NetworkError, match=message):
            build(**settings)

    @pytest.mark.parametrize("num_classes", [0, 1, 256])
    def test_number_of_classes_is_checked(self, num_classes: int) -> None:
        with pytest.raises(NetworkError, match="num_classes: expected 2 to 255"):
            build(num_classes=num_classes)


class TestPretrainedWeights:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty cache of the hub, offline."""
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    def test_weights_that_cannot_be_downloaded_say_how_to_go_on(self, hub: Path) -> None:
        with pytest.raises(NetworkError) as caught:
            build("FPN", "mobilenet_v2", encoder_weights="imagenet")
        assert "'imagenet' of encoder 'mobilenet_v2' could not be loaded" in str(caught.value)
        assert "encoder_weights: null" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_weights_in_the_cache_are_loaded(self, hub: Path) -> None:
        import segmentation_models_pytorch as smp

        source = smp.encoders.get_encoder("mobilenet_v2", weights=None)
        settings = smp.encoders.encoders["mobilenet_v2"]["pretrained_settings"]["imagenet"]
        repository = "models--" + settings["repo_id"].replace("/", "--")
        snapshot = hub / repository / "snapshots" / settings["revision"]
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        safetensors.torch.save_file(source.state_dict(), snapshot / "model.safetensors")

        network = build("FPN", "mobilenet_v2", encoder_weights="imagenet")

        loaded = network.encoder_module.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


class TestTorchvisionOperators:
    def test_libraries_import_in_a_fresh_process_without_warnings(self) -> None:
        code = (
            "import rdd_pipeline.networks.torchvision_ops\n"
            "import torchvision, timm, segmentation_models_pytorch\n"
        )
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
        )
        assert (result.returncode, result.stderr) == (0, "")

    def test_declaring_again_changes_nothing(self) -> None:
        library = torchvision_ops._library
        torchvision_ops.declare_missing_operators()
        assert torchvision_ops._library is library

    def test_operators_are_declared_only_where_the_compiled_library_does_not_load(self) -> None:
        import torchvision

        loads = torchvision_ops.compiled_library_loads()
        assert loads == torchvision.extension._has_ops()
        assert (torchvision_ops._library is None) == loads

    def test_a_declared_operator_fails_with_torchvisions_explanation(self) -> None:
        import torchvision

        if torchvision_ops.compiled_library_loads():
            pytest.skip("torchvision's compiled library fits this torch")
        with pytest.raises(RuntimeError, match="Couldn't load custom C"):
            torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
