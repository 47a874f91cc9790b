"""Training a teacher further, and fitting an auxiliary head to a finished network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rdd_pipeline.config import parse_config
from rdd_pipeline.errors import CheckpointError, ConfigError, NetworkError
from rdd_pipeline.networks import build_network, load_state, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_maps, run_teacher
from tiny import tiny_tree

QUIET = Reporter(quiet=True)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A checkpoint with one head, and a configuration that asks for two."""
    tree = tiny_tree(tmp_path)
    one_head = parse_config(tree).teacher.network.model_copy(update={"auxiliary": None})
    checkpoint = tmp_path / "plain.safetensors"
    save_weights(build_network(one_head, 8, seed=5), checkpoint)
    tree["teacher"]["checkpoint"] = str(checkpoint)
    return tree, checkpoint


def test_heads_only_leaves_the_network_as_it_was(
    plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    tree, checkpoint = plain
    tree["teacher"]["heads_only"] = True
    config = parse_config(tree)
    trained = run_teacher(config, QUIET)
    before, after = load_state(checkpoint), load_state(trained.weights)
    for name, tensor in before.items():  # weights and the statistics of batch norms
        assert torch.equal(tensor, after[name]), name
    added = after.keys() - before.keys()
    assert added
    assert all(name.startswith("auxiliary_head.") for name in added)
    start = build_network(config.teacher.network, 8, seed=config.seed).state_dict()
    assert all(not torch.equal(start[name], after[name]) for name in added)
    # The main head predicts what it did.
    tree["teacher"] |= {
        "heads_only": False,
        "training": None,
        "network": tree["teacher"]["network"],
    }
    tree["teacher"]["network"]["auxiliary"] = None
    tree |= {"name": "plain", "maps": tree["maps"] | {"discrepancy": "flip"}}
    untouched = run_teacher(parse_config(tree), QUIET)
    assert untouched.result["metrics"] == trained.result["metrics"]


def test_the_result_makes_maps_and_is_reused(plain: tuple[dict[str, Any], Path]) -> None:
    tree, _ = plain
    tree["teacher"]["heads_only"] = True
    config = parse_config(tree)
    trained = run_teacher(config, QUIET)
    assert not trained.reused
    assert run_teacher(config, QUIET).reused
    assert run_maps(config, trained, QUIET).images_built == 7
    whole = parse_config(tree | {"teacher": tree["teacher"] | {"heads_only": False}})
    assert not run_teacher(whole, QUIET).reused


def test_training_further_begins_with_the_checkpoint(
    plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    tree, checkpoint = plain
    tree["teacher"]["training"] |= {"lr": 1e-9, "iterations": 2}
    trained = run_teacher(parse_config(tree), QUIET)
    before, after = load_state(checkpoint), load_state(trained.weights)
    weights = [name for name in before if name.endswith("weight")]
    for name in weights:  # so small a rate moves nothing far
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_only_the_auxiliary_head_may_be_missing(
    plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    tree, checkpoint = plain
    state = load_state(checkpoint)
    state.pop("segmentation_head.0.bias")
    import safetensors.torch

    safetensors.torch.save_file(state, checkpoint)
    with pytest.raises(CheckpointError, match=r"1 missing: segmentation_head\.0\.bias"):
        run_teacher(parse_config(tree), QUIET)


def test_what_belongs_to_the_auxiliary_head() -> None:
    network = build_network(parse_config(tiny_tree(Path("unused"))).teacher.network, 8, seed=0)
    names = network.auxiliary_tensors()
    assert names == {n for n in network.state_dict() if n.startswith("auxiliary_head.")}
    assert any("running_mean" in name for name in names)
    network.train_auxiliary_head_alone()
    network.eval()
    network.train()
    training = {name for name, module in network.named_modules() if module.training}
    assert {name for name in training if name} == {
        name for name, _ in network.named_modules() if name.startswith("auxiliary_head")
    }


def test_heads_only_needs_a_finished_network_and_a_head(
    plain: tuple[dict[str, Any], Path],
) -> None:
    tree, _ = plain
    tree["teacher"] |= {"heads_only": True, "checkpoint": None}
    with pytest.raises(ConfigError, match="give both checkpoint and training for heads_only"):
        parse_config(tree)
    one_head = parse_config(tiny_tree(Path("unused"))).teacher.network.model_copy(
        update={"auxiliary": None}
    )
    with pytest.raises(NetworkError, match="no auxiliary head"):
        build_network(one_head, 8).train_auxiliary_head_alone()


def test_teach_as_a_user_types_it(plain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    tree, _ = plain
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-m", "rdd_flows.cli", "teach", str(file), "--heads-only", "--quiet"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "teacher: mIoU" in done.stdout
    assert (tmp_path / "tiny" / "teacher" / "weights.safetensors").exists()
