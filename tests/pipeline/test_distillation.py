from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdd_pipeline import _distil_features, _distil_logits, _distil_memory
from rdd_pipeline.difficulty import TensorArgumentError
from rdd_pipeline.losses import (
    CIRKDMemory,
    attention_loss,
    centre_logits,
    cirkd_memory_loss,
    cirkd_minibatch_loss,
    csd_loss,
    cwd_loss,
    dist_loss,
    ifvd_loss,
    kd_loss,
    pairwise_loss,
    psd_loss,
)

sys.path.insert(0, str(Path(__file__).parent))
import slow_distillation as slow

seeds = st.integers(0, 2**31 - 1)
few_examples = settings(max_examples=12, deadline=None, derandomize=True)


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor
    valid: Tensor | None = None


class Loss(NamedTuple):
    fast: Callable[[Inputs], Tensor]
    slow: Callable[..., float]
    """Of student, teacher, target and valid as arrays."""
    masked: bool = False
    """Takes a mask."""
    features: bool = False
    """Students and teachers may differ in their channels."""


CLASSES = 3


def layers(maps: Tensor) -> list[Tensor]:
    """Three layers on two grids."""
    return [maps, 0.5 * maps[:, :1].roll(1, 3) + maps, maps[:, :, ::2, ::2].flip(3)]


def slow_psd(student: np.ndarray, teacher: np.ndarray, *_: np.ndarray) -> float:
    students, teachers = (
        [layer.numpy() for layer in layers(torch.from_numpy(maps))] for maps in (student, teacher)
    )
    return slow.psd(students, teachers)


def anchors(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).flatten(0, 2)


def slow_memory(student: np.ndarray, teacher: np.ndarray, *_: np.ndarray) -> float:
    own, other = (anchors(torch.from_numpy(maps)).numpy() for maps in (student, teacher))
    return slow.cirkd_memory(own, other, other[::2] + 0.5, 0.2, 2.0)


LOSSES = {
    "cwd": Loss(
        lambda x: cwd_loss(x.student, x.teacher, 2.0, valid=x.valid),
        lambda s, t, y, v: slow.cwd(s, t, 2.0, v),
        masked=True,
    ),
    "dist": Loss(
        lambda x: dist_loss(x.student, x.teacher, 2.0, 0.5, 3.0, valid=x.valid),
        lambda s, t, y, v: slow.dist(s, t, 2.0, 0.5, 3.0, v),
        masked=True,
    ),
    "csd": Loss(
        lambda x: csd_loss(x.student, x.teacher, 2.0, 2, valid=x.valid),
        lambda s, t, y, v: slow.csd(s, t, 2.0, 2, v),
        masked=True,
    ),
    "pairwise": Loss(
        lambda x: pairwise_loss(x.student, x.teacher, valid=x.valid),
        lambda s, t, y, v: slow.pairwise(s, t, 2, v),
        masked=True,
        features=True,
    ),
    "pairwise-single": Loss(
        lambda x: pairwise_loss(x.student, x.teacher, 1, valid=x.valid),
        lambda s, t, y, v: slow.pairwise(s, t, 1, v),
        masked=True,
        features=True,
    ),
    "attention": Loss(
        lambda x: attention_loss(x.student, x.teacher),
        lambda s, t, y, v: slow.attention(s, t),
        features=True,
    ),
    "ifvd": Loss(
        lambda x: ifvd_loss(x.student, x.teacher, x.target, CLASSES),
        lambda s, t, y, v: slow.ifvd(s, t, y, CLASSES, 255),
        features=True,
    ),
    "psd": Loss(lambda x: psd_loss(layers(x.student), layers(x.teacher)), slow_psd, features=True),
    "cirkd-minibatch": Loss(
        lambda x: cirkd_minibatch_loss(x.student, x.teacher, 0.5, 2),
        lambda s, t, y, v: slow.cirkd_minibatch(s, t, 0.5, 2),
        features=True,
    ),
    "cirkd-memory": Loss(
        lambda x: cirkd_memory_loss(
            anchors(x.student), anchors(x.teacher), anchors(x.teacher)[::2] + 0.5, 0.2, 2.0
        ),
        slow_memory,
    ),
}

each_loss = pytest.mark.parametrize("name", LOSSES)
masked_losses = pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.masked])
feature_losses = pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.features])


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def labels_of(seed: int, shape: tuple[int, ...], ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


def inputs_of(
    name: str,
    seed: int,
    batch: int = 2,
    grid: tuple[int, int] = (3, 5),
    *,
    valid: bool = False,
    extra: int = 0,
) -> Inputs:
    channels = 3
    return Inputs(
        normal(seed, (batch, channels, *grid), 2.0).requires_grad_(),
        normal(seed + 1, (batch, channels + (extra if LOSSES[name].features else 0), *grid), 2.0),
        labels_of(seed, (batch, 3 * grid[0] + 1, 2 * grid[1] + 1)).to(torch.uint8),
        labels_of(seed + 2, (batch, *grid), 0.4) != 255 if valid and LOSSES[name].masked else None,
    )


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, of, retain_graph=True)
    return grad


# --- every loss -----------------------------------------------------------------------------


@each_loss
@few_examples
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    valid=st.booleans(),
    extra=st.integers(-1, 2),
)
def test_agrees_with_loops(
    name: str, seed: int, batch: int, grid: tuple[int, int], valid: bool, extra: int
) -> None:
    x = inputs_of(name, seed, batch, grid, valid=valid, extra=extra)
    student = x.student.detach().numpy()
    mask = slow.everywhere(student) if x.valid is None else x.valid.numpy()
    expected = LOSSES[name].slow(student, x.teacher.numpy(), x.target.numpy(), mask)
    result = LOSSES[name].fast(x)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    single = LOSSES[name].fast(x._replace(student=x.student.float(), teacher=x.teacher.float()))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@each_loss
@pytest.mark.parametrize("valid", [False, True])
def test_gradient_is_the_derivative(name: str, valid: bool) -> None:
    x = inputs_of(name, 3, grid=(2, 3), valid=valid, extra=1)
    assert torch.autograd.gradcheck(
        lambda student: LOSSES[name].fast(x._replace(student=student)), (x.student,)
    )


@each_loss
def test_the_teacher_takes_no_gradient(name: str) -> None:
    x = inputs_of(name, 4)
    teacher = x.teacher.requires_grad_()
    LOSSES[name].fast(x).backward()
    assert teacher.grad is None
    assert x.student.grad is not None
    assert bool(x.student.grad.any())


@each_loss
def test_no_loss_between_equals(name: str) -> None:
    x = inputs_of(name, 5, valid=True)
    x = x._replace(teacher=x.student.detach())
    loss = LOSSES[name].fast(x)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(
        gradient(loss, x.student), torch.zeros_like(x.student), rtol=0, atol=1e-7
    )


@each_loss
@few_examples
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_the_batch_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    if name == "cirkd-memory":
        return  # anchors have no batch; what they are compared with would change
    x = inputs_of(name, seed, batch=3, valid=True)
    permuted = Inputs(*(None if tensor is None else tensor[order] for tensor in x))
    torch.testing.assert_close(LOSSES[name].fast(permuted), LOSSES[name].fast(x))


# Their inputs are computed in the tests, which must not happen in half precision.
HALF: dict[str, Callable[[Inputs], Tensor]] = {name: loss.fast for name, loss in LOSSES.items()}
HALF["psd"] = lambda x: psd_loss(*([maps, maps[:, :, ::2, ::2]] for maps in x[:2]))
HALF["cirkd-memory"] = lambda x: cirkd_memory_loss(
    anchors(x.student), anchors(x.teacher), anchors(x.teacher)[::2]
)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_but_the_inputs(name: str, dtype: torch.dtype) -> None:
    x = inputs_of(name, 6, valid=True)
    student = (10 * x.student.detach()).to(dtype).requires_grad_()
    low = x._replace(student=student, teacher=x.teacher.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = HALF[name](low)
    exact = low._replace(
        student=student.detach().float().requires_grad_(), teacher=low.teacher.float()
    )
    expected = HALF[name](exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    grad = gradient(loss, student)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, gradient(expected, exact.student).to(dtype))


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "large": lambda z: 1e4 * z,
    "zeros": torch.zeros_like,
    "all the same": lambda z: torch.full_like(z, 0.1),
    "a constant channel": lambda z: torch.cat([torch.full_like(z[:, :1], 0.3), z[:, 1:]], 1),
    "a position of zeros": lambda z: z * (torch.arange(z[0, 0].numel()) > 0).view(z.shape[2:]),
    "one channel decides": lambda z: z + 1e4 * (torch.arange(z.shape[1]) == 0).view(-1, 1, 1),
}


@each_loss
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
@pytest.mark.parametrize("other", [False, True])
def test_losses_stay_finite(name: str, extreme: str, grid: tuple[int, int], other: bool) -> None:
    usual = inputs_of(name, 7, batch=1, grid=grid, valid=True)
    student = EXTREMES[extreme](usual.student.detach().float()).requires_grad_()
    teacher = usual.teacher.float() if other else -student.detach().flip(1)
    x = usual._replace(student=student, teacher=teacher)
    loss = LOSSES[name].fast(x)
    grad = gradient(loss, student)
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    assert grad.abs().max().item() < 1e5


@each_loss
def test_one_graph_for_the_compiler(name: str) -> None:
    x = inputs_of(name, 8, valid=True)
    compiled = torch.compile(LOSSES[name].fast, fullgraph=True, backend="eager")
    loss = compiled(x)
    expected = LOSSES[name].fast(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, x.student), gradient(expected, x.student))


# --- masks ----------------------------------------------------------------------------------


@masked_losses
@few_examples
@given(seed=seeds)
def test_positions_outside_the_mask_do_not_exist(name: str, seed: int) -> None:
    x = inputs_of(name, seed, batch=3, valid=True)
    assert x.valid is not None
    x.valid[1] = False
    outside = ~x.valid.unsqueeze(1).expand_as(x.student)
    loss = LOSSES[name].fast(x)
    changed = x._replace(
        student=torch.where(outside, torch.nan, x.student),
        teacher=torch.where(outside, torch.inf, x.teacher),
    )
    other = LOSSES[name].fast(changed)
    assert other.item() == loss.item()
    for grad in (gradient(loss, x.student), gradient(other, x.student)):
        assert not grad[outside].any()
        assert bool(grad.isfinite().all())


@masked_losses
@few_examples
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(1, 5))
def test_padding_equals_a_smaller_image(name: str, seed: int, rows: int, columns: int) -> None:
    x = inputs_of(name, seed, grid=(4, 5))
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[:, :rows, :columns] = True
    smaller = x._replace(
        student=x.student[:, :, :rows, :columns], teacher=x.teacher[:, :, :rows, :columns]
    )
    loss = LOSSES[name].fast(x._replace(valid=valid))
    torch.testing.assert_close(loss, LOSSES[name].fast(smaller))
    everything = torch.ones_like(valid)
    torch.testing.assert_close(
        LOSSES[name].fast(x._replace(valid=everything)), LOSSES[name].fast(x)
    )


@masked_losses
def test_an_image_of_padding_alone_is_left_out(name: str) -> None:
    x = inputs_of(name, 9)
    first_only = torch.ones(2, 3, 5, dtype=torch.bool)
    first_only[1] = False
    alone = x._replace(student=x.student[:1], teacher=x.teacher[:1])
    torch.testing.assert_close(
        LOSSES[name].fast(x._replace(valid=first_only)), LOSSES[name].fast(alone)
    )


@masked_losses
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_without_a_valid_position_zero_and_connected(name: str, scale: float) -> None:
    x = inputs_of(name, 10)
    student = (scale * x.student.detach().float()).requires_grad_()
    nowhere = torch.zeros(2, 3, 5, dtype=torch.bool)
    loss = LOSSES[name].fast(x._replace(student=student, valid=nowhere))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


# --- invariances ----------------------------------------------------------------------------


@few_examples
@given(seed=seeds)
def test_centring_removes_what_a_softmax_does_not_see(seed: int) -> None:
    student, teacher = normal(seed, (2, 2, 4, 3, 5), 2.0)
    shift = normal(seed + 1, (2, 1, 3, 5), 5.0)
    shifted = teacher + shift
    for function in (kd_loss, dist_loss):
        expected = function(student, teacher)
        torch.testing.assert_close(function(student, shifted), expected)
        torch.testing.assert_close(function(student - shift, teacher), expected)
        torch.testing.assert_close(function(student, centre_logits(teacher)), expected)
    for function in (cwd_loss, csd_loss, pairwise_loss):
        assert function(student, shifted).item() != pytest.approx(function(student, teacher).item())
        torch.testing.assert_close(
            function(centre_logits(student + shift), centre_logits(shifted)),
            function(centre_logits(student), centre_logits(teacher)),
        )


def test_centred_logits_have_no_mean() -> None:
    logits = normal(0, (2, 4, 3, 5))
    torch.testing.assert_close(centre_logits(logits), torch.from_numpy(slow.centre(logits.numpy())))
    single = centre_logits(logits.bfloat16())
    assert single.dtype == torch.float32
    assert single.mean(1).abs().max().item() < 1e-6
    assert torch.autograd.gradcheck(centre_logits, (logits.requires_grad_(),))
    compiled = torch.compile(centre_logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits), centre_logits(logits))


@feature_losses
@few_examples
@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 50.0]))
def test_a_basis_of_the_channels_does_not_matter(name: str, seed: int, scale: float) -> None:
    if name == "psd":
        return  # its layers, made in the test, would not be those of the rotated features
    x = inputs_of(name, seed)
    # Three channels to five, angles and proportions kept.
    basis, _ = torch.linalg.qr(normal(seed + 3, (5, 3)))
    teacher = scale * torch.einsum("gf,bfhw->bghw", basis, x.student.detach())
    assert LOSSES[name].fast(x._replace(teacher=teacher)).item() == pytest.approx(0.0, abs=1e-12)


@few_examples
@given(seed=seeds)
def test_channel_wise_distillation_ignores_a_constant_per_channel(seed: int) -> None:
    student, teacher = normal(seed, (2, 2, 4, 3, 5), 2.0)
    shift = normal(seed + 1, (2, 4, 1, 1), 5.0)
    torch.testing.assert_close(cwd_loss(student, teacher + shift), cwd_loss(student, teacher))


def test_correlation_ignores_scale_and_offset_of_the_probabilities() -> None:
    # Halfway to the uniform distribution: another divergence, the same order and proportions.
    probs = F.softmax(normal(0, (2, 4, 3, 5)), 1)
    flatter = (0.5 * probs + 0.5 / 4).log()
    assert dist_loss(probs.log(), flatter).item() == pytest.approx(0.0, abs=1e-12)
    assert kd_loss(probs.log(), flatter).item() > 0.01


def test_what_is_constant_correlates_with_nothing() -> None:
    # On this grid the mean of equal probabilities differs from them by rounding.
    student = torch.full((1, 19, 5, 7), 0.1, requires_grad=True)
    loss = dist_loss(student, normal(0, (1, 19, 5, 7)).float(), 2.0, 1.0, 10.0)
    assert loss.item() == pytest.approx(4 * 11)
    assert not gradient(loss, student).any()


def test_layers_that_attend_alike_have_no_residual() -> None:
    student, teacher = normal(0, (2, 2, 5, 9, 11)).float()
    student.requires_grad_()
    loss = psd_loss([student, 3 * student], [teacher, 7 * teacher])  # alike but for rounding
    assert loss.item() == 0
    assert not gradient(loss, student).any()


# --- labels ---------------------------------------------------------------------------------


def test_class_variation_without_labels_is_zero_and_connected() -> None:
    x = inputs_of("ifvd", 11)
    for label in (255, CLASSES):  # ignored, or outside the classes
        loss = ifvd_loss(x.student, x.teacher, torch.full_like(x.target, label), CLASSES)
        assert loss.item() == 0
        assert not gradient(loss, x.student).any()


def test_class_variation_looks_at_labelled_positions_only() -> None:
    x = inputs_of("ifvd", 12)
    target = labels_of(1, (2, 3, 5), 0.5)  # one label for each position
    loss = ifvd_loss(x.student, x.teacher, target, CLASSES)
    ignored = (target == 255).unsqueeze(1).expand_as(x.student)
    assert not gradient(loss, x.student)[ignored].any()
    changed = torch.where(ignored, torch.nan, x.student)
    other = ifvd_loss(changed, x.teacher, target, CLASSES)
    assert other.item() == loss.item()
    assert not gradient(other, x.student)[ignored].any()


def test_class_variation_ignores_a_class_by_its_number() -> None:
    x = inputs_of("ifvd", 13)
    target = labels_of(1, (2, 9, 15), 0.0)
    without = torch.where(target == 1, 255, target)
    torch.testing.assert_close(
        ifvd_loss(x.student, x.teacher, target, CLASSES, ignore_index=1),
        ifvd_loss(x.student, x.teacher, without, CLASSES),
    )


def test_a_position_has_the_label_in_its_middle() -> None:
    features = torch.zeros(1, 1, 2, 3)
    target = torch.arange(6 * 12).view(1, 6, 12)
    labels = _distil_features.labels_on_grid(target, features, 100, 255)
    assert labels.tolist() == [[12 + 2, 12 + 6, 12 + 10, 48 + 2, 48 + 6, 48 + 10]]


# --- similarity matrices in slices ----------------------------------------------------------


@pytest.mark.parametrize("name", ["pairwise", "pairwise-single", "cirkd-minibatch"])
@pytest.mark.parametrize("elements", [1, 40])
def test_slices_change_nothing(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs_of(name, 14, batch=3, valid=True, extra=1)
    whole = LOSSES[name].fast(x)
    monkeypatch.setattr(_distil_features, "_PAIR_ELEMENTS", elements)
    sliced = LOSSES[name].fast(x)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(gradient(sliced, x.student), gradient(whole, x.student))


@pytest.mark.parametrize("name", ["pairwise", "cirkd-minibatch"])
def test_slices_are_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distil_features, "_PAIR_ELEMENTS", 40)
    x = inputs_of(name, 14, valid=True)
    compiled = torch.compile(LOSSES[name].fast, fullgraph=True, backend="eager")
    expected = LOSSES[name].fast(x)
    torch.testing.assert_close(gradient(compiled(x), x.student), gradient(expected, x.student))


def peak_of_pairs(function: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Peak memory by the profiler, in units of the similarities of all pairs."""
    student, teacher = (normal(seed, (2, 4, 16, 32)).float() for seed in (0, 1))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function(student.requires_grad_(), teacher).backward()
    peak = held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (4 * 2 * 512 * 2 * 512)


def test_slices_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return cirkd_minibatch_loss(student, teacher, patch=1)

    assert peak_of_pairs(function) > 2.0
    monkeypatch.setattr(_distil_features, "_PAIR_ELEMENTS", 1 << 14)
    assert peak_of_pairs(function) < 0.5


# --- arguments ------------------------------------------------------------------------------

MAPS = torch.zeros(2, 3, 4, 5)
LABELS = torch.zeros(2, 8, 10, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: centre_logits(MAPS[0]), "logits: expected 4 axes"),
        (lambda: cwd_loss(MAPS, MAPS[:, :2]), "teacher: expected shape"),
        (lambda: cwd_loss(MAPS, MAPS, 0.0), "temperature: expected a number above 0"),
        (lambda: cwd_loss(MAPS, MAPS, valid=MAPS[:, 0, :2] == 0), "valid: expected shape"),
        (lambda: dist_loss(MAPS[0], MAPS[0]), "student: expected 4 axes"),
        (lambda: dist_loss(MAPS, MAPS, -1.0), "temperature"),
        (lambda: csd_loss(MAPS, MAPS, patch=0), "patch: expected at least 1, got 0"),
        (lambda: pairwise_loss(MAPS, MAPS[..., 1:]), "teacher: expected shape"),
        (lambda: pairwise_loss(MAPS, MAPS, valid=MAPS[:1, 0] == 0), "valid: expected shape"),
        (lambda: attention_loss(MAPS, MAPS[:1]), "teacher: expected shape"),
        (lambda: ifvd_loss(MAPS, MAPS, LABELS[:1], 3), "target: expected shape"),
        (lambda: ifvd_loss(MAPS, MAPS, LABELS, 0), "num_classes: expected at least 1"),
        (lambda: psd_loss([MAPS], [MAPS]), "at least two layers.* got 1 and 1"),
        (lambda: psd_loss([MAPS] * 3, [MAPS] * 2), "as many of both, got 3 and 2"),
        (lambda: psd_loss([MAPS] * 2, [MAPS, MAPS[:1]]), r"teachers\[1\]: expected shape"),
        (lambda: cirkd_minibatch_loss(MAPS, MAPS, 0.0), "temperature"),
        (lambda: cirkd_memory_loss(MAPS[0, 0], MAPS[0, 0], MAPS[0, 0, :, :2]), "contrast"),
        (lambda: cirkd_memory_loss(MAPS[0, 0], MAPS[0, 0, :2], MAPS[0, 0]), "teacher_anchors"),
        (lambda: CIRKDMemory(3, 0), "dim: expected at least 1, got 0"),
        (lambda: CIRKDMemory(3, 4, anchors=0), "anchors: expected at least 1"),
        (lambda: CIRKDMemory(3, 4, kd_temperature=0.0), "kd_temperature"),
        (lambda: CIRKDMemory(3, 4)(MAPS, MAPS, LABELS), r"student: expected shape \(2, 4, 4, 5\)"),
        (lambda: CIRKDMemory(3, 3)(MAPS, MAPS[:1], LABELS), "teacher: expected shape"),
        (lambda: CIRKDMemory(3, 3)(MAPS, MAPS, LABELS[:1]), "target: expected shape"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TensorArgumentError, match=message):
        call()


@pytest.mark.parametrize("module", [_distil_logits, _distil_features, _distil_memory])
def test_examples_run(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


# --- the memory bank ------------------------------------------------------------------------

DIM = 6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def step_of(seed: int, batch: int = 2, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = normal(seed, (2, batch, DIM, 3, 5))
    target = labels_of(seed, (batch, 3, 5), ignored)
    return student.requires_grad_(), teacher, target


def remembered(bank: CIRKDMemory, kind: str) -> list[Tensor]:
    """The filled part of each class's queue."""
    queue, count = getattr(bank, f"{kind}_queue"), getattr(bank, f"{kind}_count")
    return [rows[:filled] for rows, filled in zip(queue, count.tolist(), strict=True)]


def expected_bank(teacher: Tensor, target: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """All labelled pixels and all regions by class, in the order of the images."""
    pixels: list[list[Tensor]] = [[] for _ in range(CLASSES)]
    regions: list[list[Tensor]] = [[] for _ in range(CLASSES)]
    for features, labels in zip(teacher, target, strict=True):
        for c in range(CLASSES):
            own = F.normalize(features[:, labels == c].T, dim=1)
            pixels[c] += list(own)
            if len(own):
                regions[c].append(F.normalize(own.mean(0), dim=0))
    return pixels, regions


def same_rows(first: Tensor, second: Tensor) -> None:
    """The same vectors in whatever order."""
    assert first.shape == second.shape
    first, second = (rows[rows[:, 0].argsort()] for rows in (first.double(), second.double()))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_bank_remembers_then_compares_with_all_it_has() -> None:
    bank = CIRKDMemory(CLASSES, DIM, pixels_per_class=15, temperature=0.3, kd_temperature=2.0)
    seen_pixels: list[Tensor] = []
    seen_regions: list[Tensor] = []
    for seed in range(2):
        student, teacher, target = step_of(seed)
        pixels, regions = expected_bank(teacher, target)
        seen_pixels += [row for rows in pixels for row in rows]
        seen_regions += [row for rows in regions for row in rows]
        labelled = (target != 255).flatten()
        own, other = (anchors(maps)[labelled].detach().numpy() for maps in (student, teacher))
        losses = bank(student, teacher, target)
        for loss, seen in zip(losses, (seen_pixels, seen_regions), strict=True):
            expected = slow.cirkd_memory(own, other, torch.stack(seen).numpy(), 0.3, 2.0)
            assert loss.item() == pytest.approx(expected, rel=1e-5)
    same_rows(torch.cat(remembered(bank, "pixel")), torch.stack(seen_pixels))
    same_rows(torch.cat(remembered(bank, "region")), torch.stack(seen_regions))


def test_regions_are_remembered_in_the_order_of_the_images() -> None:
    bank = CIRKDMemory(CLASSES, DIM)
    student, teacher, target = step_of(2, batch=3)
    bank(student, teacher, target)
    _, regions = expected_bank(teacher, target)
    for kept, expected in zip(remembered(bank, "region"), regions, strict=True):
        torch.testing.assert_close(kept.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_an_empty_bank_compares_with_nothing() -> None:
    bank = CIRKDMemory(CLASSES, DIM).eval()
    student, teacher, target = step_of(3)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    for loss in bank(student, teacher, target):
        assert loss.item() == 0
        assert not gradient(loss, student).any()
    # Evaluation does not remember.
    torch.testing.assert_close(dict(bank.state_dict()), before)
    assert not any(value.any() for value in before.values())


@pytest.mark.parametrize("filled", [False, True])
def test_nothing_labelled_is_zero_and_connected(filled: bool) -> None:
    bank = CIRKDMemory(CLASSES, DIM)
    student, teacher, target = step_of(4)
    if filled:
        bank(student, teacher, target)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    for label in (255, CLASSES):
        for loss in bank(student, teacher, torch.full_like(target, label)):
            assert loss.item() == 0
            assert not gradient(loss, student).any()
    torch.testing.assert_close(dict(bank.state_dict()), before)


def test_only_what_was_seen_is_drawn() -> None:
    bank = CIRKDMemory(CLASSES, DIM, pixel_contrast=12, region_contrast=3, pixels_per_class=5)
    student, teacher, target = step_of(5, ignored=0.0)
    target[target == 0] = 255
    target[0, 0, :2] = 0
    bank(student, teacher, target)
    drawn = _distil_memory._draw_contrast(bank.pixel_queue, bank.pixel_count, 12)
    known = torch.cat(remembered(bank, "pixel"))
    assert bool((drawn[:, None] == known).all(2).any(1).all())
    # Four of each class, and the two that the first has; none twice.
    of_class = [
        int((drawn[:, None] == rows).all(2).any(1).sum()) for rows in remembered(bank, "pixel")
    ]
    assert of_class == [2, 4, 4]
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert len(_distil_memory._draw_contrast(bank.region_queue, bank.region_count, 3)) == 3
    # At least one of each class, however few are asked for.
    assert len(_distil_memory._draw_contrast(bank.pixel_queue, bank.pixel_count, 1)) == 3


def test_pixels_are_of_their_class_and_drawn_at_random() -> None:
    bank = CIRKDMemory(CLASSES, CLASSES + 1, pixels_per_class=2)
    target = labels_of(6, (2, 6, 10))
    class_of = F.one_hot(torch.where(target == 255, CLASSES, target), CLASSES + 1)
    teacher = class_of.movedim(-1, 1).double()
    for _ in range(3):
        bank(teacher, teacher, target)
    for c, (pixels, regions) in enumerate(
        zip(remembered(bank, "pixel"), remembered(bank, "region"), strict=True)
    ):
        assert pixels.shape == (3 * 2 * 2, CLASSES + 1)
        assert regions.shape == (3 * 2, CLASSES + 1)
        assert bool((pixels[:, c] == 1).all())
        torch.testing.assert_close(regions[:, c], torch.ones(6))
    # A position says where it is: in forty draws of two out of twelve each comes up.
    where = torch.linspace(0.0, 1.5, 12).view(1, 1, 3, 4)
    teacher = torch.cat([where.cos(), where.sin()], 1)
    bank = CIRKDMemory(1, 2, pixels_per_class=2)
    for _ in range(40):
        bank(teacher, teacher, torch.zeros(1, 3, 4, dtype=torch.long))
    assert len(bank.pixel_queue[0, :80].unique(dim=0)) == 12
    for pair in bank.pixel_queue[0, :80].view(40, 2, 2):
        assert not torch.equal(pair[0], pair[1])


@few_examples
@given(
    seed=seeds,
    size=st.integers(1, 7),
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_queues_forget_the_oldest(seed: int, size: int, steps: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    queue = torch.zeros(2, size, 1)
    position, count = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    expected: list[deque[float]] = [deque(maxlen=size) for _ in range(2)]
    for entries in steps:
        values = torch.rand(entries, 2, 1, generator=generator)
        kept = torch.rand(entries, 2, generator=generator) < 0.7
        _distil_memory._write(queue, position, count, values, kept)
        for entry, c in kept.nonzero().tolist():
            expected[c].append(values[entry, c, 0].item())
    for c in range(2):
        filled = int(count[c])
        start = int(position[c]) if filled == size else 0
        found = [queue[c, (start + k) % size, 0].item() for k in range(filled)]
        assert found == list(expected[c])


def test_a_small_bank_keeps_the_last_and_still_compares() -> None:
    bank = CIRKDMemory(CLASSES, DIM, pixel_memory=3, region_memory=1, pixels_per_class=15)
    for seed in range(3):
        student, teacher, target = step_of(seed)
        losses = bank(student, teacher, target)
        assert all(loss.isfinite() and loss > 0 for loss in losses)
    _, regions = expected_bank(teacher, target)
    assert bank.pixel_count.tolist() == [3] * CLASSES
    last = torch.stack([rows[-1] for rows in regions])
    torch.testing.assert_close(bank.region_queue[:, 0].double(), last, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_bank_and_losses() -> None:
    def run(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(seed)
        bank = CIRKDMemory(
            CLASSES, DIM, pixel_contrast=6, region_contrast=3, pixels_per_class=2, anchors=5
        )
        losses = [loss.item() for step in range(3) for loss in bank(*step_of(step))]
        return losses, dict(bank.state_dict())

    first, again, other = run(1), run(1), run(2)
    assert first[0] == again[0]
    for name, value in first[1].items():
        assert torch.equal(value, again[1][name])
    assert first[0] != other[0]
    assert not torch.equal(first[1]["pixel_queue"], other[1]["pixel_queue"])


def test_a_restored_bank_goes_on_as_the_first() -> None:
    def make() -> CIRKDMemory:
        return CIRKDMemory(CLASSES, DIM, pixel_memory=7, pixel_contrast=6, pixels_per_class=2)

    first, second = make(), make()
    for seed in range(3):
        first(*step_of(seed))
    second.load_state_dict(first.state_dict())
    results = []
    for bank in (first, second):
        torch.manual_seed(5)
        results.append([loss.item() for loss in bank(*step_of(9))])
    assert results[0] == results[1]
    assert not [name for name, _ in first.named_parameters()]
    assert len(first.state_dict()) == 6
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize("limit", [1, 4, None])
def test_anchors_are_drawn_from_the_labelled_positions(limit: int | None) -> None:
    bank = CIRKDMemory(CLASSES, DIM, anchors=limit)
    student, teacher, target = step_of(7)
    pixel, region = bank(student, teacher, target)
    labelled = target != 255
    for loss in (pixel, region):
        reached = torch.autograd.grad(loss, student, retain_graph=True)[0].abs().sum(1) > 0
        assert not reached[~labelled].any()
        assert int(reached.sum()) == (int(labelled.sum()) if limit is None else limit)


def test_the_bank_s_gradient_is_the_derivative_and_the_teacher_s_none() -> None:
    bank = CIRKDMemory(CLASSES, DIM, temperature=0.5).double()
    student, teacher, target = step_of(8, batch=1)
    bank(student, teacher, target)
    bank.eval()

    def total(student: Tensor) -> Tensor:
        pixel, region = bank(student, teacher, target)
        return pixel + region

    assert torch.autograd.gradcheck(total, (student,))
    teacher.requires_grad_()
    total(student).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_bank_works_in_half_precision(scale: float) -> None:
    bank = CIRKDMemory(CLASSES, DIM)
    student, teacher, target = step_of(9)
    low = (student.detach() * scale).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = bank(low, teacher.half(), target)
    for loss in losses:
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        grad = torch.autograd.grad(loss, low, retain_graph=True)[0]
        assert bool(grad.isfinite().all())
    assert bank.pixel_queue.dtype == torch.float32
    assert sum(bank.pixel_count.tolist()) > 0


def test_the_memory_loss_without_anchors_or_embeddings_is_zero_and_connected() -> None:
    maps = normal(0, (4, DIM)).requires_grad_()
    for own, contrast in ((maps[:0], maps), (maps, maps[:0])):
        loss = cirkd_memory_loss(own, own, contrast)
        assert loss.item() == 0
        assert not gradient(loss, maps).any()


PROCESS = """
import sys
import torch
from rdd_pipeline.losses import CIRKDMemory

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
torch.manual_seed(rank)
teacher, target = torch.load(f"{folder}/step.pt")[rank]
bank = CIRKDMemory(3, 6, pixels_per_class=4)
for _ in range(2):
    bank(teacher, teacher, target)
torch.save(bank.state_dict(), f"{folder}/bank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_all_processes_hold_the_same_bank(tmp_path: Path) -> None:
    # What one of them alone has no label for comes from the other.
    steps = [(teacher.float(), target) for _, teacher, target in map(step_of, (10, 11))]
    steps[0][1].fill_(255)
    torch.save(steps, tmp_path / "step.pt")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"bank{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
    _, regions = expected_bank(torch.cat([s[0] for s in steps]), torch.cat([s[1] for s in steps]))
    for c in range(CLASSES):
        seen = torch.stack(regions[c] * 2)
        assert int(first["region_count"][c]) == len(seen) > 0
        torch.testing.assert_close(
            first["region_queue"][c, : len(seen)], seen, rtol=1e-5, atol=1e-6
        )
