"""What a training leaves on disk while it runs: checkpoints, the best weights, and snapshots."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.export import WEIGHTS_FILE
from rdd_pipeline.files import read_json, write_json
from rdd_pipeline.networks import load_state, save_weights, state_differences

BEST_FOLDER = "best"
BEST_FILE = "best.json"
SNAPSHOTS_FOLDER = "snapshots"

_STATE_FILE = "trainer.json"
_MODEL_FILE = "model.safetensors"


@dataclass(kw_only=True)
class TrainingState:
    """What must survive a restart besides weights, optimiser and random state."""

    iteration: int = 0
    """Optimiser steps that were taken."""
    seconds: float = 0.0
    wait_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    class_history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_miou: float | None = None
    best_iteration: int | None = None

    def evaluated(self) -> bool:
        """Whether the weights as they are were evaluated."""
        return bool(self.evaluations) and self.evaluations[-1]["iteration"] == self.iteration


class Checkpoints:
    """The folder of a training's checkpoints, of which the last is kept.

    Args:
        folder: Made when the first is written.
        accelerator: Has model, optimiser and whatever else has a state.
        network: What is trained, in words, for messages.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, network: str) -> None:
        self.folder = folder
        self._accelerator = accelerator
        self._network = network

    def latest(self) -> Path | None:
        """The last complete checkpoint."""
        if not self.folder.is_dir():
            return None
        complete = [path for path in self.folder.iterdir() if path.name.isdigit()]
        return max(complete, key=lambda path: int(path.name), default=None)

    def load(self, model: torch.nn.Module) -> TrainingState | None:
        """Put the last checkpoint into what the accelerator has; None if there is none.

        Raises:
            CheckpointError: It is of another network or number of processes, or damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        try:
            description: dict[str, Any] = read_json(latest / _STATE_FILE)
            network = description.pop("network", "a network without description")
            processes = description.pop("processes", self._accelerator.num_processes)
            state = TrainingState(**description)
            self._require_fit(latest, network, processes, model)
            self._accelerator.load_state(str(latest))
        except CheckpointError:
            raise
        except Exception as error:  # the libraries below raise many kinds for a damaged file
            raise CheckpointError(
                f"{latest}: does not fit this network or its optimiser ({error}); "
                "delete the folder to train anew"
            ) from error
        return state

    def _require_fit(
        self, latest: Path, network: str, processes: int, model: torch.nn.Module
    ) -> None:
        try:
            found = load_state(latest / _MODEL_FILE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or delete the folder to train anew") from error
        wanted = self._accelerator.unwrap_model(model).state_dict()
        # Of tensors that share their memory one alone is in the file.
        there = {tensor.data_ptr() for name, tensor in wanted.items() if name in found}
        wanted = {n: t for n, t in wanted.items() if n in found or t.data_ptr() not in there}
        differences = state_differences(wanted, found)
        if differences:
            lines = [
                f"{latest}: does not fit this network or its optimiser; the checkpoint is of",
                f"  {network}",
                "and what is to be trained is",
                f"  {self._network}",
                *differences,
                "delete the folder to train anew, or go on with the network of the checkpoint",
            ]
            raise CheckpointError("\n".join(lines))
        if processes != self._accelerator.num_processes:
            raise CheckpointError(
                f"{latest}: was written by {processes} training process(es), now there are "
                f"{self._accelerator.num_processes}, and the global batch would be another; start "
                f"{processes} again, or delete the folder to train anew"
            )

    def save(self, state: TrainingState) -> None:
        """Write everything into a temporary folder, rename it, and drop older ones."""
        accelerator = self._accelerator
        final = self.folder / f"{state.iteration:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            described = {"network": self._network, "processes": accelerator.num_processes}
            write_json(temporary / _STATE_FILE, asdict(state) | described)
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            for old in self.folder.iterdir():
                if old.name != final.name:
                    shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()


class Snapshots:
    """Weights kept on the way, evenly spread between the first iteration and the last.

    With those of the end, ``count`` of them part a training in ``count + 1`` equal stretches.

    Args:
        directory: Of the training.
        count: How many; 0 keeps none.
        iterations: Length of the training.
    """

    def __init__(self, directory: Path, count: int, iterations: int) -> None:
        self._directory = directory
        places = (round(place * iterations / (count + 1)) for place in range(1, count + 1))
        self._iterations = frozenset(place for place in places if 0 < place < iterations)

    def due(self, iteration: int) -> bool:
        """Whether the weights after this iteration are kept."""
        return iteration in self._iterations

    def save(self, network: torch.nn.Module, iteration: int) -> None:
        """Write the weights, whole or not at all.

        Raises:
            CheckpointError: They cannot be written.
        """
        folder = self._directory / SNAPSHOTS_FOLDER / f"{iteration:08d}"
        save_weights(network, folder / WEIGHTS_FILE)

    def drop_after(self, iteration: int) -> None:
        """Remove what a process wrote after the checkpoint from which this one goes on."""
        for path in snapshot_folders(self._directory):
            if int(path.name) > iteration:
                shutil.rmtree(path)


def snapshot_folders(directory: Path) -> list[Path]:
    """Folders of a training's snapshots, named by their iterations, in order."""
    found = (directory / SNAPSHOTS_FOLDER).glob("[0-9]*")
    return sorted((p for p in found if p.name.isdigit()), key=lambda path: int(path.name))


def note_best(state: TrainingState, metrics: Metrics) -> bool:
    """Note an evaluation in the state if it is the best so far; says whether it is."""
    if state.best_miou is not None and metrics.miou <= state.best_miou:
        return False
    state.best_miou, state.best_iteration = metrics.miou, state.iteration
    return True


def save_best(directory: Path, network: torch.nn.Module, state: TrainingState) -> None:
    """Write the best weights, then what they are; each file is replaced in one step.

    A process that dies between the two resumes before this evaluation, and writes both again.
    """
    save_weights(network, directory / BEST_FOLDER / WEIGHTS_FILE)
    write_json(
        directory / BEST_FOLDER / BEST_FILE,
        {"iteration": state.best_iteration, "miou": state.best_miou},
    )
