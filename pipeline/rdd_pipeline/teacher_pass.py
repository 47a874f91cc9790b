"""The teacher pass: from images to the maps that one shard of the store holds."""

# Shape suffixes: B batch, C classes, H W image pixels, h w output grid, R rows of a band.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline._fused import Bands
from rdd_pipeline.data import IGNORE_INDEX, Sample
from rdd_pipeline.errors import NonFiniteError
from rdd_pipeline.evaluate import stack_images
from rdd_pipeline.networks import SegmentationNetwork
from rdd_pipeline.teacher_batches import BatchLimit, batches_by_size
from rdd_pipeline.teacher_views import TeacherViews, autocast
from rdd_pipeline.teacher_windows import AS_IT_IS, ImageView
from rdd_storage import (
    HARDNESS_IGNORED,
    ImageLogits,
    ImageMaps,
    encode_confidence,
    encode_hardness,
    encode_logits,
    hardness_edges,
)

_WHOLE_ELEMENTS_CPU = 2**20
_WHOLE_ELEMENTS_DEVICE = 2**23
"""Upsampled logits of so many images as stay below this size (4 MB in float32, which the caches
hold, and 32 MB) are made at once; where one image is larger, in bands of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassOptions:
    """What the teacher pass computes."""

    soft_labels: bool
    """Keep the main head's logits."""
    aux_hardness: bool
    """Keep the hardness under the auxiliary logits."""
    batch_size: int | Literal["auto"]
    """Images per forward pass; see :class:`rdd_pipeline.teacher_batches.BatchLimit`."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    discrepancy: str = "heads"
    """How the discrepancy is obtained; see :class:`rdd_pipeline.teacher_views.TeacherViews`."""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Sizes of the image for ``discrepancy="scales"``."""
    view: ImageView = AS_IT_IS
    """Whether windows slide over large images, and what is averaged."""
    logits_only: bool = False
    """Compute nothing but the main head's logits, for stores that have the other maps."""

    def views(self, network: SegmentationNetwork) -> TeacherViews:
        """The teacher as these options have it look at images.

        Raises:
            NetworkError: The teacher cannot give the discrepancy that is asked for.
        """
        return TeacherViews(network, self.discrepancy, self.scales, view=self.view)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelMaps:
    """What a head says at full resolution, (B, H, W) each."""

    confidence: Tensor
    """float32, probability of the most probable class."""
    prediction: Tensor
    """uint8, that class."""
    true_prob: Tensor
    """float32, probability of the label's class; 1 at ignored pixels."""


def pixel_maps(logits_BChw: Tensor, labels_BHW: Tensor) -> PixelMaps:
    """Confidence, prediction and true-class probability from one upsampling.

    ``p = softmax(up(z))``, ``up`` bilinear with ``align_corners=True``. ``true_prob`` is
    :func:`rdd_pipeline.difficulty.true_class_probability` but for rounding in the last places:
    there it is the exponent of the logarithm of the softmax. Where images are upsampled in bands,
    first across and then along, all three differ from ``interpolate`` by rounding as well.

    Args:
        logits_BChw: (B, C, h, w) float32.
        labels_BHW: (B, H, W) int64; classes below C or 255.
    """
    ignored_BHW = labels_BHW == IGNORE_INDEX
    class_BHW = labels_BHW.masked_fill(ignored_BHW, 0)
    confidence_BHW = torch.empty(labels_BHW.shape, device=labels_BHW.device)
    true_prob_BHW = torch.empty_like(confidence_BHW)
    prediction_BHW = torch.empty_like(confidence_BHW, dtype=torch.uint8)
    for probs_BCRW, at in _upsampled_probs(logits_BChw, labels_BHW.shape[1:]):
        confidence_BHW[at], index_BRW = probs_BCRW.max(dim=1)
        prediction_BHW[at] = index_BRW
        true_prob_BHW[at] = probs_BCRW.gather(1, class_BHW[at].unsqueeze(1))[:, 0]
    return PixelMaps(
        confidence=confidence_BHW,
        prediction=prediction_BHW,
        true_prob=true_prob_BHW.masked_fill_(ignored_BHW, 1.0),
    )


def _true_prob(logits_BChw: Tensor, labels_BHW: Tensor) -> Tensor:
    """:attr:`PixelMaps.true_prob` alone."""
    ignored_BHW = labels_BHW == IGNORE_INDEX
    class_BHW = labels_BHW.masked_fill(ignored_BHW, 0)
    true_prob_BHW = torch.empty(labels_BHW.shape, device=labels_BHW.device)
    for probs_BCRW, at in _upsampled_probs(logits_BChw, labels_BHW.shape[1:]):
        true_prob_BHW[at] = probs_BCRW.gather(1, class_BHW[at].unsqueeze(1))[:, 0]
    return true_prob_BHW.masked_fill_(ignored_BHW, 1.0)


def _upsampled_probs(
    logits_BChw: Tensor, size: Sequence[int]
) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
    """Yield probabilities (n, C, R, W) and the (images, rows) where they belong.

    At the size of the images they are by far the largest tensor of the pass, and are never made
    for a whole batch of large images.
    """
    batch, classes = logits_BChw.shape[:2]
    height, width = size
    on_cpu = logits_BChw.device.type == "cpu"
    elements = _WHOLE_ELEMENTS_CPU if on_cpu else _WHOLE_ELEMENTS_DEVICE
    step = elements // (classes * height * width)
    if step == 0:
        for band_BCRW, at in Bands(logits_BChw, height, width):
            yield band_BCRW.softmax(dim=1), at
        return
    for first in range(0, batch, step):
        images = slice(first, first + step)
        upsampled_BCHW = F.interpolate(
            logits_BChw[images], (height, width), mode="bilinear", align_corners=True
        )
        yield upsampled_BCHW.softmax(dim=1), (images, slice(None))


_Made = TypeVar("_Made", ImageMaps, ImageLogits)


class Pending(ABC, Generic[_Made]):
    """Arrays of a batch on their way from the device; :meth:`result` waits and quantises.

    Args:
        samples: The images.
        arrays: What was computed of them, on the device.
        views: All logits that it was computed from, by what gave them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        arrays: Mapping[str, Tensor],
        views: Mapping[str, Tensor],
    ) -> None:
        finite = {
            name: torch.isfinite(logits_BChw).flatten(1).all(dim=1)
            for name, logits_BChw in views.items()
        }
        self._samples = samples
        # A copy that blocked would wait for the next batch's pass too, once that has begun.
        device = next(iter(arrays.values())).device
        on_cuda = device.type == "cuda"
        self._arrays = {k: v.to("cpu", non_blocking=on_cuda) for k, v in arrays.items()}
        self._finite = {k: v.to("cpu", non_blocking=on_cuda) for k, v in finite.items()}
        self._copied = torch.cuda.current_stream(device).record_event() if on_cuda else None

    def result(self) -> list[_Made]:
        """One result per image, quantised.

        Raises:
            NonFiniteError: The teacher gave NaN or infinity; names the image.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self._require_finite()
        return [
            self._image(sample, {name: tensor[i].numpy() for name, tensor in self._arrays.items()})
            for i, sample in enumerate(self._samples)
        ]

    @abstractmethod
    def _image(self, sample: Sample, rows: dict[str, NDArray[Any]]) -> _Made:
        """Quantise what was computed of one image."""

    def _require_finite(self) -> None:
        for view, finite_B in self._finite.items():
            for sample, good in zip(self._samples, finite_B.tolist(), strict=True):
                if not good:
                    raise NonFiniteError(
                        f"image '{sample.image_id}': the teacher's {view} gave NaN or infinity; "
                        "check the checkpoint and the input normalisation, or use "
                        "maps.precision: no"
                    )


class PendingMaps(Pending[ImageMaps]):
    """All maps of a batch."""

    def _image(self, sample: Sample, rows: dict[str, NDArray[Any]]) -> ImageMaps:
        valid = sample.label != IGNORE_INDEX
        for name in {"hardness", "aux_hardness"} & rows.keys():
            if rows[name].dtype != np.uint8:
                rows[name] = encode_hardness(rows[name], valid)
        return ImageMaps(
            image_id=sample.image_id,
            discrepancy=rows["discrepancy"],
            hardness=rows["hardness"],
            aux_hardness=rows.get("aux_hardness"),
            prediction=rows["prediction"],
            confidence=encode_confidence(rows["confidence"]),
            logits=encode_logits(rows["logits"]) if "logits" in rows else None,
            label=sample.label,
        )


class PendingLogits(Pending[ImageLogits]):
    """The main head's logits of a batch."""

    def _image(self, sample: Sample, rows: dict[str, NDArray[Any]]) -> ImageLogits:
        return ImageLogits(image_id=sample.image_id, logits=encode_logits(rows["logits"]))


@torch.no_grad()
def evaluate_batch(
    views: TeacherViews, samples: Sequence[Sample], options: PassOptions, device: torch.device
) -> PendingMaps:
    """Evaluate the teacher on images of one size.

    Raises:
        NetworkError: The teacher cannot give the discrepancy that is asked for.
    """
    images = stack_images(list(samples), device)
    with autocast(device, options.precision):
        outputs = views(images)
    labels_BHW = torch.from_numpy(np.stack([s.label for s in samples])).to(device).long()
    valid_BHW = labels_BHW != IGNORE_INDEX
    pixels = pixel_maps(outputs.main, labels_BHW)
    true_probs = {"hardness": pixels.true_prob}
    if options.aux_hardness and outputs.aux is not None:
        true_probs["aux_hardness"] = _true_prob(outputs.aux, labels_BHW)
    if device.type != "cpu":  # a quarter of the bytes to copy
        true_probs = {name: hardness_codes(p, valid_BHW) for name, p in true_probs.items()}
    arrays = {
        "discrepancy": outputs.discrepancy,
        "prediction": pixels.prediction,
        "confidence": pixels.confidence,
        **true_probs,
    }
    if options.soft_labels:
        arrays["logits"] = outputs.main
    return PendingMaps(samples, arrays, outputs.views)


@torch.no_grad()
def evaluate_logits(
    views: TeacherViews, samples: Sequence[Sample], options: PassOptions, device: torch.device
) -> PendingLogits:
    """The teacher's logits for images of one size: those that :func:`evaluate_batch` gives."""
    images = stack_images(list(samples), device)
    with autocast(device, options.precision):
        main, _, seen = views.heads(images)
    return PendingLogits(samples, {"logits": main}, seen)


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
        NetworkError: The teacher cannot give the discrepancy that is asked for.
    """
    return evaluate_batch(options.views(network), samples, options, device).result()


class PendingShard:
    """Maps of a shard, of which the last are still to be quantised."""

    def __init__(self, places: Sequence[int], batches: Sequence[Future[list[Any]]]) -> None:
        self._places, self._batches = places, batches

    def result(self) -> list[Any]:
        """The maps in the order of the images: :class:`rdd_storage.ImageMaps`, or
        :class:`rdd_storage.ImageLogits` where nothing else is computed.

        Raises:
            NonFiniteError: The teacher gave NaN or infinity; names the image.
        """
        maps = [item for batch in self._batches for item in batch.result()]
        ordered = sorted(zip(self._places, maps, strict=True), key=lambda pair: pair[0])
        return [item for _, item in ordered]


def evaluate_shard(
    views: TeacherViews,
    samples: Iterable[Sample],
    options: PassOptions,
    device: torch.device,
    *,
    limit: BatchLimit,
    quantiser: ThreadPoolExecutor,
) -> PendingShard:
    """Evaluate the teacher on the images of one shard, in batches of equal size.

    Args:
        views: The teacher in evaluation mode.
        samples: The images, which may be decoded as they are taken.
        options: What is computed.
        device: Where.
        limit: Decides the size of a batch, and learns from batches that do not fit.
        quantiser: Quantises a batch while the next one is computed.

    Raises:
        NonFiniteError: The teacher gave NaN or infinity; names the image.
        TeacherMemoryError: One image alone does not fit into the device's memory.
    """
    places: list[int] = []
    batches: list[Future[list[Any]]] = []

    def evaluate(part: Sequence[Sample]) -> Pending[Any]:
        if options.logits_only:
            return evaluate_logits(views, part, options, device)
        return evaluate_batch(views, part, options, device)

    for batch in batches_by_size(iter(samples), limit):
        places += [place for place, _ in batch]
        for pending in limit.run([sample for _, sample in batch], evaluate):
            if batches:
                batches[-1].result()  # no more than one batch waits to be quantised
            batches.append(quantiser.submit(pending.result))
    return PendingShard(places, batches)
