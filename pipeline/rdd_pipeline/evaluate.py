"""Evaluation of a network on whole images."""

# Shape suffixes: B batch, C classes, H W image pixels, h w output grid.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rdd_pipeline.data import IGNORE_INDEX, Sample, SegmentationDataset
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.progress import Reporter


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Quality of a network on a data set, from one confusion matrix over all its pixels."""

    miou: float
    """Mean intersection over union of the classes that occur in label or prediction."""
    pixel_accuracy: float
    """Share of valid pixels whose predicted class is the label's."""
    class_iou: dict[str, float | None]
    """Intersection over union per class; None for a class that occurs nowhere."""
    confusion: list[list[int]]
    """Pixel counts, rows label, columns prediction."""

    @classmethod
    def from_confusion(cls, confusion: np.ndarray, class_names: tuple[str, ...]) -> Metrics:
        """Compute the metrics from counts (C, C), rows label, columns prediction."""
        hits = np.diag(confusion).astype(np.float64)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
        present = union > 0
        iou = np.divide(hits, union, out=np.full_like(hits, np.nan), where=present)
        total = confusion.sum()
        return cls(
            miou=float(iou[present].mean()) if present.any() else 0.0,
            pixel_accuracy=float(hits.sum() / total) if total else 0.0,
            class_iou={
                name: float(value) if np.isfinite(value) else None
                for name, value in zip(class_names, iou, strict=True)
            },
            confusion=confusion.astype(int).tolist(),
        )


def image_batches(
    dataset: SegmentationDataset, indices: list[int], batch_size: int
) -> Iterator[list[Sample]]:
    """Group images of equal size into batches, in order, so that no image is padded."""
    batch: list[Sample] = []
    for index in indices:
        sample = dataset[index]
        if batch and (len(batch) == batch_size or sample.image.shape != batch[0].image.shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def stack_images(samples: list[Sample], device: torch.device) -> torch.Tensor:
    """Stack images of one size to uint8 (B, 3, H, W) on the device."""
    images_BHWC = np.stack([sample.image for sample in samples])
    return torch.from_numpy(images_BHWC).to(device).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(
    network: SegmentationNetwork,
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    reporter: Reporter,
    name: str = "evaluate",
    batch_size: int = 4,
) -> Metrics:
    """Evaluate on every image at full resolution, single scale, no flip.

    Logits are upsampled bilinearly (``align_corners=True``) before the argmax; ignored pixels do
    not count. The network's train/eval mode is restored.
    """
    # Imported here: it takes seconds, and the workers of a teacher pass need this module too.
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchmetrics

    training = network.training
    network.eval()
    classes = dataset.num_classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    try:
        with reporter.bar(name, len(dataset)) as bar:
            for samples in image_batches(dataset, list(range(len(dataset))), batch_size):
                images = stack_images(samples, device)
                logits_BChw = network(images).main.float()
                logits_BCHW = F.interpolate(
                    logits_BChw, images.shape[-2:], mode="bilinear", align_corners=True
                )
                labels = torch.from_numpy(np.stack([s.label for s in samples])).to(device)
                confusion += multiclass_confusion_matrix(
                    logits_BCHW.argmax(dim=1),
                    labels.long(),
                    num_classes=classes,
                    ignore_index=IGNORE_INDEX,
                ).cpu()
                bar.advance(len(samples))
    finally:
        network.train(training)
    return Metrics.from_confusion(confusion.numpy(), dataset.class_names)
