"""Digests are kept for files that have not changed, and for no others."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import CamVidData, FolderData
from rdd_pipeline.data import build_dataset, dataset_digests
from rdd_pipeline.errors import ImageReadError

_NONE = "00" * 32  # a digest that no file has: it can only come from the cache


def write(folder: Path, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, shape in (("train", (12, 16, 3)), ("trainannot", (12, 16))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 11, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / part / f"{number}.png", compress_level=0)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that were written so long ago that their times say whether they have changed."""
    folder = tmp_path_factory.mktemp("settled")
    for number in range(3):
        write(folder, number, number)
    time.sleep(2.1)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that keeps digests."""
    monkeypatch.setenv("RDD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.sqlite"


def digests(folder: Path, **settings: Any) -> tuple[str, ...]:
    return dataset_digests(build_dataset(CamVidData(root=folder, **settings), "train"))


def kept(cache: Path, change: str = "") -> int:
    """Number of images of which something is kept, after a change of that."""
    connection = sqlite3.connect(cache)
    try:
        with connection:
            connection.execute(change)
        (count,) = connection.execute("SELECT count(*) FROM contents").fetchone()
    finally:
        connection.close()
    return int(count)


def test_unchanged_files_are_not_read(settled: Path, cache: Path) -> None:
    found = digests(settled)
    assert kept(cache, f"UPDATE contents SET digest = x'{_NONE}', height = 7") == 3
    steps: list[int] = []
    dataset = build_dataset(CamVidData(root=settled), "train")
    assert dataset_digests(dataset, steps.append) == (_NONE,) * 3
    assert steps == [3]
    assert dataset.size(0) == (7, 16), "nor are headers"
    assert dataset.digest(0) == found[0]
    # All are read where that is asked for, and what was wrong is right again.
    assert digests(settled, read_all=True) == digests(settled) == found


def test_files_in_order_are_checked_once(settled: Path, cache: Path) -> None:
    def checked(**settings: Any) -> int:
        """How many images are read; none of them has a problem."""
        dataset = build_dataset(CamVidData(root=settled, **settings), "train")
        read: list[int] = []
        examine = dataset.examine
        dataset.examine = lambda index: read.append(index) or examine(index)  # type: ignore
        steps: list[int] = []
        assert dataset.problems(steps.append) == []
        assert sum(steps) == 3
        return len(read)

    assert [checked(), checked(), checked(read_all=True), checked()] == [3, 0, 3, 0]
    # Whether they are in order depends on what labels mean.
    where = {"images": "train", "labels": "trainannot"}
    few = FolderData(root=settled, train=where, val=where, classes=("road", "tree"))
    assert len(build_dataset(few, "train").problems()) == 3
    assert len(build_dataset(few, "train").problems()) == 3, "nor are problems forgotten"


def test_relative_paths_are_those_of_their_folder(
    settled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests(settled)
    kept(cache, f"UPDATE contents SET digest = x'{_NONE}'")
    monkeypatch.chdir(settled.parent)
    assert digests(Path(settled.name)) == (_NONE,) * 3
    monkeypatch.chdir(settled)
    assert digests(Path()) == (_NONE,) * 3


def test_what_has_just_been_written_is_read_again(tmp_path: Path, cache: Path) -> None:
    """Its times would be the same if it were written once more within a tick of the clock."""
    for number in range(2):
        write(tmp_path, number, number)
    first = digests(tmp_path)
    assert kept(cache) == 0
    write(tmp_path, 1, 77)
    second = digests(tmp_path)
    assert [old == new for old, new in zip(first, second, strict=True)] == [True, False]


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("damage", ["no database", "cut", "folder", "read-only"])
def test_a_cache_that_cannot_be_used_is_no_error(
    settled: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = digests(settled)
    whole = cache.read_bytes()
    if damage in ("no database", "cut"):
        cache.write_bytes(b"no database" * 500 if damage == "no database" else whole[:4100])
    else:
        cache.unlink()
        if damage == "folder":
            cache.mkdir()
        else:  # which even root cannot write to
            cache.parent.rmdir()
            cache.parent.write_text("")
    assert digests(settled) == found
    (message,) = {record.message for record in warnings(caplog)}
    assert str(cache) in message
    caplog.clear()
    assert digests(settled) == found
    if damage in ("no database", "cut"):
        assert "is damaged" in message
        assert kept(cache) == 3
        assert not warnings(caplog), "it was begun anew"
    else:
        assert "files are read again next time" in message


def test_several_processes_write_at_once(settled: Path, cache: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from rdd_pipeline.data.digests import Content, DigestCache
number = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with DigestCache(Path(sys.argv[1])) as cache:
    for batch in range(40):
        rows = [(os.urandom(16), bytes([number]), Content(digest="ab" * 32, size=(1, 2)))
                for _ in range(10)]
        cache.keep(rows)
        keys, stamps, contents = zip(*rows)
        assert list(cache.find(keys, stamps).values()) == list(contents)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(cache), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("\n", timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert kept(cache) == 800


# The last two change the files, whose times are young from then on.


def test_files_of_old_times_and_equal_size_are_seen_to_be_others(
    settled: Path, cache: Path
) -> None:
    found = digests(settled)
    image = settled / "train" / "1.png"
    before, state = image.read_bytes(), image.stat()
    other = Image.fromarray(np.full((12, 16, 3), 9, np.uint8))
    try:
        other.save(image, compress_level=0)
        os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert (image.stat().st_size, image.stat().st_mtime_ns) == (
            state.st_size,
            state.st_mtime_ns,
        )
        again = digests(settled)
        assert [old == new for old, new in zip(found, again, strict=True)] == [True, False, True]
    finally:
        image.write_bytes(before)
    assert digests(settled) == found


def test_what_was_read_before_an_error_is_kept(settled: Path, cache: Path) -> None:
    label = settled / "trainannot" / "2.png"
    content = label.read_bytes()
    dataset = build_dataset(CamVidData(root=settled), "train")
    label.unlink()
    try:
        with pytest.raises(ImageReadError, match=r"2\.png: cannot be read"):
            dataset_digests(dataset)
    finally:
        label.write_bytes(content)
    assert kept(cache) >= 1
