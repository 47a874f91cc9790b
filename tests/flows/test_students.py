"""``rdd students`` as a user types it: killed midway, then run again to its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from rdd_pipeline.config import load_config
from rdd_pipeline.many_students import Sources, one_after_another, train_student
from rdd_pipeline.progress import Reporter
from rdd_pipeline.report import write_report
from rdd_pipeline.stages import run_maps, run_teacher
from report_pages import Page
from tiny import tiny_tree

Rdd = Callable[..., subprocess.CompletedProcess[str]]


def loader_processes(session: int) -> list[str]:
    """The loaders' processes of a session that still run, with state and parent."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z" and "forkserver" in command:
            found.append(f"{fields[0]} {fields[1]} {command}")
    return found


def test_killed_midway_and_run_again(
    rdd_on_server: Rdd, prefect_server: str, prefect_home: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(tmp_path / "runs")
    training = tree["student"]["training"]
    training["snapshots"] = 1
    tree |= {
        "students": [],
        "grid": {
            "methods": [
                "supervised",
                {"method": "rdd", "rdd": {"min_kept": 0.05, "switch": 0.5}},
                {"name": "broken", "method": "kd", "training": training | {"lr": 1e30}},
            ],
            "seeds": [0, 1],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    config, quiet = load_config(path), Reporter(quiet=True)

    refused = rdd_on_server("students", path)
    assert refused.returncode == 1
    assert "'rdd-s0' and 3 more need maps" in refused.stderr
    assert "rdd maps build" in refused.stderr
    assert (
        "expected auto or a number from 1"
        in rdd_on_server("students", path, "--parallel", "0").stderr
    )

    # A first attempt, whose loader ends with it when it is killed.
    teacher = run_teacher(config, quiet)
    maps = run_maps(config, teacher, quiet)
    process = subprocess.Popen(
        [
            Path(sys.executable).parent / "rdd",
            "students",
            path,
            "--set",
            "student.training.workers=1",
        ],
        env=os.environ | {"PREFECT_HOME": str(prefect_home), "PREFECT_API_URL": prefect_server},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    students = config.run_dir / "students"
    deadline = time.monotonic() + 300
    try:
        while not list(students.glob("*/result.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        while left := loader_processes(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):  # they have all ended
            os.killpg(process.pid, signal.SIGKILL)

    finished = [folder.parent.name for folder in students.glob("*/result.json")]
    assert finished
    done = rdd_on_server("students", path)
    assert done.returncode == 1
    assert "2 of 6 students failed" in done.stderr
    assert "broken-s1: the loss is" in done.stderr
    assert "Traceback" not in done.stderr
    for name in finished:
        assert f"student {name}: reused" in done.stderr
    assert done.stderr.count(": reused from") == len(finished)
    assert "0, 2 failed" in done.stdout
    assert "over supervised (95%)" in done.stdout
    comparison = json.loads((config.run_dir / "students.json").read_text())
    assert [row["method"] for row in comparison["methods"]] == ["supervised", "rdd", "broken"]
    assert comparison["methods"][1]["difference"]["pairs"] == 2
    assert "| rdd | 2 |" in (config.run_dir / "students.md").read_text()

    # No 'rdd run' was here, and there is a report all the same.
    words = Page(write_report(config.run_dir).read_text(encoding="utf-8")).words
    for text in (
        "Methods over seeds",
        "failed: broken-s1: the loss is",
        "over supervised, mean and 95% interval",
        "Students against the teacher, over time",
        maps.fingerprint,
        "The hardest images",
    ):
        assert text in words
    assert "What is missing" not in words

    # What was killed, resumed and trained on other processes is what one process trains.
    once = config.model_copy(update={"output": tmp_path / "once"})
    sources = Sources(store=maps.path, teacher=None)
    whole = one_after_another(
        [student for student in config.students if "broken" not in student.name],
        lambda student: train_student(once, student, sources, quiet),
        quiet,
    )
    assert len(whole) == 4
    for outcome in whole:
        assert outcome.result is not None
        weights = Path("students") / outcome.student / "weights.safetensors"
        assert (config.run_dir / weights).read_bytes() == (once.run_dir / weights).read_bytes()
