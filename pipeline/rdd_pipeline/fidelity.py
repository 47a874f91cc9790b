"""How far stored maps of whole images are from what the teacher says on each augmented crop.

The published trainer of Relative Difficulty Distillation (arXiv 2407.03719) shows the teacher every
crop. A store holds maps of whole images, of which a crop's part is taken: another estimate of the
same thing. Here both are made for the same crops and compared, and a third, the teacher on the
whole image without a store between, tells what quantisation costs from what the view costs.

Shape suffixes: B crops of a batch, C classes, H W pixels, h w the teacher's output grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from rdd_pipeline._fidelity_figures import (
    ERROR_EDGES,
    Comparison,
    CropFigures,
    FidelityFigures,
    FidelityTally,
    FieldError,
    Figure,
    LogitError,
    MaskDifference,
    Qualities,
    Quality,
    ScaleRange,
)
from rdd_pipeline.build import pass_options, store_identity
from rdd_pipeline.config import RunConfig, StudentConfig, without_pretrained
from rdd_pipeline.data import IGNORE_INDEX, SegmentationDataset
from rdd_pipeline.data.geometry import (
    AXES,
    CropWindow,
    Size,
    covered_points,
    random_crop,
    resample_field,
    source_coordinates,
)
from rdd_pipeline.difficulty import true_class_probability
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.live_teacher import LiveTeacher
from rdd_pipeline.losses import TeacherSignals
from rdd_pipeline.networks import build_network, load_weights, weights_hash
from rdd_pipeline.progress import Reporter
from rdd_pipeline.signals import SignalDecoder
from rdd_pipeline.stream import MapStream, Need
from rdd_pipeline.teacher_views import TeacherViews, autocast
from rdd_storage import MapReader

__all__ = [
    "ERROR_EDGES",
    "Comparison",
    "CropFigures",
    "Example",
    "Fidelity",
    "FidelityFigures",
    "FidelitySettings",
    "FidelityTally",
    "FieldError",
    "Figure",
    "LogitError",
    "MaskDifference",
    "Measurement",
    "Qualities",
    "Quality",
    "ScaleRange",
    "choose_student",
    "measure_fidelity",
]

_EXAMPLES = 3
# Second word of the random seeds; the stream's order and crops have 0 and 1.
_CROP = 2

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelitySettings:
    """What decided the figures, besides store and teacher."""

    student: str
    """Whose training settings were used."""
    rdd: str
    """Where threshold and min_kept come from."""
    threshold: float
    min_kept: int | float
    batch_size: int
    """Crops per batch; hard masks are those of a batch."""
    crop_size: tuple[int, int]
    scale: tuple[float, float]
    flip: float
    seed: int
    precision: str
    """Of the teacher's forward pass, on crops as on whole images: that of the store."""
    discrepancy: str
    """The discrepancy's definition."""
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """A measurement, as far as it goes into JSON."""

    store: str
    fingerprint: str
    store_version: int
    dataset: str
    settings: FidelitySettings
    figures: FidelityFigures
    image_ids: tuple[str, ...]
    """The image of each crop."""
    scales: tuple[float, ...]
    """The scale of each crop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One crop, to be looked at."""

    image_id: str
    scale: float
    image: NDArray[np.uint8]
    """RGB (H, W, 3)."""
    labelled: NDArray[np.bool_]
    """(H, W); False where ignored, padding included."""
    covered: NDArray[np.bool_]
    """(H, W); False in padding."""
    weight_stored: NDArray[np.float32]
    weight_on_crop: NDArray[np.float32]
    hard_stored: NDArray[np.bool_]
    hard_on_crop: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A measurement with what its charts are drawn from."""

    fidelity: Fidelity
    tally: FidelityTally
    examples: tuple[Example, ...]
    """Crops of a small, a middling and a large scale, chosen before anything was measured."""


def choose_student(config: RunConfig, name: str | None) -> StudentConfig:
    """The student whose crops and hard masks are measured: by name, or the first with ``rdd``.

    Raises:
        ConfigError: There is no student of that name.
    """
    if name is None:
        return next((s for s in config.students if "rdd" in s.method), config.students[0])
    for student in config.students:
        if student.name == name:
            return student
    names = ", ".join(student.name for student in config.students)
    raise ConfigError(f"--student {name}: expected one of {names}; name one, or leave it out")


@torch.no_grad()
def measure_fidelity(
    config: RunConfig,
    student: StudentConfig,
    dataset: SegmentationDataset,
    store: str,
    weights: Path,
    *,
    crops: int,
    device: torch.device,
    reporter: Reporter,
    seed: int = 0,
    digests: Sequence[str] | None = None,
) -> Measurement:
    """Compare stored maps with the teacher on random crops, in batches as in training.

    Ignored pixels and padding count nowhere. The teacher runs in evaluation mode and in the
    store's precision.

    Args:
        config: The run: its teacher and maps are those of the store.
        student: Whose crops (size, scale, flip, batch) and hard masks to take.
        dataset: The data set the store was built from.
        store: Path or URL of the store.
        weights: The teacher's weights.
        crops: How many crops at least; whole batches are measured.
        device: Of the teacher and the figures.
        reporter: Where progress is shown.
        seed: Of the crops, 0 or more.
        digests: Of the data set's images, if they are known already.

    Raises:
        StoreMismatchError: The store was built by another teacher, from other data or settings.
        StoreIncompleteError: The store is not built to the end.
        ConfigError: Fewer than one crop, or a negative seed.
    """
    if crops < 1:
        raise ConfigError(f"crops: expected at least 1, got {crops}")
    training = config.student_training(student)
    reader = MapReader(store)
    network = build_network(without_pretrained(config.teacher.network), dataset.num_classes)
    load_weights(network, weights)
    needs = _stored_needs(reader)
    grid_size = network.grid_size(*training.crop_size)
    batches = -(-crops // training.batch_size)
    stream = MapStream(
        dataset=dataset,
        reader=reader,
        crop_size=training.crop_size,
        scale=training.scale,
        flip=training.flip,
        seed=seed,
        length=batches * training.batch_size,
        needs=needs,
        grid_size=grid_size,
        mark_padding=True,
        identity=store_identity(
            dataset, config.teacher.network, weights_hash(network), config.maps
        ),
        allow_missing=config.student.allow_missing,
        digests=digests,
    )
    network.to(device)
    views = TeacherViews(network, config.maps.discrepancy, config.maps.scales)
    precision = config.maps.precision
    on_crop = LiveTeacher(views, needs=needs, grid_size=grid_size, precision=precision)
    # As the pass of this store looks at whole images: in windows, averaged.
    as_stored = pass_options(config.maps).views(network)
    whole = _WholeImageTeacher(as_stored, needs, grid_size, precision, device)
    decode = SignalDecoder(reader.schema.hardness_bits)
    tally = FidelityTally(
        class_names=dataset.class_names,
        threshold=student.rdd.threshold,
        min_kept=student.rdd.min_kept,
        scale=training.scale,
    )
    plan = [_draw(stream, k) for k in range(len(stream))]
    scales = [window.scaled_size[0] / window.source_size[0] for _, window in plan]
    shown = _spread(scales)
    examples: dict[int, Example] = {}
    size = training.batch_size

    def load(number: int) -> list[dict[str, Tensor]]:
        return [stream.sample(*crop) for crop in plan[number * size : (number + 1) * size]]

    with reporter.bar("compare on crops", len(plan), "crops") as bar:
        for number, samples in enumerate(_ahead(load, batches)):
            first = number * size
            batch = {key: value.to(device) for key, value in default_collate(samples).items()}
            stored, live = decode(batch), on_crop(batch)
            masks = tally.add(
                batch["label"],
                stored=stored,
                on_crop=live,
                whole=whole(dataset, plan[first : first + size]),
                scales=scales[first : first + size],
            )
            for k in shown.intersection(range(first, first + size)):
                examples[k] = _example(dataset, *plan[k], k - first, batch, (stored, live), masks)
            bar.advance(size)
    has_rdd = "rdd" in student.method
    return Measurement(
        fidelity=Fidelity(
            store=store,
            fingerprint=reader.fingerprint,
            store_version=reader.version,
            dataset=f"{dataset.name} {dataset.split}",
            settings=FidelitySettings(
                student=student.name,
                rdd=f"student {student.name}" if has_rdd else "defaults of rdd",
                threshold=student.rdd.threshold,
                min_kept=student.rdd.min_kept,
                batch_size=size,
                crop_size=training.crop_size,
                scale=training.scale,
                flip=training.flip,
                seed=seed,
                precision=precision,
                discrepancy=views.definition,
                device=str(device),
            ),
            figures=tally.figures(),
            image_ids=tuple(dataset.image_ids[index] for index, _ in plan),
            scales=tuple(scales),
        ),
        tally=tally,
        examples=tuple(examples[k] for k in sorted(examples, key=scales.__getitem__)),
    )


class _WholeImageTeacher:
    """The third estimate: what the store would say if it were not quantised."""

    def __init__(
        self,
        views: TeacherViews,
        needs: Sequence[Need],
        grid_size: Size,
        precision: str,
        device: torch.device,
    ) -> None:
        self._views, self._needs, self._grid_size = views, needs, grid_size
        self._precision, self._device = precision, device

    def __call__(
        self, dataset: SegmentationDataset, crops: Sequence[tuple[int, CropWindow]]
    ) -> TeacherSignals:
        """Signals of crops, from the teacher's view of their whole images."""
        found = [self._resampled(dataset, *crop) for crop in crops]
        stacked = {
            name: torch.from_numpy(np.stack([signals[name] for signals in found])).to(self._device)
            for name in found[0]
        }
        return TeacherSignals(
            weight=stacked["weight"],
            true_prob=stacked["true_prob"],
            aux_true_prob=stacked.get("aux_true_prob"),
            logits=stacked.get("logits"),
        )

    def _resampled(
        self, dataset: SegmentationDataset, index: int, window: CropWindow
    ) -> dict[str, NDArray[np.float32]]:
        sample = dataset[index]
        image_13HW = (
            torch.from_numpy(np.array(sample.image)).to(self._device).permute(2, 0, 1)[None]
        )
        label_1HW = torch.from_numpy(np.array(sample.label)).to(self._device)[None]
        with autocast(self._device, self._precision):
            outputs = self._views(image_13HW)
        grid = (outputs.main.shape[2], outputs.main.shape[3])
        signals = {
            # Exponent before interpolation, as for stored maps.
            "weight": resample_field(
                torch.exp(-outputs.discrepancy[0]).cpu().numpy(), window, grid, fill=1.0
            ),
            "true_prob": _nearest(true_class_probability(outputs.main, label_1HW)[0], window),
        }
        if "aux_true_prob" in self._needs and outputs.aux is not None:
            signals["aux_true_prob"] = _nearest(
                true_class_probability(outputs.aux, label_1HW)[0], window
            )
        if "logits" in self._needs:
            signals["logits"] = resample_field(
                outputs.main[0].cpu().numpy(), window, grid, points=self._grid_size
            )
        return signals


def _nearest(prob_HW: Tensor, window: CropWindow) -> NDArray[np.float32]:
    """What :func:`rdd_pipeline.data.geometry.crop_nearest` does with codes, 1 in the padding."""
    places = (source_coordinates(window, axis)[0] for axis in AXES)
    nearest = (np.floor(place + 0.5).astype(np.intp) for place in places)
    crop: NDArray[np.float32] = prob_HW.cpu().numpy()[np.ix_(*nearest)]
    crop[~covered_points(window)] = 1.0
    return crop


def _stored_needs(reader: MapReader) -> tuple[Need, ...]:
    optional: dict[str, Need] = {"aux_hardness": "aux_true_prob", "logits": "logits"}
    held = (need for array, need in optional.items() if array in reader.arrays)
    return ("weight", "true_prob", *held)


def _draw(stream: MapStream, k: int) -> tuple[int, CropWindow]:
    """Image and crop at a position, drawn as the stream draws its own."""
    index = stream.image_index(k)
    return index, random_crop(
        np.random.default_rng([stream.seed, _CROP, k]),
        source_size=stream.dataset.size(index),
        crop_size=stream.crop_size,
        scale=stream.scale,
        flip=stream.flip,
    )


def _spread(scales: Sequence[float]) -> set[int]:
    """Positions of a small, a middling and a large scale."""
    order = np.argsort(scales, kind="stable")
    return {int(order[(2 * i + 1) * len(order) // (2 * _EXAMPLES)]) for i in range(_EXAMPLES)}


def _ahead(make: Callable[[int], Result], count: int) -> Iterator[Result]:
    """``make(0)`` to ``make(count - 1)``, each made while the one before is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, 0)
        for number in range(1, count + 1):
            made = pending.result()
            if number < count:
                pending = pool.submit(make, number)
            yield made


def _example(
    dataset: SegmentationDataset,
    index: int,
    window: CropWindow,
    place: int,
    batch: dict[str, Tensor],
    estimates: tuple[TeacherSignals, TeacherSignals],
    masks: tuple[Tensor, Tensor],
) -> Example:
    weights = []
    for estimate in estimates:
        assert estimate.weight is not None  # every store has discrepancies
        weights.append(estimate.weight[place].float().cpu().numpy())
    return Example(
        image_id=dataset.image_ids[index],
        scale=window.scaled_size[0] / window.source_size[0],
        image=batch["image"][place].permute(1, 2, 0).cpu().numpy(),
        labelled=(batch["label"][place] != IGNORE_INDEX).cpu().numpy(),
        covered=covered_points(window),
        weight_stored=weights[0],
        weight_on_crop=weights[1],
        hard_stored=masks[0][place].cpu().numpy(),
        hard_on_crop=masks[1][place].cpu().numpy(),
    )
