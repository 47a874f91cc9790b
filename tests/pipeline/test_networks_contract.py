"""What every type of network must hold: one contract, run over all of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from rdd_pipeline.config import NetworkConfig, without_pretrained
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    load_weights,
    network_identity,
    parameter_groups,
    save_weights,
    weights_hash,
)
from tiny_models import require_family, save_tiny

CLASSES = 5
SIZES = [(45, 61), (64, 96)]

NETWORKS: dict[str, dict[str, Any]] = {
    "smp": {
        "architecture": "FPN",
        "encoder": "tu-mobilenetv3_small_050",
        "auxiliary": True,
        "options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    },
    "torchvision": {
        "type": "torchvision",
        "architecture": "deeplabv3_mobilenet_v3_large",
        "auxiliary": True,
    },
    "transformers-segformer": {"type": "transformers", "model": "segformer"},
    "transformers-upernet": {"type": "transformers", "model": "upernet", "auxiliary": True},
    "transformers-beit": {"type": "transformers", "model": "beit", "auxiliary": True},
    "transformers-mask2former": {"type": "transformers", "model": "mask2former"},
    "custom": {"type": "custom", "factory": "tiny_factories:two_heads", "auxiliary": True},
    "custom-one-head": {
        "type": "custom",
        "factory": "tiny_factories:two_heads",
        "options": {"form": "tensor"},
    },
}


def parse(settings: dict[str, Any]) -> Any:
    return TypeAdapter(NetworkConfig).validate_python(settings)


@pytest.fixture(scope="module", params=list(NETWORKS))
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = dict(NETWORKS[request.param])
    if settings.get("type") == "transformers":
        require_family(settings["model"])
        folder = tmp_path_factory.mktemp("models") / settings["model"]
        save_tiny(folder, settings["model"], CLASSES)
        settings |= {"model": str(folder), "pretrained": False}
    return parse(settings)


@pytest.fixture(scope="module")
def network(config: Any) -> SegmentationNetwork:
    """Changed by no test but in its running statistics."""
    network = build_network(config, CLASSES, seed=0)
    assert network.training
    return network


def images(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


class TestContract:
    @pytest.mark.parametrize("size", SIZES)
    def test_logits_of_both_heads_are_on_the_announced_grid(
        self, config: Any, network: SegmentationNetwork, size: tuple[int, int]
    ) -> None:
        network.eval()
        with torch.no_grad():
            main, aux = network(images(*size))
        assert main.shape == (1, CLASSES, *network.grid_size(*size))
        assert main.isfinite().all()
        assert network.has_aux == bool(config.auxiliary)
        assert (aux is not None) == network.has_aux
        if aux is not None:
            assert aux.shape == main.shape
            assert not torch.equal(aux, main)

    def test_stride_divides_the_multiples_of_the_image(self, network: SegmentationNetwork) -> None:
        assert network.output_stride >= 1
        assert network.divisor % network.output_stride == 0

    def test_one_image_of_odd_size_trains_every_used_parameter(
        self, network: SegmentationNetwork
    ) -> None:
        network.train().zero_grad()
        main, aux = network(images(45, 61))
        loss = main.square().mean() + (0.0 if aux is None else aux.square().mean())
        loss.backward()
        parameters = dict(network.named_parameters())
        without = {name for name, parameter in parameters.items() if parameter.grad is None}
        assert without == network.unused_parameters
        assert all(not parameters[name].requires_grad for name in without)
        assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)

    def test_bytes_and_floats_give_equal_logits(self, network: SegmentationNetwork) -> None:
        network.eval()
        x = images(64, 64, batch=2)
        with torch.no_grad():
            assert torch.equal(network(x).main, network(x.float() / 255.0).main)

    def test_images_of_a_batch_do_not_see_each_other(self, network: SegmentationNetwork) -> None:
        network.eval()
        x = torch.cat([images(64, 64), images(64, 64).flip(-1)])
        with torch.no_grad():
            both, alone = network(x).main, network(x[:1]).main
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)

    def test_equal_seeds_give_equal_weights(
        self, config: Any, network: SegmentationNetwork
    ) -> None:
        torch.manual_seed(11)
        before = torch.get_rng_state()
        twin = build_network(config, CLASSES, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        assert weights_hash(build_network(config, CLASSES, seed=3)) == weights_hash(twin)
        assert weights_hash(twin) != weights_hash(network)

    def test_weights_survive_saving_and_loading(
        self, config: Any, network: SegmentationNetwork, tmp_path: Path
    ) -> None:
        save_weights(network, tmp_path / "network.safetensors")
        torch.save({"state_dict": network.state_dict()}, tmp_path / "network.pth")
        for name in ("network.safetensors", "network.pth"):
            other = build_network(config, CLASSES, seed=5)
            assert load_weights(other, tmp_path / name) == []
            assert weights_hash(other) == weights_hash(network)
        x = images(64, 64)
        with torch.no_grad():
            assert torch.equal(other.eval()(x).main, network.eval()(x).main)

    def test_configuration_survives_json_and_pickling(self, config: Any) -> None:
        assert parse(config.model_dump(mode="json")) == config
        assert pickle.loads(pickle.dumps(config)) == config

    def test_encoder_and_heads_partition_the_trained_parameters(
        self, network: SegmentationNetwork
    ) -> None:
        groups = parameter_groups(network, lr=0.1, head_lr_factor=10.0)
        assert [(group["name"], group["lr"]) for group in groups] == [
            ("encoder", 0.1),
            ("heads", 1.0),
        ]
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        trained = [id(p) for p in network.parameters() if p.requires_grad]
        assert sorted(grouped) == sorted(trained)

    def test_without_pretrained_weights_it_is_the_same_network(self, config: Any) -> None:
        bare = without_pretrained(config)
        assert network_identity(bare) == network_identity(config)
        assert bare.type == "custom" or not bare.pretrained_whole

    def test_classifiers_follow_the_number_of_classes(
        self, config: Any, network: SegmentationNetwork
    ) -> None:
        names, state = network.classifier_names, network.state_dict()
        if config.type == "custom":
            assert names == ()
            return
        changed = {
            name
            for name, tensor in build_network(config, CLASSES + 4, seed=0).state_dict().items()
            if tensor.shape != state[name].shape
        }
        assert changed == set(names)

    def test_identity_says_nothing_of_where_weights_came_from(self, config: Any) -> None:
        identity = network_identity(config)
        assert identity["type"] == config.type
        assert identity["mean"] == list(config.mean or (0.485, 0.456, 0.406))
        sources = {"encoder_weights", "weights", "weights_backbone", "pretrained", "model"}
        assert sources.isdisjoint(identity)


def test_identity_of_smp_networks_is_what_it_was_before_there_were_types() -> None:
    # Stores built earlier are found by it.
    assert network_identity(parse({"architecture": "FPN", "encoder": "resnet18"})) == {
        "type": "smp",
        "architecture": "FPN",
        "encoder": "resnet18",
        "output_stride": None,
        "auxiliary": None,
        "options": {},
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
