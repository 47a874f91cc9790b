"""Networks that a user's function builds: what is accepted, and what is said of the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_factories
from rdd_pipeline.config import CustomConfig
from rdd_pipeline.errors import NetworkError
from rdd_pipeline.networks import SegmentationNetwork, build_network, load_weights


def build(function: str = "two_heads", **settings: Any) -> SegmentationNetwork:
    config = CustomConfig(factory=f"tiny_factories:{function}", **settings)
    return build_network(config, 5, seed=0)


@pytest.mark.parametrize("form", ["tuple", "dictionary", "attributes"])
def test_heads_are_found_in_every_form(form: str) -> None:
    network = (
        build("named", auxiliary=True)
        if form == "attributes"
        else build(auxiliary=True, options={"form": form})
    ).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        main, aux = network(x)
        expected = tiny_factories.TwoHeads.forward(
            network.get_submodule("network"), (x - network.mean) / network.std
        )
    main_there, aux_there = expected.values() if isinstance(expected, dict) else expected
    assert torch.equal(main, main_there)
    assert network.output_stride == 8
    assert aux is not None
    assert aux.shape == main.shape
    assert aux_there.shape[-1] == 2 * aux.shape[-1]


def test_auxiliary_logits_are_left_alone_unless_asked_for() -> None:
    network = build()
    assert network(torch.rand(1, 3, 64, 64)).aux is None
    assert network.unused_parameters == {"network.aux_head.weight", "network.aux_head.bias"}


def test_options_reach_the_function() -> None:
    assert build(options={"width": 12}).encoder_module[0].out_channels == 12  # type: ignore[index]


def test_checkpoint_of_the_plain_module_fits(tmp_path: Path) -> None:
    module = tiny_factories.two_heads(5)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "plain.pth")
    network = build()
    assert load_weights(network, tmp_path / "plain.pth") == []
    ours = network.get_submodule("network").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in module.state_dict().items())


def test_a_network_that_is_said_to_be_trained_may_teach() -> None:
    assert build(pretrained=True).pretrained_whole
    assert not build().pretrained_whole


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        ("no_such_module:f", {}, "there is no module 'no_such_module'; install it, or add its"),
        ("tiny_factories.sub:f", {}, "cannot be imported|there is no module"),
        ("tiny_factories:tow_heads", {}, "there is no 'tow_heads'; did you mean two_heads"),
        ("tiny_factories:__doc__", {}, "expected a function, got str"),
        ("tiny_factories:no_network", {}, "expected a torch.nn.Module, got str"),
        ("tiny_factories:two_heads", {"options": {"depth": 3}}, r"options \['depth'\] .*TypeError"),
        (
            "tiny_factories:one_class_too_many",
            {},
            r"expected main logits \(B, 5, h, w\), .*got shape \(2, 6, 8, 8\)",
        ),
        (
            "tiny_factories:nothing",
            {},
            r"expected a tensor of logits.*got dict with \['features'\]",
        ),
        (
            "tiny_factories:two_heads",
            {"options": {"form": "tensor"}, "auxiliary": True},
            "network.auxiliary: the network returns no auxiliary logits",
        ),
    ],
)
def test_what_cannot_be_used_is_named(factory: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        build_network(CustomConfig(factory=factory, **settings), 5)
    assert str(caught.value).startswith(f"network.factory '{factory}': ") or re.match(
        r"network\.", str(caught.value)
    )


def test_a_module_whose_import_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "stumbles.py").write_text("raise RuntimeError('no device')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetworkError, match="No module named 'a_package_that_is_not_there'"):
        build_network(CustomConfig(factory="needs_more:f"), 5)
    with pytest.raises(NetworkError, match=r"cannot be imported \(RuntimeError: no device\)"):
        build_network(CustomConfig(factory="stumbles:f"), 5)


@pytest.mark.parametrize("factory", ["module", "module:", ":function", "a b:c", "module/x:f"])
def test_factory_is_written_as_module_and_function(factory: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        CustomConfig(factory=factory)
