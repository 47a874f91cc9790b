"""Networks of torchvision: its own outputs, its weights, and the errors of what there is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchvision

# isort: split
import torchvision

from rdd_pipeline.config import TorchvisionConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.features import FeatureTaps
from rdd_pipeline.networks import SegmentationNetwork, build_network, load_weights, weights_hash

DEEPLAB = "deeplabv3_mobilenet_v3_large"
LRASPP = "lraspp_mobilenet_v3_large"
NO_NORMALISATION = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def build(architecture: str = LRASPP, num_classes: int = 5, **settings: Any) -> SegmentationNetwork:
    config = TorchvisionConfig(architecture=architecture, **settings)
    return build_network(config, num_classes, seed=0)


def plain(architecture: str, num_classes: int = 5, **arguments: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torchvision.models.get_model(
            architecture, weights=None, weights_backbone=None, num_classes=num_classes, **arguments
        ).eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's folder of downloads, empty; nothing can be fetched into it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(folder: Path, model: str, name: str, state: dict[str, Any]) -> None:
    url = torchvision.models.get_model_weights(model)[name].url
    torch.save(state, folder / url.rpartition("/")[2])


@pytest.mark.parametrize(
    ("architecture", "aux", "stride"),
    [
        ("fcn_resnet50", True, 8),
        (DEEPLAB, True, 16),
        (LRASPP, False, 8),
    ],
)
def test_upsampled_logits_are_those_of_the_plain_model(
    architecture: str, aux: bool, stride: int, tmp_path: Path
) -> None:
    model = plain(architecture, **({} if architecture == LRASPP else {"aux_loss": aux}))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    network = build(architecture, auxiliary=aux, **NO_NORMALISATION).eval()
    assert load_weights(network, tmp_path / "plain.pth") == []
    assert weights_hash(network) == weights_hash(model)
    assert network.output_stride == stride

    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = network.raw_logits(x), model(x)

    def up(logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)

    torch.testing.assert_close(up(ours.main), theirs["out"], rtol=1e-4, atol=1e-5)
    assert (ours.aux is not None) == aux
    if ours.aux is not None:
        torch.testing.assert_close(up(ours.aux), theirs["aux"], rtol=1e-4, atol=1e-5)


def test_features_can_be_taken_where_the_documentation_says() -> None:
    network = build(DEEPLAB, auxiliary=True)
    assert FeatureTaps(network, ["backbone.16", "classifier.3"]).channels() == (960, 256)
    with pytest.raises(NetworkError, match=r"no module 'encoder'; there is .*backbone, classifier"):
        FeatureTaps(network, ["encoder[-1]"])


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "code was run"))


class TestPretrained:
    NAME = "COCO_WITH_VOC_LABELS_V1"

    @pytest.mark.parametrize("architecture", [DEEPLAB, LRASPP])
    def test_weights_of_these_classes_are_loaded_whole(
        self, architecture: str, hub: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = plain(architecture, 21, **({} if architecture == LRASPP else {"aux_loss": True}))
        put(hub, architecture, self.NAME, model.state_dict())
        network = build(architecture, 21, weights=self.NAME, auxiliary=architecture == DEEPLAB)
        assert network.pretrained_whole
        assert weights_hash(network) == weights_hash(model)
        assert caplog.messages == []

    def test_heads_of_other_classes_are_made_anew_and_named(
        self, hub: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = plain(DEEPLAB, 21, aux_loss=True)
        put(hub, DEEPLAB, self.NAME, model.state_dict())
        with caplog.at_level(logging.WARNING, "rdd.networks"):
            network = build(DEEPLAB, weights=self.NAME, auxiliary=True)
        assert not network.pretrained_whole
        [message] = caplog.messages
        assert "are of 21 classes, the data set has 5" in message
        assert message.endswith("classifier.4, aux_classifier.4")
        ours, theirs = network.state_dict(), model.state_dict()
        changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
        assert changed == set(network.classifier_names)

    def test_backbone_weights_are_loaded(self, hub: Path) -> None:
        backbone = torchvision.models.mobilenet_v3_large(weights=None)
        put(hub, "mobilenet_v3_large", "IMAGENET1K_V2", backbone.state_dict())
        network = build(weights_backbone="IMAGENET1K_V2")
        assert not network.pretrained_whole
        ours, theirs = network.encoder_module.state_dict(), backbone.features.state_dict()
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    @pytest.mark.parametrize(
        ("settings", "key"),
        [
            ({"weights": NAME}, "weights"),
            ({"weights_backbone": "IMAGENET1K_V1"}, "weights_backbone"),
        ],
    )
    def test_weights_that_cannot_be_downloaded_say_how_to_go_on(
        self, settings: dict[str, str], key: str, hub: Path
    ) -> None:
        with pytest.raises(NetworkError) as caught:
            build(**settings)
        message = str(caught.value)
        assert message.startswith(f"network.{key}: the weights '{settings[key]}' of ")
        assert f"set {key}: null" in message
        assert len(message.splitlines()) == 1

    def test_a_download_with_code_is_not_run(self, hub: Path) -> None:
        put(hub, LRASPP, self.NAME, {"weight": Marker(hub / "marker")})
        with pytest.raises(NetworkError, match="could not be loaded"):
            build(weights=self.NAME)
        assert not (hub / "marker").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "deeplabv3_resnet18"},
            r"no 'deeplabv3_resnet18'; did you mean deeplabv3_",
        ),
        ({"auxiliary": True}, r"network.auxiliary: lraspp_.* has one head; .*fcn_resnet50"),
        ({"weights": "COCO"}, r"network.weights: lraspp_.* no weights 'COCO'; .*COCO_WITH_VOC"),
        ({"weights_backbone": "IMAGENET"}, r"network.weights_backbone: .*IMAGENET1K_V1"),
    ],
)
def test_what_cannot_be_built_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        build(**{"architecture": LRASPP, **settings})


def test_weights_of_all_and_of_the_backbone_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="weights already hold the backbone"):
        TorchvisionConfig(architecture=LRASPP, weights="A", weights_backbone="B")
