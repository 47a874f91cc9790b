"""``rdd maps hardest``, ``quality``, ``compare`` and ``student`` as a user types them."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

from inspection_stores import tiny_dataset
from rdd_pipeline.export import describe_network
from rdd_pipeline.inspection import Maps
from rdd_pipeline.networks import build_network, save_weights
from tiny import tiny_config

Rdd = Callable[..., subprocess.CompletedProcess[str]]


def test_hardest_lists_and_writes(rdd: Rdd, two_stores: Path, tmp_path: Path) -> None:
    done = rdd("maps", "hardest", two_stores / "a.zarr", "-n", "3", "--by", "soft_min",
               "--class", "car", "--csv", tmp_path / "h.csv", "--overlays", tmp_path / "png",
               "--config", two_stores / "tiny.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = Maps(two_stores / "a.zarr").hardest(3, "soft_min", class_name="car").image_ids
    assert "low is hard" in done.stdout
    places = [done.stdout.index(name) for name in expected]
    assert places == sorted(places)
    with (tmp_path / "h.csv").open(newline="") as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == list(expected)
    assert len(list((tmp_path / "png").glob("*.png"))) == 3


def test_quality_shows_baselines_and_refuses_circles(
    rdd: Rdd, two_stores: Path, tmp_path: Path
) -> None:
    done = rdd("maps", "quality", two_stores / "a.zarr", "--config", two_stores / "tiny.yaml",
               "--errors", two_stores / "b.zarr", "--hardness", "--images", "5", "--resamples",
               "20", "--csv", tmp_path / "q.csv", "--figure", tmp_path / "q.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("discrepancy", "hardness", "predicted boundary", "random (baseline)", "auroc"):
        assert text in done.stdout
    assert (tmp_path / "q.png").stat().st_size > 1000
    with (tmp_path / "q.csv").open(newline="") as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    assert 0 < float(rows["hardness"]["auroc_low"]) < float(rows["hardness"]["auroc"]) < 1
    refused = rdd("maps", "quality", two_stores / "a.zarr", "--config", two_stores / "tiny.yaml",
                  "--hardness")  # fmt: skip
    assert refused.returncode == 1
    assert "does not know the errors" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_compare_ranks_what_changed(rdd: Rdd, two_stores: Path) -> None:
    done = rdd("maps", "compare", two_stores / "a.zarr", two_stores / "b.zarr", "-n", "2")
    assert done.returncode == 0, done.stderr
    expected = Maps(two_stores / "a.zarr").compare(two_stores / "b.zarr")
    assert f"{expected.spearman:.4f}" in done.stdout
    assert expected.images[0].image_id in done.stdout
    unknown = rdd("maps", "compare", two_stores / "a.zarr", two_stores / "nosuch.zarr")
    assert unknown.returncode == 1
    assert "no map store" in unknown.stderr


def test_student_is_followed_over_its_snapshots(rdd: Rdd, two_stores: Path, tmp_path: Path) -> None:
    network = tiny_config(tmp_path).teacher.network
    describe_network(tmp_path, network, tiny_dataset())
    for seed, folder in enumerate(("", "snapshots/00000005")):
        weights = build_network(network, tiny_dataset().num_classes, seed=seed)
        save_weights(weights, tmp_path / folder / "weights.safetensors")
    done = rdd("maps", "student", two_stores / "a.zarr", tmp_path, "--data",
               two_stores / "tiny.yaml", "--images", "2", "--device", "cpu",
               "--csv", tmp_path / "s.csv", "--figure", tmp_path / "s.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    maps = Maps(two_stores / "a.zarr", two_stores / "tiny.yaml")
    kept, end = maps.student_history(tmp_path, images=2).table()
    rows = [line.split() for line in done.stdout.splitlines() if "0." in line]
    assert [row[0] for row in rows] == ["5", "end"]
    assert kept["spearman"] != end["spearman"]
    assert [row[1] for row in rows] == [f"{step['spearman']:.4f}" for step in (kept, end)]
    assert [row[4] for row in rows] == [f"{step['relative']:.4f}" for step in (kept, end)]
    with (tmp_path / "s.csv").open(newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["5", ""]
    assert (tmp_path / "s.png").stat().st_size > 1000
