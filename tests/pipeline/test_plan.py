"""What a plan says against what the build then takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rdd_pipeline.config import parse_config
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.plan import plan_maps
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import ready_teacher, run_maps, run_teacher
from tiny import tiny_tree, write_tiny

QUIET = Reporter(quiet=True)


def test_bytes_and_files_are_those_of_the_build(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["data"]["train_images"] = 12
    config = parse_config(tree)
    assert ready_teacher(config, QUIET) is None
    teacher = run_teacher(config, QUIET)
    network = ready_teacher(config, QUIET)
    assert network is not None
    plan = plan_maps(config, network, sample=2, device="cpu", reporter=QUIET)
    built = run_maps(config, teacher, QUIET)
    files = [path for path in Path(built.path).rglob("*") if path.is_file()]
    assert plan.objects == len(files)
    assert plan.bytes_total == pytest.approx(built.bytes_on_disk, rel=0.1)
    assert (plan.images, plan.sampled, plan.trained_teacher) == (12, 6, True)
    assert {"discrepancy", "hardness", "logits"} <= plan.arrays.keys()
    # Two images of a shard: 48x80 codes of four maps, 2 bytes for each of 9 values of a position.
    height, width = network.grid_size(48, 80)
    assert plan.shard_bytes == 2 * (4 * 48 * 80 + 2 * 9 * height * width)
    assert plan.seconds == pytest.approx(12 * plan.seconds_per_image)
    assert plan.online_seconds > 0.0
    assert plan.break_even_students >= 1
    assert not list(tmp_path.glob("**/rdd-plan-*"))


def test_sample_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path))
    with pytest.raises(ConfigError, match=r"--sample 3.*has 7; give at most 2"):
        plan_maps(config, None, sample=3, device="cpu", reporter=QUIET)


def test_plan_as_a_user_types_it(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "run.yaml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "rdd_flows.cli", "maps", "plan", str(file), "--sample", "2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("on disk", "files", "pays from", "not trained yet"):
        assert word in done.stdout
    assert not (tmp_path / "tiny").exists()
