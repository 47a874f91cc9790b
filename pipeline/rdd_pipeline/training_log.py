"""What a training tells while it runs: averages of its loss, curves and pictures in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from rdd_pipeline.evaluate import Metrics
from rdd_pipeline.losses import LossOutput
from rdd_pipeline.progress import Reporter

_COUNTED = "empty_masks"  # summed over the steps, everything else is averaged
_PATIENCE_SECONDS = 30.0
_TOO_LONG = 0.1


class Averages:
    """Running sums of loss terms and diagnostics, kept on the device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._classes: torch.Tensor | None = None

    def add(self, result: LossOutput) -> None:
        """Add one forward pass."""
        values: dict[str, torch.Tensor] = {"loss": result.total.detach(), **result.terms}
        if result.diagnostics is not None:
            values |= result.diagnostics.as_tensors()
        names = tuple(values)
        # All numbers at once: on a GPU each operation costs more than the arithmetic in it.
        numbers = torch.stack([value.float() for value in values.values()])
        # NaN in a diagnostic says "not computed"; a loss is finite, or training has stopped.
        both = torch.stack([numbers.nan_to_num(nan=0.0), (~numbers.isnan()).float()])
        self._sums[names] = self._sums[names].add_(both) if names in self._sums else both

    def take(self, processes: int = 1) -> dict[str, float]:
        """Means since the last call, over all processes; every one of them has to call."""
        found: dict[str, tuple[float, float]] = {}
        for names, both in self._sums.items():
            if processes > 1:
                torch.distributed.all_reduce(both)
            for name, total, count in zip(names, *both.tolist(), strict=True):
                totals, counts = found.get(name, (0.0, 0.0))
                found[name] = totals + total, counts + count
        self._sums = {}
        return {
            name: total / (1.0 if name == _COUNTED else count)
            for name, (total, count) in found.items()
            if count > 0
        }

    def count_classes(self, label: torch.Tensor, relative: torch.Tensor, num_classes: int) -> None:
        """Count the pixels of each class in a batch, and those of them that were trained on.

        For the batches of logged steps: on a GPU it waits for the device.

        Args:
            label: (B, H, W); what is no class counts nowhere.
            relative: bool (B, H, W), see :class:`rdd_pipeline.losses.LossOutput`.
            num_classes: C.
        """
        both = torch.stack(
            [
                torch.bincount(part.flatten().long(), minlength=256)[:num_classes]
                for part in (label[relative], label)
            ]
        )
        self._classes = both if self._classes is None else self._classes + both

    def take_classes(self, processes: int = 1) -> list[float | None]:
        """Share of each class's pixels that were trained on, over all processes, since the last
        call; None for a class without pixels. Empty if nothing was counted."""
        if self._classes is None:
            return []
        counts, self._classes = self._classes, None
        if processes > 1:
            torch.distributed.all_reduce(counts)
        relative, pixels = counts.tolist()
        return [
            round(some / every, 4) if every else None
            for some, every in zip(relative, pixels, strict=True)
        ]


class TrainingLog:
    """Curves and pictures of one training in TensorBoard.

    Args:
        directory: Of the event files; None writes none.
        iteration: Where training goes on; what an earlier process wrote beyond it is dropped.
    """

    def __init__(self, directory: Path | None, iteration: int) -> None:
        self._writer = (
            None if directory is None else SummaryWriter(str(directory), purge_step=iteration)
        )

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def scalars(self, group: str, values: Mapping[str, float], iteration: int) -> None:
        """Add a point to each curve."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, iteration)

    def evaluation(self, metrics: Metrics, iteration: int) -> None:
        """Add quality as a whole, and by class."""
        whole = {"miou": metrics.miou, "pixel_accuracy": metrics.pixel_accuracy}
        self.scalars("val", whole, iteration)
        known = {name: iou for name, iou in metrics.class_iou.items() if iou is not None}
        self.scalars("val_iou", known, iteration)

    def pictures(self, pictures: Iterable[tuple[str, NDArray[np.uint8]]], iteration: int) -> None:
        """Add RGB pictures (H, W, 3) by name."""
        if self._writer is not None:
            for name, picture in pictures:
                self._writer.add_image(f"val/{name}", picture, iteration, dataformats="HWC")


class Pace:
    """How fast a training goes and how much of its time it waits for data, between two looks.

    Args:
        reporter: Told once if a GPU waits too long.
        name: Of the training.
        accelerated: Whether an accelerator could be waiting.
    """

    def __init__(self, reporter: Reporter, name: str, *, accelerated: bool) -> None:
        self._reporter, self._name = reporter, name
        self._warn = accelerated
        self._images = 0
        self._seconds = self._waited = 0.0
        self._window_seconds = self._window_waited = 0.0

    def step(self, images: int, seconds: float, waited: float) -> None:
        """Count one optimiser step."""
        self._images += images
        self._seconds += seconds
        self._waited += waited
        if not self._warn:
            return
        self._window_seconds += seconds
        self._window_waited += waited
        if self._window_seconds < _PATIENCE_SECONDS:
            return
        share = self._window_waited / self._window_seconds
        if share > _TOO_LONG:
            self._warn = False
            self._reporter.warn(
                f"{self._name}: the accelerator waits for data {share:.0%} of the time; raise "
                "training.workers, or pack images and labels with 'rdd data pack'"
            )
        self._window_seconds = self._window_waited = 0.0

    def take(self) -> dict[str, float]:
        """Images per second and the share of waiting since the last call."""
        seconds = max(self._seconds, 1e-9)
        found = {
            "images_per_second": self._images / seconds,
            "data_wait_share": self._waited / seconds,
        }
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        return found


def note(entry: Mapping[str, float], pace: Mapping[str, float]) -> str:
    """Loss, stage and waiting in a few words, for a progress bar."""
    parts = [f"loss {entry['loss']:.3f}"]
    share = entry.get("tfe_share")
    if share is not None:
        parts.append("TFE" if share == 1.0 else "TSE" if share == 0.0 else "TFE+TSE")
    parts.append(f"data wait {pace['data_wait_share']:.0%}")
    return ", ".join(parts)
