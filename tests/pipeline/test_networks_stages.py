"""Teachers and students of every type through the stages of a run, on a few synthetic images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_pipeline.comparison import network_label
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.errors import CheckpointError, ConfigError
from rdd_pipeline.export import load_trained
from rdd_pipeline.networks import build_network, load_state, state_hash, weights_hash
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from rdd_storage import MapReader
from tiny import tiny_tree
from tiny_models import save_tiny, tiny_model

CLASSES = 8  # of the built-in scenes


class Sayings(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def configuration(
    output: Path,
    teacher: dict[str, Any],
    student: dict[str, Any] | None = None,
    discrepancy: str = "flip",
) -> RunConfig:
    tree = tiny_tree(output)
    tree["data"] |= {"train_images": 3, "val_images": 1}
    tree["maps"]["discrepancy"] = discrepancy
    if teacher.get("training") == "short":
        teacher = teacher | {"training": tree["teacher"]["training"] | {"iterations": 2}}
    tree["teacher"] = teacher
    if student is not None:
        tree["student"]["network"] = student
    tree["student"]["training"]["iterations"] = 2
    return parse_config(tree)


def run(config: RunConfig, reporter: Reporter, student: str = "rdd") -> MapReader:
    """Teacher, maps and one student; returns the maps."""
    teacher = run_teacher(config, reporter)
    maps = run_maps(config, teacher, reporter)
    assert maps.images_built == 3
    [settings] = [s for s in config.students if s.name == student]
    trained = run_student(config, settings, maps.path, reporter)
    assert trained.result["iterations"] == 2
    for network in (teacher, trained):
        found = weights_hash(load_trained(network.weights.parent).network)
        assert found == state_hash(load_state(network.weights))
    assert 0.0 <= trained.result["metrics"]["miou"] <= 1.0
    again = run_maps(config, run_teacher(config, reporter), reporter)
    assert (again.images_built, again.fingerprint) == (0, maps.fingerprint)
    return MapReader(maps.path)


def test_a_torchvision_teacher_is_trained_and_teaches_a_torchvision_student(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        {
            "network": {
                "type": "torchvision",
                "architecture": "deeplabv3_mobilenet_v3_large",
                "auxiliary": True,
            },
            "training": "short",
        },
        {"type": "torchvision", "architecture": "lraspp_mobilenet_v3_large"},
        discrepancy="heads",
    )
    maps = run(config, Reporter())
    assert maps.schema.output_stride == 16
    assert "aux_hardness" in maps.arrays


def test_a_transformers_folder_teaches_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "segformer", CLASSES, shards="20KB")
    network = {"type": "transformers", "model": str(tmp_path / "model")}
    config = configuration(tmp_path, {"network": network})
    maps = run(config, Reporter())
    assert maps.schema.output_stride == 4
    assert maps.identity["teacher"]["weights"] == weights_hash(
        build_network(config.teacher.network, CLASSES)
    )

    # Other weights in the same folder are another teacher.
    tiny_model("segformer", CLASSES, seed=7).save_pretrained(tmp_path / "model")
    reporter = Sayings()
    assert not run_teacher(config, reporter).reused
    assert any("settings changed (weights" in line for line in reporter.said)


def test_a_transformers_teacher_with_two_heads_and_a_checkpoint_folder(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "upernet", CLASSES)
    save_tiny(tmp_path / "trained", "upernet", CLASSES, seed=7)
    network = {
        "type": "transformers",
        "model": str(tmp_path / "model"),
        "pretrained": False,
        "auxiliary": True,
    }
    teacher = {"network": network, "checkpoint": str(tmp_path / "trained")}
    student = {"type": "custom", "factory": "tiny_factories:two_heads", "auxiliary": True}
    config = configuration(tmp_path, teacher, student, discrepancy="heads")
    maps = run(config, Reporter())
    whole = build_network(
        config.teacher.network.model_copy(
            update={"model": str(tmp_path / "trained"), "pretrained": True}
        ),
        CLASSES,
    )
    assert maps.identity["teacher"]["weights"] == weights_hash(whole)


def test_a_checkpoint_that_fits_in_part_is_loaded_only_when_asked_to(tmp_path: Path) -> None:
    network = {"type": "custom", "factory": "tiny_factories:two_heads"}
    config = configuration(tmp_path, {"network": network, "training": "short"})
    state = build_network(config.teacher.network, CLASSES, seed=9).state_dict()
    del state["network.deep.bias"]
    torch.save(state, tmp_path / "part.pth")

    teacher = {"network": network, "checkpoint": str(tmp_path / "part.pth")}
    with pytest.raises(CheckpointError, match=r"1 missing: network\.deep\.bias"):
        run_teacher(configuration(tmp_path / "strict", teacher), Reporter())

    reporter = Sayings()
    lenient = configuration(tmp_path / "lenient", teacher | {"strict": False})
    trained = run_teacher(lenient, reporter)
    [said] = [line for line in reporter.said if "was loaded" in line]
    assert "1 missing: network.deep.bias" in said
    loaded = load_state(trained.weights)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert run_teacher(lenient, reporter).reused
    assert state_hash(load_state(trained.weights)) == state_hash(loaded)


def test_a_teacher_whose_head_is_new_has_to_be_trained(tmp_path: Path) -> None:
    model = tiny_model("segformer", CLASSES)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("decode_head")}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    network = {"type": "transformers", "model": str(tmp_path / "model")}
    with pytest.raises(ConfigError, match="not all of its layers have pretrained weights of these"):
        run_teacher(configuration(tmp_path, {"network": network}), Reporter())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"network": {"type": "torchvision", "architecture": "fcn_resnet50"}},
            "give checkpoint .* or a network with pretrained weights of all its layers",
        ),
        (
            {
                "network": {
                    "type": "transformers",
                    "model": "x",
                    "ignore_mismatched_head": True,
                }
            },
            "teacher: give checkpoint",
        ),
        (
            {"network": {"type": "transformers", "model": "x"}, "strict": False},
            "teacher: give checkpoint too, which strict and checkpoint_layout are about",
        ),
        (
            {"network": {"type": "torchvison", "architecture": "fcn_resnet50"}},
            "teacher.network: expected keys and values with type: smp, torchvision, transformers",
        ),
        (
            {"network": {"type": "torchvision", "architecture": "x", "encoder": "resnet18"}},
            r"teacher.network.encoder: unknown key; .*architecture",
        ),
        (
            {"network": {"architecture": "FPN", "encoder": "resnet18", "weights": "V1"}},
            "teacher.network.weights: unknown key; did you mean 'encoder_weights'",
        ),
    ],
)
def test_what_a_configuration_gets_wrong_is_named(
    teacher: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tree = tiny_tree(tmp_path) | {"teacher": teacher}
    tree["maps"]["discrepancy"] = "flip"
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_every_type_has_a_name_in_the_report() -> None:
    assert network_label({"architecture": "FPN", "encoder": "resnet18"}) == "FPN resnet18"
    assert network_label({"architecture": "fcn_resnet50", "type": "torchvision"}) == "fcn_resnet50"
    assert network_label({"model": "nvidia/segformer-b0"}) == "nvidia/segformer-b0"
    assert network_label({"factory": "mine:build", "options": {}}) == "mine:build"
