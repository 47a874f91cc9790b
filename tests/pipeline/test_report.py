from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdd_pipeline.comparison import Outcome, comparison_tree
from rdd_pipeline.config import parse_config
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.report import write_report as report_of
from rdd_pipeline.report import write_run_report
from rdd_pipeline.report.curves import MAX_POINTS, Line, line_chart, thinned
from rdd_pipeline.report.panels import Panel, PictureBook, image_panels
from rdd_pipeline.report.run_section import difficulty_charts
from report_pages import (
    CONFIG,
    Page,
    build_store,
    external_references,
    hardest_panels,
    train_set,
)


def metrics(names: tuple[str, ...], miou: float) -> dict[str, Any]:
    return {
        "miou": miou,
        "pixel_accuracy": 0.8765,
        "class_iou": {name: 0.5 if i else None for i, name in enumerate(names)},
        "confusion": [[0] * len(names)] * len(names),
    }


def training(names: tuple[str, ...], miou: float, step_ms: float) -> dict[str, Any]:
    return {
        "metrics": metrics(names, miou),
        "iterations": 40,
        "seconds": 12.5,
        "images_per_second": 25.6,
        "step_ms": step_ms,
        "data_wait_share": 0.031,
        "parameters": 1234567,
        "history": [
            {"iteration": float(i), "lr": 0.1, "loss": 2.0 / i, "ce": 1.5 / i} for i in (10, 20, 40)
        ],
        "evaluations": [{"iteration": 40, "miou": miou}],
    }


def rdd_history() -> list[dict[str, float]]:
    stage_1 = {"loss": 1.0, "tfe": 0.8, "kd": 0.2, "tfe_share": 1.0, "mean_weight": 0.83}
    stage_2 = {
        "loss": 0.9,
        "tse": 0.7,
        "kd": 0.2,
        "tfe_share": 0.0,
        "hard_teacher": 0.2,
        "hard_student": 0.3,
        "hard_both": 0.1,
        "relative": 0.3,
        "tau_teacher": 0.7,
        "tau_student": 0.91,
    }
    return [
        {"iteration": 10.0, "lr": 0.1, "empty_masks": 0.0} | stage_1,
        {"iteration": 20.0, "lr": 0.1, "empty_masks": 0.0} | stage_2,
        {"iteration": 40.0, "lr": 0.1, "empty_masks": 3.0} | stage_2,
    ]


def class_history(classes: int) -> list[dict[str, Any]]:
    return [
        {"iteration": 20, "relative": [0.25] * classes},
        {"iteration": 40, "relative": [0.5] * (classes - 1) + [None]},
    ]


def student(names: tuple[str, ...], name: str, miou: float, step_ms: float) -> dict[str, Any]:
    config = parse_config(copy.deepcopy(CONFIG)).student
    is_rdd = name.startswith("rdd")
    result = training(names, miou, step_ms)
    if is_rdd:
        result["history"] = rdd_history()
        result["class_history"] = class_history(len(names))
    return result | {
        "name": name,
        "method": ["rdd" if is_rdd else "supervised"],
        "label": "rdd" if is_rdd else "supervised",
        "in_this_run": True,
        "reused": False,
        "finished": "2026-01-01T00:00:00+00:00",
        "settings": {
            "network": config.network.model_dump(mode="json"),
            "training": config.training.model_dump(mode="json"),
            "method": ["rdd" if is_rdd else "supervised"],
            "methods": {"rdd": {"switch": 0.5, "relation": "xor"}} if is_rdd else {},
        },
    }


@pytest.fixture(scope="module")
def run_template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder with a real store, and the results that belong to it."""
    run_dir = tmp_path_factory.mktemp("run")
    dataset = train_set()
    names = dataset.class_names
    reader = build_store(run_dir / "maps" / "synthetic-train-0123.zarr", dataset)
    return run_dir, {
        "name": "tiny",
        "finished": "2026-01-01T00:00:00+00:00",
        "machine": {
            "platform": "Linux-test",
            "cpus": 2,
            "gpu": None,
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "zarr": "3.1.6"},
            "command": "rdd run tiny.yaml",
        },
        "config": parse_config(copy.deepcopy(CONFIG)).model_dump(mode="json"),
        "data": {
            "name": "synthetic",
            "class_names": list(names),
            "train_images": 10,
            "val_images": 2,
        },
        "teacher": training(names, 0.6543, 50.0) | {"reused": False},
        "maps": {
            "path": reader.path,
            "fingerprint": reader.fingerprint,
            "images": 10,
            "images_built": 10,
            "seconds": 3.0,
            "bytes_on_disk": 1000,
            "bytes_per_image": 100.0,
        },
        "students": [
            student(names, "supervised", 0.4321, 40.0),
            student(names, "rdd", 0.4567, 42.0),
        ],
        "seconds": {"check": 0.1, "teacher": 130.0, "maps": 3.0, "students": 25.0},
        "peak_memory_bytes": 1_500_000_000,
    }


@pytest.fixture
def run_dir(run_template: tuple[Path, dict[str, Any]]) -> Path:
    return run_template[0]


@pytest.fixture
def results(run_template: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(run_template[1])


def write_report(run_dir: Path, results: dict[str, Any], images: int = 0) -> tuple[str, Page]:
    file = run_dir / "results.json"
    file.write_text(json.dumps(results))
    path = write_run_report(file, images=images)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def test_the_search_for_external_references_finds_them() -> None:
    html = (
        "<img src='https://a/x.png'><style>@import 'b.css'; p {background: url(c.png)}</style>"
        "<a href='#here'></a><img src='data:,x'>"
    )
    assert list(external_references(html)) == ["https://a/x.png", "c.png", "@import 'b.css'"]


def test_the_report_is_one_file_that_needs_nothing_else(
    run_dir: Path, results: dict[str, Any]
) -> None:
    html, page = write_report(run_dir, results, images=24)
    assert list(external_references(html)) == []
    assert [script.get("src") for script in page.all("script")] == [None, None]  # the viewer
    assert page.all("link") == []
    assert len(html) < 5_000_000
    assert "prefers-color-scheme: dark" in html


def test_figures_of_the_run_appear(run_dir: Path, results: dict[str, Any]) -> None:
    _, page = write_report(run_dir, results)
    for text in (
        "rdd run tiny.yaml",
        "Python 3.11.7, torch 2.13.0, zarr 3.1.6",
        "2 CPU cores, no GPU; Linux-test",
        "10 training and 2 validation images",
        "teacher 2 min 10 s",
        "1.5 GB in one process",
        "0.6543",
        "0.4321",
        "0.4567",
        "0.8765",
        "1,234,567",
        "25.6",
        "3.1%",
        results["maps"]["fingerprint"],
        "the teacher ran on 10 in this run",
    ):
        assert text in page.words


def test_step_time_is_compared_with_the_supervised_student_of_equal_work(
    run_dir: Path, results: dict[str, Any]
) -> None:
    _, page = write_report(run_dir, results)
    assert " 42.0 1.05 " in page.words
    assert "not timed in the same run" not in page.words

    results["students"][0]["reused"] = True
    _, page = write_report(run_dir, results)
    assert " 42.0 1.05* " in page.words
    assert "not timed in the same run" in page.words

    results["students"][0]["settings"]["network"]["encoder"] = "resnet34"
    _, page = write_report(run_dir, results)
    assert " 42.0 – " in page.words


def test_origin_of_each_network_is_told(run_dir: Path, results: dict[str, Any]) -> None:
    results["teacher"]["reused"] = True
    results["students"][1] |= {"in_this_run": False, "reused": True}
    _, page = write_report(run_dir, results)
    table = page.words.partition("trained in")[2].partition("Measured on")[0]
    assert re.findall("reused|this run|earlier run", table) == ["reused", "this run", "earlier run"]


def test_store_facts_match_the_store(run_dir: Path, results: dict[str, Any]) -> None:
    _, page = write_report(run_dir, results)
    section = page.words.partition("Map store path")[2]
    assert section.startswith(" maps/synthetic-train-0123.zarr fingerprint")
    assert str(run_dir) not in page.words
    assert "format version 1 " in section
    for array in ("hardness", "discrepancy", "prediction", "confidence", "statistics"):
        assert f" {array} " in section


def test_curves_and_diagnostics_are_drawn_with_the_stage_switch(
    run_dir: Path, results: dict[str, Any]
) -> None:
    for student, mean in zip(results["students"], (0.4, 0.5), strict=True):
        student["difficulty_history"] = [
            {"iteration": i, "spearman": None if i == 10 else 0.5, "student_mean": mean,
             "teacher_mean": 0.3, "relative": 0.2}
            for i in (10, 20, 40)
        ]  # fmt: skip
    _, page = write_report(run_dir, results)
    titles = [svg["aria-label"] for svg in page.all("svg")]
    assert titles[:11] == [
        "teacher: loss",
        "supervised: loss",
        "rdd: loss",
        "share of the labelled pixels",
        "mean weight exp(−D)",
        "hard threshold tau",
        "empty masks",
        "teacher XOR student (trained on): share of each class's pixels",
        "rank correlation with the teacher's hardness",
        "mean hardness",
        "share of pixels hard for student or teacher alone",
    ]
    assert difficulty_charts({"students": [{"difficulty_history": []}, {}]}) == ()
    assert page.words.count("stage 2") - page.words.count("stage 2 (TSE)") == 5
    for label in ("teacher XOR student (trained on)", "hard for both", "stage 1 (TFE)"):
        assert label in page.words
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_evaluations_during_training_get_a_chart(run_dir: Path, results: dict[str, Any]) -> None:
    results["students"][0]["evaluations"].insert(0, {"iteration": 20, "miou": 0.3})
    _, page = write_report(run_dir, results)
    assert page.all("svg")[0]["aria-label"] == "mIoU on the validation images"


def test_methods_are_compared_over_seeds_with_their_intervals(
    run_dir: Path, results: dict[str, Any]
) -> None:
    assert "Methods over seeds" not in write_report(run_dir, results)[1].text
    grid = {"methods": ["supervised", "rdd", "kd"], "seeds": [0, 1]}
    config = parse_config(copy.deepcopy(CONFIG) | {"students": [], "grid": grid})
    miou = {"supervised-s0": 0.30, "supervised-s1": 0.32, "rdd-s0": 0.40, "rdd-s1": 0.41,
            "kd-s0": 0.30, "kd-s1": 0.34}  # fmt: skip
    outcomes = [
        Outcome(student=name, result=training((), value, 40.0) | {"metrics": {"miou": value}})
        for name, value in miou.items()
    ]
    file = run_dir / "students.json"
    file.write_text(json.dumps(comparison_tree(config, outcomes)))
    try:
        html, page = write_report(run_dir, results)
    finally:
        file.unlink()
    for expected in (
        "Methods over seeds",
        "0.3100 ± 0.0141",
        "+0.0950 [+0.0315, +0.1585]",
        "contains 0",
        "1 of 2 methods cannot be told from the baseline",
    ):
        assert expected in page.words
    assert not list(external_references(html))
    labels = [attributes.get("aria-label") for attributes in page.all("svg")]
    assert "mIoU over supervised, mean and 95% interval" in labels


def test_students_alone_have_a_report(
    run_dir: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    """As ``rdd students`` leaves them where none reads maps."""
    config = parse_config(copy.deepcopy(CONFIG))
    for entry in results["students"]:
        entry["settings"] |= {"store": None, "teacher": None}
        folder = tmp_path / "students" / entry["name"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(entry))
    outcomes = [Outcome(student=entry["name"], result=entry) for entry in results["students"]]
    tree = comparison_tree(config, outcomes)
    file = tmp_path / "students.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="run the same 'rdd students' again"):
        report_of(tmp_path, images=0)

    facts = {key: results[key] for key in ("finished", "machine", "config", "data")}
    file.write_text(json.dumps(tree | facts | {"store": None}))
    page = Page(report_of(tmp_path, images=0).read_text(encoding="utf-8"))
    for text in ("Methods over seeds", "Every method was trained once", "0.4321", "rdd: loss"):
        assert text in page.words
    assert "Map store" not in page.words
    assert "peak memory" not in page.words
    assert "over time" not in page.words


def test_hardest_images_come_first_with_all_panels(run_dir: Path, results: dict[str, Any]) -> None:
    _, page = write_report(run_dir, results, images=24)
    found = hardest_panels(page)
    hardest = [f"train-{index:06d}" for index in range(9, -1, -1)]
    panels = ("image", "label", "teacher's prediction", "weight exp(−D)", "hardness")
    assert found == [f"{panel} of {name}" for name in hardest for panel in panels]
    assert "no label" in page.words


def test_everything_is_escaped(run_dir: Path, results: dict[str, Any]) -> None:
    evil = '<script>alert("1")</script> & $x_1$'
    results["name"] = evil
    results["machine"]["command"] = evil
    results["data"]["class_names"][1] = evil
    results["students"][1]["name"] = evil
    html, page = write_report(run_dir, results, images=24)
    assert len(page.all("script")) == 2  # the viewer's
    assert "<script>" not in html
    assert page.text.count(evil) >= 4


def test_labels_of_a_chart_are_escaped_and_are_no_mathematics() -> None:
    line = Line(label="a", x=[1, 2], y=[0.1, 0.2], colour=0)
    chart = line_chart('<b> "t" & u', [line], key="k", mark=1, mark_label="<i>$x$ & y")
    page = Page(str(chart.svg))
    assert page.all("svg")[0]["aria-label"] == '<b> "t" & u'
    assert page.all("b") == page.all("i") == []
    assert "<i>$x$ & y" in page.text


def test_long_lines_are_thinned_to_averages_or_sums() -> None:
    count = 10 * MAX_POINTS
    x, y = [float(i) for i in range(1, count + 1)], [float(i % 2) for i in range(count)]
    averaged = thinned(Line(label="a", x=x, y=y, colour=0))
    added = thinned(Line(label="a", x=x, y=y, colour=0, total=True))
    assert len(averaged[0]) == len(averaged[1]) <= MAX_POINTS
    assert averaged[0][-1] == added[0][-1] == count
    assert averaged[1] == [0.5] * len(averaged[1])
    assert sum(added[1]) == sum(y)

    short = Line(label="a", x=x[:3], y=y[:3], colour=0)
    assert thinned(short) == (x[:3], y[:3])


def test_teacher_from_a_checkpoint_and_supervised_students_only(
    run_dir: Path, results: dict[str, Any]
) -> None:
    names = tuple(results["data"]["class_names"])
    results["teacher"] = {"metrics": metrics(names, 0.6), "parameters": 10, "reused": True}
    results["students"] = results["students"][:1]
    results["maps"]["images_built"] = 0
    _, page = write_report(run_dir, results)
    assert page.all("svg")[0]["aria-label"] == "supervised: loss"
    assert "the two stages" not in page.text
    assert "reused, the teacher did not run" in page.words

    results["students"] = []
    _, page = write_report(run_dir, results)
    assert not any(svg["aria-label"].endswith("loss") for svg in page.all("svg"))
    assert "No network of this run has a training history." in page.words


def test_absent_class_and_values_that_were_not_computed(
    run_dir: Path, results: dict[str, Any]
) -> None:
    for entry in results["students"][1]["history"]:
        entry |= {"mean_weight": None, "tau_teacher": None, "tau_student": None}
    _, page = write_report(run_dir, results)
    first = results["data"]["class_names"][0]
    assert f"{first} – – –" in page.words
    titles = [svg["aria-label"] for svg in page.all("svg")]
    assert "mean weight exp(−D)" not in titles
    assert "hard threshold tau" not in titles


def test_a_moved_run_is_found_and_a_missing_store_is_told(
    run_dir: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    name = Path(results["maps"]["path"]).name
    results["maps"]["path"] = f"/nowhere/maps/{name}"
    _, page = write_report(run_dir, results, images=24)
    assert len(hardest_panels(page)) == 50

    _, page = write_report(tmp_path, results, images=24)
    assert page.all("img") == []
    assert f"/nowhere/maps/{name}: no map store there" in page.words
    assert results["maps"]["fingerprint"] in page.words


def test_maps_are_shown_without_image_when_the_data_are_others_or_gone(
    run_dir: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    results["config"]["data"]["seed"] = 1
    _, page = write_report(run_dir, results, images=24)
    assert len(hardest_panels(page)) == 10 * 3
    assert "expected the data set that the store was built from" in page.words
    assert "needs the labels" in page.words

    results["config"]["data"] = {"type": "camvid", "root": str(tmp_path / "gone")}
    _, page = write_report(run_dir, results, images=24)
    assert len(hardest_panels(page)) == 10 * 3
    assert str(tmp_path / "gone") in page.words


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"results\.json: expected the results of a run"):
        write_run_report(file)
    assert not (tmp_path / "report.html").exists()


def test_many_large_images_stay_within_the_bytes_of_the_page() -> None:
    rng = np.random.default_rng(0)  # noise is the worst case
    shape = (512, 1024)

    def draw(side: int, quality: int) -> tuple[Panel, ...]:
        return image_panels(
            image=rng.integers(0, 256, (*shape, 3), np.uint8),
            label=rng.integers(0, 19, shape, np.uint8),
            prediction=rng.integers(0, 19, shape, np.uint8),
            weight=rng.random(shape),
            hardness=np.where(rng.random(shape) < 0.1, np.nan, rng.random(shape)),
            palette=rng.integers(0, 256, (19, 3), np.uint8),
            side=side,
            quality=quality,
        )

    whole = sum(len(panel.uri) for panel in PictureBook(1).add(draw))
    book = PictureBook(3, limit=whole)
    sizes = [sum(len(panel.uri) for panel in book.add(draw)) for _ in range(3)]
    assert whole / 10 < sum(sizes) <= whole
