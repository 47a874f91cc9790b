"""Discrepancies of teachers with one head and with two: definitions, errors, and what they find."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor, nn

from rdd_pipeline.build import BuildResult, build_maps, pass_options, store_identity
from rdd_pipeline.config import MapsConfig, SmpConfig, parse_config
from rdd_pipeline.data import IGNORE_INDEX, Sample, build_dataset
from rdd_pipeline.data.synthetic import SyntheticDataset
from rdd_pipeline.difficulty import prediction_discrepancy
from rdd_pipeline.errors import NetworkError, NonFiniteError
from rdd_pipeline.networks import (
    SegLogits,
    SegmentationNetwork,
    build_network,
    load_weights,
    save_weights,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.teacher_check import compare_with_teacher
from rdd_pipeline.teacher_pass import batch_maps
from rdd_pipeline.teacher_views import TeacherViews
from rdd_storage import MapReader, StoreMismatchError, fingerprint, verify_store
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
ONE_HEAD = ("flip", "scales", "entropy", "margin")
KINDS = ("heads", "module:auxiliary_head", *ONE_HEAD)
CPU = torch.device("cpu")


def network_config(**changes: Any) -> SmpConfig:
    return SmpConfig.model_validate(tiny_tree(Path())["teacher"]["network"] | changes)


def images_of(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    small = torch.rand(batch, 3, 6, 8, generator=generator)
    images = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (images * 255).to(torch.uint8)


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    built = build_network(network_config(), 8, seed=3).eval().requires_grad_(False)
    with torch.no_grad():  # of logits that differ from pixel to pixel, as a trained network's do
        for head in (built.segmentation_head, built.auxiliary_head):
            for parameter in head.parameters():
                parameter.mul_(3.0)
    return built


class PointwiseNetwork(SegmentationNetwork):
    """Logits from the colour at each grid point: without neighbours, so mirrored exactly."""

    def __init__(self, outputs: Any = None) -> None:
        super().__init__(num_classes=4, divisor=8, mean=(0.5,) * 3, std=(0.2,) * 3)
        self.colours = nn.Conv2d(3, 4, 1)
        self.branch = _Returns(outputs)
        self.idle = nn.Conv2d(3, 4, 1)
        self.measure()

    @property
    def has_aux(self) -> bool:
        return False

    @property
    def encoder_module(self) -> nn.Module:
        return self.colours

    @property
    def classifier_names(self) -> tuple[str, ...]:
        return ("colours.weight", "colours.bias")

    def raw_logits(self, x: Tensor) -> SegLogits:
        grid = (x.shape[-2] // 4, x.shape[-1] // 4)
        main = self.colours(resized(x, grid))
        self.branch(main)
        return SegLogits(main, None)


class _Returns(nn.Module):
    """A branch whose output is what a test needs it to be."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function or (lambda main: main)

    def forward(self, main: Tensor) -> Any:
        return self.function(main)


@torch.no_grad()
def test_two_heads_give_the_published_discrepancy(network: SegmentationNetwork) -> None:
    images = images_of(2, 48, 80)
    main, aux = network(images)
    outputs = TeacherViews(network)(images)
    assert torch.equal(outputs.main, main)
    assert outputs.aux is not None
    assert torch.equal(outputs.aux, aux)
    assert torch.equal(outputs.discrepancy, prediction_discrepancy(main, aux))
    assert outputs.discrepancy.mean() > 0.01


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_the_auxiliary_head_by_its_name_is_the_auxiliary_head(
    network: SegmentationNetwork, autocast: bool
) -> None:
    images = images_of(2, 41, 83)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        heads = TeacherViews(network, "heads")(images)
        module = TeacherViews(network, "module:auxiliary_head")(images)
    assert heads.aux is not None
    assert module.aux is not None
    for one, other in zip(
        (heads.main, heads.aux, heads.discrepancy),
        (module.main, module.aux, module.discrepancy),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    assert not network.auxiliary_head._forward_hooks  # type: ignore[union-attr]


@torch.no_grad()
def test_flip_is_the_divergence_of_the_mirrored_images_logits(
    network: SegmentationNetwork,
) -> None:
    images = images_of(2, 48, 83)
    outputs = TeacherViews(network, "flip")(images)
    p = network(images).main.softmax(1)
    q = torch.stack([row.main[0].flip(-1) for row in (network(i.flip(-1)[None]) for i in images)])
    expected = (q.softmax(1) * (q.softmax(1).log() - p.log())).sum(1)
    torch.testing.assert_close(outputs.discrepancy, expected, rtol=1e-4, atol=1e-5)
    assert outputs.aux is None
    assert outputs.discrepancy.mean() > 0.01


@pytest.mark.parametrize("width", [80, 83, 89])
@torch.no_grad()
def test_a_network_that_mirrors_exactly_has_no_flip_discrepancy(width: int) -> None:
    """At widths too that the network has to resize: the grid spans the image symmetrically."""
    torch.manual_seed(0)
    outputs = TeacherViews(PointwiseNetwork(), "flip")(images_of(2, 45, width))
    assert outputs.main.std() > 0.1
    assert outputs.discrepancy.max() < 1e-6


@torch.no_grad()
def test_flip_of_a_symmetric_image_asks_how_symmetric_the_logits_are(
    network: SegmentationNetwork,
) -> None:
    half = images_of(1, 48, 48)
    symmetric = torch.cat([half, half.flip(-1)], dim=-1)
    flip = TeacherViews(network, "flip")(symmetric)
    main = network(symmetric).main
    torch.testing.assert_close(
        flip.discrepancy, prediction_discrepancy(main, main.flip(-1)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("scales", [(0.75, 1.0, 1.25), (0.5, 2.0)])
@torch.no_grad()
def test_scales_are_a_jensen_shannon_divergence(
    network: SegmentationNetwork, scales: tuple[float, ...], as_float: bool
) -> None:
    images = images_of(2, 48, 80)
    outputs = TeacherViews(network, "scales", scales)(images / 255.0 if as_float else images)
    main = network(images).main
    torch.testing.assert_close(outputs.main, main)
    probs = []
    for scale in scales:
        size = (round(48 * scale), round(80 * scale))
        logits = network(resized(images / 255.0, size)).main
        probs.append(resized(logits.softmax(1), main.shape[-2:]).double())
    mean = sum(probs) / len(probs)
    expected = sum((p * (p.log() - mean.log())).sum(1) for p in probs) / len(probs)
    torch.testing.assert_close(outputs.discrepancy.double(), expected, rtol=1e-3, atol=1e-5)
    assert 1e-3 < outputs.discrepancy.max() <= math.log(len(scales))


@torch.no_grad()
def test_entropy_and_margin_need_one_pass(network: SegmentationNetwork) -> None:
    images = images_of(2, 48, 80)
    runs: list[int] = []
    handle = network.register_forward_hook(lambda *_: runs.append(1))
    entropy = TeacherViews(network, "entropy")(images)
    margin = TeacherViews(network, "margin")(images)
    handle.remove()
    assert len(runs) == 2
    p = network(images).main.double().softmax(1)
    torch.testing.assert_close(
        entropy.discrepancy.double(), -(p * p.log()).sum(1), rtol=1e-4, atol=1e-6
    )
    first, second = p.sort(dim=1, descending=True).values[:, :2].unbind(1)
    torch.testing.assert_close(
        torch.exp(-margin.discrepancy).double(), first - second, rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
def test_gradients_and_modes_are_left_to_the_caller(network: SegmentationNetwork) -> None:
    network.train()
    views = TeacherViews(network, "module:auxiliary_head")
    views.check()
    assert network.training
    assert all(module.training for module in network.modules())
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for kind in KINDS:
        with torch.enable_grad():
            image = images_of(1, 48, 80).float().div(255).requires_grad_()
            TeacherViews(network, kind)(image).discrepancy.sum().backward()
        assert image.grad is not None
        assert image.grad.abs().max() > 0
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("discrepancy", "expected"),
    [
        ("heads", r"one head; add 'auxiliary: true'.*or choose flip, scales, entropy, margin"),
        ("module:decodr", "no module 'decodr'; did you mean decoder"),
        ("module:zzzzzz", "at the top there are encoder, decoder, segmentation_head"),
        ("module:", "expected heads, flip"),
        ("flipp", "expected heads, flip, scales, entropy, margin or module:NAME, got 'flipp'"),
    ],
)
def test_what_a_teacher_cannot_give_is_refused_at_once(discrepancy: str, expected: str) -> None:
    one_head = build_network(network_config(auxiliary=None), 8, seed=0)
    with pytest.raises(NetworkError, match=rf"maps\.discrepancy: .*{expected}"):
        TeacherViews(one_head, discrepancy)
    with pytest.raises(NetworkError, match=r"maps\.scales: expected at least two"):
        TeacherViews(one_head, "scales", (1.0,))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (lambda main: main[:, :3], r"'branch': .*each of 4 classes, got shape \(1, 3, "),
        (lambda main: main[0], r"expected logits \(1, 4, h, w\).*got shape \(4, "),
        (lambda main: (main, main), "expected one tensor .* got tuple of 2"),
        (lambda main: {"out": main}, "got dict"),
    ],
)
def test_a_module_that_gives_no_logits_is_refused(outputs: Any, expected: str) -> None:
    views = TeacherViews(PointwiseNetwork(outputs), "module:branch")
    with pytest.raises(NetworkError, match=expected):
        views.check()
    with pytest.raises(NetworkError, match=expected):
        views(images_of(1, 16, 16))


@torch.no_grad()
def test_a_module_may_give_a_list_of_one_and_a_grid_of_its_own() -> None:
    network = PointwiseNetwork(lambda main: [main[..., ::2, ::2] * 0.5])
    outputs = TeacherViews(network, "module:branch")(images_of(2, 40, 56))
    assert outputs.aux is not None
    assert outputs.aux.shape == outputs.main.shape
    expected = resized(outputs.main[..., ::2, ::2] * 0.5, outputs.main.shape[-2:])
    torch.testing.assert_close(outputs.aux, expected)
    assert outputs.discrepancy.max() > 0


def test_a_module_that_does_not_run_is_refused() -> None:
    with pytest.raises(NetworkError, match="'idle' took no part in the forward pass"):
        TeacherViews(PointwiseNetwork(), "module:idle").check()


class _BreaksOn(nn.Module):
    """Passes logits on, but for one pass, which it spoils."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.passes = number, 0

    def forward(self, logits: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self.number:
            logits = logits.clone()
            logits[1, 0, 0, 0] = -math.inf
        return logits


@pytest.mark.parametrize(
    ("discrepancy", "number", "view"),
    [
        ("entropy", 1, "main head"),
        ("flip", 2, "view of the mirrored image"),
        ("scales", 3, "view at scale 1.25"),
    ],
)
def test_a_view_that_is_not_finite_names_the_image(
    discrepancy: str, number: int, view: str
) -> None:
    network = PointwiseNetwork()
    network.colours = nn.Sequential(network.colours, _BreaksOn(number))  # type: ignore[assignment]
    samples = [
        Sample(
            image_id=f"image{i}",
            image=np.full((16, 24, 3), 90, np.uint8),
            label=np.zeros((16, 24), np.uint8),
        )
        for i in range(2)
    ]
    maps = MapsConfig(discrepancy=discrepancy)
    with pytest.raises(NonFiniteError, match=f"image 'image1': the teacher's {view} gave NaN"):
        batch_maps(network, samples, pass_options(maps), CPU)


# -- stores ----------------------------------------------------------------------------------

DEFINITIONS = {
    "heads": "KL(aux || main)",
    "module:auxiliary_head": "KL(module:auxiliary_head || main)",
    "flip": "KL(mirrored back || main)",
    "scales": "mean KL(scale || mean), scales 0.75, 1.0, 1.25",
    "entropy": "entropy(main)",
    "margin": "-ln(p1 - p2)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_each_kind_says_what_it_holds(kind: str, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["maps"]["discrepancy"] = kind
    tree["data"]["train_images"] = 3
    has_aux = kind not in ONE_HEAD
    if not has_aux:
        tree["teacher"]["network"]["auxiliary"] = None
    config = parse_config(tree)
    network = build_network(config.teacher.network, 8, seed=3)
    weights = tmp_path / "teacher.safetensors"
    save_weights(network, weights)
    dataset = build_dataset(config.data, "train")

    def build() -> BuildResult:
        return build_maps(
            dataset, config.teacher.network, weights, maps=config.maps, root=tmp_path / "maps",
            device="cpu", reporter=QUIET,
        )  # fmt: skip

    built = build()
    assert built.images_built == 3
    assert build().images_built == 0
    assert verify_store(built.path).ok

    reader = MapReader(built.path)
    assert reader.identity["method"]["discrepancy"] == DEFINITIONS[kind]
    assert reader.schema.discrepancy == DEFINITIONS[kind]
    assert ("aux_hardness" in reader.arrays) == has_aux
    attributes = dict(zarr.open_group(built.path, mode="r")["discrepancy"].attrs)
    assert attributes.get("definition", "KL(aux || main)") == DEFINITIONS[kind]
    assert ("definition" in attributes) == (kind != "heads")

    image = torch.from_numpy(np.array(dataset[1].image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = TeacherViews(network.eval(), kind)(image)
    stored = reader.read("discrepancy", dataset.image_ids[1]).astype(np.float32)
    np.testing.assert_allclose(
        np.exp(-stored), torch.exp(-outputs.discrepancy)[0].numpy(), atol=2e-4
    )
    differences = compare_with_teacher(
        built.path, dataset, config.teacher.network, weights,
        maps=config.maps, images=2, device="cpu", reporter=QUIET,
    )  # fmt: skip
    assert {difference.array for difference in differences} == set(reader.arrays)
    assert max(difference.largest for difference in differences) < 0.01
    other = MapsConfig(discrepancy="entropy" if kind == "margin" else "margin")
    with pytest.raises(StoreMismatchError, match=r"method\.discrepancy: expected .*, found"):
        compare_with_teacher(
            built.path, dataset, config.teacher.network, weights,
            maps=other, images=1, device="cpu", reporter=QUIET,
        )  # fmt: skip


def test_identities_differ_by_kind_and_not_by_how_they_are_written() -> None:
    dataset = SyntheticDataset(split="train", images=1, height=32, width=32)

    def identity(**maps: Any) -> dict[str, Any]:
        return store_identity(dataset, network_config(), "weights", MapsConfig(**maps))

    kinds = [*KINDS, "module:aux", "module:decoder"]
    assert len({fingerprint(identity(discrepancy=kind)) for kind in kinds}) == len(kinds)
    plain = identity()
    assert plain["method"]["discrepancy"] == "KL(aux || main)"
    assert plain == identity(aux_hardness=True, scales=(0.5, 1.0))
    assert plain["arrays"]["aux_hardness"] is True
    assert identity(aux_hardness=False)["arrays"]["aux_hardness"] is False
    assert identity(discrepancy="flip")["arrays"]["aux_hardness"] is False
    assert identity(discrepancy="flip") == identity(discrepancy="flip", aux_hardness=False)
    scaled = identity(discrepancy="scales")
    assert scaled != identity(discrepancy="scales", scales=(0.5, 1.0))
    assert scaled == identity(discrepancy="scales", scales=[0.75, 1, 1.25])


def test_a_wrong_module_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = network_config(auxiliary=None)
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config, 8, seed=0), weights)
    with pytest.raises(NetworkError, match=r"'decoder': .*each of 8 classes, got shape \(1, 32,"):
        build_maps(
            SyntheticDataset(split="train", images=1, height=32, width=32), config, weights,
            maps=MapsConfig(discrepancy="module:decoder", workers=0), root=tmp_path / "maps",
            device="cpu", reporter=QUIET,
        )  # fmt: skip
    assert not (tmp_path / "maps").exists()


# -- what they find --------------------------------------------------------------------------

SIZE = (48, 80)


def scenes(split: Any, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, H, W) and labels int64 (N, H, W)."""
    dataset = SyntheticDataset(split=split, images=count, height=SIZE[0], width=SIZE[1])
    samples = [dataset[index] for index in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.label for sample in samples]))
    return images.permute(0, 3, 1, 2).contiguous(), labels.long()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SegmentationNetwork:
    """A small teacher that has learnt the scenes; about 87% of pixels right."""
    config = network_config(
        encoder="tu-resnet10t",
        options={
            "encoder_depth": 4,
            "decoder_pyramid_channels": 32,
            "decoder_segmentation_channels": 32,
            "decoder_dropout": 0.0,
        },
    )
    network = build_network(config, 8, seed=0)
    iterations, batch = 170, 6
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=iterations)
    images, labels = scenes("train", 96)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for iteration in range(iterations):
            chosen = torch.randint(0, len(images), (batch,), generator=generator)
            x, y = images[chosen], labels[chosen]
            if iteration % 2:
                x, y = x.flip(-1), y.flip(-1)
            main, aux = (resized(logits, SIZE) for logits in network(x))
            loss = F.cross_entropy(main, y, ignore_index=IGNORE_INDEX)
            loss = loss + 0.4 * F.cross_entropy(aux, y, ignore_index=IGNORE_INDEX)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    weights = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_weights(network, weights)
    loaded = build_network(config, 8)
    load_weights(loaded, weights)
    return loaded.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_occluded_pixels_are_harder(kind: str, trained: SegmentationNetwork) -> None:
    """Patches of noise over unseen scenes: the same pixels with and without them."""
    images, _ = scenes("val", 24)
    patches = torch.zeros(SIZE, dtype=torch.bool)
    for top in range(8, 40, 16):
        for left in range(8, 72, 16):
            patches[top : top + 8, left : left + 8] = True
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 255
    views = TeacherViews(trained, kind)
    clean = views(images).discrepancy
    occluded = views(torch.where(patches, noise.to(torch.uint8), images)).discrepancy
    grid = F.interpolate(patches[None, None].float(), clean.shape[-2:], mode="nearest")[0, 0] > 0
    ratio = (occluded[:, grid].mean() / clean[:, grid].mean()).item()
    assert ratio > 1.3
    # And by the weight itself, in which no single pixel can outweigh the others.
    assert torch.exp(-occluded[:, grid]).mean() < torch.exp(-clean[:, grid]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_blurred_pixels_are_harder(kind: str, trained: SegmentationNetwork) -> None:
    """Unseen scenes out of focus (standard deviation 6 pixels) and the same scenes sharp."""
    images, _ = scenes("val", 24)
    views = TeacherViews(trained, kind)
    sharp = views(images).discrepancy
    blurred = views(out_of_focus(images, 6.0)).discrepancy
    ratio = (blurred.mean() / sharp.mean()).item()
    if kind == "scales":
        # What is blurred looks the same at every scale: the one thing that this measure cannot
        # see (docs/method.md says so).
        assert ratio < 1.0
    else:
        assert ratio > 1.1


def out_of_focus(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 (N, 3, H, W)."""
    reach = int(3 * sigma)
    offsets = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    wide = F.pad(images.float(), (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(wide, kernel, groups=3)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=3).round().to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_the_teacher_gets_wrong_are_harder(
    kind: str, trained: SegmentationNetwork
) -> None:
    images, labels = scenes("val", 24)
    outputs = TeacherViews(trained, kind)(images)
    prediction = resized(outputs.main, SIZE).argmax(1)
    discrepancy = resized(outputs.discrepancy[:, None], SIZE)[:, 0]
    valid = labels != IGNORE_INDEX
    wrong, right = valid & (prediction != labels), valid & (prediction == labels)
    assert right.sum() / valid.sum() > 0.75  # the teacher has learnt the task
    ratio = (discrepancy[wrong].mean() / discrepancy[right].mean()).item()
    assert ratio > 1.2
