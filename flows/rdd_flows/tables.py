"""The tables that ``rdd run`` and ``rdd students`` end with."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from rdd_flows.console import out
from rdd_pipeline.files import readable_bytes


def print_results(results: dict[str, Any]) -> None:
    """Print the table of a run: mIoU, seconds and images/s of each student, store size."""
    table = Table(
        "network", "method", "mIoU", "train s", "images/s", "step ms", "data wait", box=None
    )
    teacher = results["teacher"]
    table.add_row("teacher", "reused" if teacher["reused"] else "", *_figures(teacher))
    for student in results["students"]:
        method = student["label"] + (" (reused)" if student["reused"] else "")
        table.add_row(student["name"], method, *_figures(student))
    out.print(table)
    maps = results["maps"]
    added = maps["soft_labels_added"]
    labels = f", soft labels added to {added}" if added else ""
    out.print(
        f"maps: {maps['images']} images, {readable_bytes(maps['bytes_per_image'])} an image, "
        f"{maps['images_built']} built{labels} in {maps['seconds']:.1f} s"
    )
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    out.print(f"stages: {stages}; peak memory {readable_bytes(results['peak_memory_bytes'])}")


def print_comparison(tree: dict[str, Any]) -> None:
    """Print the students of a run by method: means over seeds, and differences to the baseline."""
    from rdd_pipeline.comparison import notes, table

    header, rows = table(tree)
    shown = Table(*header, box=None)
    for column in shown.columns:
        column.justify = "left" if column.header in ("network", "method") else "right"
    for row in rows:
        shown.add_row(*map(escape, row))
    out.print(shown)
    for note in notes(tree):
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def _figures(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['metrics']['miou']:.4f}",
        *(
            f"{result[key]:{form}}" if key in result else "-"
            for key, form in (
                ("seconds", ".1f"),
                ("images_per_second", ".1f"),
                ("step_ms", ".0f"),
                ("data_wait_share", ".1%"),
            )
        ),
    ]
