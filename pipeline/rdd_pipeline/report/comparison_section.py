"""The report's section that compares methods over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rdd_pipeline.comparison import COMPARISON_FILE, notes, table
from rdd_pipeline.files import read_json
from rdd_pipeline.report.curves import Chart, Interval, interval_chart

_TEXT = frozenset({"network", "method"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonSection:
    """The table of a run's students over their seeds."""

    header: tuple[tuple[str, bool], ...]
    """Names of the columns, and whether they hold text."""
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    one_seed: bool
    """Whether no method has a second seed, and so nothing an interval."""
    chart: Chart | None
    """Differences to the baseline; None where there are none."""


def comparison_section(run_dir: Path) -> ComparisonSection | None:
    """The comparison that is in a run's folder; None if there is none."""
    path = run_dir / COMPARISON_FILE
    if not path.exists():
        return None
    tree = read_json(path)
    several = len({row["network"] for row in tree["methods"]}) > 1
    intervals = [
        Interval(
            label=f"{row['network']}: {row['method']}" if several else row["method"],
            mean=row["difference"]["mean"],
            low=row["difference"]["low"],
            high=row["difference"]["high"],
        )
        for row in tree["methods"]
        if row["difference"] is not None
    ]
    title = f"mIoU over {tree['baseline']}, mean and 95% interval"
    header, rows = table(tree)
    return ComparisonSection(
        header=tuple((name, name in _TEXT) for name in header),
        rows=rows,
        notes=notes(tree),
        one_seed=all(len(row["seeds"]) < 2 for row in tree["methods"]),
        chart=interval_chart(title, intervals, key="comparison") if intervals else None,
    )
