"""``rdd maps hardest``, ``quality`` and ``compare`` as a user types them."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from inspection_stores import build_store
from rdd_pipeline.inspection import Maps
from tiny import write_tiny

Rdd = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    build_store(folder / "a.zarr")
    build_store(folder / "b.zarr", seed=1)
    write_tiny(folder / "tiny.yaml", folder / "runs")
    return folder


def test_hardest_lists_and_writes(rdd: Rdd, folder: Path, tmp_path: Path) -> None:
    done = rdd("maps", "hardest", folder / "a.zarr", "-n", "3", "--by", "soft_min",
               "--class", "car", "--csv", tmp_path / "h.csv", "--overlays", tmp_path / "png",
               "--config", folder / "tiny.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = Maps(folder / "a.zarr").hardest(3, "soft_min", class_name="car").image_ids
    assert "low is hard" in done.stdout
    places = [done.stdout.index(name) for name in expected]
    assert places == sorted(places)
    with (tmp_path / "h.csv").open(newline="") as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == list(expected)
    assert len(list((tmp_path / "png").glob("*.png"))) == 3


def test_quality_shows_baselines_and_refuses_circles(
    rdd: Rdd, folder: Path, tmp_path: Path
) -> None:
    done = rdd("maps", "quality", folder / "a.zarr", "--config", folder / "tiny.yaml", "--errors",
               folder / "b.zarr", "--hardness", "--images", "5", "--resamples", "20",
               "--csv", tmp_path / "q.csv", "--figure", tmp_path / "q.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("discrepancy", "hardness", "predicted boundary", "random (baseline)", "auroc"):
        assert text in done.stdout
    assert (tmp_path / "q.png").stat().st_size > 1000
    with (tmp_path / "q.csv").open(newline="") as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    assert 0 < float(rows["hardness"]["auroc_low"]) < float(rows["hardness"]["auroc"]) < 1
    refused = rdd("maps", "quality", folder / "a.zarr", "--config", folder / "tiny.yaml",
                  "--hardness")  # fmt: skip
    assert refused.returncode == 1
    assert "does not know the errors" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_compare_ranks_what_changed(rdd: Rdd, folder: Path) -> None:
    done = rdd("maps", "compare", folder / "a.zarr", folder / "b.zarr", "-n", "2")
    assert done.returncode == 0, done.stderr
    expected = Maps(folder / "a.zarr").compare(folder / "b.zarr")
    assert f"{expected.spearman:.4f}" in done.stdout
    assert expected.images[0].image_id in done.stdout
    unknown = rdd("maps", "compare", folder / "a.zarr", folder / "nosuch.zarr")
    assert unknown.returncode == 1
    assert "no map store" in unknown.stderr
