"""Colour changes against torchvision's own."""

import numpy as np
import pytest
from PIL import Image

import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchvision
from rdd_pipeline.config import JitterConfig, parse_config
from rdd_pipeline.data.jitter import jitter_colours
from rdd_pipeline.errors import ConfigError
from tiny import tiny_tree


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (13, 17, 3), dtype=np.uint8)


def test_the_changes_are_those_of_torchvision():
    from torchvision.transforms import functional

    jitter = JitterConfig(brightness=0.5, contrast=0.6, saturation=1.5, hue=0.3)
    orders = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        factors = [rng.uniform(low, high) for low, high in ((0.5, 1.5), (0.4, 1.6), (0.0, 2.5))]
        turn = rng.uniform(-0.3, 0.3)
        order = tuple(rng.permutation(4))
        changes = (
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
            functional.adjust_hue,
        )
        expected = Image.fromarray(image(seed))
        for change in order:
            expected = changes[change](expected, [*factors, turn][change])
        found = jitter_colours(image(seed), jitter, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, np.asarray(expected))
        orders.add(order)
    assert len(orders) > 10


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_a_change_alone_keeps_what_it_should(change):
    before = image()
    after = jitter_colours(before, JitterConfig(**{change: 0.5}), np.random.default_rng(3))
    assert after.shape == before.shape
    assert after.dtype == np.uint8
    assert np.abs(after.astype(int) - before).mean() > 3
    if change == "hue":  # brightest and darkest channel of a pixel keep their values
        assert np.abs(after.max(2).astype(int) - before.max(2)).max() <= 1
    grey = np.repeat(before[..., :1], 3, axis=2)
    greyed = jitter_colours(grey, JitterConfig(**{change: 0.5}), np.random.default_rng(3))
    assert (np.ptp(greyed, axis=2) == 0).all()
    if change in ("saturation", "hue"):
        np.testing.assert_array_equal(greyed, grey)


def test_strengths_without_a_meaning_are_refused(tmp_path):
    tree = tiny_tree(tmp_path)
    tree["student"]["training"]["jitter"] = {"hue": 0.6, "brightness": -0.1}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert "student.training.jitter.hue" in str(caught.value)
    assert "student.training.jitter.brightness" in str(caught.value)


def test_no_strength_is_no_change():
    np.testing.assert_array_equal(
        jitter_colours(image(), JitterConfig(), np.random.default_rng(0)), image()
    )
