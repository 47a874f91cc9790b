"""Methods over seeds: mean and standard deviation of a run's students, paired with supervision.

    python bench/methods.py runs/camvid-methods/results.json

Students are grouped by method; seeds pair each student with the supervised one of equal seed,
which starts from the same weights and sees the same crops. Intervals are Student's t over the
seeds' differences: with three seeds they are wide, and rightly so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

# Two-sided 95% points of Student's t by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _difference(students: dict[int, Any], baseline: dict[int, Any]) -> str:
    seeds = sorted(students.keys() & baseline.keys())
    pairs = [students[s]["metrics"]["miou"] - baseline[s]["metrics"]["miou"] for s in seeds]
    if len(pairs) < 2 or len(pairs) - 1 not in _T95:
        return ""
    half = _T95[len(pairs) - 1] * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.mean(pairs):+.3f} ± {half:.3f}"


def main() -> None:
    """Print the table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results = json.loads(parser.parse_args().results.read_text())
    groups: dict[str, dict[int, Any]] = defaultdict(dict)
    for student in results["students"]:
        groups[student["label"]][student["settings"]["seed"]] = student
    baseline = groups.get("supervised", {})
    print(f"teacher: mIoU {results['teacher']['metrics']['miou']:.3f}\n")
    print("| method | seeds | mIoU | over supervised (95%) | pixel accuracy | step, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for label, students in groups.items():
        rows = list(students.values())
        miou = _spread([row["metrics"]["miou"] for row in rows])
        accuracy = _spread([row["metrics"]["pixel_accuracy"] for row in rows])
        step = statistics.median(row["step_ms"] for row in rows)
        difference = "" if label == "supervised" else _difference(students, baseline)
        print(f"| {label} | {len(rows)} | {miou} | {difference} | {accuracy} | {step:.0f} |")


if __name__ == "__main__":
    main()
