from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rdd_pipeline.comparison import (
    Member,
    Outcome,
    compare,
    comparison_tree,
    default_baseline,
    markdown,
    members,
    notes,
    paired_difference,
    table,
)
from rdd_pipeline.config import RunConfig, parse_config
from tiny import tiny_tree

NETWORK = tiny_tree(Path())["student"]["network"]


def outcome(name: str, miou: float | None, *, seconds: float = 2.0) -> Outcome:
    if miou is None:
        return Outcome(student=name, result=None, error="the loss is nan")
    result = {
        "metrics": {"miou": miou},
        "seconds": seconds,
        "step_ms": 10.0 * seconds,
        "data_wait_share": 0.25,
        "parameters": 1234,
    }
    return Outcome(student=name, result=result)


def config_of(students: Any = (), grid: dict[str, Any] | None = None) -> RunConfig:
    return parse_config(tiny_tree(Path("runs")) | {"students": list(students), "grid": grid})


@pytest.mark.parametrize("count", [2, 3, 5, 12, 40])
def test_interval_is_that_of_the_paired_t_test(count: int) -> None:
    generator = np.random.default_rng(count)
    values, baseline = generator.normal(0.5, 0.1, (2, count))
    found = paired_difference(values.tolist(), baseline.tolist())
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.pairs == count
    assert found.mean == pytest.approx(float((values - baseline).mean()), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.conclusive == (expected.pvalue < 0.05)


def test_interval_by_hand() -> None:
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, t(2) = 4.302653.
    found = paired_difference([0.31, 0.42, 0.53], [0.30, 0.40, 0.50])
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-7)
    assert not found.conclusive


def test_one_pair_has_no_interval_and_equal_differences_an_empty_one() -> None:
    one = paired_difference([0.4], [0.3])
    assert (one.pairs, one.low, one.high) == (1, None, None)
    assert not one.conclusive
    same = paired_difference([0.5, 0.75], [0.25, 0.5])
    assert (same.low, same.mean, same.high) == (0.25, 0.25, 0.25)
    assert same.conclusive


def test_rows_pair_common_seeds_within_a_network() -> None:
    miou = {
        ("a", "supervised", 0): 0.30, ("a", "supervised", 1): 0.40, ("a", "supervised", 2): 0.35,
        ("a", "rdd", 0): 0.33, ("a", "rdd", 1): 0.41, ("a", "rdd", 7): 0.90,
        ("b", "rdd", 0): 0.50,
    }  # fmt: skip
    places = {"-".join(map(str, key)): Member(network=key[0], method=key[1], seed=key[2])
              for key in miou}  # fmt: skip
    rows = compare(
        [outcome(name, value) for name, value in zip(places, miou.values(), strict=True)],
        places,
        "supervised",
    )
    supervised, rdd, other = rows
    assert (supervised.baseline, supervised.difference) == (True, None)
    assert supervised.std == pytest.approx(statistics.stdev([0.30, 0.40, 0.35]))
    assert rdd.seeds == (0, 1, 7)
    assert rdd.mean == pytest.approx((0.33 + 0.41 + 0.90) / 3)
    assert rdd.difference is not None
    assert rdd.difference.pairs == 2
    assert rdd.difference.mean == pytest.approx(0.02)
    assert (other.network, other.std, other.difference) == ("b", None, None)


def test_table_shows_dashes_where_nothing_is_known_and_names_what_failed() -> None:
    config = config_of(grid={"methods": ["supervised", "kd", "rdd", "dist"], "seeds": [0, 1]})
    values = {
        "supervised-s0": 0.30, "supervised-s1": 0.32, "kd-s0": 0.40, "kd-s1": 0.41,
        "rdd-s0": 0.31, "rdd-s1": None, "dist-s0": None, "dist-s1": None,
    }  # fmt: skip
    tree = comparison_tree(config, [outcome(name, miou) for name, miou in values.items()])
    header, rows = table(tree)
    assert header[:5] == ("method", "seeds", "mIoU", "over supervised (95%)", "pairs")
    cells = {row[0]: row[1:5] for row in rows}
    assert cells["supervised"] == ("2", "0.3100 ± 0.0141", "baseline", "-")
    assert cells["kd"][2:] == ("+0.0950 [+0.0315, +0.1585]", "2")
    assert cells["rdd"] == ("1, 1 failed", "0.3100", "+0.0100 [-]", "1")
    assert cells["dist"] == ("0, 2 failed", "-", "-", "-")
    said = "\n".join(notes(tree))
    assert "1 of 2 methods cannot be told from the baseline" in said
    assert "failed: rdd-s1: the loss is nan" in said
    page = markdown(tree)
    assert page.count("\n| ") == 5
    assert "- failed: dist-s0: the loss is nan" in page


def test_an_interval_around_0_is_said_to_contain_it() -> None:
    config = config_of(grid={"methods": ["supervised", "kd"], "seeds": [0, 1]})
    values = {"supervised-s0": 0.30, "supervised-s1": 0.30, "kd-s0": 0.28, "kd-s1": 0.33}
    tree = comparison_tree(config, [outcome(name, miou) for name, miou in values.items()])
    assert "contains 0" in table(tree)[1][1][3]


def test_listed_students_are_grouped_by_what_they_are() -> None:
    config = config_of(
        [
            {"name": "base-1", "method": "supervised", "seed": 1},
            {"name": "base-2", "method": "supervised", "seed": 2},
            {"name": "r1", "method": "rdd", "seed": 1},
            {"name": "r2", "method": "rdd", "seed": 2},
            {"name": "or", "method": "rdd", "seed": 1, "rdd": {"relation": "or"}},
            {"name": "live", "method": "rdd", "seed": 1, "teacher": "online"},
            {"name": "big", "method": "rdd", "network": NETWORK | {"encoder": "resnet18"}},
        ]
    )
    found = {name: (place.method, place.seed) for name, place in members(config).items()}
    assert found == {
        "base-1": ("supervised", 1), "base-2": ("supervised", 2), "r1": ("rdd", 1),
        "r2": ("rdd", 2), "or": ("rdd #2", 1), "live": ("rdd, online", 1), "big": ("rdd", 0),
    }  # fmt: skip
    networks = {name: place.network for name, place in members(config).items()}
    assert networks["r1"] == "FPN tu-mobilenetv3_small_050"
    assert networks["big"] == "FPN resnet18"
    assert default_baseline(config) == "supervised"


def test_a_listed_student_equal_to_a_grids_but_for_its_seed_belongs_to_it() -> None:
    plain = {"name": "plain", "method": "kd"}
    config = config_of(
        [{"name": "earlier", "method": "kd", "seed": 5}],
        {"methods": ["rdd", plain], "seeds": [0], "baseline": "plain", "networks": {"m": NETWORK}},
    )
    assert members(config)["earlier"] == Member(network="m", method="plain", seed=5)
    assert default_baseline(config) == "plain"
    assert default_baseline(config_of(["kd", "rdd"])) is None
    tree = comparison_tree(config_of(["kd", "rdd"]), [outcome("kd", 0.3), outcome("rdd", 0.4)])
    header, rows = table(tree)
    assert header[:3] == ("method", "seeds", "mIoU")
    assert "pairs" not in header
    assert [row[2] for row in rows] == ["0.3000", "0.4000"]
