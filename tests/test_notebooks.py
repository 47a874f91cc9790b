"""The notebooks run from top to bottom on a store that the real pipeline built."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from rdd_pipeline.build import build_maps
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.files import write_json
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_storage import MapReader

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
INSPECT = NOTEBOOKS / "inspect_maps.ipynb"


def tiny_config(output: Path) -> RunConfig:
    network = {"architecture": "FPN", "encoder": "resnet18", "auxiliary": {}}
    return parse_config(
        {
            "name": "quickstart",
            "output": str(output),
            "data": {
                "type": "synthetic",
                "train_images": 5,
                "val_images": 1,
                "height": 64,
                "width": 96,
            },
            "teacher": {"network": network, "training": {"iterations": 1}},
            "maps": {"workers": 0, "shard_images": 4},
            "student": {"network": network},
            "students": ["supervised"],
        }
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run whose teacher was never trained."""
    config = tiny_config(tmp_path_factory.mktemp("inspect") / "runs")
    dataset = build_dataset(config.data, "train")
    teacher = config.teacher.network
    weights = config.run_dir / "teacher" / "weights.safetensors"
    save_weights(build_network(teacher, dataset.num_classes, seed=0), weights)
    write_json(config.run_dir / "config.json", config.model_dump(mode="json"))
    built = build_maps(
        dataset,
        teacher,
        weights,
        maps=config.maps,
        root=config.maps_root,
        device="cpu",
        reporter=Reporter(quiet=True),
    )
    return Path(built.path)


def execute(notebook: Path) -> list[Any]:
    """Run a notebook in a fresh kernel, as Jupyter would, and return all outputs."""
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.execute()
    return [output for cell in content.cells for output in cell.get("outputs", [])]


def source_of_cell(notebook: Path, text: str) -> str:
    """The source of the code cell that contains a text."""
    cells = nbformat.read(notebook, as_version=4).cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and text in c.source]
    return str(source)


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name)
def test_committed_notebooks_have_no_outputs(notebook: Path) -> None:
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_inspect_maps_shows_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDD_STORE", str(store))
    outputs = execute(INSPECT)

    streams = [output for output in outputs if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    text = "".join(output.text for output in streams)
    assert store.name in text
    assert "synthetic: 5 images, 8 classes" in text

    statistics = MapReader(store).statistics()
    counts = statistics.image_hardness.sum(axis=1).astype(float)
    mean = (counts * range(251)).sum(axis=1) / counts.sum(axis=1) * 0.3**0.5 / 137
    order = mean.argsort()[::-1]
    expected = [f"{mean[row]:.3f}  {statistics.image_ids[row]}" for row in order]
    assert [line for line in text.splitlines() if "  train-" in line] == expected

    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1 + 3
    # Photographs and scales, not empty axes.
    assert all(len(picture.convert("RGB").getcolors(1 << 24)) > 300 for picture in pictures)


def test_inspect_maps_finds_the_newest_quickstart_store(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RDD_STORE", raising=False)
    (store.parents[3] / "notebooks").mkdir(exist_ok=True)
    monkeypatch.chdir(store.parents[3] / "notebooks")
    names: dict[str, Any] = {}
    exec(source_of_cell(INSPECT, "def find_store"), names)
    assert names["store"] == store


@pytest.mark.parametrize(
    ("variable", "message"),
    [(None, "run 'make demo'"), ("elsewhere", "RDD_STORE: no map store at .*elsewhere")],
)
def test_inspect_maps_says_what_to_do_without_a_store(
    variable: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RDD_STORE", raising=False)
    if variable is not None:
        monkeypatch.setenv("RDD_STORE", variable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        exec(source_of_cell(INSPECT, "def find_store"), {})
