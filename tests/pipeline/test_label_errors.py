"""Regions whose label is wrong: found with class and rank, and written for other tools."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from rdd_pipeline.config import parse_config
from rdd_pipeline.data import build_dataset
from rdd_pipeline.inspection import (
    DataNeededError,
    EmptySelectionError,
    InspectionError,
    LabelErrors,
    Maps,
    UnknownClassError,
    find_label_errors,
)
from rdd_pipeline.inspection._regions import connected_regions, suspicious_regions
from rdd_pipeline.inspection.run_lengths import decode_mask, encode_pixels
from rdd_storage import (
    ExtraNotInstalledError,
    ImageMaps,
    ImageRecord,
    MapSchema,
    MapWriter,
    encode_confidence,
    encode_hardness,
)
from tiny import tiny_tree

# pycocotools' compiled part meets numpy 2 with its old protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 40, 56
CLASSES = ("road", "car", "sky")
ROAD, CAR, SKY, IGNORED = 0, 1, 2, 255
WIDE = np.s_[8:20, 10:30]
SMALL = np.s_[25:33, 40:48]


def scene() -> np.ndarray:
    """What is really there: a car on a road, and a strip without a label."""
    truth = np.full((HEIGHT, WIDTH), ROAD, np.uint8)
    truth[WIDE] = CAR
    truth[:2] = IGNORED
    return truth


def labels() -> dict[str, np.ndarray]:
    """Labels of the scene: right, wrong in known places, and different without being wrong."""
    names = ("clean", "wide", "small", "sliver", "speck", "two")
    found = {name: scene() for name in names}
    found["wide"][WIDE] = SKY
    found["small"][SMALL] = CAR
    found["sliver"][8:20, 30:32] = CAR  # the car's border, two pixels wide
    found["speck"][30:33, 4:8] = SKY  # 12 pixels
    # Side by side, of two classes: two regions.
    found["two"][WIDE] = SKY
    found["two"][8:20, 30:40] = SKY
    return found


def teacher(image_id: str) -> np.ndarray:
    """Probabilities (3, H, W) of a teacher that knows the scene, less surely in some places."""
    truth = scene()
    truth[truth == IGNORED] = SKY  # what it says there counts nowhere
    sure = np.full((HEIGHT, WIDTH), 0.96, np.float32)
    if image_id == "small":
        sure[SMALL] = 0.7
    probs = np.repeat(((1 - sure) / 2)[None], 3, axis=0)
    np.put_along_axis(probs, truth[None].astype(np.intp), sure[None], axis=0)
    return probs.astype(np.float32)


def build(folder: Path, bits: int) -> tuple[Path, Path]:
    """Files, configuration and store of the scenes."""
    for name, label in labels().items():
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(name))
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    split = {"images": "images", "labels": "labels"}
    data = {"type": "folder", "root": str(folder), "train": split, "val": split}
    tree = tiny_tree(folder / "runs") | {"data": data | {"classes": list(CLASSES)}}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    dataset = build_dataset(parse_config(tree).data, "train")
    schema = MapSchema(
        num_classes=3, class_names=CLASSES, height=HEIGHT, width=WIDTH, grid_height=5,
        grid_width=7, output_stride=8, shard_images=4, hardness_bits=bits, aux_hardness=False,
        logits=False,
    )  # fmt: skip
    records = [
        ImageRecord(image_id=name, height=HEIGHT, width=WIDTH, grid_height=5, grid_width=7,
                    digest=dataset.digest(index))
        for index, name in enumerate(dataset.image_ids)
    ]  # fmt: skip
    store = folder / "maps.zarr"
    writer = MapWriter.create(
        store, schema=schema, images=records, identity={"data": dataset.identity()}
    )
    for shard in writer.pending_shards():
        writer.write_shard(
            shard, [maps_of(schema, dataset[row]) for row in writer.shard_rows(shard)]
        )
    writer.publish()
    return store, config


def maps_of(schema: MapSchema, sample: Any) -> ImageMaps:
    probs, label = teacher(sample.image_id), sample.label
    valid = label != IGNORED
    places = np.where(valid, label, 0)[None].astype(np.intp)
    return ImageMaps(
        image_id=sample.image_id,
        discrepancy=np.zeros((5, 7), np.float32),
        hardness=encode_hardness(
            np.take_along_axis(probs, places, 0)[0], valid, schema.hardness_bits
        ),
        prediction=probs.argmax(0).astype(np.uint8),
        confidence=encode_confidence(probs.max(0)),
        label=label,
    )


@pytest.fixture(scope="module", params=[8, 16])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp(f"bits{request.param}"), request.param)


@pytest.fixture
def maps(built: tuple[Path, Path]) -> Maps:
    return Maps(*built)


@pytest.fixture
def found(maps: Maps) -> LabelErrors:
    return find_label_errors(maps)


def test_injected_errors_are_found_with_their_class_and_in_order(found: LabelErrors) -> None:
    got = [(e.image_id, e.label, e.suggestion, e.area, e.bbox, e.depth) for e in found]
    # Of equal scores the order is that of the store.
    assert got[0] == ("two", "sky", "car", 240, (10, 8, 20, 12), 6)
    assert got[1] == ("wide", "sky", "car", 240, (10, 8, 20, 12), 6)
    assert got[2] == ("two", "sky", "road", 120, (30, 8, 10, 12), 5)
    assert got[3] == ("small", "car", "road", 64, (40, 25, 8, 8), 4)
    assert len(got) == found.total == 4
    assert [e.score for e in found] == sorted((e.score for e in found), reverse=True)


def test_what_an_error_says_of_itself_is_what_the_teacher_said(found: LabelErrors) -> None:
    error = found[3]
    assert error.confidence == pytest.approx(0.7, abs=0.002)
    assert error.true_prob == pytest.approx(0.15, abs=0.01)
    assert error.centroid == (43.5, 28.5)
    assert error.score == pytest.approx(
        np.log(error.confidence / (error.true_prob + 0.001)) * np.log(5), rel=1e-12
    )
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[SMALL] = True
    assert np.array_equal(error.mask, wanted)


def test_images_without_enough_wrong_pixels_are_not_read(maps: Maps) -> None:
    seen: list[int] = []
    found = find_label_errors(maps, progress=seen.append)
    # "clean" and "speck" by their counts; "sliver" has 24 wrong pixels and is looked at.
    assert (found.images, found.skipped) == (6, 2)
    assert sum(seen) == 6
    assert find_label_errors(maps, min_area=65, class_name="car").skipped == 6


def test_settings_decide_what_counts_as_an_error(maps: Maps) -> None:
    def names(**settings: Any) -> list[str]:
        return sorted(error.image_id for error in find_label_errors(maps, **settings))

    assert names(min_depth=1) == ["sliver", "small", "two", "two", "wide"]
    assert names(min_area=12) == ["small", "speck", "two", "two", "wide"]
    assert names(min_area=121) == ["two", "wide"]
    assert names(min_confidence=0.8) == ["two", "two", "wide"]
    assert names(max_true_prob=0.1) == ["two", "two", "wide"]
    assert names(class_name="car") == ["small"]
    assert names(images=["small", "clean"]) == ["small"]
    assert names(keep=1) == ["two"]
    # Road's mean probability is 0.957, the car's lower because of the wrong labels.
    assert names(min_confidence=None) == ["two", "two", "wide"]


def test_a_diagonal_joins_nothing_and_a_ring_is_one_region() -> None:
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    _, members, count = connected_regions(np.zeros((5, 5), np.uint8), ring)
    assert (count, len(members)) == (1, 24)
    assert connected_regions(np.zeros((3, 3), np.uint8), np.eye(3, dtype=bool))[2] == 3
    assert connected_regions(np.zeros((3, 3), np.uint8), np.zeros((3, 3), bool))[2] == 0


def test_an_image_that_is_wrong_everywhere_is_one_region() -> None:
    shape = (6, 9)
    (region,) = suspicious_regions(
        np.zeros(shape, np.uint8), np.ones(shape, np.uint8), np.zeros(shape, np.float32),
        np.ones(shape, np.float32), valid=np.ones(shape, bool), max_true_prob=0.5,
        min_confidence=np.array([0.5, 0.5]), min_area=1, min_depth=1,
    )  # fmt: skip
    assert (len(region.pixels), region.label, region.prediction) == (54, 0, 1)
    assert region.depth >= 6


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_pycocotools(seed: int) -> None:
    from pycocotools import mask as coco

    rng = np.random.default_rng(seed)
    mask = rng.random((7, 5)) < (0.2, 0.5, 0.9, 1.0, 0.03)[seed]
    mask[3, 2] = True
    counts = encode_pixels(np.flatnonzero(mask), (7, 5))
    packed = coco.frPyObjects({"size": [7, 5], "counts": list(counts)}, 7, 5)
    assert np.array_equal(coco.decode(packed).astype(bool), mask)
    assert packed == coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert np.array_equal(decode_mask(counts, (7, 5)), mask)


def test_csv_holds_every_error_with_its_mask(found: LabelErrors, tmp_path: Path) -> None:
    with found.to_csv(tmp_path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [error.image_id for error in found]
    row = rows[3]
    assert (row["rank"], row["label"], row["suggestion"]) == ("4", "car", "road")
    assert (row["x"], row["y"], row["width"], row["height"]) == ("40", "25", "8", "8")
    size = int(row["image_height"]), int(row["image_width"])
    mask = decode_mask([int(count) for count in row["counts"].split()], size)
    assert np.array_equal(mask, found[3].mask)


def test_coco_is_read_by_pycocotools(found: LabelErrors, tmp_path: Path) -> None:
    coco = COCO(found.to_coco(tmp_path / "errors.json"))
    assert [coco.cats[i]["name"] for i in coco.getCatIds()] == list(CLASSES)
    for rank, error in enumerate(found, start=1):
        annotation = coco.anns[rank]
        assert np.array_equal(coco.annToMask(annotation).astype(bool), error.mask)
        assert coco.imgs[annotation["image_id"]]["file_name"] == f"{error.image_id}.png"
        assert coco.cats[annotation["category_id"]]["name"] == error.suggestion
        assert annotation["attributes"]["label"] == error.label
        assert (annotation["area"], tuple(annotation["bbox"])) == (error.area, error.bbox)
    named = json.loads(found.to_coco(tmp_path / "b.json", file_name="x/{}.jpg".format).read_text())
    assert {image["file_name"] for image in named["images"]} == {
        f"x/{error.image_id}.jpg" for error in found
    }


def test_fiftyone_fields_place_each_mask_in_its_box(found: LabelErrors, tmp_path: Path) -> None:
    files = found.write_images(tmp_path)
    samples = found.fiftyone_fields(files)
    assert {sample["image_id"] for sample in samples} == {"two", "wide", "small"}
    ranks = []
    for sample in samples:
        with Image.open(sample["filepath"]) as image:
            assert np.array_equal(np.asarray(image), found.maps[sample["image_id"]].image)
        for detection in sample["label_errors"]:
            error = found[detection["rank"] - 1]
            ranks.append(detection["rank"])
            x, y, w, h = detection["bounding_box"]
            # FiftyOne rounds down.
            rows = slice(int(y * HEIGHT), int((y + h) * HEIGHT))
            columns = slice(int(x * WIDTH), int((x + w) * WIDTH))
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[rows, columns] = detection["mask"]
            assert np.array_equal(mask, error.mask)
            assert (detection["label"], detection["given_label"]) == (
                error.suggestion, error.label,
            )  # fmt: skip
    assert sorted(ranks) == [1, 2, 3, 4]
    with pytest.raises(InspectionError, match="expected a file for each image"):
        found.fiftyone_fields({})


@pytest.mark.skipif(importlib.util.find_spec("fiftyone") is not None, reason="fiftyone is there")
def test_without_fiftyone_the_message_says_what_to_do(found: LabelErrors, tmp_path: Path) -> None:
    with pytest.raises(ExtraNotInstalledError, match="pip install fiftyone"):
        found.to_fiftyone(found.write_images(tmp_path))


def test_pictures_show_the_region(found: LabelErrors, tmp_path: Path) -> None:
    figure = found.figure(2)
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert [t for t in titles if t.startswith("label")] == ["label: sky"] * 2
    assert [t for t in titles if t.startswith("teacher")] == ["teacher: car"] * 2
    label, suggested = (np.asarray(figure.axes[i].images[0].get_array()) for i in (1, 2))
    changed = (label != suggested).any(axis=2)
    assert changed.sum() == found[0].area
    assert [path.name for path in found.write_pictures(tmp_path)] == [
        f"{rank:05d}.png" for rank in range(1, 5)
    ]


def test_what_cannot_be_asked_is_refused(built: tuple[Path, Path], maps: Maps) -> None:
    with pytest.raises(DataNeededError, match="finding label errors needs the images' labels"):
        find_label_errors(Maps(built[0]))
    with pytest.raises(UnknownClassError, match="did you mean 'car'"):
        find_label_errors(maps, class_name="cars")
    with pytest.raises(EmptySelectionError, match="at least one"):
        find_label_errors(maps, images=[])
    for settings in (
        {"max_true_prob": 1.5}, {"min_confidence": -0.1}, {"min_confidence": float("nan")},
        {"min_area": 0}, {"min_depth": 0}, {"keep": 0},
    ):  # fmt: skip
        (name,) = settings
        with pytest.raises(InspectionError, match=f"^{name}: expected"):
            find_label_errors(maps, **settings)  # type: ignore[arg-type]


def test_nothing_found_is_a_result_that_cannot_be_written(maps: Maps, tmp_path: Path) -> None:
    found = find_label_errors(maps, images=["clean"])
    assert (len(found), found.total, found.table()) == (0, 0, [])
    for write in (found.to_csv, found.to_coco, found.write_images, found.write_pictures):
        with pytest.raises(EmptySelectionError, match="got none"):
            write(tmp_path / "x")
    with pytest.raises(EmptySelectionError):
        found.figure()


@pytest.fixture
def changed(tmp_path: Path) -> Maps:
    store, config = build(tmp_path, 8)
    Image.fromarray(scene()).save(tmp_path / "labels" / "wide.png")
    return Maps(store, config)


def test_images_changed_since_the_build_are_left_out_and_named(changed: Maps) -> None:
    found = find_label_errors(changed)
    assert {error.image_id for error in found} == {"two", "small"}
    assert found.images == 5
    assert "expected digest" in found.problems["wide"]
    with pytest.raises(DataNeededError, match="first, wide: the image or its label has changed"):
        find_label_errors(changed, images=["wide"])


def test_command_lists_and_writes(tmp_path: Path) -> None:
    store, config = build(tmp_path, 8)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("rdd"), "maps", "label-errors", store, *words]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
        )

    done = run("--data", config, "-n", 2, "--csv", tmp_path / "a.csv", "--coco",
               tmp_path / "a.json", "--pictures", tmp_path / "pictures")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 4 suspicious regions in 6 images" in done.stdout
    assert "sky" in done.stdout
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3
    assert len(COCO(tmp_path / "a.json").anns) == 2
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    refused = run("--data", config, "--class", "skies")
    assert refused.returncode == 1
    assert "'skies'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_masks_do_not_depend_on_the_order_of_pixels(found: LabelErrors) -> None:
    error = found[0]
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(error.mask))
    assert replace(error, counts=encode_pixels(shuffled, error.size)).counts == error.counts
