"""Public data sets: miniatures with the folders, names and encodings of the real ones."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import ADE20KData, CityscapesData, COCOStuffData, VOCData
from rdd_pipeline.data import IGNORE_INDEX, build_dataset, check_dataset, dataset_digests
from rdd_pipeline.data.ade20k import ADE20K_CLASSES, ADE20K_PALETTE
from rdd_pipeline.data.cocostuff import COCOSTUFF_CLASSES, COCOSTUFF_PALETTE
from rdd_pipeline.data.palettes import bit_palette
from rdd_pipeline.errors import DataError

_RNG = np.random.default_rng(0)


def write_image(path, height=12, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = _RNG.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_label(path, numbers, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers, mode="L" if palette is None else "P")
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)
    return numbers


def drawn(numbers, height=12, width=16):
    """All numbers, each about as often, in any order."""
    return _RNG.permutation(np.resize(np.asarray(numbers, np.uint8), height * width)).reshape(
        height, width
    )


def table(mapping):
    """Class of each of 256 numbers, -1 where there should be none."""
    classes = np.full(256, -1, np.int64)
    for number, index in mapping.items():
        classes[number] = index
    return classes


def make_cityscapes(root):
    raw = {}
    for split, cities in (("train", ("aachen", "zurich")), ("val", ("frankfurt",))):
        for city in cities:
            for frame in range(2):
                name = f"{city}_{frame:06d}_000019"
                write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
                folder = root / "gtFine" / split / city
                raw[name] = write_label(
                    folder / f"{name}_gtFine_labelIds.png", drawn([*range(34), 255])
                )
                write_label(folder / f"{name}_gtFine_labelTrainIds.png", drawn([0, 1, 255]))
                write_label(folder / f"{name}_gtFine_instanceIds.png", drawn([7, 8]))
                (folder / f"{name}_gtFine_polygons.json").write_text("{}")
    return raw


def make_voc(root):
    raw = {}
    colours = bit_palette(256, first=0)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for number, name in enumerate(("2007_000032", "2007_000033", "2008_000002", "2011_003276")):
        write_image(root / "JPEGImages" / f"{name}.jpg", height=10 + number)
        numbers = drawn([*range(21), 255], height=10 + number)
        if name != "2008_000002":
            write_label(root / "SegmentationClass" / f"{name}.png", numbers, colours)
        raw[name] = write_label(root / "SegmentationClassAug" / f"{name}.png", numbers)
    write_image(root / "JPEGImages" / "2012_000001.jpg")  # most images have no label at all
    (lists / "train.txt").write_text("2007_000032\n2007_000033\n")
    (lists / "val.txt").write_text("2011_003276\n")
    (lists / "train_aug.txt").write_text("2007_000032\n2007_000033\n2008_000002\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n"
    )
    return raw


def make_ade20k(root):
    raw = {}
    for split, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            name = f"ADE_{short}_{number:08d}"
            height = 10 + number
            write_image(root / "images" / split / f"{name}.jpg", height)
            raw[name] = write_label(
                root / "annotations" / split / f"{name}.png", drawn(range(151), height)
            )
    return raw


def make_cocostuff(root, labels="annotations"):
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    raw = {}
    for split, number in (("train2017", 9), ("train2017", 25), ("val2017", 139)):
        name = f"{number:012d}"
        write_image(root / "images" / split / f"{name}.jpg", width=20)
        numbers = drawn([n for n in (*range(182), 255) if n not in unused], width=20)
        raw[name] = write_label(root / labels / split / f"{name}.png", numbers)
        write_label(root / labels / split / f"{name}_labelTrainIds.png", numbers)
    return raw


CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
TABLES = {
    "cityscapes": table(
        dict.fromkeys((*range(34), 255), 255) | {n: i for i, n in enumerate(CITYSCAPES_TRAIN_IDS)}
    ),
    "voc": table({n: n for n in (*range(21), 255)}),
    "ade20k": table({0: 255} | {n: n - 1 for n in range(1, 151)}),
    # Written out from the official table: what lies between two unused numbers moves together.
    "cocostuff": table(
        {n: n for n in range(11)} | {n: n - 1 for n in range(12, 25)} | {26: 24, 27: 25}
        | {n: n - 4 for n in range(30, 44)} | {n: n - 5 for n in range(45, 65)} | {66: 60, 69: 61}
        | {n: n - 9 for n in range(71, 82)} | {n: n - 10 for n in range(83, 90)}
        | {n: n - 11 for n in range(91, 182)} | {255: 255}
    ),
}  # fmt: skip
MAKERS = {
    "cityscapes": (CityscapesData, make_cityscapes),
    "voc": (VOCData, make_voc),
    "ade20k": (ADE20KData, make_ade20k),
    "cocostuff": (COCOStuffData, make_cocostuff),
}


@pytest.fixture(params=sorted(MAKERS))
def made(request, tmp_path):
    config, make = MAKERS[request.param]
    raw = make(tmp_path / "data")
    return config(root=tmp_path / "data"), raw


def test_labels_are_mapped_pixel_by_pixel(made):
    config, raw = made
    seen = set()
    for split in ("train", "val"):
        dataset = build_dataset(config, split)
        check_dataset(dataset)
        assert dataset.name == config.type
        for index, sample in enumerate(dataset):
            assert sample.image_id in raw
            expected = TABLES[config.type][raw[sample.image_id]]
            assert expected.min() >= 0
            np.testing.assert_array_equal(sample.label, expected)
            assert dataset.size(index) == sample.image.shape[:2] == sample.label.shape
            seen |= set(np.unique(sample.label).tolist())
        part = dataset.read_window(0, slice(2, 7), slice(3, 9))
        np.testing.assert_array_equal(part.label, dataset[0].label[2:7, 3:9])
        np.testing.assert_array_equal(part.image, dataset[0].image[2:7, 3:9])
    assert IGNORE_INDEX in seen
    assert max(seen - {IGNORE_INDEX}) == dataset.num_classes - 1


def test_train_and_val_share_no_image_and_the_order_is_fixed(made):
    config, _ = made
    train, val = build_dataset(config, "train"), build_dataset(config, "val")
    assert not set(train.image_ids) & set(val.image_ids)
    assert train.image_ids == tuple(sorted(train.image_ids))
    assert build_dataset(config, "train").image_ids == train.image_ids


def test_identity_and_digests_stay_when_the_data_is_moved(made, tmp_path):
    config, _ = made
    before = build_dataset(config, "train")
    identity, digests = before.identity(), dataset_digests(before)
    shutil.move(config.root, tmp_path / "moved")
    after = build_dataset(config.model_copy(update={"root": tmp_path / "moved"}), "train")
    assert after.identity() == identity
    assert dataset_digests(after) == digests
    assert len(set(digests)) == len(digests)


def test_a_bucket_gives_the_same(made, bucket):
    config, _ = made
    url = bucket.upload(config.root)
    for split in ("train", "val"):
        local = build_dataset(config, split)
        dataset = build_dataset(config.model_copy(update={"root": url}), split)
        check_dataset(dataset)
        assert dataset.identity() == local.identity()
        assert dataset.image_ids == local.image_ids
        assert dataset_digests(dataset) == dataset_digests(local)
        np.testing.assert_array_equal(dataset[-1].image, local[-1].image)
        np.testing.assert_array_equal(dataset[-1].label, local[-1].label)


def test_a_loader_process_gets_the_same(made):
    dataset = build_dataset(made[0], "train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.image_ids == dataset.image_ids
    np.testing.assert_array_equal(copy[0].label, dataset[0].label)


@pytest.mark.parametrize(
    ("kind", "gone", "shown"),
    [
        ("cityscapes", "gtFine", "gtFine/train/<city>/<name>_gtFine_labelIds.png"),
        ("cityscapes", "leftImg8bit/train", "leftImg8bit/train/<city>/<name>_leftImg8bit.png"),
        ("voc", "JPEGImages", "JPEGImages/2007_000032.jpg"),
        ("ade20k", "annotations", "annotations/training/ADE_train_00000001.png"),
        ("cocostuff", "annotations", "stuffthingmaps_trainval2017.zip was unpacked to"),
    ],
)
def test_a_wrong_layout_shows_the_right_one(tmp_path, kind, gone, shown):
    config, make = MAKERS[kind]
    make(tmp_path)
    shutil.rmtree(tmp_path / gone)
    with pytest.raises(DataError) as caught:
        build_dataset(config(root=tmp_path), "train")
    message = str(caught.value)
    assert f"data.root: no folder {tmp_path / gone.split('/')[0]}" in message
    assert "<data.root>/" in message
    assert shown in message
    assert "Set data.root to the folder" in message


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("voc", "VOCdevkit/VOC2012"), ("ade20k", "ADEChallengeData2016"), ("cocostuff", "coco")],
)
def test_the_folder_above_is_recognised(tmp_path, kind, inner):
    config, make = MAKERS[kind]
    make(tmp_path / inner)
    with pytest.raises(DataError, match=f"Did you mean data.root: {tmp_path / inner}"):
        build_dataset(config(root=tmp_path), "train")


@pytest.mark.parametrize("kind", ["cityscapes", "ade20k", "cocostuff"])
def test_folders_without_images_are_refused(tmp_path, kind):
    config, make = MAKERS[kind]
    make(tmp_path)
    for folder in ("images", "leftImg8bit"):
        for path in (tmp_path / folder).rglob("*.*g"):
            path.unlink()
    with pytest.raises(DataError, match="no images in"):
        build_dataset(config(root=tmp_path), "train")


def test_damage_is_named(made):
    config, _ = made
    dataset = build_dataset(config, "train")
    files = sorted(p for p in config.root.rglob("*") if p.suffix in (".jpg", ".png"))
    first = f"{dataset.image_ids[0]}."
    image = next(p for p in files if first in p.name.replace("_leftImg8bit", "."))
    label = next(
        p
        for p in files
        if p.suffix == ".png"
        and dataset.image_ids[1] in p.name
        and p.parent.name != "SegmentationClass"
        and not p.stem.endswith(("8bit", "TrainIds", "instanceIds"))
    )
    image.write_bytes(image.read_bytes()[:200])
    write_label(label, np.full(dataset.size(1), 201, np.uint8))
    with pytest.raises(DataError) as caught:
        check_dataset(dataset)
    assert f"{image}: cannot be read as an image" in str(caught.value)
    assert f"{label}: label values 201" in str(caught.value)


def test_files_without_their_partner_are_named(tmp_path):
    raw = make_cityscapes(tmp_path)
    lost, stray, *_ = raw
    label = tmp_path / f"gtFine/train/aachen/{lost}_gtFine_labelIds.png"
    image = tmp_path / f"leftImg8bit/train/aachen/{stray}_leftImg8bit.png"
    label.unlink()
    image.unlink()
    with pytest.raises(DataError) as caught:
        check_dataset(build_dataset(CityscapesData(root=tmp_path), "train"))
    assert f"image without a label; expected {label}" in str(caught.value)
    assert f"label without an image; expected {image}" in str(caught.value)


def test_files_of_a_mac_and_of_other_programs_are_passed_over(tmp_path):
    raw = make_ade20k(tmp_path)
    (tmp_path / "images/training/._ADE_train_00000001.jpg").write_bytes(b"resource fork")
    (tmp_path / "images/training/Thumbs.db").write_bytes(b"thumbs")
    dataset = build_dataset(ADE20KData(root=tmp_path), "train")
    check_dataset(dataset)
    assert set(dataset.image_ids) == {name for name in raw if "train" in name}


def test_cityscapes_classes_and_weights(tmp_path):
    make_cityscapes(tmp_path)
    dataset = build_dataset(CityscapesData(root=tmp_path), "train")
    assert dataset.image_ids[0] == "aachen_000000_000019"
    assert (dataset.class_names[0], dataset.class_names[18]) == ("road", "bicycle")
    assert dataset.palette[13] == (0, 0, 142)  # car
    assert len(dataset.class_names) == len(dataset.palette) == len(dataset.class_weights) == 19
    assert sum(dataset.class_weights) / 19 == pytest.approx(1.0, abs=5e-3)


def test_voc_lists(tmp_path):
    make_voc(tmp_path)
    sizes = {
        split: len(build_dataset(VOCData(root=tmp_path, train_split=split), "train"))
        for split in ("train", "train_aug", "trainaug")
    }
    assert sizes == {"train": 2, "train_aug": 3, "trainaug": 1}
    paired = build_dataset(VOCData(root=tmp_path, train_split="trainaug"), "train")
    assert paired.image_ids == ("2008_000002",)
    check_dataset(paired)
    assert paired.palette[15] == (192, 128, 128)  # person
    assert paired.palette[0] == (0, 0, 0)


@pytest.mark.parametrize("gone", ["SegmentationClassAug", "ImageSets/Segmentation/train_aug.txt"])
def test_voc_without_the_augmentation_says_what_to_do(tmp_path, gone):
    make_voc(tmp_path)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as caught:
        build_dataset(VOCData(root=tmp_path), "train")
    assert gone in str(caught.value)
    assert "10,582" in str(caught.value)
    assert "data.train_split: train" in str(caught.value)
    check_dataset(build_dataset(VOCData(root=tmp_path, train_split="train"), "train"))


def test_voc_names_missing_files_and_double_lines(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(
        "2007_000032\n2009_000001\n\n2007_000032\n"
    )
    with pytest.raises(DataError) as caught:
        check_dataset(build_dataset(VOCData(root=tmp_path, train_split="train"), "train"))
    assert "train.txt: 1 name(s) stand twice" in str(caught.value)
    assert "JPEGImages/2009_000001.jpg: no such file" in str(caught.value)
    assert "SegmentationClass/2009_000001.png: no such file" in str(caught.value)


def test_cocostuff_labels_may_lie_elsewhere(tmp_path):
    make_cocostuff(tmp_path, labels="stuffthingmaps")
    config = COCOStuffData(root=tmp_path, labels="stuffthingmaps")
    dataset = build_dataset(config, "val")
    check_dataset(dataset)
    assert dataset.image_ids == ("000000000139",)


def test_class_tables():
    assert len(ADE20K_CLASSES) == len(ADE20K_PALETTE) == len(set(ADE20K_CLASSES)) == 150
    assert [ADE20K_CLASSES[i] for i in (0, 12, 89, 130, 149)] == [
        "wall", "person", "television", "screen", "flag",
    ]  # fmt: skip
    assert ADE20K_PALETTE[:2] == ((120, 120, 120), (180, 120, 120))
    assert ADE20K_PALETTE[149] == (92, 0, 255)
    assert len(COCOSTUFF_CLASSES) == len(set(COCOSTUFF_CLASSES)) == 171
    assert [COCOSTUFF_CLASSES[i] for i in (0, 11, 26, 79, 80, 170)] == [
        "person", "stop sign", "handbag", "toothbrush", "banner", "wood",
    ]  # fmt: skip
    assert len(set(COCOSTUFF_PALETTE)) == 171


def test_the_generated_palette_is_that_of_voc():
    colours = bit_palette(256, first=0)
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colours[255] == (224, 224, 192)
    assert len(set(colours)) == 256
