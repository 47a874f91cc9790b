"""The notebooks run from top to bottom on a run that the real pipeline made."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from rdd_pipeline.config import parse_config
from rdd_pipeline.inspection import Maps
from rdd_pipeline.progress import Reporter
from rdd_pipeline.results import write_results
from rdd_pipeline.stages import run_maps, run_teacher
from rdd_storage import MapReader
from tiny import tiny_tree

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
ITERATIONS = 60  # of the teacher: enough to know sky, buildings and roads


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without students, whose store has grown once."""
    tree = tiny_tree(tmp_path_factory.mktemp("notebooks") / "runs")
    tree["data"] |= {"train_images": 12, "height": 64, "width": 96}
    tree["maps"]["shard_images"] = 4
    training = tree["teacher"]["training"]
    training |= {"iterations": ITERATIONS, "batch_size": 4, "crop_size": [64, 96], "lr": 0.1}
    for section in (training, tree["student"]["training"]):
        section |= {"overlays": 0, "log_every": 20, "checkpoint_every": 1000}
    config = parse_config(tree)
    earlier = config.data.model_copy(update={"train_images": 6})
    quiet = Reporter(quiet=True)
    teacher = run_teacher(config, quiet)
    run_maps(config.model_copy(update={"data": earlier}), teacher, quiet)
    maps = run_maps(config, teacher, quiet)
    assert maps.version == 2
    (config.run_dir / "students").mkdir()
    write_results(config, teacher, maps, {}, {})
    return config.run_dir


class Executed:
    """What a notebook showed."""

    def __init__(self, outputs: list[Any]) -> None:
        streams = [output for output in outputs if output.output_type == "stream"]
        self.warnings = [output.text for output in streams if output.name == "stderr"]
        self.text = "".join(output.text for output in streams if output.name == "stdout")
        data = [output.data for output in outputs if "data" in output]
        self.plain = [str(item.get("text/plain", "")) for item in data]
        self.html = [str(item["text/html"]) for item in data if "text/html" in item]
        self.markdown = [str(item["text/markdown"]) for item in data if "text/markdown" in item]
        self.pictures = [
            Image.open(io.BytesIO(base64.b64decode(item["image/png"])))
            for item in data
            if "image/png" in item
        ]
        self.widgets = sum("application/vnd.jupyter.widget-view+json" in item for item in data)


def execute(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> Executed:
    """Run a notebook in a fresh kernel, as Jupyter would."""
    (path,) = [notebook for notebook in NOTEBOOKS if notebook.stem == name]
    monkeypatch.setenv("RDD_RUN", str(run))
    content = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(content, timeout=120, kernel_name="python3", resources=resources).execute()
    shown = Executed([output for cell in content.cells for output in cell.get("outputs", [])])
    assert shown.warnings == []
    # Drawings, not empty axes.
    assert all(len(picture.convert("RGB").getcolors(1 << 24)) > 100 for picture in shown.pictures)
    return shown


def store_of(run: Path) -> str:
    return str(json.loads((run / "results.json").read_text())["maps"]["path"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_have_no_outputs(notebook: Path) -> None:
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_without_a_run_the_first_cell_says_what_makes_one(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RDD_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(notebook, as_version=4).cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    with pytest.raises(FileNotFoundError, match=r"runs/quickstart, found none; .*'make demo'"):
        exec(first, {})


def test_inspect_maps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("inspect_maps", run, monkeypatch)
    maps = Maps(store_of(run))
    hardest = maps.hardest(5).image_ids
    ranking = next(html for html in shown.html if "5 hardest of 12 images" in html)
    places = [ranking.index(f">{name}<") for name in hardest]
    assert places == sorted(places)
    auroc = maps.quality(["discrepancy"], resamples=0)["discrepancy"].figures["auroc"].value
    assert f">{auroc:.4f} [" in next(html for html in shown.html if "augrc" in html)
    assert len(shown.pictures) == 6
    assert shown.widgets == 1


def test_label_errors_finds_what_it_planted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("label_errors", run, monkeypatch)
    assert "12 wrong regions in " in shown.text
    found = [int(n) for n in re.findall(r"(\d+) of 12 planted found", shown.text)]
    assert found == sorted(found)
    assert found[-1] >= 3
    assert len(shown.pictures) == 1
    folder = run.parent / "label-errors"
    with (folder / "label_errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    annotations = json.loads((folder / "label_errors.json").read_text())["annotations"]
    assert len(rows) == len(annotations) >= 5
    assert {row["image_id"] for row in rows} <= {p.stem for p in (folder / "labels").iterdir()}


def test_compare_teachers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("compare_teachers", run, monkeypatch)
    (younger,) = (run.parent / "younger-teacher" / "maps").glob("*.zarr")
    comparison = Maps(younger).compare(store_of(run))
    assert f"hardness: Spearman {comparison.spearman:.2f}, " in shown.text
    assert any(comparison.images[0].image_id in html for html in shown.html)
    assert len(shown.pictures) == 3


def test_three_students_read_one_store(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("three_students", run, monkeypatch)
    students = run.parent / "three-students" / "students"
    results = {
        name: json.loads((students / name / "result.json").read_text())
        for name in ("supervised", "kd", "rdd")
    }
    fingerprint = MapReader(store_of(run)).fingerprint
    stores = {name: result["settings"]["store"] for name, result in results.items()}
    assert stores == {"supervised": None, "kd": fingerprint, "rdd": fingerprint}
    for name, result in results.items():
        assert f"| {name} | 1 | {result['metrics']['miou']:.4f}" in shown.markdown[0]
    assert "three-students/rdd" in shown.html[-1]
    assert len(shown.pictures) == 1
    assert len(list((students / "rdd" / "snapshots").iterdir())) == 3


def test_plain_xarray_needs_nothing_of_this_project(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = execute("plain_xarray", run, monkeypatch)
    (path,) = [notebook for notebook in NOTEBOOKS if notebook.stem == "plain_xarray"]
    assert not re.search(r"(import|from) rdd_", path.read_text(encoding="utf-8"))
    maps = Maps(store_of(run))
    view = maps[0]
    for name in ("confidence", "weight", "hardness"):
        mean = np.nanmean(getattr(view, name), dtype=np.float64)
        assert f"{name}: mean {mean:.3f}" in shown.text
    ranking = next(text for text in shown.plain if text.startswith("image\n"))
    for image in maps.hardest(5):
        assert re.search(rf"{image.image_id} +{image.mean:.3f}\n", ranking)
    assert re.search(r"version 1: 6 of \d+ rows", shown.text)
    assert re.search(r"version 2: 12 of \d+ rows", shown.text)
    assert len(shown.pictures) == 1
