from __future__ import annotations

import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rdd_pipeline import _fused, difficulty
from rdd_pipeline.difficulty import (
    TensorArgumentError,
    entropy_discrepancy,
    hard_mask,
    hard_threshold,
    margin_discrepancy,
    prediction_discrepancy,
    relative_difficulty,
    scale_discrepancy,
    tfe_weight,
    true_class_probability,
)

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "golden").glob("*.npz"))
RELATIONS = ("xor", "or", "and", "student")

seeds = st.integers(0, 2**31 - 1)
few_examples = settings(max_examples=25, deadline=None, derandomize=True)


def logits_of(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(
    seed: int, shape: tuple[int, ...], classes: int, ignored: float = 0.2
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    with np.load(request.param) as file:
        case = {name: torch.from_numpy(file[name]) for name in file}
    case["target"] = case["target"].masked_fill(case["target"] == -1, 255)
    return case


def test_there_are_golden_cases() -> None:
    assert len(GOLDEN) == 4


def test_discrepancy_and_weight_are_the_published_ones(golden: dict[str, torch.Tensor]) -> None:
    discrepancy = prediction_discrepancy(golden["teacher_main"], golden["teacher_aux"])
    torch.testing.assert_close(discrepancy, golden["out_discrepancy"], rtol=1e-5, atol=1e-6)
    weight = tfe_weight(discrepancy, tuple(golden["target"].shape[1:]))
    torch.testing.assert_close(weight, golden["out_weight"], rtol=1e-5, atol=1e-7)


def test_true_class_probability_is_the_published_one(golden: dict[str, torch.Tensor]) -> None:
    prob = true_class_probability(golden["teacher_main"], golden["target"])
    torch.testing.assert_close(prob, golden["out_teacher_true_prob"], rtol=1e-5, atol=0)


def test_masks_are_the_published_ones_bit_for_bit(golden: dict[str, torch.Tensor]) -> None:
    target = golden["target"]
    masks = {}
    for network in ("student", "teacher"):
        prob = true_class_probability(golden[f"{network}_main"], target)
        masks[network] = hard_mask(
            prob, target != 255, golden["threshold"].item(), golden["min_kept"].item()
        )
        assert torch.equal(masks[network], golden[f"out_hard_{network}"])
    relative = relative_difficulty(masks["student"], masks["teacher"])
    assert torch.equal(relative, golden["out_relative"])


def of_scales(logits: torch.Tensor) -> torch.Tensor:
    """Scales whose logits are those given and, in turn, those of the other classes."""
    views = [logits, logits.roll(1, dims=1), logits.flip(1)]
    return scale_discrepancy([view.double().softmax(1).to(logits.dtype) for view in views])


ONE_HEAD = {
    "entropy": (entropy_discrepancy, lambda classes: math.log(classes)),
    "margin": (margin_discrepancy, lambda classes: 23 * math.log(2)),
    "scales": (of_scales, lambda classes: math.log(3)),
}


@pytest.mark.parametrize("kind", ONE_HEAD)
@given(seed=seeds, classes=st.integers(2, 20), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
@few_examples
def test_discrepancies_of_one_head_stay_within_their_bounds(
    kind: str, seed: int, classes: int, scale: float
) -> None:
    function, bound = ONE_HEAD[kind]
    logits = logits_of(seed, (2, classes, 3, 4), scale)
    d = function(logits)
    assert d.shape == (2, 3, 4)
    assert d.dtype == torch.float32
    assert not torch.signbit(d).any()
    assert d.max() <= bound(classes) + 1e-5
    torch.testing.assert_close(d.double(), function(logits.double()), rtol=1e-4, atol=1e-5)
    # The classes' order, and for logits a common shift, are nothing to it.
    if kind != "scales":
        shifted = logits.flip(1) + (1.0 if scale <= 30.0 else 0.0)
        torch.testing.assert_close(function(shifted), d, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_discrepancies_of_one_head_are_float32_under_autocast(dtype: torch.dtype) -> None:
    logits = logits_of(1, (1, 19, 4, 4), 3.0).to(dtype)
    probs = [logits.softmax(1), logits.flip(1).softmax(1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (
            entropy_discrepancy(logits), margin_discrepancy(logits), scale_discrepancy(probs)
        )  # fmt: skip
    outside = (
        entropy_discrepancy(logits.float()),
        margin_discrepancy(logits.float()),
        scale_discrepancy([p.float() for p in probs]),
    )
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_discrepancies_of_one_head_at_their_ends() -> None:
    sure = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 3, 1, 1)
    tie = torch.zeros(1, 3, 1, 1)
    assert entropy_discrepancy(sure).item() == margin_discrepancy(sure).item() == 0.0
    assert entropy_discrepancy(tie).item() == pytest.approx(math.log(3))
    assert margin_discrepancy(tie).item() == pytest.approx(23 * math.log(2))
    one, other = sure.softmax(1), sure.flip(1).softmax(1)
    assert scale_discrepancy([one, one, one]).item() == 0.0
    assert scale_discrepancy([one, one.roll(1, 1), other]).item() == pytest.approx(math.log(3))
    smallest = torch.tensor([1.0, 1e-45]).reshape(1, 2, 1, 1)  # its third underflows
    apart = scale_discrepancy([smallest, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)] * 2)
    assert 0.0 <= apart.item() < 1e-6


def test_discrepancies_of_one_head_refuse_what_is_none() -> None:
    p = torch.full((1, 2, 2, 2), 0.5)
    for call, expected in [
        (lambda: scale_discrepancy([p]), "probs: expected at least two scales, got 1"),
        (lambda: scale_discrepancy([p, p[..., :1]]), r"probs\[1\]: expected shape"),
        (lambda: scale_discrepancy([p[0], p[0]]), r"probs\[0\]: expected 4 axes"),
        (lambda: entropy_discrepancy(p[0]), "logits: expected 4 axes"),
        (lambda: margin_discrepancy(p[:, :1]), "logits: expected at least two classes"),
    ]:
        with pytest.raises(TensorArgumentError, match=expected):
            call()


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(difficulty, extraglobs={"torch": torch})
    assert result.attempted > 5
    assert result.failed == 0


@few_examples
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 10.0, 1e4]), classes=st.integers(1, 7))
def test_discrepancy_is_not_negative_and_weight_is_a_weight(
    seed: int, scale: float, classes: int
) -> None:
    main, aux = logits_of(seed, (2, 2, classes, 3, 5), scale)
    discrepancy = prediction_discrepancy(main, aux)
    weight = tfe_weight(discrepancy, (11, 7))
    assert discrepancy.shape == (2, 3, 5)
    assert bool((discrepancy >= 0).all())
    assert bool(discrepancy.isfinite().all())
    assert weight.shape == (2, 11, 7)
    assert bool(((weight > 0) & (weight <= 1)).all())


@few_examples
@given(seed=seeds, scale=st.sampled_from([1.0, 1e4]), shift=st.floats(-100, 100))
def test_heads_that_agree_weigh_one(seed: int, scale: float, shift: float) -> None:
    main = logits_of(seed, (1, 5, 4, 4), scale)
    weight = tfe_weight(prediction_discrepancy(main, main), (13, 9))
    torch.testing.assert_close(weight, torch.ones(1, 13, 9), rtol=0, atol=1e-6)
    # A constant added to all classes of a position changes no probability.
    shifted = tfe_weight(prediction_discrepancy(main.double(), main.double() + shift), (13, 9))
    torch.testing.assert_close(shifted, torch.ones_like(shifted), rtol=0, atol=1e-9)


def test_the_exponent_comes_before_the_interpolation() -> None:
    discrepancy = torch.tensor([[[0.0, 4.0]]])
    middle = tfe_weight(discrepancy, (1, 3))[0, 0, 1].item()
    assert middle == pytest.approx((1 + np.exp(-4)) / 2)


@few_examples
@given(seed=seeds, classes=st.integers(2, 6))
def test_permuting_classes_changes_nothing(seed: int, classes: int) -> None:
    main, aux = logits_of(seed, (2, 1, classes, 3, 4)).double()
    target = labels_of(seed, (1, 9, 13), classes)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    # Class order[k] is renamed to k, in the logits as in the labels.
    renamed = torch.full((256,), 255)
    renamed[order] = torch.arange(classes)
    torch.testing.assert_close(
        prediction_discrepancy(main[:, order], aux[:, order]), prediction_discrepancy(main, aux)
    )
    torch.testing.assert_close(
        true_class_probability(main[:, order], renamed[target]),
        true_class_probability(main, target),
    )


@few_examples
@given(seed=seeds, dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_true_class_probability_against_its_definition(seed: int, dtype: torch.dtype) -> None:
    logits = logits_of(seed, (2, 5, 3, 4), 3.0)
    target = labels_of(seed, (2, 10, 15), 5)
    upsampled = F.interpolate(logits, size=(10, 15), mode="bilinear", align_corners=True)
    expected = torch.ones(2, 10, 15)
    for b, y, x in np.ndindex(2, 10, 15):
        if target[b, y, x] != 255:
            expected[b, y, x] = upsampled[b, :, y, x].softmax(0)[target[b, y, x]]
    prob = true_class_probability(logits, target.to(dtype))
    torch.testing.assert_close(prob, expected, rtol=1e-5, atol=1e-7)
    assert bool((prob[target == 255] == 1).all())


@few_examples
@given(
    seed=seeds,
    threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    min_kept=st.one_of(st.integers(0, 400), st.floats(0.001, 0.999)),
    ignored=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    levels=st.sampled_from([4, 250, 10**6]),
)
def test_hard_mask_against_a_sort(
    seed: int, threshold: float, min_kept: int | float, ignored: float, levels: int
) -> None:
    generator = np.random.default_rng(seed)
    # Few levels make ties, as stored codes do.
    prob = (generator.random((2, 9, 11)) * levels).round().astype(np.float32) / np.float32(levels)
    valid = generator.random(prob.shape) >= ignored
    count = min_kept if isinstance(min_kept, int) else max(1, round(min_kept * prob.size))
    tau = np.float32(threshold)
    if count > 0:
        ascending = np.sort(np.where(valid, prob, np.float32(1)).ravel())
        tau = max(tau, ascending[min(count, prob.size) - 1])
    mask = hard_mask(torch.from_numpy(prob), torch.from_numpy(valid), threshold, min_kept)
    assert np.array_equal(mask.numpy(), valid & (prob <= tau))
    assert mask.sum() >= min(count, valid.sum())
    measured = hard_threshold(torch.from_numpy(prob), torch.from_numpy(valid), threshold, min_kept)
    assert measured.item() == tau


@few_examples
@given(seed=seeds, min_kept=st.integers(0, 500))
def test_hard_mask_does_not_depend_on_the_order_of_the_batch(seed: int, min_kept: int) -> None:
    prob = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(seed)) ** 0.2
    valid = labels_of(seed, (4, 6, 7), 3) != 255
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    mask = hard_mask(prob, valid, min_kept=min_kept)
    assert torch.equal(hard_mask(prob[order], valid[order], min_kept=min_kept), mask[order])


def test_the_usual_threshold_is_the_stored_code_s() -> None:
    # Stores hold the code of float32(0.7) for "hard"; the comparison must include it.
    prob = torch.tensor([[[np.float32(0.7), np.nextafter(np.float32(0.7), np.float32(1))]]])
    valid = torch.ones_like(prob, dtype=torch.bool)
    assert hard_mask(prob, valid, 0.7, 0).tolist() == [[[True, False]]]


def test_with_fewer_valid_pixels_than_min_kept_all_of_them_are_hard() -> None:
    prob = torch.full((1, 8, 8), 0.999)
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[0, :2] = True
    assert torch.equal(hard_mask(prob, valid, min_kept=17), valid)
    assert torch.equal(hard_mask(prob, valid, min_kept=100_000), valid)
    assert not hard_mask(prob, torch.zeros_like(valid), min_kept=5).any()


def test_half_precision_probabilities_are_compared_in_single_precision() -> None:
    prob = torch.tensor([[[0.7, 0.69]]], dtype=torch.float16)  # 0.7 is stored as 0.70019
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert hard_mask(prob, valid, 0.7, 0).tolist() == [[[False, True]]]


@few_examples
@given(seed=seeds)
def test_relations_obey_their_set_algebra(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, 2, 5, 6, generator=generator) < 0.5
    xor, either, both, alone = (
        relative_difficulty(student, teacher, relation) for relation in RELATIONS
    )
    assert torch.equal(xor | both, either)
    assert not (xor & both).any()
    assert torch.equal(xor, either & ~both)
    assert torch.equal(alone, student)
    assert torch.equal(relative_difficulty(teacher, student, "xor"), xor)
    assert not relative_difficulty(student, student, "xor").any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_single_precision_maps(dtype: torch.dtype) -> None:
    main, aux = logits_of(3, (2, 1, 4, 3, 3)).to(dtype)
    target = labels_of(3, (1, 9, 9), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        discrepancy = prediction_discrepancy(main, aux)
        prob = true_class_probability(main, target)
        weight = tfe_weight(discrepancy.half(), (9, 9))
    assert {discrepancy.dtype, prob.dtype, weight.dtype} == {torch.float32}
    torch.testing.assert_close(discrepancy, prediction_discrepancy(main.float(), aux.float()))
    torch.testing.assert_close(prob, true_class_probability(main.float(), target))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prediction_discrepancy(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)),
            r"aux: expected shape \(1, 2, 3, 3\).*got \(1, 2, 3, 4\)",
        ),
        (lambda: tfe_weight(torch.zeros(3, 3), (4, 4)), r"discrepancy: expected 3 axes"),
        (
            lambda: true_class_probability(torch.zeros(2, 2, 3, 3), torch.zeros(1, 4, 4).int()),
            r"target: expected a batch of 2",
        ),
        (
            lambda: true_class_probability(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 4)),
            r"target: expected an integer dtype, got torch.float32",
        ),
        (
            lambda: hard_mask(torch.zeros(1, 2, 2), torch.ones(1, 2, 3).bool()),
            r"valid: expected shape",
        ),
        (
            lambda: hard_mask(torch.zeros(1, 2, 2), torch.ones(1, 2, 2).bool(), 1.5),
            r"threshold: expected a number from 0 to 1, got 1.5",
        ),
        (
            lambda: hard_mask(torch.zeros(1, 2, 2), torch.ones(1, 2, 2).bool(), min_kept=1.5),
            r"min_kept: expected a count \(int\) or a fraction",
        ),
        (
            lambda: hard_mask(torch.zeros(1, 2, 2), torch.ones(1, 2, 2).bool(), min_kept=-1),
            r"min_kept: expected at least 0",
        ),
        (
            lambda: relative_difficulty(torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool()),
            r"hard_student: expected a bool mask, got torch.float32",
        ),
        (
            lambda: relative_difficulty(*torch.ones(2, 1, 2, 2).bool(), "nand"),
            r"relation: expected one of xor, or, and, student, got 'nand'",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(TensorArgumentError, match=message):
        call()


def test_maps_compile_without_graph_breaks() -> None:
    def maps(
        main: torch.Tensor, aux: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weight = tfe_weight(prediction_discrepancy(main, aux), (9, 12))
        prob = true_class_probability(main, target)
        hard = hard_mask(prob, target != 255, 0.7, 0.1)
        return weight, prob, relative_difficulty(hard, ~hard, "or")

    main, aux = logits_of(0, (2, 2, 4, 3, 4))
    target = labels_of(0, (2, 9, 12), 4)
    compiled = torch.compile(maps, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(main, aux, target), maps(main, aux, target), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("elements", [0, 2**23], ids=["bands", "whole"])
@pytest.mark.parametrize("label", [-1, 2, 254])
def test_a_label_outside_the_classes_is_named(
    elements: int, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fused, "_DIRECT_ELEMENTS", elements)
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 1, 1], target[0, 2, 2] = 255, label
    with pytest.raises(TensorArgumentError, match=f"classes 0 to 1 .*got {label}; check"):
        true_class_probability(torch.zeros(1, 2, 3, 3), target)
