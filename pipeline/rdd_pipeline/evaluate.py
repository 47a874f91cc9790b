"""Evaluation of a network on whole images."""

# Shape suffixes: B batch, C classes, H W image pixels, h w output grid.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.data import IGNORE_INDEX, Sample, SegmentationDataset
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.progress import Reporter
from rdd_pipeline.teacher_batches import DecodedImages, decoder_threads


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
    flip: bool = False
    """Whether mirrored images were passed too, and probabilities averaged."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Sizes the images were passed at, as multiples of their own; probabilities were averaged."""

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


def image_batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Group images of equal size into batches, in order, so that no image is padded."""
    batch: list[Sample] = []
    for sample in samples:
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


def averaged_probs(
    network: SegmentationNetwork, images: Tensor, *, flip: bool, scales: Sequence[float]
) -> Tensor:
    """Mean of the main head's class probabilities over sizes and mirror images.

    Args:
        network: In evaluation mode.
        images: uint8 (B, 3, H, W).
        flip: Pass the mirrored images as well.
        scales: Sizes, as multiples of the images' own.

    Returns:
        (B, C, H, W) float32. Logits of each pass are brought to the images' size (bilinear,
        corners aligned) before the softmax.
    """
    size = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = images
        if scale != 1.0:
            sides = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images / 255.0, sides, mode="bilinear", align_corners=True)
        for mirrored in (False, True)[: 1 + flip]:
            logits_BChw = network(scaled.flip(-1) if mirrored else scaled).main.float()
            logits_BCHW = F.interpolate(logits_BChw, size, mode="bilinear", align_corners=True)
            probs = logits_BCHW.flip(-1).softmax(1) if mirrored else logits_BCHW.softmax(1)
            total = probs if total is None else total.add_(probs)
    if total is None:
        raise ConfigError("evaluation.scales: expected at least one, got none")
    return total / (len(scales) * (1 + flip))


def predicted_classes(
    network: SegmentationNetwork,
    images: Tensor,
    *,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Class of each pixel, int64 (B, H, W); see :func:`averaged_probs` for the arguments."""
    if flip or tuple(scales) != (1.0,):
        return averaged_probs(network, images, flip=flip, scales=scales).argmax(1)
    logits_BChw = network(images).main.float()
    size = images.shape[-2:]
    return F.interpolate(logits_BChw, size, mode="bilinear", align_corners=True).argmax(1)


@torch.no_grad()
def evaluate(
    network: SegmentationNetwork,
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    reporter: Reporter,
    name: str = "evaluate",
    batch_size: int = 4,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    rank: int = 0,
    processes: int = 1,
) -> Metrics:
    """Evaluate on every image at full resolution.

    Logits are upsampled bilinearly (``align_corners=True``) before the argmax; ignored pixels do
    not count. The network's train/eval mode is restored.

    Args:
        network: On ``device``.
        dataset: Images and labels.
        device: Where the network is.
        reporter: Shows how far it is.
        name: What the bar is called.
        batch_size: Images of equal size that are passed together.
        flip: Average over mirror images, see :func:`averaged_probs`.
        scales: Average over sizes, likewise.
        rank: Number of this process.
        processes: Processes that share the images; all of them call this function with equal
            weights, and all get the metrics of the whole.
    """
    # Imported here: it takes seconds, and the workers of a teacher pass need this module too.
    import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchmetrics

    # isort: split
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    training = network.training
    network.eval()
    classes = dataset.num_classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    own = range(rank, len(dataset), processes)
    threads = decoder_threads(device)
    try:
        with (
            reporter.bar(name, len(own)) as bar,
            ThreadPoolExecutor(threads, thread_name_prefix="rdd-decode") as pool,
            closing(DecodedImages(pool, dataset, own, batch_size + threads)) as decoded,
        ):
            for samples in image_batches(decoded, batch_size):
                images = stack_images(samples, device)
                labels = torch.from_numpy(np.stack([s.label for s in samples])).to(device)
                confusion += multiclass_confusion_matrix(
                    predicted_classes(network, images, flip=flip, scales=scales),
                    labels.long(),
                    num_classes=classes,
                    ignore_index=IGNORE_INDEX,
                ).cpu()
                bar.advance(len(samples))
    finally:
        network.train(training)
    if processes > 1:
        on_device = confusion.to(device)
        torch.distributed.all_reduce(on_device)
        confusion = on_device.cpu()
    metrics = Metrics.from_confusion(confusion.numpy(), dataset.class_names)
    return replace(metrics, flip=flip, scales=list(scales))
