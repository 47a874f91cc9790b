"""What needs a GPU: run by `make test-gpu`, and by nothing else.

The CPU's results are the reference. With `--device cpu` the tests show that they are sound
themselves; what is particular to a GPU is then not looked at.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from rdd_pipeline import _fused
from rdd_pipeline.config import Method, RunConfig, StudentConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.difficulty import hard_threshold
from rdd_pipeline.errors import NonFiniteError
from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.live_teacher import LiveTeacher
from rdd_pipeline.loader import make_loader
from rdd_pipeline.losses import KDLoss, LossOutput, RDDLoss, SupervisedLoss
from rdd_pipeline.networks import SegLogits, build_network, load_state, load_weights
from rdd_pipeline.prefetch import DevicePrefetcher
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from rdd_pipeline.student import PreparedStudent, prepare_student
from rdd_pipeline.trainer import TrainingResult, train
from rdd_pipeline.training_log import Averages
from rdd_storage import MapReader
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
CPU = torch.device("cpu")
B, C, CROP, GRID = 3, 8, (96, 160), (13, 21)
CODES = {8: torch.uint8, 16: torch.uint16}


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=rtol, atol=atol)


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def stored_batch(bits: int) -> dict[str, Tensor]:
    """As the stream gives it, with all maps."""
    random = torch.Generator().manual_seed(bits)
    last = {8: 251, 16: 64033}[bits]
    label = torch.randint(0, C, (B, *CROP), generator=random)
    ignored = torch.rand(B, *CROP, generator=random) < 0.1
    codes = torch.randint(0, last, (2, B, *CROP), generator=random)
    codes[:, ignored] = 2**bits - 1
    rows, columns = (
        torch.rand(B, n, generator=random, dtype=torch.float64) * (size - 1)
        for n, size in zip(CROP, (15, 23), strict=True)
    )
    rows[:, -8:] = -1.0  # padding
    return {
        "label": label.masked_fill(ignored, 255).to(torch.uint8),
        "weight_field": torch.rand(B, 15, 23, generator=random),
        "weight_rows": rows,
        "weight_columns": columns,
        "true_prob_code": codes[0].to(CODES[bits]),
        "aux_true_prob_code": codes[1].to(CODES[bits]),
        "logits": torch.randn(B, C, *GRID, generator=random).half(),
        "logits_valid": torch.rand(B, *GRID, generator=random) < 0.9,
    }


LOSSES = {
    "supervised": lambda: SupervisedLoss(),
    "kd": lambda: KDLoss(temperature=2.0),
    "rdd": lambda: RDDLoss(iterations=10, switch=5, min_kept=0.3),
    "rdd, class weights": lambda: RDDLoss(
        iterations=10, switch=5, blend="linear", class_weight=torch.linspace(0.5, 2.0, C)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_from_stored_maps_agree(
    device: torch.device, name: str, bits: int, dtype: torch.dtype
) -> None:
    batch = stored_batch(bits)
    logits = [torch.randn(B, C, *GRID, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]

    def computed(on: torch.device, iteration: int) -> tuple[LossOutput, list[Tensor]]:
        leaves = [part.to(on, dtype).requires_grad_() for part in logits]
        here = moved(batch, on)
        result: LossOutput = LOSSES[name]().to(on)(
            SegLogits(*leaves), here["label"], SignalDecoder(bits)(here), iteration
        )
        result.total.backward()
        return result, [leaf.grad for leaf in leaves if leaf.grad is not None]

    for iteration in (0, 7):
        found, gradients = computed(device, iteration)
        expected, wanted = computed(CPU, iteration)
        assert found.total.device.type == device.type
        close(found.total, expected.total)
        assert found.terms.keys() == expected.terms.keys()
        for term in expected.terms:
            close(found.terms[term], expected.terms[term])
        # A pixel at the threshold may fall on either side.
        if expected.relative is not None and found.relative is not None:
            assert (found.relative.cpu() != expected.relative).float().mean() < 1e-4
        coarse = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
        for gradient, reference in zip(gradients, wanted, strict=True):
            close(gradient, reference, **coarse)


@pytest.mark.parametrize("kept", [0, 1, 1000, 0.5, 10**9])
def test_hard_threshold_is_the_same_number(device: torch.device, kept: int | float) -> None:
    prob = torch.rand(B, *CROP, generator=torch.Generator().manual_seed(0)).sqrt()
    prob[:, :20] = 0.9  # ties
    valid = prob > 0.1
    found = hard_threshold(prob.to(device), valid.to(device), 0.7, kept)
    assert torch.equal(found.cpu(), hard_threshold(prob, valid, 0.7, kept))


def test_bands_of_the_cross_entropy_agree_with_the_whole(device: torch.device) -> None:
    logits = torch.randn(2, 19, 65, 129, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 19, (2, 512, 1024), generator=torch.Generator().manual_seed(1))
    label[:, :50] = 255

    def computed(compute: Any, on: torch.device) -> tuple[Tensor, Tensor]:
        leaf = logits.to(on).requires_grad_()
        loss = compute(leaf, label.to(on, torch.uint8), 255)
        loss.mean().backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    loss, gradient = computed(_fused.direct_cross_entropy, CPU)
    for compute in (_fused.direct_cross_entropy, _fused.banded_cross_entropy):
        found, its_gradient = computed(compute, device)
        close(found, loss, atol=1e-4)
        close(its_gradient, gradient, atol=1e-7)


def test_batches_arrive_whole_beside_a_busy_device(device: torch.device) -> None:
    batches = [
        {"image": torch.full((4, 3, 256, 256), i % 251, dtype=torch.uint8), "k": torch.tensor(i)}
        for i in range(60)
    ]
    pinned = [
        {name: t.pin_memory() if device.type == "cuda" else t for name, t in batch.items()}
        for batch in batches
    ]
    busy = torch.rand(1500, 1500, device=device)
    sums = []
    with DevicePrefetcher(pinned, device) as prefetcher:
        for _ in pinned:
            batch = prefetcher.take()
            assert batch["image"].device.type == device.type
            busy = (busy @ busy).clamp_(-1.0, 1.0)
            sums.append((batch["k"], batch["image"].double().sum()))
            del batch  # its memory is free for the next copy while the sum may still wait
    expected = [(i, float(b["image"].double().sum())) for i, b in enumerate(batches)]
    assert [(int(k), float(total)) for k, total in sums] == expected


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], TrainedNetwork, str]:
    """A teacher trained on the CPU, its maps built there, and the configuration."""
    tree = tiny_tree(tmp_path_factory.mktemp("built"))
    # Slow learning, so that small differences stay small; no dropout, which devices draw each in
    # their own way.
    for network in (tree["teacher"]["network"], tree["student"]["network"]):
        network["auxiliary"]["dropout"] = network["options"]["decoder_dropout"] = 0.0
    tree["student"]["training"] |= {"iterations": 12, "log_every": 1, "lr": 0.002}
    config = parse_config(tree)
    teacher = run_teacher(config, QUIET)
    return tree, teacher, run_maps(config, teacher, QUIET).path


def changed(tree: dict[str, Any], output: Path, device: torch.device, **training: Any) -> RunConfig:
    tree = copy.deepcopy(tree) | {"output": str(output), "device": device.type}
    tree["student"]["training"] |= training
    return parse_config(tree)


def test_maps_of_the_device_are_those_of_the_cpu(
    device: torch.device, built: tuple[dict[str, Any], TrainedNetwork, str], tmp_path: Path
) -> None:
    tree, teacher, path = built
    found = MapReader(run_maps(changed(tree, tmp_path, device), teacher, QUIET).path)
    expected = MapReader(path)
    for image_id in expected.image_ids:
        mine, reference = (
            reader.read("hardness", image_id).astype(int) for reader in (found, expected)
        )
        assert np.abs(mine - reference).max() <= 2
        assert (mine != reference).mean() < 0.01
        np.testing.assert_allclose(
            found.read("discrepancy", image_id).astype(float),
            expected.read("discrepancy", image_id).astype(float),
            rtol=1e-2,
            atol=1e-3,
        )


@pytest.mark.parametrize("method", sorted(get_args(Method)))
def test_every_method_agrees_with_the_teacher_in_memory(
    device: torch.device,
    built: tuple[dict[str, Any], TrainedNetwork, str],
    tmp_path: Path,
    method: str,
) -> None:
    tree, teacher, _ = built
    config = changed(tree, tmp_path, device)
    dataset = build_dataset(config.data, "train")
    stages = {"rdd": {"switch": 0.5, "min_kept": 0.05}} if method == "rdd" else {}
    student = StudentConfig.model_validate(
        {"name": "s", "method": method, "teacher": "online"} | stages
    )

    def computed(on: torch.device) -> list[LossOutput]:
        torch.manual_seed(0)
        known = None
        if student.needs_teacher:
            known = build_network(config.teacher.network, dataset.num_classes)
            load_weights(known, teacher.weights)
        ready: PreparedStudent = prepare_student(
            config, student, dataset, reader=None, teacher=known
        )
        if isinstance(ready.signals, LiveTeacher):
            ready.signals.network.to(on)
        model = ready.model.to(on).train()
        loss: Any = ready.loss
        loss.to(on)
        results = []
        for iteration, batch in zip((0, 7), make_loader(ready.stream, batch_size=4), strict=False):
            here = moved(batch, on)
            result = loss(model(here["image"]), here["label"], ready.signals(here), iteration)
            result.total.backward()
            results.append(result)
        return results

    for found, expected in zip(computed(device), computed(CPU), strict=True):
        close(found.total, expected.total, rtol=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"precision": "bf16", "channels_last": True},
        {"precision": "fp16", "gradient_clip": 1.0},
        {"ema": 0.9, "accumulate": 2},
        {"workers": 2, "evaluate_every": 5},
        {"compile": True},
    ],
    ids=str,
)
def test_training_goes_as_on_the_cpu(
    device: torch.device,
    built: tuple[dict[str, Any], TrainedNetwork, str],
    tmp_path: Path,
    training: dict[str, Any],
) -> None:
    tree, _, path = built
    config = changed(tree, tmp_path / "device", device, **training)
    found = run_student(config, config.students[2], path, QUIET).result
    same = {k: v for k, v in training.items() if k in ("accumulate", "ema", "gradient_clip")}
    reference = changed(tree, tmp_path / "cpu", CPU, **same)
    expected = run_student(reference, reference.students[2], path, QUIET).result
    losses, wanted = ([entry["loss"] for entry in r["history"]] for r in (found, expected))
    assert all(math.isfinite(loss) for loss in losses)
    # Pixels near a threshold come and go with the last digits: later steps drift apart.
    tolerance = 0.02 if training.get("precision", "no") == "no" else 0.1
    np.testing.assert_allclose(losses[:3], wanted[:3], rtol=tolerance)
    assert (found["peak_device_bytes"] is not None) == (device.type == "cuda")


def trained(
    config: RunConfig, path: str, output: Path, loss: Any = None, evaluate: Any = None
) -> TrainingResult:
    """The student ``rdd`` by the trainer alone."""
    student = config.students[2]
    dataset = build_dataset(config.data, "train")
    ready = prepare_student(config, student, dataset, reader=MapReader(path), teacher=None)
    return train(
        ready.model,
        loss(ready.loss) if loss else ready.loss,
        ready.stream,
        signals=ready.signals,
        config=config.student_training(student),
        seed=0,
        directory=output,
        evaluate=evaluate or (lambda network, on: Metrics.from_confusion(np.eye(2), ("a", "b"))),
        reporter=QUIET,
        name="s",
        device=config.device,
    )


def test_an_interrupted_training_goes_on(
    device: torch.device, built: tuple[dict[str, Any], TrainedNetwork, str], tmp_path: Path
) -> None:
    tree, _, path = built
    config = changed(tree, tmp_path, device, evaluate_every=6, precision="fp16")

    def dies(network: Any, on: torch.device) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(config, path, tmp_path / "s", evaluate=dies)
    resumed = trained(config, path, tmp_path / "s")
    whole = trained(config, path, tmp_path / "whole")
    losses, wanted = ([entry["loss"] for entry in r.history] for r in (resumed, whole))
    assert len(losses) == 12
    assert all(math.isfinite(loss) for loss in losses)
    np.testing.assert_allclose(losses[:3], wanted[:3], rtol=0.05)
    weights, expected = (load_state(tmp_path / n / "weights.safetensors") for n in ("s", "whole"))
    for name in expected:
        if expected[name].is_floating_point():  # weights move little in twelve slow steps
            close(weights[name], expected[name], rtol=0.5, atol=0.1)
        else:
            assert torch.equal(weights[name], expected[name]), name  # batches that were counted


def test_a_loss_that_is_no_number_stops_with_its_batch(
    device: torch.device, built: tuple[dict[str, Any], TrainedNetwork, str], tmp_path: Path
) -> None:
    tree, _, path = built

    def broken(loss: Any) -> Any:
        def changed_loss(outputs: Any, target: Any, teacher: Any, iteration: int) -> LossOutput:
            result: LossOutput = loss(outputs, target, teacher, iteration)
            factor = math.nan if iteration == 3 else 1.0
            return replace(result, total=result.total * factor)

        return changed_loss

    with pytest.raises(NonFiniteError, match="nan at iteration 4;"):
        trained(changed(tree, tmp_path, device), path, tmp_path / "s", loss=broken)
    assert len(list((tmp_path / "s" / "nonfinite").glob("iteration-00000004-*"))) == 2


def test_no_step_waits_for_the_device(
    device: torch.device, built: tuple[dict[str, Any], TrainedNetwork, str], tmp_path: Path
) -> None:
    tree, _, path = built
    config = changed(tree, tmp_path, device)
    ready = prepare_student(
        config,
        config.students[2],
        build_dataset(config.data, "train"),
        reader=MapReader(path),
        teacher=None,
    )
    model = ready.model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    averages, seen = Averages(), 0
    with DevicePrefetcher(make_loader(ready.stream, batch_size=2), device) as batches:
        for iteration in range(12):
            batch = batches.take()
            if device.type == "cuda" and iteration % 6:  # tables go there in the first ones
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.zero_grad(set_to_none=True)
                outputs = model(batch["image"])
                result = ready.loss(outputs, batch["label"], ready.signals(batch), iteration)
                averages.add(result)
                result.total.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            seen += 1
    assert seen == 12
    assert averages.take()["loss"] > 0.0


def test_signals_say_on_which_device_they_are(device: torch.device) -> None:
    signals = SignalDecoder(8)(moved(stored_batch(8), device))
    given = [getattr(signals, f.name) for f in fields(signals)]
    assert {t.device.type for t in given if isinstance(t, Tensor)} == {device.type}


def test_the_commands_use_the_device(
    device: torch.device, built: tuple[dict[str, Any], TrainedNetwork, str], tmp_path: Path
) -> None:
    """The whole way, students side by side, and a process for each of two GPUs."""
    tree, _, _ = built
    tree = copy.deepcopy(tree) | {"output": str(tmp_path), "device": device.type}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect")}
    rdd, torchrun = (str(Path(sys.executable).with_name(name)) for name in ("rdd", "torchrun"))

    def run(*command: str) -> None:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr

    run(rdd, "run", str(config))
    assert (tmp_path / "tiny" / "report.html").exists()
    grid = "grid={methods: [supervised, rdd], seeds: [0, 1]}"
    side_by_side = ("--parallel", "auto" if device.type == "cuda" else "1")
    run(rdd, "students", str(config), *side_by_side, "--set", "students=[]", "--set", grid)
    processes = str(min(2, torch.cuda.device_count()) if device.type == "cuda" else 2)
    run(
        torchrun, "--nproc-per-node", processes, "--no-python", rdd, "train", str(config),
        "--student", "rdd", "--set", f"output={tmp_path / 'several'}",
        "--set", f"maps.root={tmp_path / 'tiny' / 'maps'}",
    )  # fmt: skip
    assert (tmp_path / "several" / "tiny" / "students" / "rdd" / "result.json").exists()
