"""The one trainer: teachers and students, supervised or distilled.

Training is a function of its settings: the samples are those of an endless stream addressed by
position, so a run that was killed continues from its last checkpoint to the same weights.
Device placement, mixed precision, gradient scaling, several processes and the training state on
disk are Accelerate's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.tensorboard import SummaryWriter

from rdd_pipeline.config import TrainingConfig
from rdd_pipeline.errors import CheckpointError, NonFiniteError
from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.features import TappedStudent
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.losses import LossOutput, NetworkOutputs, TeacherSignals
from rdd_pipeline.networks import (
    SegmentationNetwork,
    parameter_count,
    parameter_groups,
    save_weights,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stream import MapStream, make_loader

logger = logging.getLogger("rdd.train")

_WARM_UP_STEPS = 5  # not counted in step times: first allocations and worker start
_STATE_FILE = "trainer.json"


class Loss(Protocol):
    """What the trainer asks of a loss; see :mod:`rdd_pipeline.losses`."""

    def __call__(
        self, outputs: NetworkOutputs, target: torch.Tensor, teacher: TeacherSignals, iteration: int
    ) -> LossOutput:
        """Compute the loss of one batch."""
        ...


Signals = Callable[[Mapping[str, torch.Tensor]], TeacherSignals]
"""Turns a batch of the stream into the teacher's signals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a finished training leaves behind."""

    metrics: Metrics
    iterations: int
    seconds: float
    """Wall time of all training steps, evaluation and interruptions left out."""
    images_per_second: float
    step_ms: float
    """Median wall time of a step, waiting for data included."""
    data_wait_share: float
    """Share of the training time spent waiting for the loader."""
    parameters: int
    history: list[dict[str, float]] = field(default_factory=list)
    """Loss terms and diagnostics, one entry per ``log_every`` iterations, averaged over them."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Iteration and mIoU of each evaluation."""


@dataclass(kw_only=True)
class _State:
    """What must survive a restart besides weights, optimiser and random state."""

    iteration: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


def poly_schedule(config: TrainingConfig) -> Callable[[int], float]:
    """Factor on the learning rate: linear warm-up, then ``(1 - t / T) ** power``."""

    def factor(iteration: int) -> float:
        if iteration < config.warmup_iterations:
            return (iteration + 1) / config.warmup_iterations
        done = min(iteration / config.iterations, 1.0)
        return float((1.0 - done) ** config.poly_power)

    return factor


def train(
    student: SegmentationNetwork | TappedStudent,
    loss: Loss,
    stream: MapStream,
    *,
    signals: Signals,
    config: TrainingConfig,
    seed: int,
    directory: Path,
    evaluate: Callable[[SegmentationNetwork, torch.device], Metrics],
    reporter: Reporter,
    name: str,
    device: str = "auto",
) -> TrainingResult:
    """Train a network, resuming from the last checkpoint in ``directory`` if there is one.

    A :class:`TappedStudent` is trained whole; what is evaluated and saved is its network. A loss
    that is a module with state (a memory of earlier batches) is resumed as well.

    Writes ``checkpoints/<iteration>`` (weights as safetensors and the whole training state),
    ``tensorboard/`` and, at the end, ``weights.safetensors``.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the last checkpoint is kept.
        CheckpointError: The checkpoint does not fit this network.
    """
    with _accelerator(config, device) as accelerator:
        set_seed(seed)
        optimizer = torch.optim.SGD(
            _parameter_groups(student, config),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, poly_schedule(config))
        if accelerator.num_processes > 1:
            student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
        model, optimizer = accelerator.prepare(student, optimizer)
        accelerator.register_for_checkpointing(scheduler)
        if isinstance(loss, torch.nn.Module):
            loss.to(accelerator.device)
            if loss.state_dict():
                accelerator.register_for_checkpointing(loss)

        state = _State()
        checkpoints = directory / "checkpoints"
        latest = _latest_checkpoint(checkpoints)
        if latest is not None:
            try:
                accelerator.load_state(str(latest))
            except Exception as error:  # the libraries below raise many kinds for a damaged file
                raise CheckpointError(
                    f"{latest}: does not fit this network or its optimiser ({error}); "
                    "delete the folder to train anew"
                ) from error
            state = _State(**read_json(latest / _STATE_FILE))
            reporter.say(f"{name}: resumes at iteration {state.iteration} of {config.iterations}")

        with contextlib.ExitStack() as stack:
            writer = None
            if accelerator.is_main_process:
                writer = SummaryWriter(str(directory / "tensorboard"), purge_step=state.iteration)
                stack.callback(writer.close)
            _run(
                accelerator, model, loss, optimizer, scheduler, stream, signals, config, state,
                checkpoints, evaluate, reporter, name, writer,
            )  # fmt: skip
        unwrapped = _network(accelerator, model)
        metrics = evaluate(unwrapped, accelerator.device)
        if accelerator.is_main_process:
            save_weights(unwrapped, directory / "weights.safetensors")
        accelerator.wait_for_everyone()
        images = config.iterations * config.batch_size * accelerator.num_processes
        return TrainingResult(
            metrics=metrics,
            iterations=config.iterations,
            seconds=state.seconds,
            images_per_second=images / max(state.seconds, 1e-9),
            step_ms=1000.0 * statistics.median(state.step_seconds or [0.0]),
            data_wait_share=state.wait_seconds / max(state.seconds, 1e-9),
            parameters=parameter_count(unwrapped),
            history=state.history,
            evaluations=[
                *state.evaluations,
                {"iteration": config.iterations, "miou": metrics.miou},
            ],
        )


def _run(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    stream: MapStream,
    signals: Signals,
    config: TrainingConfig,
    state: _State,
    checkpoints: Path,
    evaluate: Callable[[SegmentationNetwork, torch.device], Metrics],
    reporter: Reporter,
    name: str,
    writer: SummaryWriter | None,
) -> None:
    """Take the steps that are left, writing curves and checkpoints on the way."""
    batch_size = config.batch_size
    loader = make_loader(
        stream,
        batch_size=batch_size,
        start=state.iteration * batch_size * accelerator.num_processes,
        workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    model.train()
    sums = _Averages()
    processes = accelerator.num_processes
    with reporter.bar(name, config.iterations, "images") as bar:
        bar.start_at(state.iteration)
        batches = iter(loader)
        first = state.iteration
        while state.iteration < config.iterations:
            started = time.perf_counter()
            batch = {
                key: value.to(accelerator.device, non_blocking=True)
                for key, value in next(batches).items()
            }
            waited = time.perf_counter() - started
            optimizer.zero_grad(set_to_none=True)
            with accelerator.autocast():
                outputs = model(batch["image"])
            result = loss(outputs, batch["label"], signals(batch), state.iteration)
            accelerator.backward(result.total)
            if config.gradient_clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
            learning_rate = float(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            state.iteration += 1
            sums.add(result)

            log_now = (
                state.iteration % config.log_every == 0 or state.iteration == config.iterations
            )
            if log_now:
                entry = sums.take()
                entry |= {"iteration": float(state.iteration), "lr": learning_rate}
                state.history.append(entry)
                _require_finite(entry, state.iteration, name, checkpoints)
                if writer is not None:
                    for key, value in entry.items():
                        if key != "iteration":
                            writer.add_scalar(f"train/{key}", value, state.iteration)
            elapsed = time.perf_counter() - started
            state.seconds += elapsed
            state.wait_seconds += waited
            if state.iteration - first > _WARM_UP_STEPS:
                state.step_seconds.append(elapsed)
            note = f"loss {state.history[-1]['loss']:.3f}" if state.history else None
            bar.advance(note=note, items=batch_size * processes)

            last = state.iteration == config.iterations
            if config.evaluate_every and state.iteration % config.evaluate_every == 0 and not last:
                metrics = evaluate(_network(accelerator, model), accelerator.device)
                state.evaluations.append({"iteration": state.iteration, "miou": metrics.miou})
                if writer is not None:
                    writer.add_scalar("val/miou", metrics.miou, state.iteration)
            if last or state.iteration % config.checkpoint_every == 0:
                _save_checkpoint(accelerator, checkpoints, state)


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


def _network(accelerator: Accelerator, model: torch.nn.Module) -> SegmentationNetwork:
    """The network itself, out of what distributes it and takes its features."""
    unwrapped = accelerator.unwrap_model(model)
    return unwrapped.network if isinstance(unwrapped, TappedStudent) else unwrapped


class _Averages:
    """Running sums of loss terms and diagnostics, kept on the device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, result: LossOutput) -> None:
        values: dict[str, torch.Tensor] = {"loss": result.total.detach(), **result.terms}
        if result.diagnostics is not None:
            for item in fields(result.diagnostics):
                values[item.name] = getattr(result.diagnostics, item.name)
        for key, value in values.items():
            known = torch.ones_like(value) if key == "loss" else (~value.isnan()).to(value.dtype)
            # A loss keeps its NaN, which stops the training; a diagnostic's says "not computed".
            amount = value.clone() if key == "loss" else value.nan_to_num(nan=0.0)
            if key in self._sums:
                self._sums[key] += amount
                self._counts[key] += known
            else:
                self._sums[key], self._counts[key] = amount, known

    def take(self) -> dict[str, float]:
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        # Empty masks are counted, everything else is averaged.
        return {
            key: float(value) / (1.0 if key == "empty_masks" else float(counts[key]))
            for key, value in sums.items()
            if float(counts[key]) > 0
        }


def _require_finite(entry: dict[str, float], iteration: int, name: str, checkpoints: Path) -> None:
    loss = entry["loss"]
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NonFiniteError(
            f"{name}: the loss is {loss} near iteration {iteration}; lower training.lr, set "
            f"training.gradient_clip or use precision: bf16. Checkpoints are in {checkpoints}"
        )


def _save_checkpoint(accelerator: Accelerator, checkpoints: Path, state: _State) -> None:
    """Write the state into a temporary folder, rename it, and drop older ones."""
    final = checkpoints / f"{state.iteration:08d}"
    temporary = checkpoints / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / _STATE_FILE, asdict(state))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in checkpoints.iterdir():
            if old.name != final.name:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _latest_checkpoint(checkpoints: Path) -> Path | None:
    if not checkpoints.is_dir():
        return None
    complete = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    return max(complete, key=lambda path: int(path.name), default=None)


@contextlib.contextmanager
def _accelerator(config: TrainingConfig, device: str) -> Iterator[Accelerator]:
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
