"""Training steps on a GPU that does not exist: prints what each of them asked of it, as JSON.

Tensors that claim to be on an accelerator, and have shapes and dtypes alone, go through the code as
it is. To mix them with tensors of the host is an error, as on a real device. So is to ask for a
value, or for a shape that depends on values: on a real device each of these waits for all that it
still has to do. Copies between host and device are looked for among the operations.

A program of its own: a process that has such a device has it for good.

    python pretended_gpu.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from rdd_pipeline import _fused
from rdd_pipeline.config import Method, StudentConfig
from rdd_pipeline.data import build_dataset
from rdd_pipeline.live_teacher import LiveTeacher
from rdd_pipeline.losses import TeacherSignals
from rdd_pipeline.networks import build_network
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.student import PreparedStudent, prepare_student
from rdd_pipeline.training_log import Averages
from tiny import tiny_config

GPU = torch.device("privateuseone:0")
CROP = (32, 64)
CODES = {8: torch.uint8, 16: torch.uint16}
METHODS = sorted(get_args(Method))

Signals = Callable[[Mapping[str, Tensor]], TeacherSignals]


class Backend(_DummyBackendModule):
    """What torch asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """For autocast, here only ever switched off."""
        return [torch.bfloat16]


class Operations(TorchDispatchMode):
    """Collects the operations, and those of them that move tensors between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.moves: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        # A single number of the host travels with the launch.
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
            self.moves.append(str(func))
        return result


def to_gpu(module: nn.Module) -> None:
    """Replace parameters and buffers by ones without values there."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                    parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, False) if parameter else moved


def batch(grid: tuple[int, int], bits: int | None) -> dict[str, Tensor]:
    """Two samples as the stream gives them; with the width of codes, all stored maps."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "image": ((3, *CROP), torch.uint8),
        "label": (CROP, torch.uint8),
        "index": ((), torch.int64),
        "logits_valid": (grid, torch.bool),
    }
    if bits is not None:
        shapes |= {
            "weight_field": ((7, 9), torch.float32),
            "weight_rows": (CROP[:1], torch.float64),
            "weight_columns": (CROP[1:], torch.float64),
            "true_prob_code": (CROP, CODES[bits]),
            "aux_true_prob_code": (CROP, CODES[bits]),
            "logits": ((8, *grid), torch.float16),
        }
    return {
        name: torch.empty((2, *shape), dtype=dtype, device=GPU)
        for name, (shape, dtype) in shapes.items()
    }


def take_steps(folder: Path, method: str, bits: int | None = None) -> Operations:
    """A step in each stage up to its loss: from stored maps, or with the teacher in memory."""
    config = tiny_config(folder)
    stages = {"rdd": {"switch": 0.5}} if method == "rdd" else {}
    student = StudentConfig.model_validate(
        {"name": "s", "method": method, "teacher": "online"} | stages
    )
    ready: PreparedStudent = prepare_student(
        config,
        student,
        build_dataset(config.data, "train"),
        reader=None,
        teacher=build_network(config.teacher.network, 8) if student.needs_teacher else None,
    )
    grid = ready.stream.grid_size
    assert grid is not None
    with FakeTensorMode():
        signals: Signals = ready.signals if bits is None else SignalDecoder(bits)
        to_gpu(ready.model)
        to_gpu(ready.loss)
        if isinstance(signals, LiveTeacher):
            to_gpu(signals.network)
        signals(batch(grid, bits))  # tables go to the device with the first batch
        averages = Averages()
        with Operations() as seen:
            for iteration in (0, 5):
                one = batch(grid, bits)
                outputs = ready.model(one["image"])
                result = ready.loss(outputs, one["label"], signals(one), iteration)
                averages.add(result)
                assert result.total.device == GPU
    return seen


def fused_cross_entropy() -> Operations:
    """The cross-entropy in bands of rows, both passes."""
    with FakeTensorMode():
        logits = torch.empty(2, 8, 9, 17, device=GPU)
        label = torch.empty(2, *CROP, dtype=torch.uint8, device=GPU)
        with Operations() as seen:
            loss, log_sum = _fused._forward_op._init_fn(logits, label, 255)
            gradient = _fused._backward_op._init_fn(loss, logits, label, log_sum, 255)
            assert gradient.device == GPU
            assert gradient.shape == logits.shape
    return seen


def of_the_instrument(fault: str) -> Operations:
    """What must be noticed."""
    with FakeTensorMode(), Operations() as seen:
        there = torch.empty(4, device=GPU)
        if fault == "mixes":
            there + torch.empty(4)
        elif fault == "waits":
            bool(there.sum() > 0)
        else:
            there.cpu()
    return seen


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Operations]]]:
    """Everything that is tried, by name."""
    for bits in CODES:
        yield f"stored, {bits} bits", partial(take_steps, folder, "rdd", bits)
    for method in METHODS:
        yield f"online, {method}", partial(take_steps, folder, method)
    yield "fused", fused_cross_entropy
    for fault in ("mixes", "waits", "moves"):
        yield fault, partial(of_the_instrument, fault)


def main() -> None:
    """Print what was seen."""
    _setup_privateuseone_for_python_backend(backend_module=Backend())
    found = {}
    with torch.no_grad():
        for name, case in cases(Path(sys.argv[1])):
            try:
                seen = case()
                found[name] = {"operations": len(seen.names), "moves": seen.moves}
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
