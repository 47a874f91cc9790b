"""The command line as a user types it: real processes, real Prefect, tiny networks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from real_processes import processes_of_session, wait_for
from tiny import tiny_tree, write_tiny

Rdd = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(rdd: Rdd, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str, str]:
    """A finished run: its configuration, folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    config = write_tiny(folder / "tiny.yaml", folder / "runs")
    # One Dask worker process, as by default.
    done = rdd("run", config, "--set", "maps.workers=1")
    assert done.returncode == 0, done.stderr
    return config, folder / "runs" / "tiny", done.stdout, done.stderr


def test_run_goes_the_whole_way(finished: tuple[Path, Path, str, str]) -> None:
    _, run, output, errors = finished
    for name in ("supervised", "kd", "rdd"):
        assert name in output
        folder = run / "students" / name
        assert (folder / "weights.safetensors").stat().st_size > 0
        checkpoint = folder / "checkpoints" / "00000006"
        assert {"model.safetensors", "optimizer.bin", "trainer.json"} <= {
            path.name for path in checkpoint.iterdir()
        }
        assert list((folder / "tensorboard").glob("events.*"))
    results = json.loads((run / "results.json").read_text())
    assert [student["name"] for student in results["students"]] == ["supervised", "kd", "rdd"]
    assert results["maps"]["images_built"] == 7
    assert results["maps"]["bytes_per_image"] > 0
    assert set(results["seconds"]) == {"check", "teacher", "maps", "students"}
    assert (run / "report.html").stat().st_size > 10_000
    assert "Traceback" not in errors
    log = (run / "logs" / "rdd.log").read_text()
    assert "Finished in state Completed" in log
    # Nothing but our own lines on the console: no banner, no scheduler's chatter.
    assert "prefect" not in errors.lower()


def test_second_run_reuses_everything_and_a_failing_student_leaves_the_others(
    rdd_on_server: Rdd, finished: tuple[Path, Path, str, str]
) -> None:
    config, run, _, _ = finished
    training = tiny_tree(run)["student"]["training"] | {"lr": 1e30}
    students = [
        {"name": "broken", "method": "supervised", "training": training},
        {"name": "extra", "method": "rdd", "rdd": {"relation": "or"}},
    ]
    done = rdd_on_server("run", config, "--set", "maps.workers=1",
                         "--set", f"students={json.dumps(students)}")  # fmt: skip
    assert done.returncode == 1
    assert "1 of 2 students failed" in done.stderr
    assert "broken: the loss is" in done.stderr
    assert "Traceback" not in done.stderr
    assert "teacher: reused" in done.stderr
    assert "maps: reused, all 7 images" in done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["maps"]["images_built"] == 0
    by_name = {student["name"]: student for student in results["students"]}
    assert set(by_name) == {"extra", "supervised", "kd", "rdd"}
    assert by_name["extra"]["in_this_run"]
    assert not by_name["rdd"]["in_this_run"]


def test_maps_status_and_list(rdd: Rdd, finished: tuple[Path, Path, str, str]) -> None:
    _, run, _, _ = finished
    store = next((run / "maps").glob("*.zarr"))
    status = rdd("maps", "status", store)
    assert status.returncode == 0, status.stderr
    for expected in ("7 of 7 done", "complete", "hardness", "logits", "an image", "tiny/rdd"):
        assert expected in status.stdout
    listed = rdd("maps", "list", run / "maps")
    assert store.name in listed.stdout
    assert store.name in rdd("maps", "list", run / "maps", "--teacher", "FPN").stdout
    assert store.name not in rdd("maps", "list", run / "maps", "--data", "camvid").stdout
    missing = rdd("maps", "status", run)
    assert missing.returncode == 1
    assert "error:" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_verify_repair_rebuild_and_remove(
    rdd: Rdd, rdd_on_server: Rdd, finished: tuple[Path, Path, str, str], tmp_path: Path
) -> None:
    config, run, _, _ = finished
    original = next((run / "maps").glob("*.zarr"))
    checked = rdd("maps", "verify", original, "--against-teacher", "2", "--config", config)
    assert checked.returncode == 0, checked.stderr
    assert "0 damaged" in checked.stdout
    assert "largest difference" in checked.stdout

    store = tmp_path / "maps" / original.name
    shutil.copytree(original, store)
    victim = next(path for path in (store / "hardness" / "c").rglob("*") if path.is_file())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    damaged = rdd("maps", "verify", store)
    assert damaged.returncode == 1
    assert "hardness shard" in damaged.stdout
    repaired = rdd("maps", "repair", store)
    assert repaired.returncode == 0, repaired.stderr
    assert "1 shards to build again" in repaired.stdout
    rebuilt = rdd_on_server("maps", "build", config, "--set", f"maps.root={store.parent}")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert rdd("maps", "verify", store).returncode == 0
    assert victim.read_bytes() == (original / victim.relative_to(store)).read_bytes()

    kept = rdd("maps", "remove", store, stdin="n\n")
    assert kept.returncode == 1
    assert store.exists()
    assert rdd("maps", "remove", store, "--yes").returncode == 0
    assert not store.exists()


def test_soft_labels_come_later(
    rdd: Rdd, rdd_on_server: Rdd, finished: tuple[Path, Path, str, str], tmp_path: Path
) -> None:
    _, run, _, _ = finished
    tree = tiny_tree(tmp_path)
    # The teacher of the finished run, so that none is trained here.
    tree["teacher"] = {
        "network": tree["teacher"]["network"],
        "checkpoint": str(run / "teacher" / "weights.safetensors"),
    }
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    lean = ("--set", "maps.soft_labels=false", "--set", "students=[supervised]")
    built = rdd_on_server("maps", "build", config, *lean)
    assert built.returncode == 0, built.stderr
    store = Path(built.stdout.strip())
    hardness = {path: path.stat().st_mtime_ns for path in (store / "hardness").rglob("*")}
    refused = rdd("train", config, "--student", "kd")
    assert refused.returncode == 1
    assert str(store) in refused.stderr
    assert "expected the maps logits, found none" in refused.stderr
    assert "'rdd maps build CONFIG --set maps.soft_labels=true' adds logits" in refused.stderr
    added = rdd_on_server("maps", "build", config, "--set", "maps.soft_labels=true")
    assert added.returncode == 0, added.stderr
    assert added.stdout == built.stdout
    assert "adds soft labels to 7 images" in added.stderr
    assert {path: path.stat().st_mtime_ns for path in (store / "hardness").rglob("*")} == hardness


def test_fidelity_is_measured_and_written(
    rdd: Rdd, finished: tuple[Path, Path, str, str], tmp_path: Path
) -> None:
    config, run, _, _ = finished
    store = next((run / "maps").glob("*.zarr"))
    done = rdd("maps", "fidelity", store, "--config", config, "--crops", "5")
    assert done.returncode == 0, done.stderr
    assert "teacher: reused" in done.stderr
    for expected in (
        "6 crops",
        "weight W, mean absolute error",
        "flipped",
        "soft labels",
        "0.5 to",
    ):
        assert expected in done.stdout
    tree = json.loads((run / "fidelity" / "fidelity.json").read_text())
    assert store.name.removesuffix(".zarr").endswith(tree["fingerprint"][:12])
    assert tree["settings"]["student"] == "rdd"
    assert tree["machine"]["command"].startswith("rdd maps fidelity")
    assert (run / "fidelity" / "fidelity.md").read_text().count("|") > 100
    assert (run / "fidelity" / "fidelity.png").stat().st_size > 50_000
    other = ("maps", "fidelity", store, "--config", config, "--quiet", "--out", tmp_path)
    refused = rdd(*other, "--set", "maps.precision=bf16")
    assert refused.returncode == 1
    assert "evaluation.precision: expected" in refused.stderr
    assert "--student nobody: expected one of" in rdd(*other, "--student", "nobody").stderr
    assert not list(tmp_path.iterdir())


def test_train_uses_a_ready_store_and_report_is_written_again(
    rdd: Rdd, finished: tuple[Path, Path, str, str], tmp_path: Path
) -> None:
    _, run, _, _ = finished
    store = next((run / "maps").glob("*.zarr"))
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "runs")
    nowhere = rdd("train", config, "--student", "rdd")
    assert nowhere.returncode == 1
    assert "no map store below it" in nowhere.stderr
    done = rdd("train", config, "--student", "rdd", "--set", f"maps.root={store.parent}")
    assert done.returncode == 0, done.stderr
    assert "rdd: mIoU" in done.stdout
    assert f"reads {store}" in done.stderr
    (run / "report.html").unlink()
    assert rdd("report", run).returncode == 0
    assert (run / "report.html").exists()
    page = tmp_path / "store.html"
    done = rdd("report", store, "--data", config, "--images", "2", "--out", page)
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    assert "most suspicious labels" in page.read_text(encoding="utf-8")
    neither = rdd("report", tmp_path)
    assert neither.returncode == 1
    assert "expected the folder of a finished run, or a map store" in neither.stderr


def test_store_of_another_data_set_is_refused_with_a_difference(
    rdd: Rdd, finished: tuple[Path, Path, str, str], tmp_path: Path
) -> None:
    _, run, _, _ = finished
    store = next((run / "maps").glob("*.zarr"))
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "runs")
    done = rdd("train", config, "--student", "rdd", "--store", store, "--set", "data.seed=9")
    assert done.returncode == 1
    assert "data.seed: expected 9, found 0" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_process_behind_and_resumes(
    prefect_home: Path, rdd: Rdd, tmp_path: Path, number: signal.Signals
) -> None:
    tree = tiny_tree(tmp_path / "runs")
    tree["teacher"]["training"]["iterations"] = 100_000
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [Path(sys.executable).parent / "rdd", "run", config],
        env=os.environ | {"PREFECT_HOME": str(prefect_home)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoints = tmp_path / "runs" / "tiny" / "teacher" / "checkpoints"
    wait_for(lambda: process.poll() is not None or list(checkpoints.glob("0*")))
    assert process.poll() is None
    os.kill(process.pid, number)
    assert process.wait(timeout=120) in (128 + number, 1)
    wait_for(lambda: not processes_of_session(process.pid), seconds=60)


def test_help_is_there_for_every_command(rdd: Rdd) -> None:
    top = rdd("--help")
    assert top.returncode == 0
    for command in ("run", "train", "report", "maps", "data"):
        assert command in top.stdout
        assert rdd(command, "--help").returncode == 0


def test_bad_configuration_is_one_message_before_anything_runs(rdd: Rdd, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "runs")
    tree["teacher"]["training"]["iteratons"] = 5
    tree["maps"]["shard_images"] = "many"
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = rdd("run", config)
    assert done.returncode == 1
    assert "2 problem(s)" in done.stderr
    assert "teacher.training.iteratons: unknown key; did you mean 'iterations'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_unknown_student_is_named(rdd: Rdd, tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "runs")
    done = rdd("train", config, "--student", "nobody")
    assert done.returncode == 1
    assert "supervised, kd, rdd" in done.stderr


def camvid_copy(root: Path, images: int = 3) -> Path:
    """A miniature of the CamVid layout."""
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (root / kind).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (80, 48), (40 * i, 90, 120)).save(root / split / f"{i:03d}.png")
            label = Image.new("L", (80, 48), i % 11)
            label.paste(11, (0, 0, 10, 10))
            label.save(root / f"{split}annot" / f"{i:03d}.png")
    return root


def test_data_problems_are_all_listed_before_work_starts(
    rdd_on_server: Rdd, tmp_path: Path
) -> None:
    root = camvid_copy(tmp_path / "camvid")
    (root / "trainannot" / "000.png").unlink()
    Image.new("L", (20, 20)).save(root / "trainannot" / "001.png")
    Image.new("L", (80, 48), 57).save(root / "trainannot" / "002.png")
    (root / "val" / "001.png").write_bytes((root / "val" / "001.png").read_bytes()[:60])
    tree = tiny_tree(tmp_path / "runs") | {"data": {"type": "camvid", "root": str(root)}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    for command in (("data", "check"), ("run",)):
        done = rdd_on_server(*command, config)
        assert done.returncode == 1
        message = done.stderr
        for name in ("000", "001.png", "002.png", "57"):
            assert name in message, message
        assert "val" in message
        assert "Traceback" not in message
    shutil.rmtree(root)
    done = rdd_on_server("data", "check", config)
    assert done.returncode == 1
    assert "trainannot" in done.stderr, "the expected layout is shown"


def test_wrong_network_of_the_last_student_shows_before_the_teacher_is_trained(
    rdd: Rdd, tmp_path: Path
) -> None:
    tree = tiny_tree(tmp_path)
    tree["students"][2]["network"] = tree["student"]["network"] | {"encoder": "resnet19"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    # With a server of its own, so that a failed flow is seen to end as well with that.
    done = rdd("run", config)
    assert done.returncode == 1
    assert "students: 'rdd': network.encoder" in done.stderr
    assert "did you mean resnet18" in done.stderr
    assert not (tmp_path / "tiny" / "teacher").exists()


@pytest.mark.usefixtures("finished")
def test_prefect_records_the_run(prefect_home: Path) -> None:
    """The flow really ran on Prefect: its database knows the flow and its tasks."""
    with contextlib.closing(sqlite3.connect(prefect_home / "prefect.db")) as database:
        flows = {name for (name,) in database.execute("select name from flow")}
        tasks = {name for (name,) in database.execute("select name from task_run")}
    assert "distill" in flows
    assert any(name.startswith("student rdd") for name in tasks)
