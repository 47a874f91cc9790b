"""Known label errors: regions of a label that are given another class, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

KINDS = ("relabelled", "blob", "missing")
"""A connected region of a class that got another one of the image; a random ellipse inside one
region that did; an object painted with the class around it."""

_TRIES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One region whose label was changed."""

    kind: str
    mask: NDArray[np.bool_]
    """(H, W)."""
    true_class: int
    given_class: int


def inject(
    label: NDArray[np.uint8],
    rng: np.random.Generator,
    *,
    count: int,
    kinds: Sequence[str] = KINDS,
    areas: tuple[float, float] = (0.001, 0.08),
) -> tuple[NDArray[np.uint8], list[Fault]]:
    """Change the class of some regions that do not touch each other.

    Args:
        label: Classes (H, W), 255 where ignored.
        rng: Decides everything.
        count: Regions, where there are as many to be found.
        kinds: Some of :data:`KINDS`, each as likely.
        areas: Least and most pixels of a region, as shares of the image.

    Returns:
        The changed label, and the regions.
    """
    changed = label.copy()
    taken = np.zeros(label.shape, bool)
    faults: list[Fault] = []
    low, high = (share * label.size for share in areas)
    for _ in range(_TRIES * count):
        if len(faults) == count:
            break
        kind = str(rng.choice(list(kinds)))
        mask = _ellipse(label, rng, low, high) if kind == "blob" else _component(label, rng)
        if mask is None or not low <= mask.sum() <= high or (mask & taken).any():
            continue
        true_class = int(label[mask][0])
        given = _surrounding(label, mask) if kind == "missing" else _other(label, rng, true_class)
        if given is None or given == true_class:
            continue
        changed[mask] = given
        taken |= ndimage.binary_dilation(mask, iterations=3)
        faults.append(Fault(kind=kind, mask=mask, true_class=true_class, given_class=given))
    return changed, faults


def _component(label: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.bool_] | None:
    present = [value for value in np.unique(label).tolist() if value != 255]
    if not present:
        return None
    # By class first: objects are rarer than their surroundings.
    regions, count = ndimage.label(label == rng.choice(present))
    mask: NDArray[np.bool_] = regions == rng.integers(1, count + 1)
    return mask


def _ellipse(
    label: NDArray[np.uint8], rng: np.random.Generator, low: float, high: float
) -> NDArray[np.bool_] | None:
    height, width = label.shape
    centre = rng.integers(height), rng.integers(width)
    if label[centre] == 255:
        return None
    area = np.exp(rng.uniform(np.log(low), np.log(high)))
    ratio = np.exp(rng.uniform(np.log(0.5), np.log(2.0)))
    a, b = np.sqrt(area * ratio / np.pi), np.sqrt(area / ratio / np.pi)
    y, x = np.ogrid[:height, :width]
    inside = ((y - centre[0]) / a) ** 2 + ((x - centre[1]) / b) ** 2 <= 1
    mask: NDArray[np.bool_] = inside & (label == label[centre])
    regions, _ = ndimage.label(mask)
    connected: NDArray[np.bool_] = regions == regions[centre]
    return connected


def _other(label: NDArray[np.uint8], rng: np.random.Generator, not_this: int) -> int | None:
    others = [v for v in np.unique(label).tolist() if v not in (not_this, 255)]
    return int(rng.choice(others)) if others else None


def _surrounding(label: NDArray[np.uint8], mask: NDArray[np.bool_]) -> int | None:
    ring = ndimage.binary_dilation(mask, iterations=3) & ~mask & (label != 255)
    return int(np.bincount(label[ring]).argmax()) if ring.any() else None
