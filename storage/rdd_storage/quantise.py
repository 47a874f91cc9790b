"""Quantisation of the maps: small integer codes whose decision boundary at 0.7 is exact.

``hardness = sqrt(1 - p_true)`` is kept in linear codes. The square root spends the codes where
the true-class probability is close to 1, which is where most pixels are; the step is chosen so
that the usual threshold 0.7 (Relative Difficulty Distillation, arXiv 2407.03719, section 3.3)
falls on the edge between two codes: ``p <= 0.7`` is exactly ``code >= 137``.

Decoding goes through lookup tables of float32; nothing here makes a float64 copy of a map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from rdd_storage.errors import ShardDataError

Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
CodeArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
HardnessBits = Literal[8, 16]

HARDNESS_IGNORED = 255
"""8-bit code of pixels without a label, and of padding."""
HARDNESS_UNWRITTEN = 254
"""8-bit code of pixels that no writer has reached."""
CONFIDENCE_UNWRITTEN = 255
"""Confidence code of padding and of pixels that no writer has reached."""
PREDICTION_UNWRITTEN = 255
"""Prediction of padding and of pixels that no writer has reached."""

_THRESHOLD_DROP = 0.3  # 1 - 0.7: the drop of probability that is spread over `threshold_code` steps
_CONFIDENCE_STEPS = 254
_RANGE_SLACK = 1e-5  # a softmax in half precision may leave [0, 1] by rounding alone
_BLOCK = 1 << 16  # pixels whose scratch arrays stay in the second-level cache
_NEAR_ONE = 1 << 18  # float32 values next to 1 whose 16-bit codes are kept in a table
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HardnessCodec:
    """Constants of one code width; get it from :func:`hardness_codec`."""

    bits: HardnessBits
    """8 or 16."""
    threshold_code: int
    """Lowest code of the pixels with ``p_true <= 0.7``: 137, or 137 * 256."""
    max_code: int
    """Code of ``p_true = 0``: 250, or 64032."""
    ignored: int
    """Code of ignored pixels and padding."""
    unwritten: int
    """Fill value of the array."""

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """Integer type of the codes."""
        return np.dtype(np.uint8) if self.bits == 8 else np.dtype(np.uint16)

    @property
    def scale(self) -> float:
        """Hardness per code."""
        return math.sqrt(_THRESHOLD_DROP) / self.threshold_code


_CODECS = {
    8: HardnessCodec(
        bits=8,
        threshold_code=137,
        max_code=250,
        ignored=HARDNESS_IGNORED,
        unwritten=HARDNESS_UNWRITTEN,
    ),
    # 256 codes in place of each 8-bit code, so that the high byte is the 8-bit code.
    16: HardnessCodec(
        bits=16, threshold_code=137 * 256, max_code=64032, ignored=65535, unwritten=65534
    ),
}


def hardness_codec(bits: int = 8) -> HardnessCodec:
    """Constants of the 8-bit or the 16-bit hardness codes.

    Raises:
        ValueError: ``bits`` is neither 8 nor 16.
    """
    if bits not in _CODECS:
        raise ValueError(f"hardness_bits: expected 8 or 16, got {bits!r}")
    return _CODECS[bits]


@cache
def _edges(bits: int) -> Float32Array:
    codec = hardness_codec(bits)
    codes = np.arange(1, codec.max_code + 1, dtype=np.float64)
    edges = (1.0 - _THRESHOLD_DROP * (codes / codec.threshold_code) ** 2).astype(np.float32)
    # 16-bit edges next to 1 round up to it; p = 1 keeps code 0 all the same.
    np.minimum(edges, np.nextafter(np.float32(1), np.float32(0)), out=edges)
    edges.flags.writeable = False
    return edges


@cache
def _ascending_edges(bits: int) -> Float32Array:
    return np.ascontiguousarray(_edges(bits)[::-1])


def hardness_edges(bits: int = 8) -> Float32Array:
    """Upper edges of the hardness codes, in falling order.

    ``e_k = 1 - 0.3 * (k / 137)**2`` for k = 1..250 (16 bit: 137 * 256 and 1..64032), each rounded
    to float32 and at most the largest float32 below 1. The code of ``p`` is the number of edges
    with ``p <= e_k``; ``e_137`` is exactly ``float32(0.7)``.

    Returns:
        Read-only float32 array (250,) or (64032,); entry ``k - 1`` is ``e_k``.
    """
    return _edges(bits)


def encode_hardness(p_true: Float32Array, valid: BoolArray, bits: int = 8) -> CodeArray:
    """Codes of the true-class probability, by the edges of :func:`hardness_edges`.

    Args:
        p_true: float32, any shape, in [0, 1] where ``valid``; rounding errors of 1e-5 beyond are
            clipped. Values elsewhere do not matter.
        valid: bool, the same shape; False at ignored pixels.
        bits: 8 or 16.

    Returns:
        uint8 or uint16 codes of the same shape, 255 or 65535 where not ``valid``. Exact: no pixel
        changes side at 0.7. Decoded by :func:`true_prob_table`, ``0 <= p_decoded - p < 0.00798``
        (below 0.00437 for p > 0.7; 16 bit: below 3.2e-5); decoded by :func:`hardness_table`,
        ``0 <= h - h_decoded < 0.0040`` (16 bit: below 1.6e-5), up to float32 rounding.

    Raises:
        ShardDataError: Wrong dtype or shape, or NaN or values outside [0, 1] at valid pixels.
    """
    codec = hardness_codec(bits)
    _expect(p_true, np.float32, "p_true")
    _expect(valid, np.bool_, "valid")
    if p_true.shape != valid.shape:
        raise ShardDataError(
            f"valid: expected the shape of p_true {p_true.shape}, got {valid.shape}"
        )
    flat = np.ascontiguousarray(p_true).reshape(-1)
    # 0 where valid and 255 or 65535 elsewhere: unsigned subtraction wraps.
    void = np.ascontiguousarray(valid).reshape(-1).view(np.uint8)
    codes = np.empty(flat.shape, codec.dtype)
    encode = _encode_fine if bits == 16 else _encode_by_formula
    for start in range(0, flat.size, _BLOCK):
        p = flat[start : start + _BLOCK]
        out = codes[start : start + _BLOCK]
        if not (p.min() >= 0.0 and p.max() <= 1.0):  # also True for NaN
            p = _tidy_probabilities(p, void[start : start + _BLOCK] != 0, "p_true")
        encode(p, out, codec)
        out |= np.subtract(void[start : start + _BLOCK], 1, dtype=codec.dtype)
    return codes.reshape(p_true.shape)


def _encode_by_formula(p: Float32Array, out: CodeArray, codec: HardnessCodec) -> None:
    """Codes of probabilities in [0, 1].

    The closed form lands on the right code except next to an edge, by rounding in the formula
    (relative in x) and in the float32 edge itself (in proportion to 1/x). Those pixels, few unless
    p is next to 1 and the codes are fine, are compared with the edges.
    """
    ascending = _ascending_edges(codec.bits)
    tolerance = np.float32(4e-7 * codec.max_code)
    curvature = np.float32(1e-7 * codec.threshold_code**2)
    x = np.subtract(np.float32(1), p)
    np.sqrt(x, out=x)
    np.multiply(x, np.float32(1.0 / codec.scale), out=x)
    np.copyto(out, x, casting="unsafe")
    gap = np.rint(x)
    np.subtract(gap, x, out=gap)
    np.abs(gap, out=gap)
    np.subtract(gap, tolerance, out=gap)
    np.multiply(gap, x, out=gap)
    close = gap < curvature
    close &= x > np.float32(0.5)
    near = np.flatnonzero(close)
    if near.size:
        below = np.searchsorted(ascending, p[near], side="left")
        out[near] = ascending.size - below


def _encode_fine(p: Float32Array, out: CodeArray, codec: HardnessCodec) -> None:
    """Codes of probabilities in [0, 1], by a table where p is next to 1, as most pixels are.

    There 1 - p is exactly a whole number of steps of 2**-24, and the formula would leave many
    pixels to be compared with the edges.
    """
    table = _codes_near_one(codec.bits)
    steps = np.subtract(np.float32(1), p)
    np.multiply(steps, np.float32(2**24), out=steps)
    np.minimum(steps, np.float32(table.size), out=steps)
    index = steps.astype(np.intp)
    np.take(table, index, out=out, mode="clip")
    rest = np.flatnonzero(index == table.size)
    if rest.size:
        codes = np.empty(rest.size, codec.dtype)
        _encode_by_formula(p[rest], codes, codec)
        out[rest] = codes


@cache
def _codes_near_one(bits: int) -> CodeArray:
    """Codes of 1 - n * 2**-24 for n = 0, 1, ...; small enough for the second-level cache."""
    codec = hardness_codec(bits)
    p = (1.0 - np.arange(_NEAR_ONE) * 2.0**-24).astype(np.float32)
    ascending = _ascending_edges(bits)
    below = np.searchsorted(ascending, p, side="left")
    codes = np.empty(_NEAR_ONE, codec.dtype)
    codes[...] = ascending.size - below
    codes.flags.writeable = False
    return codes


@cache
def _true_prob_table(bits: int) -> Float32Array:
    codec = hardness_codec(bits)
    table = np.full(2**bits, np.nan, np.float32)
    table[0] = 1.0
    table[1 : codec.max_code + 1] = _edges(bits)
    table[codec.ignored] = 1.0
    table.flags.writeable = False
    return table


def true_prob_table(bits: int = 8) -> Float32Array:
    """Lookup table from hardness code to true-class probability: ``table[codes]``.

    Returns:
        Read-only float32 array (256,) or (65536,). Each code decodes to its upper edge, so that
        ``table[codes] <= 0.7`` selects exactly the pixels with ``p <= 0.7``; code 0 and ignored
        pixels decode to 1, the unwritten and the unused codes to NaN.
    """
    return _true_prob_table(bits)


@cache
def _hardness_table(bits: int) -> Float32Array:
    codec = hardness_codec(bits)
    table = np.full(2**bits, np.nan, np.float32)
    table[: codec.max_code + 1] = np.arange(codec.max_code + 1) * codec.scale
    table.flags.writeable = False
    return table


def hardness_table(bits: int = 8) -> Float32Array:
    """Lookup table from hardness code to ``sqrt(1 - p_true)``: ``table[codes]``.

    Returns:
        Read-only float32 array (256,) or (65536,), NaN at the ignored, unwritten and unused codes.
    """
    return _hardness_table(bits)


def encode_confidence(confidence: Float32Array) -> npt.NDArray[np.uint8]:
    """Linear codes ``round(254 * c)`` of the probability of the predicted class.

    Args:
        confidence: float32, any shape, in [0, 1]; rounding errors of 1e-5 beyond are clipped.

    Returns:
        uint8 codes 0..254 of the same shape; the decoded value is within 0.00197 (half a step).

    Raises:
        ShardDataError: Wrong dtype, NaN, or values outside [0, 1].
    """
    _expect(confidence, np.float32, "confidence")
    if confidence.size and not (confidence.min() >= 0.0 and confidence.max() <= 1.0):
        confidence = _tidy_probabilities(confidence, np.True_, "confidence")
    scaled = confidence * np.float32(_CONFIDENCE_STEPS)
    np.rint(scaled, out=scaled)
    return scaled.astype(np.uint8)


@cache
def confidence_table() -> Float32Array:
    """Lookup table from confidence code to probability: read-only float32 (256,), NaN at 255."""
    table = np.full(256, np.nan, np.float32)
    table[: _CONFIDENCE_STEPS + 1] = np.arange(_CONFIDENCE_STEPS + 1) / _CONFIDENCE_STEPS
    table.flags.writeable = False
    return table


def encode_discrepancy(discrepancy: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    """Prediction discrepancy (a Kullback-Leibler divergence in nats) as float16.

    Args:
        discrepancy: float32 or float16, any shape, >= 0; rounding errors down to -1e-3 become 0.

    Returns:
        float16 of the same shape, at most 65504; ``exp(-d)`` is within 2e-4 of the exact value.

    Raises:
        ShardDataError: Wrong dtype, NaN, infinite or negative values.
    """
    _expect_float(discrepancy, "discrepancy")
    if discrepancy.size:
        low, high = float(discrepancy.min()), float(discrepancy.max())
        if not (low >= -1e-3 and math.isfinite(high)):
            raise ShardDataError(
                f"discrepancy: expected finite values >= 0, got {_extent(discrepancy)}; "
                "a Kullback-Leibler divergence is never negative: check the teacher's logits"
            )
    clipped: npt.NDArray[np.floating] = np.clip(discrepancy, 0.0, _FLOAT16_MAX)
    return clipped.astype(np.float16)


def encode_logits(logits_Chw: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    """Logits shifted so that the largest over the classes is 0, as float16.

    The shift changes no softmax and moves the values that matter to where float16 is finest.

    Args:
        logits_Chw: float32 or float16 (C, h, w), finite.

    Returns:
        float16 (C, h, w), at most 0 and at least -65504, exactly 0 at each maximum; the relative
        error of a centred value is at most 2**-11 (absolute 2**-25 below 2**-14).

    Raises:
        ShardDataError: Wrong dtype or number of dimensions, NaN or infinite values.
    """
    _expect_float(logits_Chw, "logits")
    if logits_Chw.ndim != 3:
        raise ShardDataError(f"logits: expected (C, h, w), got shape {logits_Chw.shape}")
    logits = logits_Chw.astype(np.float32, copy=False)
    top_hw = logits.max(axis=0)
    if not (np.isfinite(top_hw).all() and np.isfinite(logits.min(initial=0.0))):
        raise ShardDataError(f"logits: expected finite values, got {_extent(logits)}")
    with np.errstate(over="ignore"):  # a difference beyond float32 is clipped below as well
        centred: Float32Array = logits - top_hw
    np.maximum(centred, np.float32(-_FLOAT16_MAX), out=centred)
    return centred.astype(np.float16)


def _expect(array: npt.NDArray[np.generic], dtype: type[np.generic], name: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
        raise ShardDataError(f"{name}: expected a {np.dtype(dtype)} array, got {_kind(array)}")


def _expect_float(array: npt.NDArray[np.floating], name: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
        raise ShardDataError(f"{name}: expected a float32 or float16 array, got {_kind(array)}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__


def _tidy_probabilities(
    p: Float32Array, valid: BoolArray | np.bool_, name: str
) -> npt.NDArray[np.float32]:
    """Clip what rounding left outside [0, 1]; refuse what rounding cannot explain."""
    inside = (p >= -_RANGE_SLACK) & (p <= 1.0 + _RANGE_SLACK)
    if not np.all(inside | ~valid):
        bad = p[~inside & valid]
        raise ShardDataError(
            f"{name}: expected probabilities in [0, 1], got {_extent(bad)}; take the softmax in "
            "float32 and check the teacher's logits"
        )
    return np.clip(np.where(inside, p, np.float32(1)), np.float32(0), np.float32(1))


def _extent(values: npt.NDArray[np.floating]) -> str:
    """Readable range of an array, without printing the array."""
    bad = int(np.count_nonzero(~np.isfinite(values)))
    finite = values[np.isfinite(values)]
    text = f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "no finite value"
    return f"{text}, {bad} NaN or infinite" if bad else text
