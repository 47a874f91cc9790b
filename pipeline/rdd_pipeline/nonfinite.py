"""Stopping at a loss that is no number, with the batch that gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import safetensors.torch
import torch
from torch import Tensor

from rdd_pipeline.errors import NonFiniteError
from rdd_pipeline.files import write_atomically, write_json
from rdd_pipeline.losses import LossOutput, TeacherSignals


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """A loss that was computed, and what from."""

    result: LossOutput
    batch: Mapping[str, Tensor]
    teacher: TeacherSignals
    iteration: int


class LossWatch:
    """Looks at the loss of every forward pass.

    On a CUDA device the answer comes with the next pass, so that nothing waits for the device;
    elsewhere at once. Several processes stop together, and also agree on whether one of them was
    told to stop.

    Args:
        folder: Where an offending batch is written.
        image_ids: Of the training images.
        name: Of the training, begins the error's message.
        advice: What to do about such a loss.
        device: Of the loss.
        process: Number of this process.
        processes: Number of processes.
        description: Written beside the batch.
    """

    def __init__(
        self,
        folder: Path,
        image_ids: Sequence[str],
        *,
        name: str,
        advice: str,
        device: torch.device,
        process: int = 0,
        processes: int = 1,
        description: Mapping[str, str | float | int] | None = None,
    ) -> None:
        self._name, self._advice = name, advice
        self._folder, self._image_ids = folder, image_ids
        self._deferred = device.type == "cuda"
        self._process, self._processes = process, processes
        self._description = dict(description or {})
        self._pending: tuple[Tensor, torch.cuda.Event, _Look] | None = None
        self._group = None
        if processes > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # of numbers on the host

    def look(
        self,
        result: LossOutput,
        batch: Mapping[str, Tensor],
        teacher: TeacherSignals,
        iteration: int,
        *,
        stop: bool = False,
    ) -> bool:
        """Look at a loss before its backward pass.

        Args:
            result: The loss.
            batch: As the stream gave it.
            teacher: What the teacher said about it.
            iteration: Counted from 1.
            stop: Whether this process was told to stop.

        Returns:
            Whether any process was told to stop.

        Raises:
            NonFiniteError: This loss, or the one before, is NaN or infinite.
        """
        bad = self._settled()
        seen = _Look(result=result, batch=batch, teacher=teacher, iteration=iteration)
        if self._deferred:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(~result.total.detach().isfinite(), non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
            self._pending = flag, ready, seen
        elif not bool(result.total.detach().isfinite()):
            bad = seen
        return self._agree(bad, stop)

    def flush(self) -> None:
        """Look at what is still under way; call it before anything is kept."""
        self._agree(self._settled(), False)

    def _settled(self) -> _Look | None:
        """The pass before, if its loss turns out not to be finite."""
        if self._pending is None:
            return None
        flag, ready, seen = self._pending
        self._pending = None
        ready.synchronize()
        return seen if bool(flag) else None

    def _agree(self, bad: _Look | None, stop: bool) -> bool:
        anywhere = bad is not None
        if self._processes > 1:
            flags = torch.tensor([int(anywhere), int(stop)])
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
            anywhere, stop = bool(flags[0]), bool(flags[1])
        if bad is not None:
            self._raise(bad)
        if anywhere:
            raise NonFiniteError(
                f"{self._name}: the loss of another process is not finite; {self._advice}"
            )
        return stop

    def _raise(self, bad: _Look) -> NoReturn:
        ids = [self._image_ids[index] for index in bad.batch["index"].tolist()]
        value = float(bad.result.total.detach())
        file = self._write(bad, ids)
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        raise NonFiniteError(
            f"{self._name}: the loss is {value} at iteration {bad.iteration}; {self._advice}. The "
            f"batch (images {shown}) is in {file}"
        )

    def _write(self, bad: _Look, image_ids: list[str]) -> Path:
        signals = {f.name: getattr(bad.teacher, f.name) for f in fields(bad.teacher)}
        tensors = dict(bad.batch) | {
            f"teacher.{name}": value for name, value in signals.items() if isinstance(value, Tensor)
        }
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        name = f"iteration-{bad.iteration:08d}-process-{self._process}"
        file = self._folder / f"{name}.safetensors"
        write_atomically(file, lambda temporary: safetensors.torch.save_file(plain, temporary))
        terms = {"loss": bad.result.total.detach(), **bad.result.terms}
        write_json(
            self._folder / f"{name}.json",
            self._description
            | {
                "iteration": bad.iteration,
                "image_ids": image_ids,
                # As text: JSON knows no NaN.
                "terms": {key: str(float(value)) for key, value in terms.items()},
            },
        )
        return file
