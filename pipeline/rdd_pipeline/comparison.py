"""Many students in one table: means over seeds, and paired differences to a baseline.

Students that differ in nothing but their seed are one method. Those of equal network and seed
start from equal weights and see equal crops, so methods are compared seed by seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit  # much quicker to import than scipy.stats

from rdd_pipeline.config import DEFAULT_BASELINE, RunConfig, StudentConfig

COMPARISON_FILE = "students.json"
MARKDOWN_FILE = "students.md"

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where a student belongs in a comparison."""

    network: str
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the training of one student ended."""

    student: str
    """Its name."""
    result: Mapping[str, Any] | None
    """Content of its ``result.json``; None if it failed."""
    error: str = ""
    """Why it failed."""
    reused: bool = False
    """Whether an earlier run had finished it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Mean of the differences in mIoU to the baseline, over the seeds that both have."""

    mean: float
    pairs: int
    low: float | None
    """Lower end of the 95% interval; None with fewer than two pairs."""
    high: float | None

    @property
    def conclusive(self) -> bool:
        """Whether there is an interval, and 0 is outside it."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow:
    """One method with one network; None where there is nothing to compute a figure from."""

    network: str
    method: str
    baseline: bool
    """Whether it is what the others with this network are compared with."""
    seeds: tuple[int, ...]
    """Seeds of the finished students."""
    miou: tuple[float, ...]
    """Their mIoU."""
    mean: float | None
    std: float | None
    """Sample standard deviation of the mIoU."""
    difference: Difference | None
    seconds: float | None
    """Mean training time."""
    step_ms: float | None
    """Mean of the students' median steps."""
    data_wait_share: float | None
    parameters: int | None
    failed: tuple[str, ...]
    """Names of the students that failed."""


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean difference of pairs with Student's t interval at 95%.

    Args:
        values: One value for each pair; at least one.
        baseline: As many, in the same order.
    """
    pairs = [a - b for a, b in zip(values, baseline, strict=True)]
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean=mean, pairs=len(pairs), low=None, high=None)
    point = float(stdtrit(len(pairs) - 1, 0.5 + CONFIDENCE / 2))
    half = point * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean=mean, pairs=len(pairs), low=mean - half, high=mean + half)


def members(config: RunConfig) -> dict[str, Member]:
    """Network, method and seed of each of a run's students, by the student's name.

    Students of a grid have the names used there. Others take the name of a student that differs
    from them in the seed alone; methods of equal labels and different settings are told apart.
    """
    grid = {} if config.grid is None else {g.student.name: g for g in config.grid.students()}
    networks = _Labels()
    methods = _Labels()
    # The grid's names first, so that equal students listed beside it take them too.
    for student in sorted(config.students, key=lambda student: student.name not in grid):
        place = grid.get(student.name)
        network = config.student_network(student).model_dump(mode="json")
        label = place.network if place is not None else None
        networks.add(network, label or network_label(network))
        methods.add(_method(config, student), place.method if place else method_label(student))
    return {
        student.name: Member(
            network=networks[config.student_network(student).model_dump(mode="json")],
            method=methods[_method(config, student)],
            seed=config.student_seed(student),
        )
        for student in config.students
    }


def compare(
    outcomes: Iterable[Outcome], places: Mapping[str, Member], baseline: str | None
) -> tuple[MethodRow, ...]:
    """Gather students over their seeds and compare methods with the baseline.

    Args:
        outcomes: Finished and failed students. Of several with equal place the first counts.
        places: Where each belongs; see :func:`members`.
        baseline: Name of a method; None compares with nothing.

    Returns:
        The rows, by network, methods in the order in which they first occur.
    """
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    failed: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        place = places[outcome.student]
        group = groups.setdefault((place.network, place.method), {})
        if outcome.result is None:
            failed.setdefault((place.network, place.method), []).append(outcome.student)
        else:
            group.setdefault(place.seed, outcome.result)
    order = list(dict.fromkeys(network for network, _ in groups))
    return tuple(
        _row(
            network,
            method,
            results,
            None if baseline is None else groups.get((network, baseline), {}),
            is_baseline=method == baseline,
            failed=tuple(failed.get((network, method), ())),
        )
        for (network, method), results in sorted(
            groups.items(), key=lambda item: order.index(item[0][0])
        )
    )


def default_baseline(config: RunConfig) -> str | None:
    """The method that others are compared with, unless a grid says otherwise."""
    if config.grid is not None and config.grid.baseline is not None:
        return config.grid.baseline
    labels = {place.method for place in members(config).values()}
    return DEFAULT_BASELINE if DEFAULT_BASELINE in labels else None


def comparison_tree(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The comparison as JSON: what ``students.json`` holds besides when and where it was made."""
    places = members(config)
    baseline = default_baseline(config)
    return {
        "name": config.name,
        "baseline": baseline,
        "confidence": CONFIDENCE,
        "methods": [asdict(row) for row in compare(outcomes, places, baseline)],
        "students": [
            {
                "name": outcome.student,
                **asdict(places[outcome.student]),
                "miou": None if outcome.result is None else outcome.result["metrics"]["miou"],
                "error": outcome.error,
                "reused": outcome.reused,
            }
            for outcome in outcomes
        ],
    }


def table(tree: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and cells of a comparison, as terminal, markdown and report show them."""
    several = len({row["network"] for row in tree["methods"]}) > 1
    over = f"over {tree['baseline']} (95%)"
    header = ("network", "method", "seeds", "mIoU", over, "pairs", "train s", "step ms",
              "data wait", "parameters")  # fmt: skip
    keep = [
        number
        for number, name in enumerate(header)
        if (several or name != "network")
        and (tree["baseline"] is not None or name not in (over, "pairs"))
    ]
    rows = []
    for row in tree["methods"]:
        failed = f", {len(row['failed'])} failed" if row["failed"] else ""
        difference = row["difference"]
        cells = (
            row["network"],
            row["method"],
            f"{len(row['seeds'])}{failed}",
            _spread(row["mean"], row["std"]),
            "baseline" if row["baseline"] else difference_text(difference),
            "-" if difference is None else str(difference["pairs"]),
            _cell(row["seconds"], ".1f"),
            _cell(row["step_ms"], ".0f"),
            _cell(row["data_wait_share"], ".1%"),
            _cell(row["parameters"], ",d"),
        )
        rows.append(tuple(cells[number] for number in keep))
    return tuple(header[number] for number in keep), tuple(rows)


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """Such as ``+0.009 [-0.076, +0.094] contains 0``; without an interval where there is none."""
    if difference is None:
        return "-"
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return f"{difference['mean']:+.4f} [-]"
    note = " contains 0" if low <= 0.0 <= high else ""
    return f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}]{note}"


def notes(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the table has to know, one sentence each."""
    lines = ["mIoU: mean ± sample standard deviation over seeds."]
    differences = [row["difference"] for row in tree["methods"] if row["difference"] is not None]
    if tree["baseline"] is not None:
        lines.append(
            f"Differences to {tree['baseline']} are of mIoU, paired by seed, with Student's t "
            "interval at 95% for each method alone; one seed gives none."
        )
    unclear = [d for d in differences if d["low"] is None or d["low"] <= 0.0 <= d["high"]]
    if differences and unclear:
        lines.append(
            f"{len(unclear)} of {len(differences)} methods cannot be told from the baseline by "
            "these seeds: the interval contains 0, or there is none."
        )
    lines += [
        f"failed: {student['name']}: {student['error']}"
        for student in tree["students"]
        if student["error"]
    ]
    return tuple(lines)


def markdown(tree: Mapping[str, Any]) -> str:
    """The comparison as a page."""
    header, rows = table(tree)
    text = {"network", "method"}
    lines = [
        f"# Students of {tree['name']}",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if name in text else "---:" for name in header) + "|",
        *("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in notes(tree)),
    ]
    return "\n".join(lines) + "\n"


def method_label(student: StudentConfig) -> str:
    """The methods of a student in a few words."""
    online = student.teacher == "online" and student.needs_teacher
    return "+".join(student.method) + (", online" if online else "")


def network_label(network: Mapping[str, Any]) -> str:
    """What a network is, in the words of its type's configuration."""
    keys = ("architecture", "encoder", "model", "factory")
    return " ".join(str(network[key]) for key in keys if key in network)


class _Labels:
    """A label for each of different settings, no two the same."""

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}

    def add(self, settings: Mapping[str, Any], label: str) -> None:
        key = _key(settings)
        if key in self._labels:
            return
        taken, number, free = set(self._labels.values()), 1, label
        while free in taken:
            number += 1
            free = f"{label} #{number}"
        self._labels[key] = free

    def __getitem__(self, settings: Mapping[str, Any]) -> str:
        return self._labels[_key(settings)]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _method(config: RunConfig, student: StudentConfig) -> dict[str, Any]:
    """What makes a student's method: everything but its name, network and seed."""
    return student.model_dump(mode="json", exclude={"name", "network", "seed", "training"}) | {
        "training": config.student_training(student).model_dump(mode="json")
    }


def _row(
    network: str,
    method: str,
    results: Mapping[int, Mapping[str, Any]],
    baseline: Mapping[int, Mapping[str, Any]] | None,
    *,
    is_baseline: bool,
    failed: tuple[str, ...],
) -> MethodRow:
    seeds = sorted(results)
    miou = [results[seed]["metrics"]["miou"] for seed in seeds]
    common = [seed for seed in seeds if seed in baseline] if baseline and not is_baseline else []
    difference = None
    if baseline and common:
        difference = paired_difference(
            [results[seed]["metrics"]["miou"] for seed in common],
            [baseline[seed]["metrics"]["miou"] for seed in common],
        )

    def mean(key: str) -> float | None:
        return statistics.fmean(results[seed][key] for seed in seeds) if seeds else None

    return MethodRow(
        network=network,
        method=method,
        baseline=is_baseline,
        seeds=tuple(seeds),
        miou=tuple(miou),
        mean=statistics.fmean(miou) if miou else None,
        std=statistics.stdev(miou) if len(miou) > 1 else None,
        difference=difference,
        seconds=mean("seconds"),
        step_ms=mean("step_ms"),
        data_wait_share=mean("data_wait_share"),
        parameters=results[seeds[0]]["parameters"] if seeds else None,
        failed=failed,
    )


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def _cell(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)
