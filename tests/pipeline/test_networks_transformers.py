"""Networks of transformers: each family's own logits, folders, preprocessing, and the errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rdd_pipeline.config import TransformersConfig
from rdd_pipeline.errors import CheckpointError, NetworkError
from rdd_pipeline.features import FeatureTaps
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    load_weights,
    network_identity,
    weights_hash,
)
from tiny_models import CLASSES, FAMILIES, require_family, save_tiny, tiny_model

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
BGR = {"do_flip_channel_order": True, "do_rescale": True, "rescale_factor": 1 / 255}


def build(
    folder: Path, num_classes: int = CLASSES, seed: int = 0, **settings: Any
) -> SegmentationNetwork:
    config = TransformersConfig(model=str(folder), **settings)
    return build_network(config, num_classes, seed)


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def segformer(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "segformer", "segformer")
    return tmp_path / "segformer"


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_are_the_models_own(self, family: str, tmp_path: Path) -> None:
        require_family(family)
        model = save_tiny(tmp_path, family)
        network = build(tmp_path, **PLAIN).eval()
        assert network.pretrained_whole
        assert weights_hash(network.get_submodule("network")) == weights_hash(model)

        x = image()
        with torch.no_grad():
            main = network(x).main
            probs = main.softmax(dim=1)
            if family in ("mask2former", "maskformer", "oneformer"):
                arguments = {}
                if family == "oneformer":
                    arguments["task_inputs"] = network.get_buffer("task_tokens")
                output = model(x, **arguments)
                masks = output.masks_queries_logits.sigmoid()
                classes = output.class_queries_logits.softmax(-1)[0, :, :-1]
                summed = torch.stack(
                    [(masks[0] * classes[:, c, None, None]).sum(0) for c in range(CLASSES)]
                )[None]
                torch.testing.assert_close(probs, summed / summed.sum(1, keepdim=True))
                return
            theirs = model(x).logits
        if theirs.shape != main.shape:  # DPT and UPerNet, whose own last step resizes
            corners = family == "dpt"
            main = F.interpolate(main, theirs.shape[-2:], mode="bilinear", align_corners=corners)
        torch.testing.assert_close(main, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["segformer", "beit", "dpt"])
    def test_images_that_are_not_square_are_seen_upright(self, family: str, tmp_path: Path) -> None:
        save_tiny(tmp_path, family)
        network = build(tmp_path).eval()
        # What changes at the bottom of a wide image changes the bottom of the logits most.
        x = image(64, 256)
        changed = x.clone()
        changed[..., 32:, :] = 1.0 - changed[..., 32:, :]
        with torch.no_grad():
            main = network(x).main
            apart = (network(changed).main - main).abs().mean(dim=(0, 1, 3))
        assert main.shape[-2:] == network.grid_size(64, 256)
        half = len(apart) // 2
        assert apart[half:].mean() > apart[:half].mean()

    @pytest.mark.parametrize("family", ["upernet", "beit", "dpt"])
    def test_auxiliary_head_is_the_models_own(self, family: str, tmp_path: Path) -> None:
        model = save_tiny(tmp_path, family)
        network = build(tmp_path, auxiliary=True, **PLAIN).eval()
        taken: list[Tensor] = []
        model.auxiliary_head.register_forward_hook(lambda *call: taken.append(call[-1]))
        with torch.no_grad():
            aux = network.raw_logits(image()).aux
            model(image())
        torch.testing.assert_close(aux, taken[0], rtol=1e-4, atol=1e-5)
        assert not network.get_submodule("network.auxiliary_head")._forward_hooks

    @pytest.mark.parametrize("family", ["segformer", "mobilevit"])
    def test_an_auxiliary_head_that_is_not_there_is_an_error(
        self, family: str, tmp_path: Path
    ) -> None:
        save_tiny(tmp_path, family)
        with pytest.raises(NetworkError, match=r"network.auxiliary: .* has one head; UPerNet"):
            build(tmp_path, auxiliary=True)

    def test_an_auxiliary_head_that_was_switched_off_is_an_error(self, tmp_path: Path) -> None:
        save_tiny(tmp_path, "upernet", use_auxiliary_head=False)
        with pytest.raises(NetworkError, match=r"network.auxiliary: .* use_auxiliary_head"):
            build(tmp_path, auxiliary=True)

    def test_improbable_classes_have_finite_logits_and_gradients(self) -> None:
        from rdd_pipeline.networks.transformers_models import _masks_to_logits

        classes = torch.tensor([[[0.0, 200.0, 0.0], [0.0, 0.0, 200.0]]], requires_grad=True)
        masks = torch.full((1, 2, 3, 4), -200.0)
        masks[:, 0, 0, 0] = 200.0
        logits = _masks_to_logits(classes, masks)
        assert logits.shape == (1, 2, 3, 4)
        assert logits[0, 1, 0, 0] == 0.0
        assert logits.min().item() == pytest.approx(-13.8155, abs=1e-3)
        logits.sum().backward()
        assert classes.grad is not None
        assert classes.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("family", "taps"),
        [
            ("segformer", ["network.segformer[0]", "network.decode_head.activation"]),
            ("upernet", ["network.backbone[0][-1]", "network.decode_head.fpn_bottleneck"]),
            ("beit", ["network.fpn[-1]", "network.decode_head.fpn_bottleneck"]),
            ("dpt", ["network.neck[-1]", "network.head.head.3"]),
            ("mobilevit", ["network.mobilevit[0]", "network.segmentation_head.aspp"]),
        ],
    )
    def test_features_can_be_taken_where_the_documentation_says(
        self, family: str, taps: list[str], tmp_path: Path
    ) -> None:
        save_tiny(tmp_path, family)
        channels = FeatureTaps(build(tmp_path), taps).channels()
        assert all(count >= 16 for count in channels)


class TestFolder:
    def test_weights_in_shards_are_read(self, segformer: Path, tmp_path: Path) -> None:
        model = save_tiny(tmp_path / "sharded", "segformer", shards="20KB")
        assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
        network = build(tmp_path / "sharded")
        assert weights_hash(network.get_submodule("network")) == weights_hash(model)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_folder_is_a_checkpoint_too(self, family: str, tmp_path: Path) -> None:
        require_family(family)
        save_tiny(tmp_path / "random", family)
        model = save_tiny(tmp_path / "trained", family, shards="20KB", seed=7)
        network = build(tmp_path / "random", pretrained=False)
        assert load_weights(network, tmp_path / "trained") == []
        assert weights_hash(network.get_submodule("network")) == weights_hash(model)

    def test_a_state_dict_of_the_model_is_a_checkpoint_too(
        self, segformer: Path, tmp_path: Path
    ) -> None:
        model = tiny_model("segformer", seed=7)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        network = build(segformer)
        assert load_weights(network, tmp_path / "model.pth") == []
        assert weights_hash(network.get_submodule("network")) == weights_hash(model)

    def test_the_file_in_a_folder_points_to_the_folder(self, segformer: Path) -> None:
        # On disk the library keeps names that its modules had in earlier versions.
        network = build(segformer, pretrained=False)
        with pytest.raises(CheckpointError, match=r"Give its folder, .*segformer, which"):
            load_weights(network, segformer / "model.safetensors")

    def test_a_folder_of_another_kind_is_refused_and_nothing_is_loaded(
        self, segformer: Path, tmp_path: Path
    ) -> None:
        save_tiny(tmp_path / "beit", "beit")
        network = build(segformer)
        before = weights_hash(network)
        with pytest.raises(CheckpointError, match=r"beit"):
            load_weights(network, tmp_path / "beit")
        with pytest.raises(CheckpointError, match="expected a folder of Segformer"):
            load_weights(network, tmp_path)
        save_tiny(tmp_path / "other", "segformer", 9)
        with pytest.raises(CheckpointError, match="checkpoint has 9 classes, data set has 5"):
            load_weights(network, tmp_path / "other")
        assert weights_hash(network) == before

    def test_without_pretrained_weights_only_the_architecture_is_taken(
        self, segformer: Path
    ) -> None:
        (segformer / "model.safetensors").unlink()
        network = build(segformer, 7, pretrained=False)
        assert not network.pretrained_whole
        assert network(image()).main.shape[1] == 7
        with pytest.raises(NetworkError, match=r"segformer': Segformer\w+ cannot be built"):
            build(segformer)

    def test_a_pickle_with_code_is_not_run(self, segformer: Path) -> None:
        marker = segformer / "marker"
        (segformer / "model.safetensors").unlink()
        torch.save({"weight": Marker(marker)}, segformer / "pytorch_model.bin")
        torch.load(segformer / "pytorch_model.bin", weights_only=False)
        assert marker.exists()
        marker.unlink()
        with pytest.raises(NetworkError, match="cannot be built"):
            build(segformer)
        assert not marker.exists()

    def test_another_number_of_classes_names_both(self, segformer: Path) -> None:
        with pytest.raises(NetworkError) as caught:
            build(segformer, 8)
        assert "has 5 classes, the data set has 8" in str(caught.value)
        assert "ignore_mismatched_head: true" in str(caught.value)

    @pytest.mark.parametrize("family", ["segformer", "mask2former"])
    def test_a_head_of_other_classes_can_be_made_anew(self, family: str, tmp_path: Path) -> None:
        require_family(family)
        model = save_tiny(tmp_path, family)
        network = build(tmp_path, 8, ignore_mismatched_head=True).eval()
        assert not network.pretrained_whole
        assert network(image()).main.shape[1] == 8
        ours = network.state_dict()
        changed = {
            f"network.{name}"
            for name, tensor in model.state_dict().items()
            if not torch.equal(ours[f"network.{name}"], tensor)
        }
        assert changed == set(network.classifier_names)
        again = build(tmp_path, 8, ignore_mismatched_head=True)
        assert weights_hash(again) == weights_hash(network)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "code was run"))


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("preprocessor", "mean", "std"),
        [
            (None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, [0.5] * 3, [0.25] * 3),
            ({"image_mean": [0.5] * 3, "do_normalize": False}, [0.0] * 3, [1.0] * 3),
            (BGR, [0.0] * 3, [1.0] * 3),
        ],
        ids=["none", "own", "switched off", "of MobileViT"],
    )
    def test_mean_and_deviation_are_the_models(
        self, preprocessor: dict[str, Any] | None, mean: Any, std: Any, tmp_path: Path
    ) -> None:
        save_tiny(tmp_path, "segformer", preprocessor=preprocessor)
        network = build(tmp_path)
        torch.testing.assert_close(network.mean.flatten(), torch.tensor(mean))
        torch.testing.assert_close(network.std.flatten(), torch.tensor(std))
        identity = network_identity(TransformersConfig(model=str(tmp_path)))
        assert (identity["mean"], identity["std"]) == (mean, std)

    def test_a_processor_that_was_saved_whole_is_read(self, segformer: Path) -> None:
        content = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}
        (segformer / "processor_config.json").write_text(json.dumps(content))
        assert build(segformer).mean.flatten().tolist() == [0.5] * 3

    def test_the_configuration_goes_before_the_model(self, tmp_path: Path) -> None:
        save_tiny(tmp_path, "segformer", preprocessor={"image_mean": [0.5] * 3})
        network = build(tmp_path, mean=(0.1, 0.2, 0.3))
        torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))

    def test_channels_are_reversed_where_the_model_wants_it(self, tmp_path: Path) -> None:
        model = save_tiny(tmp_path, "mobilevit", preprocessor=BGR)
        network = build(tmp_path).eval()
        with torch.no_grad():
            theirs = model(image().flip(1)).logits
            torch.testing.assert_close(network(image()).main, theirs, rtol=1e-4, atol=1e-5)

    def test_another_range_than_0_to_1_has_to_be_named(self, tmp_path: Path) -> None:
        save_tiny(tmp_path, "segformer", preprocessor={"rescale_factor": 1.0})
        with pytest.raises(NetworkError, match=r"divides by 255, got rescale_factor 1.0; give"):
            build(tmp_path)
        build(tmp_path, mean=(0.5, 0.5, 0.5), std=(1 / 255,) * 3)


class TestIdentity:
    def test_a_folder_may_move_and_be_saved_by_another_version(self, segformer: Path) -> None:
        before = network_identity(TransformersConfig(model=str(segformer)))
        moved = segformer.rename(segformer.with_name("moved"))
        content = json.loads((moved / "config.json").read_text())
        content["transformers_version"] = "9.9"
        (moved / "config.json").write_text(json.dumps(dict(reversed(content.items()))))
        config = TransformersConfig(model=str(moved), pretrained=False)
        assert network_identity(config) == before

    def test_another_architecture_shows(self, segformer: Path) -> None:
        config = TransformersConfig(model=str(segformer))
        before = network_identity(config)
        content = json.loads((segformer / "config.json").read_text())
        content["num_attention_heads"] = [1, 1, 1, 1]
        (segformer / "config.json").write_text(json.dumps(content))
        assert network_identity(config) != before


class TestErrors:
    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NetworkError, match=r"none': there is no such folder"):
            build(tmp_path / "none")

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(NetworkError, match=r"its config.json cannot be read"):
            build(tmp_path)

    def test_a_name_that_cannot_be_downloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(NetworkError, match=r"name on the hub, which is downloaded on first"):
            build(Path("nobody/no-such-model"))

    def test_a_model_for_something_else(self, tmp_path: Path) -> None:
        import transformers

        transformers.BertConfig().save_pretrained(tmp_path)
        with pytest.raises(NetworkError, match="'bert' is no architecture for semantic segment"):
            build(tmp_path, pretrained=False)

    def test_oneformer_without_its_words(self, tmp_path: Path) -> None:
        require_family("oneformer")
        tiny_model("oneformer").save_pretrained(tmp_path)
        with pytest.raises(NetworkError, match="OneFormer is told its task in words"):
            build(tmp_path)

    def test_damaged_weights(self, segformer: Path) -> None:
        path = segformer / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(NetworkError, match="cannot be built"):
            build(segformer)

    def test_a_missing_package_names_the_line_that_installs_it(
        self, segformer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(NetworkError, match=r"pip install 'rdd-maps\[huggingface\]'"):
            build(segformer)
