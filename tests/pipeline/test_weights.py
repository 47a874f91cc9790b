"""Weights: round trips, the hash, and checkpoints that must be refused."""

from __future__ import annotations

import hashlib
import io
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_pipeline.config import AuxiliaryHead, SmpConfig
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    load_state,
    load_weights,
    save_weights,
    state_hash,
    weights_hash,
)

CONFIG = SmpConfig(
    architecture="PSPNet",
    encoder="tu-mobilenetv3_small_050",
    auxiliary=AuxiliaryHead(),
    options={"psp_out_channels": 16},
)


def build(seed: int = 0, num_classes: int = 5, config: SmpConfig = CONFIG) -> SegmentationNetwork:
    return build_network(config, num_classes, seed)


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    """A network with running statistics of its own; not to be changed."""
    network = build()
    with torch.no_grad():
        network(torch.rand(2, 3, 32, 32))
    return network.eval()


@pytest.fixture(scope="module")
def safetensors_file(network: SegmentationNetwork, tmp_path_factory: Any) -> Path:
    path = Path(tmp_path_factory.mktemp("weights")) / "network.safetensors"
    save_weights(network, path)
    return path


class TestRoundTrip:
    def test_safetensors(self, network: SegmentationNetwork, safetensors_file: Path) -> None:
        other = build(seed=1).eval()
        x = torch.rand(1, 3, 45, 61)
        with torch.no_grad():
            assert not torch.equal(other(x).main, network(x).main)
            load_weights(other, safetensors_file)
            assert torch.equal(other(x).main, network(x).main)
            assert torch.equal(other(x).aux, network(x).aux)
        assert weights_hash(other) == weights_hash(network)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3, "args": {"lr": 0.1}},
            lambda state: {"model": state, "optimizer": {"state": {}}},
            lambda state: {"module." + name: tensor for name, tensor in state.items()},
            lambda state: {
                "model": {"module._orig_mod." + name: tensor for name, tensor in state.items()}
            },
        ],
        ids=["plain", "state_dict", "model", "data-parallel", "compiled"],
    )
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_checkpoints_of_torch(
        self,
        network: SegmentationNetwork,
        tmp_path: Path,
        wrap: Callable[[dict[str, torch.Tensor]], dict[str, Any]],
        zipped: bool,
    ) -> None:
        path = tmp_path / "network.pth"
        torch.save(wrap(dict(network.state_dict())), path, _use_new_zipfile_serialization=zipped)
        other = build(seed=1)
        load_weights(other, path)
        assert weights_hash(other) == weights_hash(network)

    def test_content_not_name_decides_the_format(
        self, network: SegmentationNetwork, safetensors_file: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "renamed.pth"
        path.write_bytes(safetensors_file.read_bytes())
        assert state_hash(load_state(path)) == weights_hash(network)

    def test_a_checkpoint_of_torch_named_safetensors_says_so(self, tmp_path: Path) -> None:
        path = tmp_path / "wrong.safetensors"
        torch.save({"weight": torch.zeros(1)}, tmp_path / "wrong.pth")
        (tmp_path / "wrong.pth").rename(path)
        with pytest.raises(CheckpointError, match=r"wrong\.safetensors: .*rename it to \.pth"):
            load_state(path)

    def test_checkpoint_of_the_plain_smp_model_fits(self, tmp_path: Path) -> None:
        import segmentation_models_pytorch as smp

        plain = smp.PSPNet(CONFIG.encoder, encoder_weights=None, classes=5, psp_out_channels=16)
        torch.save(plain.state_dict(), tmp_path / "plain.pth")
        network = build(config=CONFIG.model_copy(update={"auxiliary": None}))
        load_weights(network, tmp_path / "plain.pth")
        assert weights_hash(network) == weights_hash(plain)

    def test_tensors_that_share_memory_or_are_strided_are_written(self, tmp_path: Path) -> None:
        module = torch.nn.Linear(4, 4, bias=False)
        twin = torch.nn.Linear(4, 4, bias=False)
        twin.weight = module.weight
        both = torch.nn.Sequential(module, twin)
        both.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        save_weights(both, tmp_path / "new" / "both.safetensors")
        assert state_hash(load_state(tmp_path / "new" / "both.safetensors")) == weights_hash(both)

    def test_equal_weights_give_equal_files(
        self, network: SegmentationNetwork, safetensors_file: Path, tmp_path: Path
    ) -> None:
        save_weights(network, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == safetensors_file.read_bytes()


class TestAtomicWriting:
    def test_a_write_that_fails_half_way_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "network.safetensors"
        save_weights(build(seed=0), path)
        old = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"network.safetensors: .*cannot be written"):
                save_weights(build(seed=1), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"file/weights.safetensors: .*cannot be written"):
            save_weights(build(), tmp_path / "file" / "weights.safetensors")


STATE = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


class TestHash:
    def test_definition(self) -> None:
        digest = hashlib.sha256()
        digest.update(b"a\0int64\0[]\0" + struct.pack("<q", 7))
        digest.update(b"b\0float32\0[2, 3]\0" + struct.pack("<6f", 0, 1, 2, 3, 4, 5))
        digest.update(b"empty\0float32\0[0, 4]\0")
        assert state_hash(STATE) == digest.hexdigest()

    def test_independent_of_order_and_memory_layout(self) -> None:
        reordered = dict(reversed(STATE.items()))
        reordered["b"] = STATE["b"].t().contiguous().t()
        assert not reordered["b"].is_contiguous()
        assert state_hash(reordered) == state_hash(STATE)

    @pytest.mark.parametrize(
        "change",
        [
            {"b": STATE["b"].to(torch.bfloat16)},
            {"b": STATE["b"].view(3, 2)},
            {"b": STATE["b"] + torch.eye(2, 3) * 1e-6},
            {"a": torch.tensor(7, dtype=torch.int32)},
            {"empty": torch.zeros(4, 0)},
            {"c": torch.zeros(1)},
        ],
        ids=["dtype", "shape", "value", "integer-dtype", "empty-shape", "name"],
    )
    def test_any_change_shows(self, change: dict[str, torch.Tensor]) -> None:
        assert state_hash({**STATE, **change}) != state_hash(STATE)

    def test_channels_last_and_mode_do_not_change_it(self, network: SegmentationNetwork) -> None:
        other = build(seed=1)
        other.load_state_dict(network.state_dict())
        other = other.to(memory_format=torch.channels_last).train()
        assert weights_hash(other) == weights_hash(network)

    def test_running_statistics_count(self, network: SegmentationNetwork) -> None:
        assert weights_hash(build()) != weights_hash(network)  # same seed, statistics moved on


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "code was run"))


class TestRefused:
    @pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.safetensors"])
    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    def test_a_checkpoint_with_code_is_not_run(self, tmp_path: Path, name: str, form: str) -> None:
        marker = tmp_path / "marker"
        path = tmp_path / name
        content = {"weight": torch.zeros(1), "extra": Marker(marker)}
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
            pickle.loads(path.read_bytes())
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
            torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
        assert marker.exists()  # the file is as hostile as it is meant to be
        marker.unlink()

        reason = "named .safetensors" if name.endswith("safetensors") else "refused"
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            load_state(path)
        assert not marker.exists()

    @pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
    @pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
    def test_a_truncated_file_is_named(
        self, network: SegmentationNetwork, tmp_path: Path, form: str, kept: float
    ) -> None:
        path = tmp_path / "cut.weights"
        if form == "safetensors":
            save_weights(network, path)
        else:
            torch.save(network.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        before = weights_hash(network)
        with pytest.raises(CheckpointError, match=r"cut\.weights: .*damaged"):
            load_weights(network, path)
        assert weights_hash(network) == before

    @pytest.mark.parametrize(
        "content",
        [b"\x00" * 64, b"\xff" * 8 + b"{" + b"\xff" * 100, b"PK\x03\x04" + b"\x00" * 99, b"hello"],
    )
    def test_garbage_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "garbage.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"garbage\.pth: .*damaged"):
            load_state(path)

    def test_a_zip_of_something_else_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "other.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
        with pytest.raises(CheckpointError, match=r"other\.pth: damaged, truncated or no"):
            load_state(path)

    def test_a_missing_file_or_a_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"none\.pth: cannot be read \(No such file"):
            load_state(tmp_path / "none.pth")
        with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory"):
            load_state(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([torch.zeros(1)], "expected a state dict, got list"),
            ({}, "expected a state dict"),
            ({"epoch": 3, "weight": torch.zeros(1)}, "these are no tensors: epoch"),
        ],
    )
    def test_a_file_without_a_state_dict_says_what_it_holds(
        self, tmp_path: Path, content: Any, message: str
    ) -> None:
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(CheckpointError, match=message):
            load_state(tmp_path / "odd.pth")


class TestMismatch:
    def test_another_number_of_classes_is_named(self, tmp_path: Path) -> None:
        save_weights(build(num_classes=19), tmp_path / "city.safetensors")
        network = build(num_classes=11)
        with pytest.raises(CheckpointError, match="checkpoint has 19 classes, data set has 11"):
            load_weights(network, tmp_path / "city.safetensors")

    def test_renamed_tensors_are_listed_with_their_nearest(
        self, network: SegmentationNetwork, tmp_path: Path
    ) -> None:
        state = {
            name.replace("encoder.", "backbone.", 1): tensor
            for name, tensor in network.state_dict().items()
        }
        renamed = sum(name.startswith("backbone.") for name in state)
        torch.save(state, tmp_path / "renamed.pth")
        with pytest.raises(CheckpointError) as caught:
            load_weights(build(), tmp_path / "renamed.pth")
        message = str(caught.value)
        assert f"{renamed} missing: encoder." in message
        assert f"{renamed} unexpected: backbone." in message
        assert (
            "encoder.model.conv_stem.weight (nearest in the checkpoint: "
            "backbone.model.conv_stem.weight)" in message
        )
        assert message.count(f"and {renamed - 10} more") == 2
        assert message.count("nearest in the checkpoint") == 10

    def test_other_shapes_are_listed_and_nothing_is_loaded(self, tmp_path: Path) -> None:
        wide = CONFIG.model_copy(update={"options": {"psp_out_channels": 24}})
        save_weights(build(config=wide), tmp_path / "wide.safetensors")
        network = build(seed=1)
        before = weights_hash(network)
        with pytest.raises(CheckpointError) as caught:
            load_weights(network, tmp_path / "wide.safetensors")
        assert "of another shape: " in str(caught.value)
        assert (
            "segmentation_head.0.weight (checkpoint [5, 24, 3, 3], network [5, 16, 3, 3])"
            in str(caught.value)
        )
        assert "missing" not in str(caught.value)
        assert weights_hash(network) == before

    def test_a_checkpoint_without_auxiliary_head_is_refused_with_the_reason(
        self, tmp_path: Path
    ) -> None:
        plain = CONFIG.model_copy(update={"auxiliary": None})
        save_weights(build(config=plain), tmp_path / "plain.safetensors")
        with pytest.raises(CheckpointError, match="It has no auxiliary head: train one"):
            load_weights(build(), tmp_path / "plain.safetensors")
        save_weights(build(), tmp_path / "both.safetensors")
        with pytest.raises(CheckpointError, match="It has an auxiliary head: add"):
            load_weights(build(config=plain), tmp_path / "both.safetensors")
