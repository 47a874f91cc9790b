"""Figures from counts against brute force, scikit-learn, scipy and torchmetrics."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchmetrics

# isort: split
from torchmetrics.functional.classification import binary_calibration_error

from rdd_pipeline.inspection import (
    EmptySelectionError,
    ImageBootstrap,
    InspectionError,
    city_block_distance,
    correlation,
    ece_from_counts,
    hardness_measures,
    kendall_from_counts,
    quality,
    risk_coverage,
    scores_from_counts,
    spearman_from_counts,
)
from rdd_pipeline.inspection import pixels as pixel_passes
from rdd_pipeline.inspection.measures import HARDNESS, TRUE_PROB
from rdd_pipeline.inspection.pixels import FARTHEST
from rdd_pipeline.inspection.quality import SCORE_NAMES, interval


def _counted(score: np.ndarray, wrong: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    correct, bad = (np.bincount(score[part], minlength=bins) for part in (~wrong, wrong))
    return correct, bad


@pytest.fixture
def pixels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    score = rng.integers(0, 12, 800)
    return score, rng.random(800) < 0.05 + 0.05 * score


def test_auroc_and_average_precision_are_those_of_scikit_learn(
    pixels: tuple[np.ndarray, np.ndarray],
) -> None:
    score, wrong = pixels
    scores = scores_from_counts(*_counted(score, wrong, 14))
    assert scores.auroc == pytest.approx(roc_auc_score(wrong, score), rel=1e-12)
    assert scores.average_precision == pytest.approx(
        average_precision_score(wrong, score), rel=1e-12
    )
    assert scores.error_rate == pytest.approx(wrong.mean(), rel=1e-12)


def test_risk_coverage_figures_are_the_mean_over_all_orders_of_ties() -> None:
    score = np.array([0, 0, 1, 1, 1, 2, 2])
    wrong = np.array([0, 1, 0, 1, 0, 1, 1], bool)
    aurc, best = [], []
    for order in itertools.permutations(range(7)):
        ordered = sorted(order, key=lambda pixel: score[pixel])
        aurc.append((np.cumsum(wrong[ordered]) / np.arange(1, 8)).mean())
        best.append((np.cumsum(wrong[list(order)]) / np.arange(1, 8)).mean())
    scores = scores_from_counts(*_counted(score, wrong, 3))
    assert scores.aurc == pytest.approx(np.mean(aurc), rel=1e-12)
    assert scores.e_aurc == pytest.approx(np.mean(aurc) - np.min(best), rel=1e-12)
    assert scores.ause == pytest.approx(float(scores.e_aurc) / wrong.mean(), rel=1e-12)


def test_augrc_is_the_area_under_the_generalised_risk(
    pixels: tuple[np.ndarray, np.ndarray],
) -> None:
    score, wrong = pixels
    correct, bad = _counted(score, wrong, 12)
    # Within ties the expected curve is straight: the trapezoids over the bins are exact.
    coverage = np.concatenate([[0], np.cumsum(correct + bad)]) / len(score)
    errors = np.concatenate([[0], np.cumsum(bad)]) / len(score)
    assert scores_from_counts(correct, bad).augrc == pytest.approx(
        np.trapezoid(errors, coverage), rel=1e-12
    )


def test_scores_that_say_nothing_and_scores_that_know_all() -> None:
    chance = scores_from_counts([75], [25])
    assert (chance.auroc, chance.average_precision) == (0.5, 0.25)
    assert chance.aurc == pytest.approx(0.25, rel=1e-12)
    perfect = scores_from_counts([75, 0], [0, 25])
    assert perfect.auroc == perfect.average_precision == 1.0
    assert perfect.e_aurc == pytest.approx(0.0, abs=1e-12)
    assert scores_from_counts([0, 75], [25, 0]).auroc == 0.0


def test_figures_that_are_not_defined_are_nan_and_nothing_warns() -> None:
    nothing = scores_from_counts([0, 0], [0, 0])
    assert all(np.isnan(getattr(nothing, name)) for name in SCORE_NAMES)
    right = scores_from_counts([3, 4], [0, 0])
    assert np.isnan(right.auroc)
    assert np.isnan(right.ause)
    assert (right.aurc, right.augrc, right.e_aurc) == (0.0, 0.0, 0.0)
    wrong = scores_from_counts([0, 0], [3, 4])
    assert np.isnan(wrong.auroc)
    assert wrong.aurc == pytest.approx(1.0)


def test_leading_axes_are_independent_and_large_counts_stay_exact() -> None:
    rng = np.random.default_rng(0)
    correct, bad = rng.integers(0, 9, (2, 3, 5, 7))
    both = scores_from_counts(correct, bad)
    one = scores_from_counts(correct[1, 2], bad[1, 2])
    for name in SCORE_NAMES:
        assert getattr(both, name).shape == (3, 5)
        assert getattr(both, name)[1, 2] == pytest.approx(float(getattr(one, name)), nan_ok=True)
    # Copies of every pixel leave all but the finite-size part of the risks as they were.
    few, many = (scores_from_counts(k * correct[1, 2], k * bad[1, 2]) for k in (10**6, 10**9))
    for name in SCORE_NAMES:
        assert float(getattr(many, name)) == pytest.approx(float(getattr(few, name)), rel=1e-5)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 255, 4000)
    right = rng.random(4000) < (codes / 254) ** 2
    correct, wrong = _counted(codes, ~right, 255)
    expected = binary_calibration_error(
        torch.from_numpy(codes / 254), torch.from_numpy(right), n_bins=13
    )
    assert ece_from_counts(correct, wrong, bins=13) == pytest.approx(float(expected), abs=2e-6)


@pytest.mark.parametrize("call", [
    lambda: scores_from_counts([1, 2], [1]), lambda: scores_from_counts([-1], [1]),
    lambda: ece_from_counts([1], [1], bins=0), lambda: spearman_from_counts([0.5]),
    lambda: kendall_from_counts([[0.5]]), lambda: ImageBootstrap(5, resamples=-1),
    lambda: hardness_measures(np.ones(251, np.uint32), threshold=2.0),
    lambda: hardness_measures(np.ones(251, np.uint32), temperature=0.0),
])  # fmt: skip
def test_bad_arguments_are_refused(call: object) -> None:
    with pytest.raises(InspectionError, match="expected"):
        call()  # type: ignore[operator]


def test_risk_coverage_curve(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    score, wrong = pixels
    coverage, risk = risk_coverage(*_counted(score, wrong, 20))
    assert coverage[-1] == 1.0
    assert risk[-1] == pytest.approx(wrong.mean())
    assert risk[3] == pytest.approx(wrong[score <= 3].mean())
    with pytest.raises(EmptySelectionError):
        risk_coverage([0], [0])


def test_bootstrap_in_parts_is_a_bootstrap_over_all_images() -> None:
    images = 40
    parts = np.split(np.arange(images), [3, 4, 30])
    bootstrap = ImageBootstrap(images, resamples=4000, seed=2)
    for part in parts:
        # Each image counts itself in a bin of its own, and its number.
        bootstrap.add({"which": np.eye(images, dtype=np.uint32)[part], "number": part[:, None]})
    which = bootstrap.totals("which")
    assert (which[0] == 1).all()
    assert (which[1:].sum(axis=1) == images).all()
    # Binomial(40, 1/40): mean 1 and variance 39/40, whichever part an image came in.
    assert which[1:].mean(axis=0) == pytest.approx(np.ones(images), abs=0.1)
    assert which[1:].var(axis=0) == pytest.approx(np.full(images, 39 / 40), abs=0.15)
    assert np.array_equal(bootstrap.totals("number")[:, 0], which @ np.arange(images))
    found = interval(bootstrap.totals("number")[:, 0] / images)
    spread = 1.96 * np.arange(images).std() / np.sqrt(images)
    assert found.value == 19.5
    assert found.low == pytest.approx(19.5 - spread, abs=0.5)
    assert found.high == pytest.approx(19.5 + spread, abs=0.5)


def test_bootstrap_needs_all_images_and_makes_no_interval_of_few() -> None:
    bootstrap = ImageBootstrap(4)
    bootstrap.add({"a": np.ones((3, 2))})
    with pytest.raises(EmptySelectionError, match="1 fewer"):
        bootstrap.totals("a")
    with pytest.raises(InspectionError, match="at most 1"):
        bootstrap.add({"a": np.ones((2, 2))})
    bootstrap.add({"a": np.ones((1, 2))})
    assert bootstrap.totals("a").tolist() == [[4.0, 4.0]]
    assert str(interval(bootstrap.totals("a")[:, 0])) == "4.0000"
    with pytest.raises(EmptySelectionError):
        ImageBootstrap(0)


def test_rank_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 9, 500)
    second = np.clip(first + rng.integers(-4, 5, 500), 2, 8)
    joint = np.zeros((11, 9), np.int64)
    np.add.at(joint, (first, second), 1)
    assert spearman_from_counts(joint) == pytest.approx(
        stats.spearmanr(first, second).statistic, abs=1e-14
    )
    assert kendall_from_counts(joint) == pytest.approx(
        stats.kendalltau(first, second).statistic, abs=1e-14
    )
    # Beyond 64-bit sums: pixels of a large store, squared.
    assert spearman_from_counts(joint * 10**9) == pytest.approx(
        spearman_from_counts(joint), abs=1e-14
    )
    assert kendall_from_counts(np.diag([10**10, 3, 10**10])) == 1.0
    assert np.isnan(spearman_from_counts([[3, 4]]))
    assert np.isnan(kendall_from_counts([[3], [4]]))


def test_measures_are_those_of_the_decoded_pixels() -> None:
    rng = np.random.default_rng(4)
    codes = np.minimum(rng.geometric(0.02, 3000) - 1, 250)
    counts = np.bincount(codes, minlength=251).astype(np.uint32)
    found = hardness_measures(
        np.stack([counts, np.zeros_like(counts)]), threshold=0.6, temperature=0.05
    )
    p, hardness = TRUE_PROB[codes], HARDNESS[codes]
    weights = np.exp((1 - p) / 0.05)
    assert found.pixels.tolist() == [3000, 0]
    assert found.mean[0] == pytest.approx(hardness.mean())
    assert found.p95[0] == np.quantile(hardness, 0.95, method="inverted_cdf")
    assert found.soft_min[0] == pytest.approx((p * weights).sum() / weights.sum())
    assert found.hard_share[0] == (p <= 0.6).mean()
    assert np.isnan(found.mean[1])


def test_soft_minimum_at_the_lowest_temperature_is_the_minimum() -> None:
    counts = np.zeros((2, 251), np.uint32)
    counts[0, [0, 200]] = 10_000, 1
    counts[1, 0] = 5
    found = hardness_measures(counts, temperature=0.002)
    assert found.soft_min == pytest.approx([TRUE_PROB[200], 1.0])


def test_distances_are_city_block() -> None:
    rng = np.random.default_rng(6)
    mask = rng.random((9, 13)) < 0.05
    rows, columns = np.nonzero(mask)
    y, x = np.indices(mask.shape)
    expected = (np.abs(y[..., None] - rows) + np.abs(x[..., None] - columns)).min(axis=-1)
    assert np.array_equal(city_block_distance(mask), expected)
    assert (city_block_distance(np.zeros((30, 30), bool)) == FARTHEST).all()
    far = np.zeros((1, 2000), bool)
    far[0, 0] = True
    assert city_block_distance(far)[0, -1] == FARTHEST


def test_examples_of_the_docstrings() -> None:
    for module in (quality, correlation, pixel_passes):
        found = doctest.testmod(module, extraglobs={"np": np})
        assert found.attempted
        assert not found.failed
