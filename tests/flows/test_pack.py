"""``rdd data pack`` as a user types it, and as it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tiny import tiny_tree

Rdd = Callable[..., subprocess.CompletedProcess[str]]


def write_config(folder: Path, images: int) -> Path:
    tree = tiny_tree(folder / "runs")
    tree["data"] |= {"train_images": images, "packed_root": str(folder / "packed")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Every object but the leases, which say who packed last."""
    return {
        name: file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and "/lease/" not in (name := file.relative_to(root).as_posix())
    }


def marks(folder: Path) -> list[Path]:
    """The completion marks of shards."""
    return [path for path in folder.glob("packed/*/done/c/*") if path.suffix != ".partial"]


def test_pack_reuse_extend_and_look_after(rdd: Rdd, tmp_path: Path) -> None:
    config = write_config(tmp_path, 5)
    first = rdd("data", "pack", config)
    assert first.returncode == 0, first.stderr
    train, val = first.stdout.splitlines()
    assert train.startswith("train: 5 of 5 images packed in ")
    assert val.startswith("val: 3 of 3 images packed in ")
    store = train.rpartition(" ")[2]
    extended = rdd("data", "pack", config, "--split", "train", "--set", "data.train_images=7")
    assert extended.stdout.startswith("train: 2 of 7 images packed in ")
    again = rdd("data", "pack", config, "--split", "val", "--quiet")
    assert again.stdout.startswith("val: reused, 3 images, ")

    status = rdd("maps", "status", store).stdout
    assert "7 of 7 done" in status
    assert any(line.split() == ["holds", "images"] for line in status.splitlines())
    shard = Path(store, "rgb", "c", "0", "0", "0", "0")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = rdd("maps", "verify", store)
    assert damaged.returncode == 1
    assert "rgb shard 0" in damaged.stdout
    assert "build them with: rdd data pack CONFIG" in rdd("maps", "repair", store).stdout
    mended = rdd("data", "pack", config, "--split", "train", "--set", "data.train_images=7")
    assert mended.stdout.startswith("train: 5 of 7 images packed in ")
    assert rdd("maps", "verify", store).returncode == 0

    wrong = rdd("train", config, "--student", "rdd", "--store", store)
    assert wrong.returncode == 1
    assert "expected a store of maps, as 'rdd maps build' makes them, got one of" in wrong.stderr


def test_a_killed_command_goes_on_to_the_same_bytes(rdd: Rdd, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    images = 300
    assert rdd("data", "pack", write_config(whole, images), "--split", "train").returncode == 0
    config = write_config(killed, images)
    command = [Path(sys.executable).with_name("rdd"), "data", "pack", config, "--split", "train"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(marks(killed)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(marks(killed))
    resumed = rdd("data", "pack", config, "--split", "train")
    packed = int(resumed.stdout.split()[1])
    assert 0 < packed < images
    assert packed in (images - 8 * done, images - 8 * done + 4)  # the last shard has four images
    assert contents(killed / "packed") == contents(whole / "packed")
