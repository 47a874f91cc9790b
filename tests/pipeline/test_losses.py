from __future__ import annotations

import dataclasses
import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rdd_pipeline import _fused, _loss_functions
from rdd_pipeline.config import StudentConfig, TrainingConfig
from rdd_pipeline.difficulty import (
    TensorArgumentError,
    hard_mask,
    prediction_discrepancy,
    relative_difficulty,
    tfe_weight,
    true_class_probability,
)
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.losses import (
    KDLoss,
    LossOutput,
    RDDLoss,
    SupervisedLoss,
    TeacherSignals,
    kd_loss,
    supervised_loss,
    tfe_loss,
    tse_loss,
)
from rdd_pipeline.methods import build_loss
from rdd_storage.errors import UnknownArrayError

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "golden").glob("*.npz"))
RELATIONS = {"xor": "xor", "or": "or", "and": "and", "student": "ohem"}
"""Relations and what the golden files call them."""

seeds = st.integers(0, 2**31 - 1)
few_examples = settings(max_examples=20, deadline=None, derandomize=True)

Case = dict[str, torch.Tensor]


class Outputs(NamedTuple):
    main: torch.Tensor
    aux: torch.Tensor | None = None


def logits_of(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(
    seed: int, shape: tuple[int, ...], classes: int, ignored: float = 0.2
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


def up(logits: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


@pytest.fixture(params=["whole", "bands"])
def formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the upsampled cross-entropy; in bands of a few rows."""
    if request.param == "bands":
        monkeypatch.setattr(_fused, "_DIRECT_ELEMENTS", 0)
        monkeypatch.setattr(_fused, "_BAND_ELEMENTS_CPU", 10_000)


# --- golden vectors -------------------------------------------------------------------------


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Case:
    with np.load(request.param) as file:
        case = {name: torch.from_numpy(file[name]) for name in file}
    case["target"] = case["target"].masked_fill(case["target"] == -1, 255).to(torch.uint8)
    return case


def assert_golden(got: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-5 relative; of the largest entry for gradients, whose smallest are rounding noise."""
    scale = max(expected.abs().max().item(), 1e-12)
    assert (got - expected).abs().max().item() <= 1e-5 * scale


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


@pytest.mark.usefixtures("formulation")
def test_first_stage_is_the_published_one(golden: Case) -> None:
    student = golden["student_main"].requires_grad_()
    target = golden["target"]
    discrepancy = prediction_discrepancy(golden["teacher_main"], golden["teacher_aux"])
    weight = tfe_weight(discrepancy, tuple(target.shape[1:]))
    assert_golden(tfe_loss(student, target, weight), golden["out_tfe_main"])
    both = tfe_loss(student, target, weight, golden["student_aux"])
    assert_golden(both, golden["out_tfe_main_aux"])
    assert_golden(gradient(both, student), golden["out_grad_tfe_main_aux"])


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.usefixtures("formulation")
def test_second_stage_is_the_published_one(golden: Case, relation: str) -> None:
    student = golden["student_main"].requires_grad_()
    target = golden["target"]
    teacher = true_class_probability(golden["teacher_main"], target)
    settings = {
        "threshold": golden["threshold"].item(),
        "min_kept": golden["min_kept"].item(),
        "relation": relation,
        "class_weight": golden.get("class_weight"),
    }
    name = f"out_tse_{RELATIONS[relation]}_main"
    main = tse_loss(student, target, teacher, **settings)
    assert_golden(main, golden[name])
    teacher_aux = true_class_probability(golden["teacher_aux"], target)
    both = tse_loss(student, target, teacher, golden["student_aux"], teacher_aux, **settings)
    assert_golden(both, golden[f"{name}_aux"])
    if relation == "xor":
        assert_golden(gradient(main, student), golden["out_grad_tse_xor_main"])


def test_logit_distillation_is_the_published_one(golden: Case) -> None:
    student = golden["student_main"].requires_grad_()
    loss = kd_loss(student, golden["teacher_main"], golden["temperature"].item())
    assert_golden(loss, golden["out_kd"])
    assert_golden(gradient(loss, student), golden["out_grad_kd"])


# --- upsampled cross-entropy ----------------------------------------------------------------


@few_examples
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    band=st.sampled_from([1, 50, 300, 10**6]),
    channels_last=st.booleans(),
)
def test_bands_equal_the_direct_formulation(
    seed: int,
    batch: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    band: int,
    channels_last: bool,
) -> None:
    logits = logits_of(seed, (batch, classes, *grid), 3.0).double()
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    logits.requires_grad_()
    target = labels_of(seed, (batch, *size), classes)
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "_BAND_ELEMENTS_CPU", band)
        banded = _fused.banded_cross_entropy(logits, target, 255)
        banded_gradient = gradient((weight * banded).sum(), logits)
    direct = _fused.direct_cross_entropy(logits, target, 255)
    torch.testing.assert_close(banded, direct, rtol=1e-10, atol=1e-10)
    expected = gradient((weight * direct).sum(), logits)
    torch.testing.assert_close(banded_gradient, expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_bands_is_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused, "_BAND_ELEMENTS_CPU", 60)
    logits = logits_of(1, (2, 3, 3, 4)).double().requires_grad_()
    target = labels_of(1, (2, 7, 9), 3)
    assert torch.autograd.gradcheck(
        lambda logits: _fused.banded_cross_entropy(logits, target, 255), (logits,)
    )


def test_bands_are_a_well_formed_operator() -> None:
    logits = logits_of(2, (1, 3, 3, 4)).requires_grad_()
    target = labels_of(2, (1, 7, 9), 3)
    torch.library.opcheck(_fused._forward_op, (logits, target, 255))


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_but_the_logits(dtype: torch.dtype) -> None:
    logits = logits_of(4, (2, 5, 8, 9), 5.0).to(dtype).requires_grad_()
    target = labels_of(4, (2, 57, 65), 5).to(torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_loss(logits, target)
        grad = gradient(loss, logits)
    exact = logits.detach().float().requires_grad_()
    expected = supervised_loss(exact, target)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, gradient(expected, exact).to(dtype))


def peak_of_second_stage() -> float:
    """Peak memory by the profiler, in units of the upsampled logits."""
    logits = torch.zeros(2, 19, 16, 32).requires_grad_()
    target = labels_of(0, (2, 128, 256), 19).to(torch.uint8)
    teacher = torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        tse_loss(logits, target, teacher, min_kept=0.05).backward()
    peak = held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (19 * target.numel() * 4)


def test_large_logits_are_not_upsampled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of_second_stage() > 2.2  # small enough to be made whole
    monkeypatch.setattr(_fused, "_DIRECT_ELEMENTS", 0)
    monkeypatch.setattr(_fused, "_BAND_ELEMENTS_CPU", 50_000)
    assert peak_of_second_stage() < 1.2


# --- properties of the losses ---------------------------------------------------------------

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "tfe": lambda z, y, p: tfe_loss(z, y, p.clamp_min(1e-6), 0.5 * z),
    "tse": lambda z, y, p: tse_loss(z, y, p, 0.5 * z, p, min_kept=0.1),
    "tse-weighted": lambda z, y, p: tse_loss(
        z, y, p, min_kept=0.1, class_weight=torch.arange(z.shape[1]).to(z.dtype)
    ),
    "ohem": lambda z, y, p: tse_loss(z, y, None, 0.5 * z, relation="student", min_kept=30),
    "supervised": lambda z, y, p: supervised_loss(z, y, 0.5 * z),
}

each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
@few_examples
@given(seed=seeds)
def test_ignored_pixels_have_no_gradient(name: str, seed: int) -> None:
    # On a grid as fine as the labels every logit belongs to one pixel.
    logits = logits_of(seed, (2, 4, 6, 7)).requires_grad_()
    target = labels_of(seed, (2, 6, 7), 4, ignored=0.4)
    prob = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
    loss = LOSSES[name](logits, target, prob)
    grad = gradient(loss, logits).movedim(1, -1)
    assert bool((grad[target == 255] == 0).all())
    # What the network says there does not matter either.
    changed = logits.detach().movedim(1, -1).clone()
    changed[target == 255] = 50.0
    torch.testing.assert_close(LOSSES[name](changed.movedim(-1, 1), target, prob), loss.detach())


@each_loss
@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("labels", ["all ignored", "one valid", "usual"])
@pytest.mark.parametrize("teacher", [0.0, 0.5, 1.0])
def test_losses_stay_finite(
    name: str, batch: int, scale: float, labels: str, teacher: float
) -> None:
    logits = logits_of(5, (batch, 3, 4, 5), scale).requires_grad_()
    target = labels_of(5, (batch, 25, 33), 3)
    if labels != "usual":
        target = torch.full_like(target, 255)
    if labels == "one valid":
        target[0, 3, 3] = 1
    prob = torch.where(target == 255, 1.0, teacher)
    loss = LOSSES[name](logits, target, prob)
    grad = gradient(loss, logits)
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    if labels == "all ignored":
        assert loss.item() == 0
        assert not grad.any()


@each_loss
@few_examples
@given(seed=seeds)
def test_the_order_of_the_batch_does_not_matter(name: str, seed: int) -> None:
    logits = logits_of(seed, (3, 4, 3, 4)).double()
    target = labels_of(seed, (3, 9, 13), 4)
    prob = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        LOSSES[name](logits[order], target[order], prob[order]), LOSSES[name](logits, target, prob)
    )


@each_loss
@few_examples
@given(seed=seeds)
def test_permuting_classes_changes_nothing(name: str, seed: int) -> None:
    if name == "tse-weighted":
        name = "tse"  # its class weights would have to be permuted as well
    logits = logits_of(seed, (2, 4, 3, 4)).double()
    target = labels_of(seed, (2, 9, 13), 4)
    prob = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    renamed = torch.full((256,), 255)
    renamed[order] = torch.arange(4)
    torch.testing.assert_close(
        LOSSES[name](logits[:, order], renamed[target], prob), LOSSES[name](logits, target, prob)
    )


@few_examples
@given(
    seed=seeds,
    relation=st.sampled_from(sorted(RELATIONS)),
    min_kept=st.one_of(st.integers(0, 300), st.floats(0.01, 0.9)),
    weighted=st.booleans(),
)
def test_second_stage_is_torch_s_cross_entropy_on_the_masked_pixels(
    seed: int, relation: str, min_kept: int | float, weighted: bool
) -> None:
    logits = logits_of(seed, (2, 4, 3, 4), 2.0).requires_grad_()
    target = labels_of(seed, (2, 9, 13), 4)
    prob = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) ** 0.3
    class_weight = torch.tensor([0.5, 1.0, 2.0, 4.0]) if weighted else None
    valid = target != 255
    student = hard_mask(true_class_probability(logits, target), valid, 0.6, min_kept)
    teacher = hard_mask(prob, valid, 0.6, min_kept)
    mask = relative_difficulty(student, teacher, relation)
    loss = tse_loss(
        logits,
        target,
        prob,
        threshold=0.6,
        min_kept=min_kept,
        relation=relation,
        class_weight=class_weight,
    )
    if not mask.any():
        assert loss.item() == 0
        return
    expected = F.cross_entropy(
        up(logits, target.shape[1:]),
        target.masked_fill(~mask, 255),
        weight=class_weight,
        ignore_index=255,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradient(loss, logits), gradient(expected, logits), rtol=1e-4, atol=1e-7
    )


@few_examples
@given(seed=seeds, temperature=st.sampled_from([0.5, 1.0, 4.0]), padded=st.booleans())
def test_distillation_is_torch_s_divergence(seed: int, temperature: float, padded: bool) -> None:
    student, teacher = logits_of(seed, (2, 2, 5, 3, 4), 3.0)
    valid = labels_of(seed, (2, 3, 4), 2, ignored=0.5) != 255 if padded else None
    pointwise = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.softmax(teacher / temperature, 1),
        reduction="none",
    ).sum(1)
    kept = pointwise if valid is None else pointwise[valid]
    expected = kept.sum() / max(1, kept.numel()) * temperature**2
    shifted = (teacher - teacher.amax(1, keepdim=True)).half()  # as stores keep it
    torch.testing.assert_close(kd_loss(student, teacher, temperature, valid=valid), expected)
    torch.testing.assert_close(
        kd_loss(student, shifted, temperature, valid=valid), expected, rtol=2e-2, atol=1e-3
    )


def test_distillation_survives_half_precision_and_extreme_logits() -> None:
    student = logits_of(7, (4, 19, 64, 64), 30.0).half().requires_grad_()
    teacher = logits_of(8, (4, 19, 64, 64), 30.0).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
    assert bool(gradient(loss, student).isfinite().all())
    extreme = logits_of(9, (1, 3, 2, 2), 1e4).requires_grad_()
    loss = kd_loss(extreme, -extreme.detach())
    assert bool(loss.isfinite())
    assert bool(gradient(loss, extreme).isfinite().all())


def test_distillation_without_a_valid_position_is_zero_and_connected() -> None:
    student = logits_of(0, (1, 3, 2, 2)).requires_grad_()
    loss = kd_loss(student, -student.detach(), valid=torch.zeros(1, 2, 2, dtype=torch.bool))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


def test_the_teacher_takes_no_gradient() -> None:
    student = logits_of(0, (1, 3, 2, 2)).requires_grad_()
    teacher = logits_of(1, (1, 3, 2, 2)).requires_grad_()
    target = labels_of(0, (1, 5, 5), 3)
    prob = true_class_probability(teacher, target)
    weight = tfe_weight(prediction_discrepancy(teacher, student.detach()), (5, 5))
    loss = (
        kd_loss(student, teacher)
        + tse_loss(student, target, prob)
        + tfe_loss(student, target, weight)
    )
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(_loss_functions)
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda z, y: tfe_loss(z, y, torch.ones(1, 4, 5)),
            r"weight: expected shape \(1, 5, 5\) \(the target's\), got \(1, 4, 5\)",
        ),
        (
            lambda z, y: tse_loss(z, y, torch.ones(1, 4, 5)),
            r"teacher_true_prob: expected shape \(1, 5, 5\)",
        ),
        (
            lambda z, y: tse_loss(z, y, None),
            r"teacher_true_prob: expected .* got None; only the relation 'student'",
        ),
        (
            lambda z, y: tse_loss(z, y, torch.ones(1, 5, 5), z, torch.ones(1, 5, 4)),
            r"teacher_aux_true_prob: expected shape",
        ),
        (
            lambda z, y: tse_loss(z, y, torch.ones(1, 5, 5), class_weight=torch.ones(2)),
            r"class_weight: expected shape \(3,\)",
        ),
        (lambda z, y: kd_loss(z, z[:, :2]), r"teacher: expected shape \(1, 3, 2, 2\)"),
        (lambda z, y: kd_loss(z, z, 0.0), r"temperature: expected a number above 0, got 0.0"),
        (
            lambda z, y: kd_loss(z, z, valid=torch.ones(1, 2, 3).bool()),
            r"valid: expected shape \(1, 2, 2\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(TensorArgumentError, match=message):
        call(torch.zeros(1, 3, 2, 2), torch.zeros(1, 5, 5, dtype=torch.uint8))


# --- modules --------------------------------------------------------------------------------


def rdd(**changes: object) -> RDDLoss:
    options: dict[str, object] = {"iterations": 100, "switch": 40, "min_kept": 0.1}
    return RDDLoss(**{**options, **changes})


def step_of(seed: int) -> tuple[Outputs, torch.Tensor, TeacherSignals]:
    main, aux = (z.clone().requires_grad_() for z in logits_of(seed, (2, 2, 4, 3, 4), 2.0))
    teacher_main, teacher_aux = logits_of(seed + 1, (2, 2, 4, 3, 4), 2.0)
    target = labels_of(seed, (2, 17, 25), 4).to(torch.uint8)
    signals = TeacherSignals(
        weight=tfe_weight(prediction_discrepancy(teacher_main, teacher_aux), (17, 25)),
        true_prob=true_class_probability(teacher_main, target),
        aux_true_prob=true_class_probability(teacher_aux, target),
        logits=teacher_main.half(),
        logits_valid=torch.ones(2, 3, 4, dtype=torch.bool),
    )
    return Outputs(main, aux), target, signals


def test_the_configuration_s_defaults_build_the_losses() -> None:
    built = build_loss(StudentConfig(name="s", method=("rdd",)), TrainingConfig(), num_classes=19)
    loss = RDDLoss(iterations=40_000)
    assert built.task._settings == loss._settings
    assert (built.task.kd_weight, built.task.temperature) == (loss.kd_weight, loss.temperature)
    assert loss.switch == 4_000
    assert loss.tfe_share(3_999) == 1.0
    assert loss.tfe_share(4_000) == 0.0


def test_schedules() -> None:
    hard = rdd(switch=0.4)
    assert [hard.tfe_share(i) for i in (0, 39, 40, 99)] == [1.0, 1.0, 0.0, 0.0]
    linear = rdd(blend="linear")
    assert [linear.tfe_share(i) for i in (0, 39, 40, 70, 85, 100, 120)] == [
        1.0, 1.0, 1.0, 0.5, 0.25, 0.0, 0.0,
    ]  # fmt: skip
    assert rdd(switch=0).tfe_share(0) == 0.0
    assert rdd(switch=100).tfe_share(99) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"switch": 100, "blend": "linear"}, r"rdd.switch: expected below iterations \(100\)"),
        ({"switch": 0.999, "blend": "linear"}, r"rdd.switch: expected below iterations"),
        ({"switch": 1.5}, r"rdd.switch: expected a fraction in \(0, 1\) or a count, got 1.5"),
        ({"switch": -1}, r"rdd.switch: expected at least 0, got -1"),
        ({"min_kept": 0.0}, r"rdd.min_kept: expected a fraction"),
        ({"threshold": 1.0}, r"rdd.threshold: expected a number in \(0, 1\), got 1.0"),
        ({"relation": "nand"}, r"rdd.relation: expected one of xor, or, and, student, got 'nand'"),
        ({"blend": "cosine"}, r"rdd.blend: expected hard or linear, got 'cosine'"),
        ({"iterations": 0}, r"iterations: expected at least 1, got 0"),
        ({"aux_weight": -0.1}, r"aux_weight: expected at least 0"),
        ({"kd_weight": -1.0}, r"kd.weight: expected at least 0, got -1.0"),
        ({"temperature": 0.0}, r"kd.temperature: expected above 0, got 0.0"),
        ({"class_weight": torch.tensor([1.0, -1.0])}, r"class_weight: .* least -1.0"),
    ],
)
def test_contradicting_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rdd(**changes)


def test_first_stage_of_the_module() -> None:
    outputs, target, signals = step_of(0)
    result = rdd(kd_weight=2.0, temperature=3.0)(outputs, target, signals, 39)
    tfe = tfe_loss(outputs.main, target, signals.weight, outputs.aux)
    kd = kd_loss(outputs.main, signals.logits, 3.0)
    assert result.terms == {"tfe": tfe, "kd": kd}
    torch.testing.assert_close(result.total, tfe + 2.0 * kd)
    assert not any(term.requires_grad for term in result.terms.values())
    numbers = result.diagnostics.as_floats()
    assert numbers["tfe_share"] == 1.0
    assert numbers["mean_weight"] == pytest.approx(signals.weight[target != 255].mean().item())
    assert numbers["empty_masks"] == 0.0
    assert all(math.isnan(numbers[name]) for name in ("hard_teacher", "relative", "tau_student"))


def test_second_stage_of_the_module() -> None:
    outputs, target, signals = step_of(1)
    class_weight = torch.tensor([1.0, 0.5, 2.0, 1.0])
    result = rdd(class_weight=class_weight, kd_weight=0.0)(outputs, target, signals, 40)
    tse = tse_loss(
        outputs.main, target, signals.true_prob, outputs.aux, signals.aux_true_prob,
        min_kept=0.1, class_weight=class_weight,
    )  # fmt: skip
    assert result.terms == {"tse": tse}
    torch.testing.assert_close(result.total, tse)
    valid = target != 255
    student_prob = true_class_probability(outputs.main, target)
    student = hard_mask(student_prob, valid, 0.7, 0.1)[valid]
    teacher = hard_mask(signals.true_prob, valid, 0.7, 0.1)[valid]
    numbers = result.diagnostics.as_floats()
    assert math.isnan(numbers.pop("mean_weight"))
    assert numbers == pytest.approx(
        {
            "tfe_share": 0.0,
            "hard_student": student.float().mean().item(),
            "hard_teacher": teacher.float().mean().item(),
            "hard_both": (student & teacher).float().mean().item(),
            "relative": (student ^ teacher).float().mean().item(),
            "tau_student": float(np.float32(0.7)),
            "tau_teacher": float(np.float32(0.7)),
            "empty_masks": 0.0,
        }
    )


def test_linear_blend_mixes_the_stages() -> None:
    outputs, target, signals = step_of(2)
    result = rdd(blend="linear")(outputs, target, signals, 85)
    terms = result.terms
    torch.testing.assert_close(
        result.total.detach(), 0.25 * terms["tfe"] + 0.75 * terms["tse"] + terms["kd"]
    )
    assert not any(math.isnan(value) for value in result.diagnostics.as_floats().values())


def test_empty_masks_are_counted_and_keep_the_graph() -> None:
    outputs, target, signals = step_of(3)
    twins = dataclasses.replace(
        signals,
        true_prob=true_class_probability(outputs.main, target).detach(),
        aux_true_prob=true_class_probability(outputs.aux, target).detach(),
    )
    loss = rdd(kd_weight=0.0)
    result = loss(outputs, target, twins, 50)
    assert result.total.item() == 0.0
    assert result.diagnostics.as_floats()["empty_masks"] == 2.0
    assert not gradient(result.total, outputs.main).any()
    main_alone = loss(Outputs(outputs.main), target, twins, 50)
    assert main_alone.diagnostics.as_floats()["empty_masks"] == 1.0


def test_auxiliary_term_needs_both_auxiliary_heads() -> None:
    outputs, target, signals = step_of(4)
    loss = rdd(kd_weight=0.0)
    alone = loss(Outputs(outputs.main), target, signals, 50).total
    no_teacher_aux = dataclasses.replace(signals, aux_true_prob=None)
    torch.testing.assert_close(loss(outputs, target, no_teacher_aux, 50).total, alone)
    assert loss(outputs, target, signals, 50).total > alone


def test_the_student_relation_does_without_the_teacher() -> None:
    outputs, target, _ = step_of(5)
    result = rdd(relation="student", kd_weight=0.0, switch=0)(outputs, target, None, 0)
    expected = tse_loss(outputs.main, target, None, outputs.aux, relation="student", min_kept=0.1)
    torch.testing.assert_close(result.total, expected)
    numbers = result.diagnostics.as_floats()
    assert math.isnan(numbers["hard_teacher"])
    assert numbers["relative"] == numbers["hard_student"]


@pytest.mark.parametrize(
    ("iteration", "signal", "message"),
    [
        (0, "weight", r"TeacherSignals.weight: the first stage .* array 'discrepancy', got None"),
        (50, "true_prob", r"TeacherSignals.true_prob: the second stage .* array 'hardness'"),
        (0, "logits", r"TeacherSignals.logits: logit distillation .* array 'logits'"),
    ],
)
def test_missing_signals_are_named(iteration: int, signal: str, message: str) -> None:
    outputs, target, signals = step_of(6)
    with pytest.raises(UnknownArrayError, match=message):
        rdd()(outputs, target, dataclasses.replace(signals, **{signal: None}), iteration)
    with pytest.raises(UnknownArrayError):
        rdd()(outputs, target, None, iteration)


def test_supervised_module_is_torch_s_cross_entropy() -> None:
    outputs, target, _ = step_of(7)
    result = SupervisedLoss(aux_weight=0.3)(outputs, target, None, 0)
    main, aux = (
        F.cross_entropy(up(z, target.shape[1:]), target.long(), ignore_index=255) for z in outputs
    )
    torch.testing.assert_close(result.total, main + 0.3 * aux)
    assert list(result.terms) == ["ce", "ce_aux"]
    assert result.diagnostics is None
    without = SupervisedLoss()(Outputs(outputs.main), target)
    assert list(without.terms) == ["ce"]
    torch.testing.assert_close(without.total, main)


def test_distillation_module_adds_the_term() -> None:
    outputs, target, signals = step_of(8)
    result = KDLoss(kd_weight=0.5, temperature=2.0)(outputs, target, signals, 0)
    expected = SupervisedLoss()(outputs, target).total + 0.5 * kd_loss(
        outputs.main, signals.logits, 2.0
    )
    torch.testing.assert_close(result.total, expected)
    assert list(result.terms) == ["ce", "ce_aux", "kd"]
    assert list(KDLoss(kd_weight=0.0)(outputs, target, None, 0).terms) == ["ce", "ce_aux"]
    with pytest.raises(UnknownArrayError, match="'logits'"):
        KDLoss()(outputs, target, None, 0)
    with pytest.raises(ConfigError, match=r"kd\.temperature"):
        KDLoss(temperature=-1.0)


def test_class_weight_moves_with_the_module_and_is_no_state() -> None:
    loss = rdd(class_weight=torch.ones(3))
    assert loss.state_dict() == {}
    assert loss.to(torch.float64).class_weight.dtype == torch.float64


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("iteration", [0, 70], ids=["first stage", "blended"])
def test_a_step_compiles_without_graph_breaks(iteration: int) -> None:
    torch.compiler.reset()
    outputs, target, signals = step_of(9)
    loss = rdd(blend="linear")

    def step(
        outputs: Outputs, target: torch.Tensor, signals: TeacherSignals
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result: LossOutput = loss(outputs, target, signals, iteration)
        return result.total, result.diagnostics.as_tensors()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    total, diagnostics = compiled(outputs, target, signals)
    expected, expected_diagnostics = step(outputs, target, signals)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient(total, outputs.main), gradient(expected, outputs.main))
    torch.testing.assert_close(diagnostics, expected_diagnostics, equal_nan=True)
