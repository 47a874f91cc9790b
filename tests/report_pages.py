"""Pages of reports, and small stores to report on; shared by the tests of reports."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from rdd_pipeline.config import parse_config
from rdd_pipeline.data import SegmentationDataset, build_dataset
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
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += " " + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def train_set() -> SegmentationDataset:
    return build_dataset(parse_config(copy.deepcopy(CONFIG)).data, "train")


def build_store(
    path: Path, dataset: SegmentationDataset, changed: tuple[int, ...] = ()
) -> MapReader:
    """A store whose image i is harder the larger i is; of some the files were others."""
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
            digest=64 * "0" if index in changed else dataset.digest(index),
        )
        for index, name in enumerate(dataset.image_ids)
    ]
    writer = MapWriter.create(
        path,
        schema=schema,
        images=records,
        identity={"data": dataset.identity()},
        palette=dataset.palette,
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


def hardest_panels(page: Page) -> list[str]:
    """Alternatives of the pictures that are not of label errors."""
    images = [image for image in page.all("img") if "loading" in image]
    ends = [i for i, image in enumerate(images) if image["alt"].startswith("close-up")]
    return [image["alt"] for image in images[: ends[0] - 1 if ends else None]]
