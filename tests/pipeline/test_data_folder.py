"""Data sets of any folders: patterns, numbers, colours, and what is said when they do not fit."""

import pickle

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import parse_config
from rdd_pipeline.data import IGNORE_INDEX, build_dataset, check_dataset
from rdd_pipeline.errors import ConfigError, DataError
from rdd_pipeline.networks import build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import check_data
from rdd_pipeline.stages import run_maps, run_student
from rdd_storage import MapReader
from tiny import tiny_tree

_RNG = np.random.default_rng(0)
CLASSES = ["road", "tree", "sky"]


def config_of(tmp_path, **data):
    defaults = {
        "type": "folder",
        "root": str(tmp_path),
        "train": {"images": "images/train", "labels": "labels/train"},
        "val": {"images": "images/val", "labels": "labels/val"},
        "classes": CLASSES,
    }
    return parse_config(tiny_tree(tmp_path) | {"data": defaults | data})


def opened(tmp_path, **data):
    return build_dataset(config_of(tmp_path, **data).data, "train")


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode=mode).save(path, **options)


def noise(height=12, width=16):
    return _RNG.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def numbers(*allowed, height=12, width=16, dtype=np.uint8):
    return _RNG.choice(np.asarray(allowed, dtype), size=(height, width))


def write(tmp_path, label, name="a", split="train"):
    """One image of noise with a label."""
    height, width = label.shape[:2]
    save(tmp_path / f"images/{split}/{name}.jpg", noise(height, width))
    save(tmp_path / f"labels/{split}/{name}.png", label)


def test_numbers_are_classes_unless_said_otherwise(tmp_path):
    label = numbers(0, 1, 2, 255)
    write(tmp_path, label)
    dataset = opened(tmp_path)
    check_dataset(dataset)
    np.testing.assert_array_equal(dataset[0].label, label)
    assert dataset.class_names == tuple(CLASSES)
    assert (dataset.name, dataset.split, dataset.image_ids) == ("folder", "train", ("a",))


def test_ids_name_what_each_number_stands_for(tmp_path):
    label = numbers(7, 8, 9, 40, 0, 200)
    write(tmp_path, label)
    ids = {7: "sky", 8: "road", 9: "road", 40: "tree", 0: None}
    dataset = opened(tmp_path, ids=ids, ignore=[200])
    expected = np.select(
        [label == 7, (label == 8) | (label == 9), label == 40], [2, 0, 1], IGNORE_INDEX
    )
    np.testing.assert_array_equal(dataset[0].label, expected)
    assert dataset.identity()["label_mapping"] == {
        "7": 2, "8": 0, "9": 0, "40": 1, "0": 255, "200": 255,
    }  # fmt: skip


def test_a_configuration_written_as_json_means_the_same(tmp_path):
    write(tmp_path, numbers(7, 9, 255))
    config = config_of(tmp_path, ids={7: "sky", 9: None})
    again = parse_config(config.model_dump(mode="json"))
    assert again == config
    assert (
        build_dataset(again.data, "train").identity()
        == build_dataset(config.data, "train").identity()
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_labels_of_more_than_8_bits(tmp_path, dtype):
    label = numbers(1000, 2000, 65535, dtype=dtype)
    save(tmp_path / "images/train/a.png", noise())
    save(tmp_path / "labels/train/a.tif", label)
    dataset = opened(tmp_path, ids={1000: "road", 2000: "sky"}, ignore=[65535])
    check_dataset(dataset)
    expected = np.select([label == 1000, label == 2000], [0, 2], IGNORE_INDEX)
    np.testing.assert_array_equal(dataset[0].label, expected)
    label[:2, :3] = 300
    if dtype == np.int32:
        label[3, 3] = -1
    save(tmp_path / "labels/train/a.tif", label)
    with pytest.raises(DataError, match=r"a\.tif: label values .*300 .* expected 1000, 2000, or"):
        dataset[0]


def test_palette_images_give_numbers_and_colours(tmp_path):
    label = numbers(0, 1, 2, 255)
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = ((10, 20, 30), (200, 0, 0), (0, 90, 0))
    save(tmp_path / "images/train/a.png", noise())
    path = tmp_path / "labels/train/a.png"
    image = Image.fromarray(label, mode="P")
    image.putpalette(colours.tobytes())
    path.parent.mkdir(parents=True)
    image.save(path)
    dataset = opened(tmp_path)
    np.testing.assert_array_equal(dataset[0].label, label)
    assert dataset.palette == ((10, 20, 30), (200, 0, 0), (0, 90, 0))
    assert opened(tmp_path, palette=[[1, 1, 1], [2, 2, 2], [3, 3, 3]]).palette[2] == (3, 3, 3)


def test_without_colours_classes_get_different_ones(tmp_path):
    write(tmp_path, numbers(0, 1, 2))
    assert len(set(opened(tmp_path).palette)) == 3


@pytest.mark.parametrize("form", ["rgb", "rgba", "palette"])
def test_colours_are_classes(tmp_path, form):
    palette = np.array([(128, 64, 128), (0, 255, 1), (70, 130, 180), (224, 224, 192)], np.uint8)
    index = numbers(0, 1, 2, 3)
    save(tmp_path / "images/train/a.png", noise())
    pixels = palette[index]
    if form == "rgba":
        pixels = np.dstack([pixels, np.full_like(index, 128)])
    image = Image.fromarray(pixels)
    if form == "palette":  # its own order of colours has nothing to do with ours
        image = Image.fromarray(3 - index, mode="P")
        image.putpalette(palette[::-1].tobytes())
    (tmp_path / "labels/train").mkdir(parents=True)
    image.save(tmp_path / "labels/train/a.png")
    given = {
        "label_format": "colours",
        "palette": palette[:3].tolist(),
        "ignore_colours": palette[3:].tolist(),
    }
    dataset = opened(tmp_path, **given)
    check_dataset(dataset)
    expected = np.where(index == 3, IGNORE_INDEX, index)
    np.testing.assert_array_equal(dataset[0].label, expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[0].label, expected)
    assert len(pickle.dumps(dataset)) < 100_000, "the table of all colours stays behind"
    with pytest.raises(DataError, match=r"a\.png: colours #e0e0c0 .* data\.ignore_colours"):
        opened(tmp_path, **given | {"ignore_colours": []})[0]


def test_colour_labels_taken_for_numbers_are_explained(tmp_path):
    write(tmp_path, noise())
    with pytest.raises(DataError, match="label_format: colours"):
        check_dataset(opened(tmp_path))


def test_suffixes_of_names_are_taken_off(tmp_path):
    for number in range(2):
        save(tmp_path / f"all/{number}_rgb.png", noise())
        save(tmp_path / f"all/{number}_mask.png", numbers(0, 1, 2))
    dataset = opened(
        tmp_path,
        train={"images": "all", "labels": "all"},
        image_suffix="_rgb",
        label_suffix="_mask",
    )
    check_dataset(dataset)
    assert dataset.image_ids == ("0", "1")


def test_patterns_reach_folders_below(tmp_path):
    for scene in ("x", "y"):
        save(tmp_path / f"data/images/{scene}/deep/0001.png", noise())
        save(tmp_path / f"data/labels/{scene}/deep/0001.png", numbers(0, 1, 2))
    where = {"images": "data/images/**/*.png", "labels": "data/labels/**/*.png"}
    dataset = opened(tmp_path, train=where)
    check_dataset(dataset)
    assert dataset.image_ids == ("x/deep/0001", "y/deep/0001")
    absolute = {key: f"{tmp_path}/{pattern}" for key, pattern in where.items()}
    assert opened(tmp_path, root="/nowhere", train=absolute).image_ids == dataset.image_ids


def test_one_folder_for_each_image(tmp_path):
    for scene in ("x", "y"):
        save(tmp_path / f"data/{scene}/image.png", noise())
        save(tmp_path / f"data/{scene}/label.png", numbers(0, 1, 2))
    dataset = opened(
        tmp_path,
        train={"images": "data/*/image.png", "labels": "data/*/label.png"},
        image_suffix="/image",
        label_suffix="/label",
    )
    check_dataset(dataset)
    assert dataset.image_ids == ("x", "y")


def test_classes_may_stand_in_a_file(tmp_path):
    write(tmp_path, numbers(0, 1, 2))
    (tmp_path / "names.txt").write_text("road\n tree \n\nsky\n")
    assert opened(tmp_path, classes=str(tmp_path / "names.txt")).class_names == tuple(CLASSES)
    with pytest.raises(ConfigError, match=r"data\.classes: expected a list of names or a text"):
        opened(tmp_path, classes=str(tmp_path / "gone.txt"))


def test_images_of_every_kind_become_rgb(tmp_path):
    """Orientation, greyscale, transparency, CMYK: image, size and window agree."""
    rgb, label = noise(8, 14), numbers(0, 1, 2, height=8, width=14)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "cmyk": (Image.fromarray(rgb).convert("CMYK"), {}),
        "grey": (Image.fromarray(rgb[..., 0]), {}),
        "rgba": (Image.fromarray(np.dstack([rgb, rgb[..., :1]])), {}),
        "turned": (Image.fromarray(rgb.transpose(1, 0, 2)[::-1]), {"exif": turned}),
    }
    for name, (image, options) in kinds.items():
        path = tmp_path / f"images/train/{name}{'.png' if name == 'rgba' else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        save(tmp_path / f"labels/train/{name}.png", label)
    dataset = opened(tmp_path)
    check_dataset(dataset)
    for index, sample in enumerate(dataset):
        assert sample.image.shape == (8, 14, 3), sample.image_id
        assert dataset.size(index) == (8, 14)
        part = dataset.read_window(index, slice(1, 5), slice(3, 10))
        np.testing.assert_array_equal(part.image, sample.image[1:5, 3:10])
        np.testing.assert_array_equal(part.label, label[1:5, 3:10])


def test_a_label_turns_with_its_own_orientation_alone(tmp_path):
    label = numbers(0, 1, 2, height=6, width=9)
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "images/train/a.png", noise(9, 6))
    save(tmp_path / "labels/train/a.png", label, exif=turned)
    dataset = opened(tmp_path)
    check_dataset(dataset)
    np.testing.assert_array_equal(dataset[0].label, label[::-1].T)
    # A turned image with a label that was drawn on its stored pixels does not fit.
    save(tmp_path / "images/train/a.png", noise(9, 6), exif=turned)
    with pytest.raises(DataError, match=r"a\.png: expected the size of its image, 6x9"):
        check_dataset(opened(tmp_path))


def test_names_that_do_not_match_are_listed(tmp_path):
    for name in "abcde":
        save(tmp_path / f"images/train/{name}.jpg", noise())
        save(tmp_path / f"labels/train/{name}_mask.png", numbers(0, 1))
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "data.train: none of 5 images has a label of the same name" in message
    assert "images: a, b, c, ..." in message
    assert "labels: a_mask, b_mask, c_mask, ..." in message
    assert "data.label_suffix" in message
    (tmp_path / "labels/train/b_mask.png").unlink()
    (tmp_path / "images/train/d.jpg").unlink()
    with pytest.raises(DataError) as caught:
        check_dataset(opened(tmp_path, label_suffix="_mask"))
    assert f"b.jpg: image without a label; expected {tmp_path}/labels/train/b_mask.png" in str(
        caught.value
    )
    assert f"d_mask.png: label without an image; expected {tmp_path}/images/train/d.jpg" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"images": "imges", "labels": "labels/train"}, r"data\.train\.images: .*imges matches no"),
        ({"images": "gone/*.png", "labels": "labels/train"}, "no folder .*gone"),
        ({"images": "images/train/*.bmp", "labels": "labels/train"}, "matches no files with the"),
        ({"images": "images/train", "labels": "images/train"}, r"data\.train\.labels: .*no files"),
    ],
)
def test_wrong_patterns_are_explained(tmp_path, where, message):
    write(tmp_path, numbers(0, 1))
    with pytest.raises(DataError, match=message):
        opened(tmp_path, train=where)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"classes": []}, "data.classes: "),
        ({"classes": ["a", "b", "a"]}, "data: classes: the names ['a'] are used twice"),
        ({"ids": {3: "rod"}}, "data: ids: ['rod'] are not among classes"),
        ({"ids": {-1: "road"}}, "greater than or equal to 0"),
        ({"ids": {255: "road"}}, "data: ignore: the numbers [255] stand for classes too"),
        ({"ignore": [0]}, "say with ids what each number stands for"),
        ({"palette": [[0, 0, 0]]}, "data: palette: expected 3 colours"),
        ({"palette": [[0, 0, 256]] * 3}, "less than or equal to 255"),
        ({"label_format": "colours"}, "needs the colour of each class"),
        ({"label_format": "colours", "palette": [[1, 1, 1]] * 3}, "[[1, 1, 1]] are used twice"),
        ({"ignore_colours": [[0, 0, 0]]}, "goes with label_format: colours"),
        ({"name": "my/data"}, "data.name: "),
        ({"clases": []}, "data.clases: unknown key; did you mean 'classes'?"),
        ({"train": {"image": "x"}}, "data.train.image: unknown key; did you mean 'images'?"),
    ],
)
def test_wrong_settings_are_explained(tmp_path, data, message):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **data)
    assert message in str(caught.value)
    assert "data.folder" not in str(caught.value), "the tag is no key of the file"


def test_the_whole_way_with_images_of_different_sizes(tmp_path):
    """A random teacher's maps of a folder of mixed sizes, and a student trained from them."""
    sizes = [(48, 80), (64, 64), (57, 91), (80, 48)]
    for split, count in (("train", 4), ("val", 2)):
        for number, (height, width) in enumerate(sizes[:count]):
            label = numbers(0, 1, 2, 255, height=height, width=width)
            write(tmp_path, label, name=f"{number}", split=split)
    config = config_of(tmp_path, name="mixed")
    quiet = Reporter(quiet=True)
    check_data(config, quiet)
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, 3, seed=3), weights)
    teacher = TrainedNetwork(name="teacher", weights=weights, reused=True, result={})
    built = run_maps(config, teacher, quiet)
    reader = MapReader(built.path)
    assert "mixed-train" in built.path
    assert [(r.height, r.width) for r in map(reader.record, reader.image_ids)] == sizes
    dataset = build_dataset(config.data, "train")
    for sample in dataset:
        assert reader.read("prediction", sample.image_id).shape == sample.label.shape
    student = next(item for item in config.students if item.name == "rdd")
    trained = run_student(config, student, built.path, quiet, None)
    assert 0.0 <= trained.result["metrics"]["miou"] <= 1.0
