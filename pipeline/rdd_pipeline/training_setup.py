"""How a training is set up: device and precision, optimiser and schedule, averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rdd_pipeline.config import TrainingConfig
from rdd_pipeline.errors import CheckpointError, ConfigError
from rdd_pipeline.features import TappedStudent
from rdd_pipeline.losses import NetworkOutputs
from rdd_pipeline.networks import SegmentationNetwork, parameter_groups
from rdd_pipeline.progress import Reporter


def poly_schedule(config: TrainingConfig) -> Callable[[int], float]:
    """Factor on the learning rate: linear warm-up, then ``(1 - t / T) ** power``."""

    def factor(iteration: int) -> float:
        if iteration < config.warmup_iterations:
            return (iteration + 1) / config.warmup_iterations
        done = min(iteration / config.iterations, 1.0)
        return float((1.0 - done) ** config.poly_power)

    return factor


@contextmanager
def open_accelerator(config: TrainingConfig, device: str) -> Iterator[Accelerator]:
    """An Accelerator for one training; its process-wide state is dropped afterwards.

    Accelerate keeps device and precision in a singleton, but teacher and students, trained one
    after another in one process, may differ in them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("device: cuda was asked for, but torch sees no GPU; use device: auto")
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=config.precision)
    try:
        yield accelerator
    finally:
        accelerator.free_memory()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingParts:
    """A network and what changes it, ready on the device."""

    model: torch.nn.Module
    """What is trained: the network, with what distributes it and takes its features."""
    forward: Callable[[torch.Tensor], NetworkOutputs]
    """The model, compiled or not."""
    network: SegmentationNetwork
    """The network itself."""
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    @property
    def evaluated(self) -> SegmentationNetwork:
        """The network that is evaluated and saved."""
        if self.ema is None:
            return self.network
        return cast(SegmentationNetwork, self.ema.module)


def prepare_training(
    accelerator: Accelerator,
    student: SegmentationNetwork | TappedStudent,
    loss: object,
    config: TrainingConfig,
    reporter: Reporter,
    name: str,
) -> TrainingParts:
    """Put a network on the device, with everything that a step needs.

    What has a state is registered with the accelerator, and so in its checkpoints.

    Args:
        accelerator: Of this training.
        student: What to train.
        loss: Its loss; one that is a module with state is in the checkpoints too.
        config: How to train.
        reporter: Told where batch norms cannot be synchronised.
        name: What the training is called there.
    """
    if config.channels_last:
        # Named: torch's stubs know no keyword for modules.
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        _parameter_groups(student, config),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, poly_schedule(config))
    plain = student.network if isinstance(student, TappedStudent) else student
    ema = None
    if config.ema is not None:
        ema = AveragedModel(
            plain,
            multi_avg_fn=get_ema_multi_avg_fn(config.ema),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )
        # Its counter, which every update reads, stays here: nothing then waits for the device.
        ema.module.to(accelerator.device)
    if accelerator.num_processes > 1:
        student = _synchronised(student, accelerator, reporter, name)
    model, optimizer = accelerator.prepare(student, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    if isinstance(loss, torch.nn.Module):
        loss.to(accelerator.device)
        if loss.state_dict():
            accelerator.register_for_checkpointing(loss)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    unwrapped = accelerator.unwrap_model(model)
    return TrainingParts(
        model=model,
        forward=_compiled(model) if config.compile else model,
        network=unwrapped.network if isinstance(unwrapped, TappedStudent) else unwrapped,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
    )


def _parameter_groups(
    student: SegmentationNetwork | TappedStudent, config: TrainingConfig
) -> list[dict[str, Any]]:
    if not isinstance(student, TappedStudent):
        return parameter_groups(student, config.lr, config.head_lr_factor)
    groups = parameter_groups(student.network, config.lr, config.head_lr_factor)
    projections = list(student.projections.parameters())
    if projections:
        rate = config.lr * config.head_lr_factor
        groups.append({"name": "projections", "params": projections, "lr": rate})
    return groups


def _synchronised(
    student: SegmentationNetwork | TappedStudent,
    accelerator: Accelerator,
    reporter: Reporter,
    name: str,
) -> SegmentationNetwork | TappedStudent:
    """The student with batch norms over all processes, where torch has them."""
    if accelerator.device.type != "cpu":
        converted: SegmentationNetwork | TappedStudent = (
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        )
        return converted
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in student.modules()):
        reporter.warn(
            f"{name}: torch synchronises batch norms on GPUs alone; on the CPU each of the "
            f"{accelerator.num_processes} processes normalises over its own images"
        )
    return student


def _compiled(model: torch.nn.Module) -> Callable[[torch.Tensor], NetworkOutputs]:
    """The model's compiled twin, which shares its tensors; the model itself stays as it is."""
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    compiled = torch.compile(model)

    def forward(images: torch.Tensor) -> NetworkOutputs:
        try:
            outputs: NetworkOutputs = compiled(images)
        except TorchDynamoException as error:
            raise ConfigError(
                f"training.compile: torch.compile failed ({str(error).strip().splitlines()[0]}); "
                "on the CPU it needs a C++ compiler and the headers of Python, on GPUs Triton; "
                "leave training.compile out"
            ) from error
        return outputs

    return forward
