from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdd_pipeline.config import parse_config
from rdd_pipeline.data import SegmentationDataset, build_dataset
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.report import write_run_report
from rdd_pipeline.report.curves import MAX_POINTS, Line, line_chart, thinned
from rdd_pipeline.report.panels import VOID_COLOUR, class_colours, hardness_colours, image_panels
from rdd_pipeline.report.store_section import rank_by_mean_hardness
from rdd_storage import (
    ImageMaps,
    ImageRecord,
    MapReader,
    MapSchema,
    MapWriter,
    encode_confidence,
    encode_hardness,
)

HEIGHT, WIDTH, STRIDE = 32, 48, 8
NETWORK = {"architecture": "FPN", "encoder": "resnet18", "auxiliary": {}}
CONFIG = {
    "name": "tiny",
    "data": {
        "type": "synthetic",
        "train_images": 10,
        "val_images": 2,
        "height": HEIGHT,
        "width": WIDTH,
    },
    "teacher": {"network": NETWORK, "training": {"iterations": 40}},
    "student": {"network": NETWORK, "training": {"iterations": 40}},
    "students": ["supervised", "rdd"],
}


class Page(HTMLParser):
    """What the tests ask of a page: its text, its elements and whether they are closed."""

    _VOID = frozenset({"meta", "br", "img", "link", "use", "path", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += " " + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def train_set() -> SegmentationDataset:
    return build_dataset(parse_config(copy.deepcopy(CONFIG)).data, "train")


def build_store(path: Path, dataset: SegmentationDataset) -> MapReader:
    """A store whose image i is harder the larger i is."""
    rng = np.random.default_rng(0)
    grid = (HEIGHT // STRIDE, WIDTH // STRIDE)
    schema = MapSchema(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        height=HEIGHT,
        width=WIDTH,
        grid_height=grid[0],
        grid_width=grid[1],
        output_stride=STRIDE,
        shard_images=4,
    )
    records = [
        ImageRecord(
            image_id=name,
            height=HEIGHT,
            width=WIDTH,
            grid_height=grid[0],
            grid_width=grid[1],
            digest=dataset.digest(index),
        )
        for index, name in enumerate(dataset.image_ids)
    ]
    writer = MapWriter.create(
        path, schema=schema, images=records, identity={"test": 1}, palette=dataset.palette
    )
    for shard in range(writer.num_shards):
        maps = []
        for row in writer.shard_rows(shard):
            label = dataset[row].label
            p_true = rng.uniform(0.0, 1.0, label.shape).astype(np.float32) ** (1 + row)
            maps.append(
                ImageMaps(
                    image_id=dataset.image_ids[row],
                    discrepancy=rng.gamma(1.0, 1.0, grid).astype(np.float32),
                    hardness=encode_hardness(p_true, label != 255),
                    prediction=np.where(label == 255, 0, label),
                    confidence=encode_confidence(np.ones(label.shape, np.float32)),
                    label=label,
                )
            )
        writer.write_shard(shard, maps)
    writer.publish()
    return MapReader(path)


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


def student(names: tuple[str, ...], name: str, miou: float, step_ms: float) -> dict[str, Any]:
    config = parse_config(copy.deepcopy(CONFIG)).student
    is_rdd = name.startswith("rdd")
    result = training(names, miou, step_ms)
    if is_rdd:
        result["history"] = rdd_history()
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


def write_report(run_dir: Path, results: dict[str, Any]) -> tuple[str, Page]:
    file = run_dir / "results.json"
    file.write_text(json.dumps(results))
    path = write_run_report(file)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def external_references(html: str) -> Iterator[str]:
    """Everything that a browser would fetch from elsewhere."""
    for _, attributes in Page(html).elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name, "")
            if value and not value.startswith(("data:", "#")):
                yield value
    for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", html):
        if not target.startswith(("data:", "#")):
            yield target
    yield from re.findall(r"@import[^;]*", html)


def test_the_search_for_external_references_finds_them() -> None:
    html = (
        "<img src='https://a/x.png'><style>@import 'b.css'; p {background: url(c.png)}</style>"
        "<a href='#here'></a><img src='data:,x'>"
    )
    assert list(external_references(html)) == ["https://a/x.png", "c.png", "@import 'b.css'"]


def test_the_report_is_one_file_that_needs_nothing_else(
    run_dir: Path, results: dict[str, Any]
) -> None:
    html, page = write_report(run_dir, results)
    assert list(external_references(html)) == []
    assert page.all("script") == []
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
    _, page = write_report(run_dir, results)
    titles = [svg["aria-label"] for svg in page.all("svg")]
    assert titles == [
        "teacher: loss",
        "supervised: loss",
        "rdd: loss",
        "share of the labelled pixels",
        "mean weight exp(−D)",
        "hard threshold tau",
        "empty masks",
    ]
    assert page.words.count("stage 2") - page.words.count("stage 2 (TSE)") == 5
    for label in ("teacher XOR student (trained on)", "hard for both", "stage 1 (TFE)"):
        assert label in page.words
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_evaluations_during_training_get_a_chart(run_dir: Path, results: dict[str, Any]) -> None:
    results["students"][0]["evaluations"].insert(0, {"iteration": 20, "miou": 0.3})
    _, page = write_report(run_dir, results)
    assert page.all("svg")[0]["aria-label"] == "mIoU on the validation images"


def test_hardest_images_come_first_with_all_panels(run_dir: Path, results: dict[str, Any]) -> None:
    _, page = write_report(run_dir, results)
    alternatives = [image["alt"] for image in page.all("img")]
    hardest = [f"train-{index:06d}" for index in (9, 8, 7, 6, 5, 4, 3, 2)]
    panels = ("image", "label", "teacher's prediction", "weight exp(−D)", "hardness")
    assert alternatives == [f"{panel} of {name}" for name in hardest for panel in panels]
    assert "no label" in page.words


def test_ranking_leaves_out_images_without_labels(run_dir: Path) -> None:
    reader = MapReader(next((run_dir / "maps").iterdir()))
    statistics = reader.statistics()
    statistics.image_hardness[7] = 0
    assert rank_by_mean_hardness(statistics).tolist() == [9, 8, 6, 5, 4, 3, 2, 1, 0]


def test_everything_is_escaped(run_dir: Path, results: dict[str, Any]) -> None:
    evil = '<script>alert("1")</script> & $x_1$'
    results["name"] = evil
    results["machine"]["command"] = evil
    results["data"]["class_names"][1] = evil
    results["students"][1]["name"] = evil
    html, page = write_report(run_dir, results)
    assert page.all("script") == []
    assert "<script" not in html
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
    assert [svg["aria-label"] for svg in page.all("svg")] == ["supervised: loss"]
    assert "reused, the teacher did not run" in page.words

    results["students"] = []
    _, page = write_report(run_dir, results)
    assert page.all("svg") == []
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
    _, page = write_report(run_dir, results)
    assert len(page.all("img")) == 40

    _, page = write_report(tmp_path, results)
    assert page.all("img") == []
    assert f"/nowhere/maps/{name}: no map store there" in page.words
    assert results["maps"]["fingerprint"] in page.words


def test_maps_are_shown_without_image_when_the_data_changed_or_is_gone(
    run_dir: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    results["config"]["data"]["seed"] = 1
    _, page = write_report(run_dir, results)
    assert len(page.all("img")) == 8 * 3
    assert "has changed since the maps were built" in page.words

    results["config"]["data"] |= {"seed": 0, "train_images": 9}
    _, page = write_report(run_dir, results)
    assert len(page.all("img")) == 7 * 5 + 3
    assert "no image of this name any more" in page.words

    results["config"]["data"] = {"type": "camvid", "root": str(tmp_path / "gone")}
    _, page = write_report(run_dir, results)
    assert len(page.all("img")) == 8 * 3
    assert str(tmp_path / "gone") in page.words


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"results\.json: expected the results of a run"):
        write_run_report(file)
    assert not (tmp_path / "report.html").exists()


def test_large_images_become_small_pictures() -> None:
    rng = np.random.default_rng(0)
    shape = (1024, 2048)
    panels = image_panels(
        image=rng.integers(0, 256, (*shape, 3), np.uint8),
        label=rng.integers(0, 19, shape, np.uint8),
        prediction=rng.integers(0, 19, shape, np.uint8),
        discrepancy=rng.random((128, 256)).astype(np.float16),
        hardness=rng.integers(0, 251, shape, np.uint8),
        palette=[(i, i, i) for i in range(19)],
    )
    # Noise is the worst case: eight such images stay within the page's 5 MB.
    assert sum(len(panel.uri) for panel in panels) < 620_000


def test_colours_of_the_codes() -> None:
    colours = hardness_colours()
    assert tuple(colours[255]) == tuple(colours[254]) == VOID_COLOUR
    brightness = colours[:251].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -1.0).all()
    assert brightness[250] > brightness[0] + 100
    classes = class_colours([(1, 2, 3), (4, 5, 6)])
    assert classes[:2].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (classes[2:] == VOID_COLOUR).all()
