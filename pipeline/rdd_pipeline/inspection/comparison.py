"""Two stores of the same images beside each other, and a student beside its teacher's store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.inspection.correlation import kendall_from_counts, spearman_from_counts
from rdd_pipeline.inspection.errors import EmptySelectionError, InspectionError
from rdd_pipeline.inspection.image import require_array
from rdd_pipeline.inspection.images import SourceImages
from rdd_pipeline.inspection.measures import HARDNESS, THRESHOLD, TRUE_PROB, discrepancy_centres
from rdd_pipeline.inspection.pixels import over_images
from rdd_pipeline.inspection.summary import Progress
from rdd_pipeline.inspection.text import MOST_LINES, text_table
from rdd_storage import MapReader, confidence_table, encode_hardness, hardness_codec
from rdd_storage.statistics import nearest_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Quantity = Literal["hardness", "discrepancy", "confidence"]
Joint = NDArray[np.int64]

QUANTITIES: Mapping[str, NDArray[np.float64]] = {
    "hardness": HARDNESS,
    "discrepancy": discrepancy_centres(),
    "confidence": confidence_table()[:255].astype(np.float64),
}
"""What can be compared, with the value of each bin: hardness and confidence in [0, 1], discrepancy
in nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageChange:
    """How one image differs between two stores, over the pixels that both have."""

    image_id: str
    pixels: int
    mean_a: float
    mean_b: float
    mean_absolute: float
    """Mean of \\|b - a\\|."""
    spearman: float
    """Rank correlation within the image; NaN where either is constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreComparison:
    """One quantity in two stores, pixel by pixel; grid point by grid point for discrepancies."""

    quantity: Quantity
    path_a: str
    path_b: str
    joint: Joint
    """(K, K): pixels by bin in ``a`` (rows) and in ``b`` (columns)."""
    values: NDArray[np.float64]
    """(K,): value of each bin."""
    spearman: float
    """Spearman's rank correlation over all pixels, exact; NaN where either is constant."""
    kendall: float
    """Kendall's tau-b over all pixels, exact."""
    mean_absolute: float
    """Mean of \\|b - a\\| over all pixels."""
    bias: float
    """Mean of b - a over all pixels."""
    images: tuple[ImageChange, ...]
    """Those that changed most first."""
    changed_files: tuple[str, ...]
    """Images left out because the two stores were built from different files of that name."""
    only_a: int
    """Images that ``b`` does not have."""
    only_b: int
    readers: tuple[MapReader, MapReader] = field(repr=False)

    def __repr__(self) -> str:
        title = (
            f"StoreComparison: {self.quantity}, {len(self.images)} images; a is {self.path_a}, "
            f"b is {self.path_b}\n  Spearman {self.spearman:.4f}, Kendall {self.kendall:.4f}, mean "
            f"|b - a| {self.mean_absolute:.4g}, mean b - a {self.bias:.4g}"
        )
        first = [_as_dict(image) for image in self.images[:MOST_LINES]]
        return text_table(title, first, ImageChange.__slots__, total=len(self.images))

    def difference(self, image_id: str) -> NDArray[np.float32]:
        """``b - a`` of one image: (H, W), or (h, w) of ``a``'s grid; NaN where either has none.

        Raises:
            UnknownImageError: A store has no such image.
        """
        first, second, known = _codes(*self.readers, self.quantity, image_id)
        values = self.values.astype(np.float32)
        result = np.full(first.shape, np.nan, np.float32)
        result[known] = values[second[known]] - values[first[known]]
        return result

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each image, those that changed most first."""
        return [_as_dict(image) for image in self.images]

    def figure(self, images: int = 3) -> Figure:
        """The joint histogram, and the difference maps of the images that changed most."""
        from rdd_pipeline.inspection.figures import comparison_figure

        return comparison_figure(self, images)

    def _repr_html_(self) -> str:
        from rdd_pipeline.inspection.html import comparison_html

        return comparison_html(self)


def compare_stores(
    a: MapReader,
    b: MapReader,
    *,
    quantity: Quantity = "hardness",
    images: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> StoreComparison:
    """Compare one quantity of two stores; see :meth:`Maps.compare`."""
    _check_quantity(quantity, a, b)
    for image_id in images or ():
        a.record(image_id)
        b.record(image_id)
    in_b = frozenset(b.image_ids)
    both = [name for name in a.image_ids if name in in_b]
    wanted = both if images is None else list(dict.fromkeys(images))
    changed = tuple(name for name in wanted if a.record(name).digest != b.record(name).digest)
    chosen = [name for name in wanted if name not in frozenset(changed)]
    if not chosen:
        raise EmptySelectionError(
            f"expected images that are in {a.path} and in {b.path}, got none "
            f"({len(changed)} of the same name were built from different files); compare stores "
            "of one data set"
        )
    values = QUANTITIES[quantity]
    joint = np.zeros((len(values), len(values)), np.int64)
    found = []
    for part in over_images(_JointCounter(a, b, quantity), chosen, progress=progress):
        for counts, change in part:
            joint += counts
            found.append(change)
    found.sort(key=lambda change: -np.nan_to_num(change.mean_absolute, nan=-1.0))
    _, _, mean_absolute, bias = _means(joint, values)
    return StoreComparison(
        quantity=quantity,
        path_a=a.path,
        path_b=b.path,
        joint=joint,
        values=values,
        spearman=spearman_from_counts(joint),
        kendall=kendall_from_counts(joint),
        mean_absolute=mean_absolute,
        bias=bias,
        images=tuple(found),
        changed_files=changed,
        only_a=len(a.image_ids) - len(both),
        only_b=len(b.image_ids) - len(both),
        readers=(a, b),
    )


@dataclass(frozen=True)
class _JointCounter:
    """Joint histogram and figures of one image. Picklable."""

    a: MapReader
    b: MapReader
    quantity: Quantity

    def __call__(self, image_id: str) -> tuple[Joint, ImageChange]:
        first, second, known = _codes(self.a, self.b, self.quantity, image_id)
        values = QUANTITIES[self.quantity]
        joint = joint_histogram(first[known], second[known], len(values))
        mean_a, mean_b, mean_absolute, _ = _means(joint, values)
        change = ImageChange(
            image_id=image_id,
            pixels=int(joint.sum()),
            mean_a=mean_a,
            mean_b=mean_b,
            mean_absolute=mean_absolute,
            spearman=spearman_from_counts(joint),
        )
        return joint, change


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentStep:
    """A student at one checkpoint against the store's teacher, over labelled pixels."""

    iteration: int | None
    """None for the final weights."""
    joint: Joint = field(repr=False)
    """(251, 251): pixels by the teacher's hardness code (rows) and the student's (columns)."""
    spearman: float
    kendall: float
    student_mean: float
    """Mean hardness for the student."""
    teacher_mean: float
    student_alone: float
    """Share of pixels with p <= 0.7 for the student alone: what it has yet to learn."""
    teacher_alone: float
    """Share of pixels with p <= 0.7 for the teacher alone."""
    relative: float
    """Share of pixels with p <= 0.7 for one of the two alone: the relative difficulty mask."""
    both: float
    """Share of pixels with p <= 0.7 for both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentHistory:
    """How a student's difficulty moves against its teacher's during the training."""

    student: str
    store: str
    image_ids: tuple[str, ...]
    steps: tuple[StudentStep, ...]
    """In order of the iterations, the final weights last."""

    def __repr__(self) -> str:
        title = f"StudentHistory: {self.student} beside {self.store}, {len(self.image_ids)} images"
        rows = self.table()
        columns = [name for name in StudentStep.__slots__ if name != "joint"]
        return text_table(title, rows[-MOST_LINES:], columns, total=len(rows))

    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each checkpoint, without the histograms."""
        return [
            {name: value for name, value in _as_dict(step).items() if name != "joint"}
            for step in self.steps
        ]

    def figure(self) -> Figure:
        """Correlation and relative difficulty over the checkpoints."""
        from rdd_pipeline.inspection.figures import history_figure

        return history_figure(self)


def student_history(
    reader: MapReader,
    source: SourceImages,
    trained: Path,
    *,
    checkpoints: Sequence[Path] | None = None,
    images: Sequence[str] | int = 16,
    device: str = "cpu",
    progress: Progress | None = None,
) -> StudentHistory:
    """A student against its teacher over checkpoints; see :meth:`Maps.student_history`."""
    import torch

    from rdd_pipeline.difficulty import true_class_probability
    from rdd_pipeline.export import load_trained

    source.require("the student's difficulty")
    if isinstance(images, int):
        if images < 1:
            raise EmptySelectionError(f"images: expected at least 1, got {images}")
        places = np.linspace(0, len(reader.image_ids) - 1, min(images, len(reader.image_ids)))
        chosen = [reader.image_ids[round(place)] for place in places]
    else:
        chosen = [reader.record(name).image_id for name in images]
    if not chosen:
        raise EmptySelectionError("images: expected at least one, got none; choose some")
    network = load_trained(trained, device).network
    steps = []
    for iteration, weights in _weights_over_time(trained, checkpoints):
        _load_checkpoint(network, weights)
        joint = np.zeros((251, 251), np.int64)
        for image_id in chosen:
            sample = source.sample(image_id)
            label_1HW = torch.from_numpy(np.array(sample.label)).to(device)[None]
            image_1HWC = torch.from_numpy(np.array(sample.image)).to(device)[None]
            with torch.inference_mode():
                logits = network(image_1HWC.permute(0, 3, 1, 2)).main
                prob = true_class_probability(logits, label_1HW)[0].float().cpu().numpy()
            valid = sample.label != 255
            own = encode_hardness(prob, valid)
            codes: NDArray[Any] = reader.read("hardness", image_id)
            teacher = codes >> (reader.schema.hardness_bits - 8)
            joint += joint_histogram(teacher[valid], own[valid], 251)
            if progress is not None:
                progress(1)
        steps.append(_student_step(iteration, joint))
    return StudentHistory(
        student=str(trained), store=reader.path, image_ids=tuple(chosen), steps=tuple(steps)
    )


def joint_histogram(first: NDArray[Any], second: NDArray[Any], bins: int) -> Joint:
    """int64 (bins, bins): how often each pair of bins comes together."""
    places = first.astype(np.int64) * bins + second
    return np.bincount(places.reshape(-1), minlength=bins * bins).reshape(bins, bins)


def _student_step(iteration: int | None, joint: Joint) -> StudentStep:
    teacher_mean, student_mean, _, _ = _means(joint, HARDNESS)
    total = max(int(joint.sum()), 1)
    # float32(0.7) is an edge of the codes: the counts are exact.
    hard = np.less_equal(TRUE_PROB, np.float32(THRESHOLD))
    student_alone = int(joint[~hard][:, hard].sum()) / total
    teacher_alone = int(joint[hard][:, ~hard].sum()) / total
    return StudentStep(
        iteration=iteration,
        joint=joint,
        spearman=spearman_from_counts(joint),
        kendall=kendall_from_counts(joint),
        student_mean=student_mean,
        teacher_mean=teacher_mean,
        student_alone=student_alone,
        teacher_alone=teacher_alone,
        relative=student_alone + teacher_alone,
        both=int(joint[hard][:, hard].sum()) / total,
    )


def _weights_over_time(
    trained: Path, checkpoints: Sequence[Path] | None
) -> Iterator[tuple[int | None, Path]]:
    """Iteration and file of each checkpoint, then the final weights."""
    from rdd_pipeline.training_state import snapshot_folders

    if checkpoints is None:
        # The last checkpoint of a finished training has its final weights.
        checkpoints = snapshot_folders(trained)
        checkpoints = checkpoints or [p for p in trained.glob("checkpoints/*") if p.name.isdigit()]
    for path in sorted(checkpoints, key=lambda path: path.name):
        if not path.name.isdigit():
            raise InspectionError(
                f"{path}: expected the folder of a snapshot or checkpoint, named by its iteration"
            )
        snapshot = path / "weights.safetensors"
        yield int(path.name), snapshot if snapshot.exists() else path / "model.safetensors"
    yield None, trained / "weights.safetensors"


def _load_checkpoint(network: Any, path: Path) -> None:
    """Load a training's checkpoint, which may hold parts of the loss beside the network."""
    from rdd_pipeline.errors import CheckpointError
    from rdd_pipeline.networks.weights import load_state

    state = load_state(path)
    wanted = network.state_dict()
    if state.keys().isdisjoint(wanted):  # a student with feature taps is a module of its own
        state = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise CheckpointError(
            f"{path}: expected the weights of this student, got a checkpoint without "
            f"{missing[0]} ({len(missing)} missing); give checkpoints of the same training"
        )
    network.load_state_dict({name: state[name] for name in wanted})


def _check_quantity(quantity: str, *readers: MapReader) -> None:
    if quantity not in QUANTITIES:
        raise InspectionError(
            f"quantity: expected one of {', '.join(QUANTITIES)}, got {quantity!r}"
        )
    for reader in readers:
        require_array(reader, quantity)


def _codes(
    a: MapReader, b: MapReader, quantity: Quantity, image_id: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Bins of both, in ``a``'s coordinates, and where both have a value."""
    first: NDArray[Any] = a.read(quantity, image_id)
    second: NDArray[Any] = b.read(quantity, image_id)
    if quantity == "discrepancy":
        # Grids of other strides span the same image corner to corner: the nearest points.
        places = (
            nearest_pixels(mine, other)
            for mine, other in zip(first.shape, second.shape, strict=True)
        )
        bins = [part.view(np.uint16) >> 7 for part in (first, second[np.ix_(*places)])]
        return bins[0], bins[1], np.ones(first.shape, np.bool_)
    if quantity == "confidence":
        return first, second, np.ones(first.shape, np.bool_)
    known = np.ones(first.shape, np.bool_)
    codes = []
    for reader, part in ((a, first), (b, second)):
        known &= part != hardness_codec(reader.schema.hardness_bits).ignored
        codes.append(part >> (reader.schema.hardness_bits - 8))
    return codes[0], codes[1], known


def _means(joint: Joint, values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Means of a, of b, of |b - a| and of b - a; NaN without pixels."""
    total = int(joint.sum())
    if not total:
        return (float("nan"),) * 4
    weights = joint / total
    gap = values[None, :] - values[:, None]
    first, second = float(weights.sum(1) @ values), float(weights.sum(0) @ values)
    return first, second, float((weights * np.abs(gap)).sum()), second - first


def _as_dict(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}
