"""Files of every mode, orientation and kind of damage that real data sets hold."""

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.data.label_maps import LabelMap
from rdd_pipeline.data.reading import (
    EncodedImage,
    image_size,
    pair_digest,
    read_image,
    read_label,
)
from rdd_pipeline.errors import DataError, ImageReadError

_RNG = np.random.default_rng(0)
_RGB = _RNG.integers(0, 256, size=(6, 10, 3), dtype=np.uint8)
_GREY = _RNG.integers(0, 256, size=(6, 10), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientation_turns_image_and_size_alike(tmp_path, orientation, suffix):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(_RGB).save(path, exif=exif)
    upright = {
        1: _RGB,
        2: _RGB[:, ::-1],
        3: _RGB[::-1, ::-1],
        4: _RGB[::-1],
        5: _RGB.transpose(1, 0, 2),
        6: _RGB.transpose(1, 0, 2)[:, ::-1],
        7: _RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: _RGB.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(read_image(path), upright)
    assert image_size(path) == upright.shape[:2]


def test_orientation_of_a_jpeg(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_RGB).save(path, exif=exif)
    assert read_image(path).shape == (10, 6, 3)
    assert image_size(path) == (10, 6)


def test_greyscale_is_repeated(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(_GREY).save(path)
    np.testing.assert_array_equal(read_image(path), np.repeat(_GREY[..., None], 3, axis=2))


def test_16_bit_greyscale_keeps_its_high_byte(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(_GREY.astype(np.uint16) * 256 + 7).save(path)
    np.testing.assert_array_equal(read_image(path)[..., 1], _GREY)


def test_transparency_is_dropped(tmp_path):
    path = tmp_path / "clear.png"
    alpha = np.dstack([_RGB, _GREY])
    Image.fromarray(alpha, mode="RGBA").save(path)
    np.testing.assert_array_equal(read_image(path), _RGB)


def test_palette_images_give_their_colours(tmp_path):
    path = tmp_path / "palette.png"
    image = Image.fromarray(_GREY % 3, mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(path, transparency=b"\x00\xff\xff")
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)[_GREY % 3]
    np.testing.assert_array_equal(read_image(path), expected)


def test_32_bit_samples_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(_GREY.astype(np.float32)).save(path)
    with pytest.raises(ImageReadError, match="8- or 16-bit samples"):
        read_image(path)


def test_labels_of_each_encoding_give_their_numbers(tmp_path):
    numbers = _GREY % 12
    grey, palette, deep = (tmp_path / f"{name}.png" for name in ("grey", "palette", "deep"))
    Image.fromarray(numbers).save(grey)
    coloured = Image.fromarray(numbers, mode="P")
    coloured.putpalette(_RNG.integers(0, 256, size=36, dtype=np.uint8).tolist())
    coloured.save(palette)
    Image.fromarray(numbers.astype(np.uint16) + 300).save(deep)
    np.testing.assert_array_equal(read_label(grey), numbers)
    np.testing.assert_array_equal(read_label(palette), numbers)
    assert read_label(deep).dtype == np.uint16
    np.testing.assert_array_equal(read_label(deep), numbers.astype(np.uint16) + 300)


def test_a_two_coloured_label(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(_GREY > 100).save(path)
    np.testing.assert_array_equal(read_label(path), (_GREY > 100).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_files_cut_short_are_named(tmp_path, suffix, share):
    path = tmp_path / f"short.{suffix}"
    noise = _RNG.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageReadError, match=f"short.{suffix}: cannot be read"):
        read_image(path)


def test_damaged_bytes_of_a_png_are_found(tmp_path):
    path = tmp_path / "damaged.png"
    Image.fromarray(_RNG.integers(0, 12, size=(64, 64), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ImageReadError, match=r"damaged\.png"):
        read_label(path)


def test_label_map_names_strange_numbers(tmp_path):
    labels = LabelMap({0: 255, 7: 0, 8: 1})
    raw = np.array([[0, 7], [8, 8]], np.uint8)
    assert labels.apply(raw, tmp_path / "a.png").tolist() == [[255, 0], [1, 1]]
    with pytest.raises(
        DataError, match=r"a\.png: label values 9, 300 \(3 pixels\).*expected 7 to 8"
    ):
        labels.apply(np.array([9, 300, 300], np.uint16), tmp_path / "a.png")


def test_encoded_images_in_memory_are_read_as_files_are(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(_RGB).save(path)
    held = EncodedImage(name="table row 3", data=path.read_bytes())
    np.testing.assert_array_equal(read_image(held), _RGB)
    assert image_size(held) == image_size(path)
    assert pair_digest(held, held) == pair_digest(path, path)
    cut = EncodedImage(name="table row 4", data=held.data[:50])
    with pytest.raises(ImageReadError, match="table row 4: cannot be read as an image"):
        read_image(cut)
    with pytest.raises(ImageReadError, match=r"table row 5: .*\(unknown format\)"):
        image_size(EncodedImage(name="table row 5", data=b"text"))


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "print.tif"
    Image.fromarray(_RGB).convert("CMYK").save(path)
    np.testing.assert_array_equal(read_image(path), _RGB)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_label_with_an_orientation_of_its_own_is_turned(tmp_path, dtype):
    path = tmp_path / "turned.tif"
    exif = Image.Exif()
    exif[0x0112] = 8
    numbers = _GREY.astype(dtype)
    Image.fromarray(numbers).save(path, exif=exif)
    np.testing.assert_array_equal(read_label(path), numbers.T[::-1])
    assert image_size(path) == (10, 6)
    if dtype == np.uint8:
        np.testing.assert_array_equal(read_image(path)[..., 2], numbers.T[::-1])
