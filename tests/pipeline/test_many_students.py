from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_pipeline.comparison import Outcome
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.errors import ClusterError, ConfigError
from rdd_pipeline.many_students import (
    Sources,
    Workers,
    choose_workers,
    one_after_another,
    side_by_side,
    student_store,
    train_student,
    write_comparison,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.report.comparison_section import comparison_section
from tiny import tiny_tree

QUIET = Reporter(quiet=True)
NOTHING = Sources(store=None, teacher=None)


def config_of(output: Path, **sections: Any) -> RunConfig:
    return parse_config(tiny_tree(output) | {"students": []} | sections)


def trained(config: RunConfig, reporter: Reporter = QUIET) -> list[Outcome]:
    """Students trained in this process."""
    return one_after_another(
        config.students, lambda item: train_student(config, item, NOTHING, reporter), reporter
    )


def weights(config: RunConfig, student: str) -> bytes:
    return (config.run_dir / "students" / student / "weights.safetensors").read_bytes()


class Spoken(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_one_that_fails_leaves_the_others_and_only_it_is_tried_again(tmp_path: Path) -> None:
    training = tiny_tree(tmp_path)["student"]["training"]
    broken = {"name": "broken", "method": "supervised", "training": training | {"lr": 1e30}}
    config = config_of(tmp_path, grid={"methods": [broken, "supervised"], "seeds": [0, 1]})
    first = trained(config)
    assert [outcome.student for outcome in first if outcome.result is None] == [
        "broken-s0", "broken-s1",
    ]  # fmt: skip
    assert "lower training.lr" in first[0].error
    assert first[1].result is not None
    reporter = Spoken()
    again = trained(config, reporter)
    assert [outcome.reused for outcome in again] == [False, True, False, True]
    assert sum("reused from" in line for line in reporter.lines) == 2

    path = write_comparison(config, again)
    tree = json.loads(path.read_text())
    assert [row["failed"] for row in tree["methods"]] == [["broken-s0", "broken-s1"], []]
    assert [student["miou"] is None for student in tree["students"]] == [True, False, True, False]
    assert tree["machine"]["versions"]["torch"] == torch.__version__
    page = (config.run_dir / "students.md").read_text()
    assert "| broken | 0, 2 failed | - |" in page
    section = comparison_section(config.run_dir)
    assert section is not None
    assert section.chart is None
    assert section.rows[0][:2] == ("broken", "0, 2 failed")


def test_killed_workers_are_replaced_and_the_result_is_that_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdd_pipeline.many_students.MAX_DEATHS", 2)

    def mortal(name: str, deaths: int, step: int) -> dict[str, Any]:
        graves = tmp_path / name
        graves.mkdir(exist_ok=True)
        options = {"graves": str(graves), "deaths": deaths, "step": step}
        factory = "tiny_factories:mortal"
        network = {"type": "custom", "factory": factory, "options": options}
        return {"name": name, "method": "supervised", "network": network}

    students = [
        mortal("always", 99, 1),
        mortal("once", 1, 4),
        {"name": "fine", "method": "supervised",
         "training": tiny_tree(tmp_path)["student"]["training"] | {"workers": 1}},
    ]  # fmt: skip
    config = config_of(tmp_path / "parallel", students=students)
    reporter = Spoken()
    workers = choose_workers(config, 2)
    assert not workers.here
    always, once, fine = side_by_side(config, NOTHING, workers, reporter)
    assert always.result is None
    assert "2 workers in turn died over it" in always.error
    assert len(list((tmp_path / "always").iterdir())) == 2
    assert len(list((tmp_path / "once").iterdir())) == 1
    assert "once: resumes at iteration 2 of 6" in reporter.lines
    # The worker may start the loader's process.
    assert not any("loads images in the training process" in line for line in reporter.lines)

    alone = config_of(tmp_path / "alone", students=students[1:])
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        for found, expected in zip((once, fine), trained(alone), strict=True):
            assert found.result is not None
            assert expected.result is not None
            assert found.result["metrics"] == expected.result["metrics"]
            assert weights(config, found.student) == weights(alone, found.student)
    finally:
        torch.set_num_threads(threads)


def test_how_many_at_a_time(tmp_path: Path) -> None:
    grid = {"methods": ["supervised", "kd"], "seeds": [0]}
    here = config_of(tmp_path, grid=grid)
    assert choose_workers(here, None).here
    assert choose_workers(here, 1).here
    assert choose_workers(here, 3) == Workers(count=3, gpus=False, elsewhere=False)
    there = config_of(tmp_path, grid=grid, cluster="tcp://127.0.0.1:9")
    assert choose_workers(there, None) == Workers(count=None, gpus=False, elsewhere=True)
    assert not choose_workers(there, 1).here
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            choose_workers(config_of(tmp_path, grid=grid, device="cuda"), 2)
        gpus = Workers(count=2, gpus=True, elsewhere=False)
        with pytest.raises(ClusterError, match="GPU"):
            side_by_side(here, NOTHING, gpus, QUIET)


def test_a_missing_store_is_an_error_where_a_student_reads_it(tmp_path: Path) -> None:
    grid = {"methods": ["supervised", "rdd", "kd"], "seeds": [0]}
    with pytest.raises(ConfigError, match=r"'rdd-s0' and 1 more need maps(.|\n)*'rdd maps build"):
        student_store(config_of(tmp_path, grid=grid), None, QUIET)
    assert student_store(config_of(tmp_path, grid=grid), "somewhere", QUIET) == "somewhere"
    grid = {"methods": ["supervised"], "seeds": [0]}
    assert student_store(config_of(tmp_path, grid=grid), None, QUIET) is None
