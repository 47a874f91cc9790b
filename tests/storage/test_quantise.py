from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rdd_storage import (
    HARDNESS_IGNORED,
    HARDNESS_UNWRITTEN,
    ShardDataError,
    confidence_table,
    encode_confidence,
    encode_discrepancy,
    encode_hardness,
    encode_logits,
    hardness_codec,
    hardness_edges,
    hardness_table,
    true_prob_table,
)

THRESHOLD = np.float32(0.7)
probabilities = hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(0.0, 1.0, width=32))
BITS = [8, 16]


def by_comparison(p: np.ndarray, bits: int) -> np.ndarray:
    """The definition: the number of edges with p <= edge."""
    return (p[:, None] <= hardness_edges(bits)[None, :]).sum(axis=1)


@pytest.mark.parametrize("bits", BITS)
def test_edges_fall_and_hold_the_threshold(bits: int) -> None:
    edges = hardness_edges(bits)
    codec = hardness_codec(bits)
    assert len(edges) == codec.max_code
    assert (np.diff(edges) <= 0).all()
    assert edges[codec.threshold_code - 1] == THRESHOLD
    assert edges[0] < 1
    assert edges[-1] > 0


def test_high_byte_of_16_bit_codes_is_the_8_bit_code() -> None:
    p = np.random.default_rng(0).random(50_000, dtype=np.float32) ** np.float32(0.2)
    valid = np.ones(p.shape, bool)
    np.testing.assert_array_equal(encode_hardness(p, valid, 16) >> 8, encode_hardness(p, valid, 8))


@pytest.mark.parametrize("bits", BITS)
def test_every_edge_and_its_neighbours_get_the_code_of_the_definition(bits: int) -> None:
    edges = hardness_edges(bits)
    neighbours = [np.nextafter(edges, np.float32(to)) for to in (0, 1)]
    ends = np.array([0, 1, 0.5, 1e-30], np.float32)
    # Next to 1, and at the end of the table that 16-bit codes are looked up in there.
    steps = np.concatenate([np.arange(3000), 2**18 + np.arange(-9, 9)]).astype(np.float32)
    p = np.concatenate([edges, *neighbours, ends, 1 - steps * np.float32(2**-24)])
    expected = edges.size - np.searchsorted(edges[::-1], p, side="left")
    np.testing.assert_array_equal(encode_hardness(p, np.ones(p.shape, bool), bits), expected)


@pytest.mark.parametrize("bits", BITS)
@given(p=probabilities)
def test_no_pixel_changes_side_at_the_threshold(bits: int, p: np.ndarray) -> None:
    codes = encode_hardness(p, np.ones(p.shape, bool), bits)
    hard = p <= THRESHOLD
    np.testing.assert_array_equal(codes >= hardness_codec(bits).threshold_code, hard)
    np.testing.assert_array_equal(true_prob_table(bits)[codes] <= THRESHOLD, hard)


@given(p=probabilities)
def test_codes_follow_the_definition(p: np.ndarray) -> None:
    np.testing.assert_array_equal(encode_hardness(p, np.ones(p.shape, bool)), by_comparison(p, 8))


@pytest.mark.parametrize(
    ("bits", "all_p", "easy_p", "h"),
    [(8, 0.00798, 0.00437, 0.0040), (16, 3.2e-5, 1.8e-5, 1.6e-5)],
)
@given(p=probabilities)
def test_stated_error_bounds(
    bits: int, all_p: float, easy_p: float, h: float, p: np.ndarray
) -> None:
    codes = encode_hardness(p, np.ones(p.shape, bool), bits)
    rounding = 1.2e-7
    error = true_prob_table(bits)[codes].astype(np.float64) - p
    # p = 1 has code 0, as has everything above the first edge.
    assert (error >= -rounding).all()
    assert (error < all_p + rounding).all()
    assert (error[p > THRESHOLD] < easy_p + rounding).all()
    exact_h = np.sqrt(1.0 - p.astype(np.float64))
    h_error = exact_h - hardness_table(bits)[codes]
    # The square root magnifies rounding of p next to 1: half a float32 step there is 1.8e-4.
    slack = np.minimum(3.0e-8 / np.maximum(exact_h, 1e-12), 1.8e-4) + rounding
    assert (h_error >= -slack).all()
    assert (h_error < h + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_ignored_pixels(bits: int) -> None:
    codec = hardness_codec(bits)
    p = np.array([[np.nan, 0.2], [0.9, np.inf]], np.float32)
    valid = np.array([[False, True], [True, False]])
    codes = encode_hardness(p, valid, bits)
    assert codes.dtype == codec.dtype
    np.testing.assert_array_equal(codes == codec.ignored, ~valid)
    assert true_prob_table(bits)[codec.ignored] == 1.0
    assert np.isnan(true_prob_table(bits)[codec.unwritten])
    assert np.isnan(hardness_table(bits)[[codec.ignored, codec.unwritten]]).all()


def test_constants_are_those_of_the_8_bit_codec() -> None:
    codec = hardness_codec(8)
    assert (codec.ignored, codec.unwritten) == (HARDNESS_IGNORED, HARDNESS_UNWRITTEN)
    with pytest.raises(ValueError, match="8 or 16"):
        hardness_codec(12)


def test_rounding_beyond_one_is_clipped() -> None:
    p = np.array([1.000001, -1e-7], np.float32)
    np.testing.assert_array_equal(encode_hardness(p, np.ones(2, bool)), [0, 250])


@pytest.mark.parametrize(
    ("p", "valid", "message"),
    [
        (np.array([np.nan], np.float32), np.ones(1, bool), "1 NaN"),
        (np.array([1.1], np.float32), np.ones(1, bool), r"probabilities in \[0, 1\], got 1.1"),
        (np.array([0.5]), np.ones(1, bool), "float32 array, got float64"),
        (np.zeros(2, np.float32), np.ones(1, bool), "shape of p_true"),
        (np.zeros(1, np.float32), np.ones(1, np.uint8), "valid: expected a bool"),
    ],
)
def test_bad_probabilities_are_refused(p: np.ndarray, valid: np.ndarray, message: str) -> None:
    with pytest.raises(ShardDataError, match=message):
        encode_hardness(p, valid)


def test_non_contiguous_input() -> None:
    p = np.random.default_rng(0).random((8, 12), dtype=np.float32)
    valid = np.ones((8, 12), bool)
    np.testing.assert_array_equal(
        encode_hardness(p.T[::2], valid.T[::2]), encode_hardness(p, valid).T[::2]
    )


@given(c=probabilities)
def test_confidence_error(c: np.ndarray) -> None:
    codes = encode_confidence(c)
    assert codes.max() <= 254
    assert np.abs(confidence_table()[codes].astype(np.float64) - c).max() <= 0.5 / 254 + 1e-7
    with pytest.raises(ShardDataError, match="confidence"):
        encode_confidence(c + np.float32(2))


@given(
    d=hnp.arrays(
        np.float32, st.integers(1, 64), elements=st.floats(0.0, float(np.float32(1e6)), width=32)
    )
)
def test_discrepancy_error(d: np.ndarray) -> None:
    stored = encode_discrepancy(d)
    assert stored.dtype == np.float16
    assert np.isfinite(stored).all()
    error = np.exp(-stored.astype(np.float64)) - np.exp(-d.astype(np.float64))
    assert np.abs(error).max() <= 2e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1])
def test_bad_discrepancy_is_refused(value: float) -> None:
    with pytest.raises(ShardDataError, match="discrepancy: expected finite values >= 0"):
        encode_discrepancy(np.array([0.5, value], np.float32))


@given(
    z=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
        elements=st.floats(-1e5, 1e5, width=32),
    )
)
def test_logits_are_centred_and_close(z: np.ndarray) -> None:
    stored = encode_logits(z)
    assert stored.dtype == np.float16
    assert (stored.max(axis=0) == 0).all()
    centred = np.maximum(z.astype(np.float64) - z.max(axis=0), -65504)
    # float32 rounds the difference once before float16 does.
    bound = 2.0**-11 * np.abs(centred) * 1.001 + 2.0**-25
    assert (np.abs(stored.astype(np.float64) - centred) <= bound).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_logits_are_refused(value: float) -> None:
    z = np.zeros((2, 2, 2), np.float32)
    z[1, 0, 0] = value
    with pytest.raises(ShardDataError, match="logits: expected finite"):
        encode_logits(z)
    with pytest.raises(ShardDataError, match=r"\(C, h, w\)"):
        encode_logits(z[0])
