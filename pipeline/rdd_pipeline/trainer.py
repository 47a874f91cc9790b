"""The one trainer: teachers and students, supervised or distilled.

Training is a function of its settings: the samples are those of an endless stream addressed by
position, so a run that was killed continues from its last checkpoint to the same weights.
Device placement, mixed precision, gradient scaling, several processes and the training state on
disk are Accelerate's.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel

from rdd_pipeline.config import TrainingConfig
from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.features import TappedStudent
from rdd_pipeline.loader import make_loader
from rdd_pipeline.losses import LossOutput, NetworkOutputs, TeacherSignals
from rdd_pipeline.networks import SegmentationNetwork, parameter_count, save_weights
from rdd_pipeline.nonfinite import LossWatch
from rdd_pipeline.prefetch import Batch, DevicePrefetcher
from rdd_pipeline.processes import peak_memory_bytes
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stopping import StopSignals
from rdd_pipeline.stream import MapStream
from rdd_pipeline.training_log import Averages, Pace, TrainingLog, note
from rdd_pipeline.training_setup import TrainingParts, open_accelerator, prepare_training
from rdd_pipeline.training_state import Checkpoints, Snapshots, TrainingState, note_best, save_best

NONFINITE_FOLDER = "nonfinite"

_WARM_UP_STEPS = 5  # not counted in step times: first allocations and worker start


class Loss(Protocol):
    """What the trainer asks of a loss; see :mod:`rdd_pipeline.losses`."""

    def __call__(
        self, outputs: NetworkOutputs, target: torch.Tensor, teacher: TeacherSignals, iteration: int
    ) -> LossOutput:
        """Compute the loss of one batch."""
        ...


Signals = Callable[[Mapping[str, torch.Tensor]], TeacherSignals]
"""Turns a batch of the stream into the teacher's signals."""

Evaluate = Callable[[SegmentationNetwork, torch.device], Metrics]
"""Evaluates a network on the device; every process calls it."""

Overlays = Callable[[SegmentationNetwork, torch.device], Iterable[tuple[str, NDArray[np.uint8]]]]
"""Pictures of a network's predictions by name; the main process alone calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a finished training leaves behind."""

    metrics: Metrics
    """Of the weights that were saved, those of the last iteration."""
    iterations: int
    seconds: float
    """Wall time of all training steps, evaluation and interruptions left out."""
    images_per_second: float
    """Over all processes."""
    step_ms: float
    """Median wall time of an optimiser step, waiting for data included."""
    data_wait_share: float
    """Share of the training time in which there was no batch to compute on."""
    parameters: int
    best_miou: float | None = None
    """Of the weights in ``best``; None where they were not kept."""
    best_iteration: int | None = None
    """Their iteration."""
    processes: int = 1
    """Training processes, each with a batch of its own."""
    peak_device_bytes: int | None = None
    """Most memory that tensors took on the main process's GPU; None on the CPU."""
    peak_host_bytes: int = 0
    """Largest resident memory of the main process or one of its children so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Loss terms and diagnostics, one entry per ``log_every`` iterations, averaged over them."""
    class_history: list[dict[str, Any]] = field(default_factory=list)
    """``iteration`` and ``relative``, the share of each class's pixels that the second stage was
    trained on in the batches of that iteration; None for a class they lack."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Iteration and mIoU of each evaluation."""


def train(
    student: SegmentationNetwork | TappedStudent,
    loss: Loss,
    stream: MapStream,
    *,
    signals: Signals,
    config: TrainingConfig,
    seed: int,
    directory: Path,
    evaluate: Evaluate,
    reporter: Reporter,
    name: str,
    device: str = "auto",
    overlays: Overlays | None = None,
    network: str = "",
) -> TrainingResult:
    """Train a network, resuming from the last checkpoint in ``directory`` if there is one.

    A :class:`TappedStudent` is trained whole; what is evaluated and saved is its network. A loss
    that is a module with state (a memory of earlier batches) is resumed as well.

    Writes ``checkpoints/<iteration>`` (weights as safetensors and the whole training state),
    ``tensorboard/``, ``best/`` where there are evaluations on the way, ``snapshots/<iteration>``
    where they are asked for and, at the end, ``weights.safetensors``. With several processes each
    of them calls this function; the main one writes.

    SIGTERM and SIGINT in the main thread take effect after the optimiser step under way, when a
    checkpoint of it has been written. During an evaluation, before which a checkpoint is written
    too, they act at once.

    Args:
        student: What to train.
        loss: Its loss.
        stream: Gives ``iterations * accumulate * batch_size`` samples for each process.
        signals: What the teacher says about a batch.
        config: How to train.
        seed: Of torch's random numbers.
        directory: Where everything is written.
        evaluate: Called at the end, and every ``evaluate_every`` iterations.
        reporter: Where progress is shown.
        name: What the training is called there.
        device: ``auto``, ``cpu`` or ``cuda``.
        overlays: Pictures for TensorBoard, at each evaluation.
        network: The network in words, for the message about a checkpoint that is of another.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the last checkpoint is kept, and the batch
            is in ``nonfinite``.
        CheckpointError: The checkpoint does not fit this network.
        ConfigError: The network cannot be compiled here.
    """
    with open_accelerator(config, device) as accelerator, StopSignals() as stop:
        if not accelerator.is_main_process:
            reporter = Reporter(quiet=True)
        set_seed(seed)
        parts = prepare_training(accelerator, student, loss, config, reporter, name)
        if accelerator.device.type == "cuda":
            # Not before something is there: only then has CUDA such statistics.
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        checkpoints = Checkpoints(
            directory / "checkpoints", accelerator, network or type(parts.network).__name__
        )
        state = checkpoints.load(parts.model) or TrainingState()
        if state.iteration:
            reporter.say(f"{name}: resumes at iteration {state.iteration} of {config.iterations}")
        snapshots = Snapshots(directory, config.snapshots, config.iterations)
        if accelerator.is_main_process:
            snapshots.drop_after(state.iteration)
        events = directory / "tensorboard" if accelerator.is_main_process else None
        with contextlib.closing(TrainingLog(events, state.iteration)) as log:
            training = _Training(
                accelerator=accelerator,
                parts=parts,
                loss=loss,
                stream=stream,
                signals=signals,
                config=config,
                seed=seed,
                directory=directory,
                evaluate=evaluate,
                overlays=overlays,
                reporter=reporter,
                name=name,
                checkpoints=checkpoints,
                snapshots=snapshots,
                state=state,
                log=log,
                stop=stop,
            )
            metrics = training.run()
        if accelerator.is_main_process:
            save_weights(parts.evaluated, directory / "weights.safetensors")
        accelerator.wait_for_everyone()
        return _result(accelerator, config, state, metrics, parts)


@dataclass(kw_only=True)
class _Training:
    """One training under way."""

    accelerator: Accelerator
    parts: TrainingParts
    loss: Loss
    stream: MapStream
    signals: Signals
    config: TrainingConfig
    seed: int
    directory: Path
    evaluate: Evaluate
    overlays: Overlays | None
    reporter: Reporter
    name: str
    checkpoints: Checkpoints
    snapshots: Snapshots
    state: TrainingState
    log: TrainingLog
    stop: StopSignals

    def __post_init__(self) -> None:
        accelerator, config = self.accelerator, self.config
        self._distributed = isinstance(self.parts.model, DistributedDataParallel)
        self._images_per_step = config.batch_size * config.accumulate * accelerator.num_processes
        self._first = self.state.iteration
        self._averages = Averages()
        self._stopping = False
        self._note: str | None = None
        self._pace = Pace(
            self.reporter, self.name, accelerated=accelerator.device.type not in ("cpu", "meta")
        )
        self._watch = LossWatch(
            self.directory / NONFINITE_FOLDER,
            self.stream.dataset.image_ids,
            name=self.name,
            advice="lower training.lr, set training.gradient_clip or use precision: bf16. "
            f"Checkpoints are in {self.checkpoints.folder}",
            device=accelerator.device,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            description={
                "seed": self.seed,
                "precision": config.precision,
                "lr": config.lr,
            },
        )

    def run(self) -> Metrics:
        """Take the steps that are left; returns the metrics at the end."""
        config, state, accelerator = self.config, self.state, self.accelerator
        loader = make_loader(
            self.stream,
            batch_size=config.batch_size,
            start=state.iteration * self._images_per_step,
            workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.parts.model.train()
        with (
            self.reporter.bar(self.name, config.iterations, "images") as bar,
            DevicePrefetcher(loader, accelerator.device) as batches,
        ):
            bar.start_at(state.iteration)
            while state.iteration < config.iterations:
                if self._evaluation_due() and not state.evaluated():
                    self._evaluate()
                self._step(batches)
                bar.advance(note=self._note, items=self._images_per_step)
                last = state.iteration == config.iterations
                checkpoint = last or state.iteration % config.checkpoint_every == 0
                checkpoint = checkpoint or self._evaluation_due() or self._stopping
                snapshot = self.snapshots.due(state.iteration)
                if checkpoint or snapshot:
                    self._watch.flush()
                # First, so that who resumes from the checkpoint finds all snapshots up to it.
                if snapshot and accelerator.is_main_process:
                    self.snapshots.save(self.parts.evaluated, state.iteration)
                if checkpoint:
                    self.checkpoints.save(state)
                if self._stopping:
                    self._leave()
        return self._evaluate()

    def _step(self, batches: DevicePrefetcher) -> None:
        """One optimiser step, with its share of logging."""
        config, state, parts = self.config, self.state, self.parts
        started, waited = time.perf_counter(), batches.waited
        parts.optimizer.zero_grad(set_to_none=True)
        for part in range(1, config.accumulate + 1):
            # Gradients are exchanged once, with the last part.
            whole = part == config.accumulate
            with contextlib.nullcontext() if whole else self.accelerator.no_sync(parts.model):
                self._backward(self._next(batches))
        if config.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(parts.model.parameters(), config.gradient_clip)
        learning_rate = float(parts.scheduler.get_last_lr()[0])
        parts.optimizer.step()
        parts.scheduler.step()
        if parts.ema is not None:
            parts.ema.update_parameters(parts.network)
        state.iteration += 1
        entry = self._log(learning_rate)
        elapsed, waited = time.perf_counter() - started, batches.waited - waited
        state.seconds += elapsed
        state.wait_seconds += waited
        if state.iteration - self._first > _WARM_UP_STEPS:
            state.step_seconds.append(elapsed)
            self._pace.step(self._images_per_step, elapsed, waited)
        if entry:
            pace = self._pace.take()
            self.log.scalars("speed", pace, state.iteration)
            self._note = note(entry, pace)
        if self.accelerator.num_processes == 1:
            self._stopping = self.stop.requested is not None

    def _next(self, batches: DevicePrefetcher) -> Batch:
        try:
            return batches.take()
        except RuntimeError:
            # Whoever ends a group of processes ends the loader's too.
            if self.stop.requested is None:
                raise
            self._say_stopped("the step under way is lost")
            self.stop.act()

    def _backward(self, batch: Batch) -> None:
        """Add the gradient of one batch."""
        images = batch["image"]
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            outputs = self.parts.forward(images)
        teacher = self.signals(batch)
        iteration = self.state.iteration
        result = self.loss(outputs, batch["label"], teacher, iteration)
        self._stopping = self._watch.look(
            result, batch, teacher, iteration + 1, stop=self.stop.requested is not None
        )
        self._averages.add(result)
        if result.relative is not None and self._log_due(iteration + 1):
            self._averages.count_classes(batch["label"], result.relative, outputs.main.shape[1])
        total = result.total
        if self._distributed:
            total = total + _connection(outputs)
        if self.config.accumulate > 1:
            total = total / self.config.accumulate
        self.accelerator.backward(total)

    def _log(self, learning_rate: float) -> dict[str, float]:
        """Write the averages if it is time to; returns them."""
        state = self.state
        if not self._log_due(state.iteration):
            return {}
        self._watch.flush()
        entry = self._averages.take(self.accelerator.num_processes)
        entry["lr"] = learning_rate
        self.log.scalars("train", entry, state.iteration)
        entry["iteration"] = float(state.iteration)
        state.history.append(entry)
        shares = self._averages.take_classes(self.accelerator.num_processes)
        if shares:
            state.class_history.append({"iteration": state.iteration, "relative": shares})
        return entry

    def _log_due(self, iteration: int) -> bool:
        return iteration % self.config.log_every == 0 or iteration == self.config.iterations

    def _evaluation_due(self) -> bool:
        every, iteration = self.config.evaluate_every, self.state.iteration
        return bool(every) and iteration > 0 and iteration % every == 0

    def _evaluate(self) -> Metrics:
        """Evaluate the weights as they are, and keep them if they are the best."""
        state, parts, accelerator = self.state, self.parts, self.accelerator
        if accelerator.num_processes > 1:
            for buffer in parts.evaluated.buffers():  # statistics of batch norms on the CPU
                torch.distributed.broadcast(buffer, 0)
        # The network prepared for training brings its own autocast, its average does not.
        precision = contextlib.nullcontext() if parts.ema is None else accelerator.autocast()
        with self.stop.passed_on(), precision:
            metrics = self.evaluate(parts.evaluated, accelerator.device)
            self.log.evaluation(metrics, state.iteration)
            if accelerator.is_main_process and self.overlays is not None:
                pictures = self.overlays(parts.evaluated, accelerator.device)
                self.log.pictures(pictures, state.iteration)
        state.evaluations.append({"iteration": state.iteration, "miou": metrics.miou})
        keeps = self.config.keep_best and self.config.evaluate_every > 0
        if keeps and note_best(state, metrics) and accelerator.is_main_process:
            save_best(self.directory, parts.evaluated, state)
        return metrics

    def _leave(self) -> NoReturn:
        self._say_stopped("its checkpoint is written")
        self.stop.act()

    def _say_stopped(self, what: str) -> None:
        number = self.stop.requested
        why = "with the other processes" if number is None else f"by {number.name}"
        self.reporter.warn(
            f"{self.name}: stopped {why} at iteration {self.state.iteration} of "
            f"{self.config.iterations}, {what}; run the same command again to continue"
        )


def _connection(outputs: NetworkOutputs) -> torch.Tensor:
    """0, connected to all outputs: distributed training waits for every gradient, also where a
    loss leaves out the auxiliary head."""
    tensors = [outputs.main, outputs.aux, *getattr(outputs, "projected", {}).values()]
    used = [t for t in tensors if t is not None]
    return torch.stack([t.flatten()[0].float() * 0.0 for t in used]).sum()


def _result(
    accelerator: Accelerator,
    config: TrainingConfig,
    state: TrainingState,
    metrics: Metrics,
    parts: TrainingParts,
) -> TrainingResult:
    images = config.iterations * config.accumulate * config.batch_size * accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    return TrainingResult(
        metrics=metrics,
        iterations=config.iterations,
        seconds=state.seconds,
        images_per_second=images / max(state.seconds, 1e-9),
        step_ms=1000.0 * statistics.median(state.step_seconds or [0.0]),
        data_wait_share=state.wait_seconds / max(state.seconds, 1e-9),
        parameters=parameter_count(parts.network),
        best_miou=state.best_miou,
        best_iteration=state.best_iteration,
        processes=accelerator.num_processes,
        peak_device_bytes=(torch.cuda.max_memory_allocated(accelerator.device) if on_gpu else None),
        peak_host_bytes=peak_memory_bytes(),
        history=state.history,
        class_history=state.class_history,
        evaluations=state.evaluations,
    )
