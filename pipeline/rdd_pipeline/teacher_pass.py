"""The teacher pass: from images to the maps that one shard of the store holds."""

# Shape suffixes: B batch, C classes, H W image pixels, h w output grid.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from rdd_pipeline.data import IGNORE_INDEX, Sample, SegmentationDataset
from rdd_pipeline.difficulty import prediction_discrepancy, true_class_probability
from rdd_pipeline.errors import NetworkError, NonFiniteError
from rdd_pipeline.evaluate import image_batches, stack_images
from rdd_pipeline.networks import SegmentationNetwork
from rdd_storage import (
    HARDNESS_IGNORED,
    ImageMaps,
    encode_confidence,
    encode_logits,
    hardness_edges,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassOptions:
    """What the teacher pass computes."""

    soft_labels: bool
    """Keep the main head's logits."""
    aux_hardness: bool
    """Keep the hardness under the auxiliary head."""
    batch_size: int
    """Images per forward pass."""
    precision: Literal["no", "bf16", "fp16"] = "no"


def require_auxiliary(network: SegmentationNetwork) -> None:
    """Refuse a teacher without an auxiliary head.

    Raises:
        NetworkError: The prediction discrepancy needs two heads.
    """
    if not network.has_aux:
        raise NetworkError(
            "teacher.network.auxiliary: the prediction discrepancy compares a main and an "
            "auxiliary head, but this teacher has one head; add 'auxiliary: {}'"
        )


@lru_cache(maxsize=4)
def _ascending_edges(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.sort(hardness_edges(8))).to(device)


def hardness_codes(true_prob: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Quantise true-class probabilities on their device.

    The same codes as :func:`rdd_storage.encode_hardness`: the number of bin edges that are not
    below p.

    Args:
        true_prob: (B, H, W) float in [0, 1].
        valid: (B, H, W) bool; False gives the code for ignored pixels.

    Returns:
        (B, H, W) uint8.
    """
    edges = _ascending_edges(true_prob.device)
    codes = len(edges) - torch.bucketize(true_prob, edges)
    return torch.where(valid, codes, HARDNESS_IGNORED).to(torch.uint8)


@torch.no_grad()
def batch_maps(
    network: SegmentationNetwork,
    samples: Sequence[Sample],
    options: PassOptions,
    device: torch.device,
) -> list[ImageMaps]:
    """Evaluate the teacher on images of one size.

    Returns:
        One :class:`rdd_storage.ImageMaps` per image, quantised.

    Raises:
        NonFiniteError: The teacher gave NaN or infinity; names the image.
    """
    images = stack_images(list(samples), device)
    size = (images.shape[-2], images.shape[-1])
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    with torch.autocast(device.type, dtype=dtype, enabled=options.precision != "no"):
        outputs = network(images)
    main_BChw = outputs.main.float()
    if outputs.aux is None:
        require_auxiliary(network)
        raise NetworkError("the teacher's auxiliary head gave no output")
    aux_BChw = outputs.aux.float()
    _require_finite(main_BChw, aux_BChw, samples)

    labels = torch.from_numpy(np.stack([s.label for s in samples])).to(device).long()
    valid = labels != IGNORE_INDEX
    discrepancy = prediction_discrepancy(main_BChw, aux_BChw).cpu().numpy()
    main_BCHW = _upsample(main_BChw, size)
    confidence, prediction = torch.softmax(main_BCHW, dim=1).max(dim=1)
    hardness = hardness_codes(true_class_probability(main_BCHW, labels), valid).cpu().numpy()
    del main_BCHW
    aux_hardness = None
    if options.aux_hardness:
        aux_prob = true_class_probability(_upsample(aux_BChw, size), labels)
        aux_hardness = hardness_codes(aux_prob, valid).cpu().numpy()
    confidences = confidence.cpu().numpy()
    predictions = prediction.to(torch.uint8).cpu().numpy()
    logits = main_BChw.cpu().numpy() if options.soft_labels else None
    return [
        ImageMaps(
            image_id=sample.image_id,
            discrepancy=discrepancy[i],
            hardness=hardness[i],
            aux_hardness=None if aux_hardness is None else aux_hardness[i],
            prediction=predictions[i],
            confidence=encode_confidence(confidences[i]),
            logits=None if logits is None else encode_logits(logits[i]),
            label=sample.label,
        )
        for i, sample in enumerate(samples)
    ]


def shard_maps(
    network: SegmentationNetwork,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    options: PassOptions,
    device: torch.device,
) -> list[ImageMaps]:
    """Evaluate the teacher on the images of one shard, decoding the next batch meanwhile."""
    network.eval()
    maps: list[ImageMaps] = []
    with ThreadPoolExecutor(max_workers=1) as decoder:
        for samples in _prefetched(
            decoder, image_batches(dataset, list(indices), options.batch_size)
        ):
            maps += batch_maps(network, samples, options, device)
    return maps


def _prefetched(
    pool: ThreadPoolExecutor, batches: Iterator[list[Sample]]
) -> Iterator[list[Sample]]:
    pending = pool.submit(next, batches, None)
    while (batch := pending.result()) is not None:
        pending = pool.submit(next, batches, None)
        yield batch


def _upsample(logits_BChw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits_BChw, size, mode="bilinear", align_corners=True)


def _require_finite(
    main_BChw: torch.Tensor, aux_BChw: torch.Tensor, samples: Sequence[Sample]
) -> None:
    for head, logits in (("main", main_BChw), ("auxiliary", aux_BChw)):
        finite = torch.isfinite(logits).flatten(1).all(dim=1).cpu()
        for sample, good in zip(samples, finite.tolist(), strict=True):
            if not good:
                raise NonFiniteError(
                    f"image '{sample.image_id}': the teacher's {head} head gave NaN or infinity; "
                    "check the checkpoint and the input normalisation, or use maps.precision: no"
                )
