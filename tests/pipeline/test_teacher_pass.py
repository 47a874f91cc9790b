"""The teacher pass on images of all sizes: windows, averaging, batches, memory, overlap."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rdd_pipeline.build import ShardBuilder, ShardTask, build_maps, pass_options, store_identity
from rdd_pipeline.config import MapsConfig, RunConfig, parse_config
from rdd_pipeline.data import IGNORE_INDEX, Sample, build_dataset
from rdd_pipeline.difficulty import (
    entropy_discrepancy,
    prediction_discrepancy,
    true_class_probability,
)
from rdd_pipeline.errors import ConfigError, NetworkError, NonFiniteError
from rdd_pipeline.networks import SegLogits, SegmentationNetwork, build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.teacher_batches import BatchLimit, TeacherMemoryError, batches_by_size
from rdd_pipeline.teacher_check import compare_with_teacher
from rdd_pipeline.teacher_pass import (
    PassOptions,
    PendingShard,
    batch_maps,
    evaluate_shard,
    pixel_maps,
)
from rdd_pipeline.teacher_views import TeacherViews
from rdd_pipeline.teacher_windows import ImageView, axis_windows
from rdd_storage import ImageMaps, MapReader, MapWriter, fingerprint, verify_store
from tiny import tiny_config, tiny_tree

QUIET = Reporter(quiet=True)
CPU = torch.device("cpu")
CLASSES = 4


class ColourNetwork(SegmentationNetwork):
    """Both heads' logits from the colours alone, at a stride; 3 x 3 of them where asked."""

    def __init__(self, stride: int = 1, kernel: int = 1) -> None:
        super().__init__(num_classes=CLASSES, divisor=stride, mean=(0.5,) * 3, std=(0.2,) * 3)
        self.stride = stride
        torch.manual_seed(0)
        self.colours = nn.Conv2d(3, CLASSES, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(3, CLASSES, kernel, padding=kernel // 2)
        self.measure()
        self.eval().requires_grad_(False)

    @property
    def has_aux(self) -> bool:
        return True

    @property
    def encoder_module(self) -> nn.Module:
        return self.colours

    @property
    def classifier_names(self) -> tuple[str, ...]:
        return ("colours.weight", "colours.bias")

    def raw_logits(self, x: Tensor) -> SegLogits:
        if self.stride > 1:
            x = resized(x, (x.shape[-2] // self.stride, x.shape[-1] // self.stride))
        return SegLogits(self.colours(x), self.second(x))


class SmallMemory(ColourNetwork):
    """Refuses batches of more pixels than it is given room for, as a device or the CPU does."""

    def __init__(self, pixels: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.pixels, self.error = pixels, error
        self.batches: list[int] = []
        self.refused: list[int] = []

    def forward(self, images: Tensor) -> SegLogits:
        batch, _, height, width = images.shape
        if batch * height * width > self.pixels:
            self.refused.append(batch)
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        self.batches.append(batch)
        return super().forward(images)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def noise(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).to(torch.uint8)


def samples_of(*sizes: tuple[int, int]) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            image_id=f"image{number}",
            image=rng.integers(0, 256, (*size, 3), np.uint8),
            label=rng.choice(np.array([*range(CLASSES), IGNORE_INDEX], np.uint8), size),
        )
        for number, size in enumerate(sizes)
    ]


def run_shard(
    network: SegmentationNetwork, samples: Iterable[Sample], maps: MapsConfig
) -> list[ImageMaps]:
    options = pass_options(maps)
    with ThreadPoolExecutor(1) as quantiser:
        return evaluate_shard(
            options.views(network.eval()), samples, options, CPU,
            limit=BatchLimit(options.batch_size, maps.shard_images, CPU), quantiser=quantiser,
        ).result()  # fmt: skip


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    """A small trained network's stand-in: random weights, heads of distinct logits."""
    config = tiny_config(Path("unused"))
    built = build_network(config.teacher.network, 8, seed=3).eval().requires_grad_(False)
    with torch.no_grad():
        for head in (built.segmentation_head, built.auxiliary_head):
            for parameter in head.parameters():
                parameter.mul_(3.0)
    return built


# -- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window", "grid", "window_grid"),
    [(97, 32, 97, 32), (96, 32, 24, 8), (100, 33, 13, 5), (48, 48, 6, 6), (200, 16, 3, 1)],
)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_shares_of_a_point_sum_to_one(
    size: int, window: int, grid: int, window_grid: int, overlap: float
) -> None:
    windows = axis_windows(size, window, overlap, grid, window_grid)
    total = torch.zeros(grid)
    for one in windows:
        share = one.blend.sum(dim=1)
        assert (share > 0).all()
        total[one.points] += share
    torch.testing.assert_close(total, torch.ones(grid), atol=1e-6, rtol=0)
    if grid > size // window:  # no window falls between two points: they cover all pixels
        edges = [(one.pixels.start, one.pixels.stop) for one in windows]
        assert (edges[0][0], edges[-1][1]) == (0, size)
        least = math.floor(overlap * window)
        assert all(a[1] - b[0] >= least for a, b in itertools.pairwise(edges))


def test_a_window_that_covers_the_image_changes_nothing(network: SegmentationNetwork) -> None:
    images = noise(2, 48, 83)
    whole = TeacherViews(network)(images)
    sliding = TeacherViews(network, view=ImageView(window=(48, 96)))(images)
    assert torch.equal(whole.main, sliding.main)
    assert torch.equal(whole.discrepancy, sliding.discrepancy)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("window", [(16, 24), (45, 20), (13, 64)])
def test_windows_do_not_matter_to_a_network_that_sees_single_pixels(
    window: tuple[int, int], overlap: float
) -> None:
    """At stride 1 any image; at a stride one that is linear in its places, as are its logits."""
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, 45), torch.linspace(0, 1, 61), indexing="ij"
    )
    ramp = torch.stack([rows, columns, 0.5 * rows + 0.3 * columns])[None]
    for stride, images in ((1, noise(2, 45, 61)), (4, ramp)):
        teacher = ColourNetwork(stride)
        for kind in ("heads", "module:second", "entropy", "flip"):
            whole = TeacherViews(teacher, kind)(images)
            view = ImageView(window=window, overlap=overlap)
            sliding = TeacherViews(teacher, kind, view=view)(images)
            assert sliding.main.shape[-2:] == teacher.grid_size(45, 61)
            torch.testing.assert_close(sliding.main, whole.main, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sliding.discrepancy, whole.discrepancy, atol=1e-5, rtol=1e-4)
            if whole.aux is not None:
                torch.testing.assert_close(sliding.aux, whole.aux, atol=1e-5, rtol=1e-5)


def test_windows_are_blended_by_the_distance_to_their_borders() -> None:
    """Against a sum over windows and pixels, for a network that sees the borders it is given."""
    teacher = ColourNetwork(kernel=3)
    images = noise(1, 20, 40)
    outputs = TeacherViews(teacher, view=ImageView(window=(20, 24), overlap=1 / 3))(images)
    total, weights = torch.zeros(1, CLASSES, 20, 40), torch.zeros(40)
    for start in (0, 16):
        logits = teacher(images[..., start : start + 24]).main
        for column in range(24):
            weight = min(column + 1, 24 - column)
            total[..., start + column] += weight * logits[..., column]
            weights[start + column] += weight
    torch.testing.assert_close(outputs.main, total / weights, atol=1e-5, rtol=1e-5)
    assert (outputs.main - teacher(images).main).abs().max() > 0.01  # the borders are seen
    assert outputs.aux is not None
    torch.testing.assert_close(
        outputs.discrepancy, prediction_discrepancy(outputs.main, outputs.aux)
    )


def test_scaled_views_slide_too(network: SegmentationNetwork) -> None:
    images, view = noise(1, 48, 80), ImageView(window=(48, 80))
    outputs = TeacherViews(network, "scales", (1.0, 2.0), view=view)(images)
    large = resized(images / 255.0, (96, 160))
    expected = TeacherViews(network, "entropy", view=view)(large).main
    torch.testing.assert_close(outputs.views["view at scale 2.0"], expected)


# -- averaging -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "module:auxiliary_head", "entropy"])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5)])
def test_averaging_is_the_mean_of_the_probabilities(
    network: SegmentationNetwork, kind: str, scales: tuple[float, ...]
) -> None:
    images = noise(2, 48, 83)
    view = ImageView(flip=True, scales=scales)
    outputs = TeacherViews(network, kind, view=view)(images)
    mean = {0: torch.zeros(()), 1: torch.zeros(())}
    for scale in scales:
        scaled = resized(images / 255.0, (round(48 * scale), round(83 * scale)))
        for heads, mirrored in ((network(scaled), False), (network(scaled.flip(-1)), True)):
            for head, logits in enumerate(heads):
                probs = logits.softmax(1).flip(-1) if mirrored else logits.softmax(1)
                mean[head] = mean[head] + resized(probs, network.grid_size(48, 83))
    main, aux = (total / (2 * len(scales)) for total in mean.values())
    torch.testing.assert_close(outputs.main.exp(), main, atol=1e-5, rtol=1e-4)
    if kind == "entropy":
        assert outputs.aux is None
        expected = entropy_discrepancy(main.log())
    else:
        assert outputs.aux is not None
        torch.testing.assert_close(outputs.aux.exp(), aux, atol=1e-5, rtol=1e-4)
        expected = prediction_discrepancy(main.log(), aux.log())
    torch.testing.assert_close(outputs.discrepancy, expected, atol=1e-5, rtol=1e-3)
    assert len(outputs.views) == 2 * len(scales) * (1 if kind == "entropy" else 2)


def test_averaging_and_windows_go_together() -> None:
    images = noise(1, 40, 60)
    view = ImageView(window=(24, 32), flip=True)
    outputs = TeacherViews(ColourNetwork(), view=view)(images)
    expected = TeacherViews(ColourNetwork(), view=ImageView(flip=True))(images)
    torch.testing.assert_close(outputs.main, expected.main, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.discrepancy, expected.discrepancy, atol=1e-5, rtol=1e-4)


class _BreaksOn(nn.Module):
    """Passes logits on, but for one call, where the second image gets an infinity."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.number:
            logits = logits.clone()
            logits[1, 0, 0, 0] = -math.inf
        return logits


@pytest.mark.parametrize(
    ("maps", "number", "view"),
    [
        ({"view": "sliding", "window": [16, 16]}, 2, "main head gave"),
        ({"averaging": {"flip": True}}, 2, "main head at scale 1.0, mirrored gave"),
        ({"averaging": {"scales": [1.0, 0.5]}}, 2, "main head at scale 0.5 gave"),
    ],
)
def test_an_infinity_that_a_mean_could_hide_names_the_image(
    maps: dict[str, Any], number: int, view: str
) -> None:
    teacher = ColourNetwork()
    teacher.colours = nn.Sequential(teacher.colours, _BreaksOn(number))  # type: ignore[assignment]
    options = pass_options(MapsConfig(**maps))
    with pytest.raises(NonFiniteError, match=f"image 'image1': the teacher's {view} NaN"):
        batch_maps(teacher, samples_of((16, 24), (16, 24)), options, CPU)


# -- configuration and identity --------------------------------------------------------------


def test_identities_of_the_settings_there_were_before_are_unchanged(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    dataset = build_dataset(config.data, "train")

    def identity(**maps: Any) -> dict[str, Any]:
        return store_identity(dataset, config.teacher.network, "weights", MapsConfig(**maps))

    assert identity()["evaluation"] == {
        "view": "whole image",
        "scales": [1.0],
        "flip": False,
        "precision": "no",
    }
    spelled_out = {"view": "whole", "averaging": {"flip": False, "scales": [1]}}
    same = ({}, spelled_out, {"batch_size": "auto"}, {"window": [64, 64], "overlap": 0.5})
    assert len({fingerprint(identity(**maps)) for maps in same}) == 1
    sliding = {"view": "sliding"}
    others: list[dict[str, Any]] = [
        {},
        sliding,
        sliding | {"window": [256, 512]},
        sliding | {"overlap": 0.5},
        {"averaging": {"flip": True}},
        {"averaging": {"scales": [0.75, 1.0]}},
        sliding | {"averaging": {"flip": True}},
    ]
    assert len({fingerprint(identity(**maps)) for maps in others}) == len(others)
    assert identity(**sliding)["evaluation"]["view"] == (
        "sliding window 512x1024, overlap 0.25, triangular blend"
    )


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ({"discrepancy": "flip", "averaging": {"flip": True}}, "averaging: expected none with"),
        ({"discrepancy": "scales", "averaging": {"scales": [0.5]}}, "averaging: expected none"),
        ({"averaging": {"scales": [1.0, 1.0]}}, "averaging.scales: expected at least one scale"),
        ({"averaging": {"scales": []}}, "averaging.scales: expected at least one scale"),
        ({"view": "slide"}, "maps.view"),
        ({"window": [0, 64]}, r"maps.window.0"),
        ({"overlap": 1.0}, "maps.overlap"),
        ({"batch_size": 0}, r"maps\.batch_size: expected auto or a number of images from 1"),
        ({"batch_size": "all"}, r"maps\.batch_size: expected auto or a number of images from 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    maps: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(tiny_tree(tmp_path) | {"maps": maps})


def test_averaging_of_what_measures_the_passes_is_refused_without_a_configuration_too() -> None:
    with pytest.raises(NetworkError, match=r"maps\.averaging: expected none"):
        TeacherViews(ColourNetwork(), "flip", view=ImageView(flip=True))


# -- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [False, True])
def test_one_upsampling_gives_what_three_did(bands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bands:
        monkeypatch.setattr("rdd_pipeline.teacher_pass._WHOLE_ELEMENTS_CPU", 0)
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, CLASSES, 9, 13)
    labels = torch.from_numpy(np.stack([s.label for s in samples_of(*[(65, 97)] * 3)])).long()
    pixels = pixel_maps(logits, labels)
    probs = resized(logits, (65, 97)).softmax(1)
    confidence, prediction = probs.max(1)
    if bands:
        torch.testing.assert_close(pixels.confidence, confidence, atol=1e-5, rtol=0)
        assert (pixels.prediction != prediction).float().mean() < 1e-3
    else:
        assert torch.equal(pixels.confidence, confidence)
        assert torch.equal(pixels.prediction.long(), prediction)
    expected = true_class_probability(logits, labels)
    torch.testing.assert_close(pixels.true_prob, expected, atol=1e-5, rtol=0)
    assert (pixels.true_prob[labels == IGNORE_INDEX] == 1).all()


# -- batches ---------------------------------------------------------------------------------


def test_images_of_equal_size_meet_in_a_batch_whatever_their_order() -> None:
    samples = samples_of(*[(16, 24), (24, 16)] * 5)
    limit = BatchLimit(4, 16, CPU)
    batches = [[place for place, _ in batch] for batch in batches_by_size(iter(samples), limit)]
    assert batches == [[0, 2, 4, 6], [1, 3, 5, 7], [8], [9]]


def test_batches_give_the_maps_of_single_images_in_their_order(
    network: SegmentationNetwork,
) -> None:
    samples = samples_of(*[(48, 80), (64, 40), (48, 80)] * 3)
    together = run_shard(network, samples, MapsConfig(batch_size=4))
    alone = run_shard(network, samples, MapsConfig(batch_size=1))
    assert [item.image_id for item in together] == [sample.image_id for sample in samples]
    for one, other in zip(together, alone, strict=True):
        assert one.image_id == other.image_id
        for name in ("hardness", "aux_hardness", "confidence"):
            codes = (getattr(item, name).astype(int) for item in (one, other))
            assert np.abs(np.subtract(*codes)).max() <= 1
        assert (one.prediction != other.prediction).mean() < 1e-3
        np.testing.assert_allclose(one.discrepancy, other.discrepancy, atol=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("batch_size", [8, "auto"])
def test_a_batch_that_does_not_fit_is_halved_and_that_is_remembered(
    batch_size: Any,
    error: type[RuntimeError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = samples_of(*[(16, 24)] * 9, (32, 24), (32, 24))
    teacher = SmallMemory(2 * 16 * 24, error)
    with caplog.at_level(logging.DEBUG, logger="rdd.maps"):
        maps = run_shard(teacher, samples, MapsConfig(batch_size=batch_size))
    assert teacher.refused == ([8, 4] if batch_size == 8 else [4])
    assert teacher.batches == [2, 2, 2, 2, 1, 1, 1]
    expected = run_shard(ColourNetwork(), samples, MapsConfig(batch_size=1))
    assert [item.image_id for item in maps] == [item.image_id for item in expected]
    for one, other in zip(maps, expected, strict=True):
        assert np.array_equal(one.prediction, other.prediction)
    [record] = caplog.records
    assert record.levelno == (logging.WARNING if batch_size == 8 else logging.INFO)
    first = 8 if batch_size == 8 else 4
    assert f"batch_size: {first} images of 16x24 pixels do not fit" in record.message
    assert record.message.endswith("going on with 2")


def test_one_image_that_does_not_fit_is_named() -> None:
    samples = samples_of((16, 24), (16, 24), (64, 48))
    with pytest.raises(
        TeacherMemoryError, match=r"'image2' of 64x48 pixels: .*maps\.view: sliding"
    ):
        run_shard(SmallMemory(2 * 16 * 24), samples, MapsConfig())
    with pytest.raises(RuntimeError, match="something else"):
        list(BatchLimit(4, 4, CPU).run(samples[:2], _something_else))


def _something_else(part: Sequence[Sample]) -> None:
    raise RuntimeError("something else")


# -- stores ----------------------------------------------------------------------------------


def with_teacher(tmp_path: Path, **maps: Any) -> tuple[RunConfig, Path]:
    tree = tiny_tree(tmp_path)
    tree["maps"] |= maps
    config = parse_config(tree)
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, 8, seed=3), weights)
    return config, weights


@pytest.mark.parametrize(
    "maps",
    [
        {"view": "sliding", "window": [32, 48]},
        {"averaging": {"flip": True, "scales": [1.0, 1.5]}, "batch_size": "auto"},
    ],
)
def test_a_store_agrees_with_its_teacher(maps: dict[str, Any], tmp_path: Path) -> None:
    config, weights = with_teacher(tmp_path, **maps)
    dataset = build_dataset(config.data, "train")
    built = build_maps(
        dataset, config.teacher.network, weights, maps=config.maps, root=tmp_path / "maps",
        device="cpu", reporter=QUIET,
    )  # fmt: skip
    assert verify_store(built.path).ok
    differences = compare_with_teacher(
        built.path, dataset, config.teacher.network, weights,
        maps=config.maps, images=3, device="cpu", reporter=QUIET,
    )  # fmt: skip
    assert {difference.array for difference in differences} == set(MapReader(built.path).arrays)
    assert max(difference.largest for difference in differences) < 0.01


def test_images_of_many_sizes_make_a_store(tmp_path: Path) -> None:
    root = tmp_path / "camvid"
    for number in range(6):
        [sample] = samples_of((48, 80) if number % 2 else (64, 56))
        for folder, array in (("train", sample.image), ("trainannot", sample.label % 4)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{number}.png")
    tree = tiny_tree(tmp_path) | {"data": {"type": "camvid", "root": str(root)}}
    tree["maps"] |= {"shard_images": 4, "view": "sliding", "window": [32, 64]}
    config = parse_config(tree)
    dataset = build_dataset(config.data, "train")
    teacher = build_network(config.teacher.network, dataset.num_classes, seed=3).eval()
    save_weights(teacher, tmp_path / "teacher.safetensors")
    built = build_maps(
        dataset, config.teacher.network, tmp_path / "teacher.safetensors", maps=config.maps,
        root=tmp_path / "maps", device="cpu", reporter=QUIET,
    )  # fmt: skip
    reader = MapReader(built.path)
    for sample in dataset:
        [alone] = batch_maps(teacher, [sample], pass_options(config.maps), CPU)
        stored = reader.read("hardness", sample.image_id)
        assert stored.shape == sample.label.shape
        assert np.abs(stored.astype(int) - alone.hardness).max() <= 1


class _Watched(ShardBuilder):
    """Does not finish writing a shard before the next one is being computed."""

    def __init__(self, task: ShardTask, shards: Sequence[int]) -> None:
        super().__init__(task)
        self.begun = {shard: threading.Event() for shard in shards}

    def _evaluate(self, shard: int, images: Iterable[Sample]) -> PendingShard:
        self.begun[shard].set()
        return super()._evaluate(shard, images)

    def _write(self, shard: int, pending: PendingShard) -> int:
        if shard + 1 in self.begun:
            assert self.begun[shard + 1].wait(60)
        return super()._write(shard, pending)


def test_one_process_computes_a_shard_while_it_writes_the_one_before(tmp_path: Path) -> None:
    config, weights = with_teacher(tmp_path)
    dataset = build_dataset(config.data, "train")
    built = build_maps(
        dataset, config.teacher.network, weights, maps=config.maps, root=tmp_path / "maps",
        device="cpu", reporter=QUIET,
    )  # fmt: skip
    writer = MapWriter.open(built.path)
    options: PassOptions = pass_options(config.maps)
    task = ShardTask(
        writer=writer, dataset=dataset, network=config.teacher.network, weights=weights,
        options=options, device="cpu",
    )  # fmt: skip
    shards = range(4)
    builder = _Watched(task, shards)
    done: list[int] = []
    with writer.lease():
        builder.build_all(shards, lambda shard, images: done.append(images))
    builder.close()
    assert done == [2, 2, 2, 1]
