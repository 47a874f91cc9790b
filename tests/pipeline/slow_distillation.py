"""The distillation losses once more: loops over numpy in float64, one number at a time.

Written from the equations, for tiny inputs; nothing is shared with the implementation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def mean(values: Iterable[float]) -> float:
    """0 where there are none."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(teacher: Sequence[float], student: Sequence[float]) -> float:
    return sum(
        p * (math.log(p) - math.log(q)) for p, q in zip(teacher, student, strict=True) if p > 0
    )


def normalised(values: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in values))
    return [value / length if length > 0 else 0.0 for value in values]


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    mean_1, mean_2 = mean(first), mean(second)
    covariance = mean((a - mean_1) * (b - mean_2) for a, b in zip(first, second, strict=True))
    variance_1 = mean((a - mean_1) ** 2 for a in first)
    variance_2 = mean((b - mean_2) ** 2 for b in second)
    # Constant but for rounding.
    if variance_1 < 1e-28 * mean_1**2 or variance_2 < 1e-28 * mean_2**2:
        return 0.0
    return covariance / math.sqrt(variance_1) / math.sqrt(variance_2)


def positions(valid: Mask) -> list[tuple[int, int]]:
    return [(i, j) for i, j in np.ndindex(valid.shape) if valid[i, j]]


def everywhere(maps: Array) -> Mask:
    return np.ones((maps.shape[0], *maps.shape[2:]), dtype=bool)


def centre(logits: Array) -> Array:
    result = logits.copy()
    for b, i, j in np.ndindex(logits.shape[0], *logits.shape[2:]):
        result[b, :, i, j] -= mean(logits[b, :, i, j].tolist())
    return result


def cwd(student: Array, teacher: Array, temperature: float, valid: Mask) -> float:
    images = []
    for b in range(len(student)):
        places = positions(valid[b])
        if not places:
            continue
        channels = []
        for c in range(student.shape[1]):
            p, q = (
                softmax([maps[b, c, i, j] / temperature for i, j in places])
                for maps in (teacher, student)
            )
            channels.append(divergence(p, q))
        images.append(mean(channels))
    return temperature**2 * mean(images)


def dist(
    student: Array,
    teacher: Array,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    valid: Mask,
) -> float:
    places = [(b, i, j) for b in range(len(student)) for i, j in positions(valid[b])]
    if not places:
        return 0.0
    probs_student, probs_teacher = (
        [softmax((maps[b, :, i, j] / temperature).tolist()) for b, i, j in places]
        for maps in (student, teacher)
    )
    inter = mean(1 - pearson(p, q) for p, q in zip(probs_student, probs_teacher, strict=True))
    intra = mean(
        1 - pearson([p[c] for p in probs_student], [q[c] for q in probs_teacher])
        for c in range(student.shape[1])
    )
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def nodes(image: Array, patch: int, valid: Mask) -> list[list[float]]:
    """Averages over patches (nodes, channels), in reading order; none without a position."""
    found = []
    height, width = image.shape[1:]
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            places = [
                (i, j)
                for i in range(top, min(top + patch, height))
                for j in range(left, min(left + patch, width))
                if valid[i, j]
            ]
            if places:
                found.append([mean(channel[i, j] for i, j in places) for channel in image])
    return found


def csd(student: Array, teacher: Array, temperature: float, patch: int, valid: Mask) -> float:
    images = []
    for b in range(len(student)):
        if not valid[b].any():
            continue
        relations = []
        for maps in (student, teacher):
            pooled = nodes(maps[b], patch, valid[b])
            classes = range(maps.shape[1])
            rows = [softmax([node[c] / temperature for node in pooled]) for c in classes]
            relations.append([dot(rows[c], rows[d]) for c in classes for d in classes])
        images.append(mean((a - b) ** 2 for a, b in zip(*relations, strict=True)))
    return mean(images)


def pairwise(student: Array, teacher: Array, patch: int, valid: Mask) -> float:
    images = []
    for b in range(len(student)):
        if not valid[b].any():
            continue
        nodes_student, nodes_teacher = (
            [normalised(node) for node in nodes(maps[b], patch, valid[b])]
            for maps in (student, teacher)
        )
        images.append(
            mean(
                (dot(nodes_student[i], nodes_student[j]) - dot(nodes_teacher[i], nodes_teacher[j]))
                ** 2
                for i in range(len(nodes_student))
                for j in range(len(nodes_student))
            )
        )
    return mean(images)


def resized(image: Array, grid: tuple[int, int]) -> Array:
    """Bilinear with the corners aligned."""
    result = np.zeros(grid)
    height, width = image.shape
    for i, j in np.ndindex(grid):
        y = i * (height - 1) / (grid[0] - 1) if grid[0] > 1 else 0.0
        x = j * (width - 1) / (grid[1] - 1) if grid[1] > 1 else 0.0
        top, left = min(int(y), height - 1), min(int(x), width - 1)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        down, across = y - top, x - left
        result[i, j] = (
            image[top, left] * (1 - down) * (1 - across)
            + image[top, right] * (1 - down) * across
            + image[bottom, left] * down * (1 - across)
            + image[bottom, right] * down * across
        )
    return result


def attention_map(image: Array, grid: tuple[int, int]) -> list[float]:
    energy = np.zeros(image.shape[1:])
    for channel in image:
        energy += channel**2
    return normalised(resized(energy, grid).ravel().tolist())


def attention(student: Array, teacher: Array) -> float:
    grid = student.shape[2:]
    return mean(
        (a - b) ** 2
        for image_student, image_teacher in zip(student, teacher, strict=True)
        for a, b in zip(
            attention_map(image_student, grid), attention_map(image_teacher, grid), strict=True
        )
    )


def psd(students: Sequence[Array], teachers: Sequence[Array]) -> float:
    grid = students[0].shape[2:]
    squares = []
    for b in range(len(students[0])):
        for i, j in itertools.combinations(range(len(students)), 2):
            residuals = []
            for layers in (students, teachers):
                first = attention_map(layers[i][b], grid)
                second = attention_map(layers[j][b], grid)
                residuals.append(normalised([q - p for p, q in zip(first, second, strict=True)]))
            squares += [(a - b) ** 2 for a, b in zip(*residuals, strict=True)]
    return mean(squares)


def label_at(target: NDArray[np.integer], b: int, i: int, j: int, grid: tuple[int, int]) -> int:
    row = math.floor((i + 0.5) * target.shape[1] / grid[0])
    column = math.floor((j + 0.5) * target.shape[2] / grid[1])
    return int(target[b, row, column])


def ifvd(
    student: Array, teacher: Array, target: NDArray[np.integer], classes: int, ignored: int
) -> float:
    grid = student.shape[2:]
    squares = []
    for b in range(len(student)):
        for c in range(classes):
            members = [
                (i, j)
                for i, j in np.ndindex(grid)
                if c != ignored and label_at(target, b, i, j, grid) == c
            ]
            variations = []
            for maps in (student, teacher):
                features = [maps[b, :, i, j].tolist() for i, j in members]
                middle = [mean(channel) for channel in zip(*features, strict=True)]
                variations.append(
                    [dot(normalised(feature), normalised(middle)) for feature in features]
                )
            squares += [(s - t) ** 2 for s, t in zip(*variations, strict=True)]
    return mean(squares)


def cirkd_minibatch(student: Array, teacher: Array, temperature: float, patch: int) -> float:
    all_valid = everywhere(student)
    student_nodes, teacher_nodes = (
        [
            [normalised(node) for node in nodes(image, patch, valid)]
            for image, valid in zip(maps, all_valid, strict=True)
        ]
        for maps in (student, teacher)
    )
    rows = []
    for i, j in itertools.product(range(len(student)), repeat=2):
        for n in range(len(student_nodes[i])):
            p, q = (
                softmax([dot(found[i][n], other) / temperature for other in found[j]])
                for found in (teacher_nodes, student_nodes)
            )
            rows.append(divergence(p, q))
    return mean(rows)


def cirkd_memory(
    student: Array, teacher: Array, contrast: Array, temperature: float, kd_temperature: float
) -> float:
    remembered = [normalised(row) for row in contrast.tolist()]
    rows = []
    for own, other in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (
            softmax(
                [
                    dot(normalised(anchor), embedding) / temperature / kd_temperature
                    for embedding in remembered
                ]
            )
            for anchor in (other, own)
        )
        rows.append(divergence(p, q))
    return kd_temperature**2 * mean(rows)
