"""The tables of a fidelity measurement, and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rdd_pipeline.fidelity import (
    Comparison,
    Fidelity,
    FieldError,
    Figure,
    MaskDifference,
    Measurement,
)
from rdd_pipeline.files import write_atomically, write_json
from rdd_pipeline.machine import machine
from rdd_pipeline.report.fidelity_plots import fidelity_plot

_NONE = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureTable:
    """A table of text, for a terminal or for markdown."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def fidelity_tables(fidelity: Fidelity) -> tuple[FigureTable, ...]:
    """All figures; what the store does not hold has no row."""
    figures = fidelity.figures
    rows = _comparison_rows(figures.approximation)
    alone = _comparison_rows(figures.storage)
    tables = [
        FigureTable(
            title=f"Stored maps against the live teacher: {figures.crops} crops, "
            f"{figures.labelled_pixels:,} labelled pixels",
            header=("figure", "the approximation: teacher on the crop",
                    "storage alone: teacher on the whole image"),
            rows=tuple((name, text, alone[name]) for name, text in rows.items()),
        ),
        FigureTable(
            title="The approximation by scale of the augmentation",
            header=("scale", "crops", "weight, mean absolute error", "weight, correlation",
                    "hard mask, flipped", "hard mask, IoU",
                    *(("soft labels, KL (nats)", "soft labels, same class")
                      if figures.approximation.logits else ())),
            rows=tuple(
                (
                    f"{part.low:g} to {part.high:g}",
                    str(part.crops),
                    *(_text(figure, form) for figure, form in _key_figures(part.approximation)),
                )
                for part in figures.by_scale
            ),
        ),
    ]  # fmt: skip
    if figures.quality is not None:
        quality = figures.quality
        named = {"stored": quality.stored, "on the crop": quality.on_crop,
                 "whole image, not quantised": quality.whole}  # fmt: skip
        tables.append(
            FigureTable(
                title="Top class of the teacher's logits against the labels, at its output grid",
                header=("estimate", "accuracy", "mIoU"),
                rows=(
                    *(
                        (name, _text(each.accuracy, _share), f"{each.miou:.4f}")
                        for name, each in named.items()
                    ),
                    (
                        "stored − on the crop",
                        _text(quality.stored_minus_on_crop, _share),
                        f"{quality.stored.miou - quality.on_crop.miou:+.4f}",
                    ),
                ),
            )
        )
    return tuple(tables)


def fidelity_notes(fidelity: Fidelity) -> tuple[str, ...]:
    """What has to be known to read the tables, a sentence or two each."""
    settings = fidelity.settings
    height, width = settings.crop_size
    low, high = settings.scale
    return (
        f"Store {fidelity.fingerprint[:12]}, version {fidelity.store_version}, of "
        f"{fidelity.dataset}; weight exp(−D) with D = {settings.discrepancy}.",
        f"Crops as of student {settings.student}: {height}x{width} pixels, scale {low:g} to "
        f"{high:g}, flip {settings.flip:g}, batches of {settings.batch_size}, seed "
        f"{settings.seed}. Hard masks are those of a batch, with threshold "
        f"{settings.threshold:g} and min_kept {settings.min_kept:g} ({settings.rdd}).",
        "Labelled pixels alone count; errors are stored − live. In brackets: 95% interval, by "
        "bootstrap over the crops.",
    )


def fidelity_markdown(fidelity: Fidelity) -> str:
    """The tables and notes as markdown."""
    parts = []
    for table in fidelity_tables(fidelity):
        rule = "|" + "---|" * len(table.header)
        lines = ["| " + " | ".join(row) + " |"
                 for row in (table.header, *table.rows)]  # fmt: skip
        parts.append("\n".join([f"**{table.title}**", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join([*parts, *fidelity_notes(fidelity)]) + "\n"


def write_fidelity(measurement: Measurement, folder: Path) -> tuple[Path, Path, Path]:
    """Write ``fidelity.json``, ``fidelity.md`` and ``fidelity.png`` into a folder.

    Returns:
        Their paths.
    """
    fidelity = measurement.fidelity
    each = measurement.tally.crop_figures()
    crops = [
        {
            "image": image_id,
            "scale": scale,
            "weight_mean_absolute": _number(each.weight[k]),
            "flipped": _number(each.flipped[k]),
            "divergence": None if each.divergence is None else _number(each.divergence[k]),
        }
        for k, (image_id, scale) in enumerate(zip(fidelity.image_ids, fidelity.scales, strict=True))
    ]
    tree = dataclasses.asdict(fidelity)
    del tree["image_ids"], tree["scales"]
    paths = (folder / "fidelity.json", folder / "fidelity.md", folder / "fidelity.png")
    write_json(paths[0], tree | {"crops": crops, "machine": machine()})
    text = fidelity_markdown(fidelity)
    write_atomically(paths[1], lambda path: path.write_text(text, encoding="utf-8"))
    figure = fidelity_plot(measurement)
    write_atomically(paths[2], lambda path: figure.savefig(path, format="png", dpi=110))
    return paths


def _comparison_rows(comparison: Comparison) -> dict[str, str]:
    rows = _field_rows("weight W", comparison.weight)
    rows |= _probability_rows("", comparison.true_prob, comparison.hard_mask)
    if comparison.aux_true_prob is not None and comparison.aux_hard_mask is not None:
        rows |= _probability_rows(
            "auxiliary head: ", comparison.aux_true_prob, comparison.aux_hard_mask
        )
    if comparison.logits is not None:
        logits = comparison.logits
        rows |= {
            "soft labels, KL(live to stored), nats": _text(logits.divergence, _number_text),
            "soft labels, same class on top": _text(logits.agreement, _share),
            "soft labels, mean absolute error of probabilities": _text(
                logits.mean_absolute, _number_text
            ),
        }
    return rows


def _field_rows(name: str, error: FieldError) -> dict[str, str]:
    return {
        f"{name}, mean absolute error": _text(error.mean_absolute, _number_text),
        f"{name}, root mean square error": _text(error.root_mean_square, _number_text),
        f"{name}, 95th percentile of absolute error": _text(error.percentile_95, _number_text),
        f"{name}, bias": _text(error.bias, _number_text),
        f"{name}, correlation": _text(error.correlation, _unit_text),
    }


def _probability_rows(head: str, error: FieldError, mask: MaskDifference) -> dict[str, str]:
    name = f"{head}true-class probability"
    return {
        f"{name}, mean absolute error": _text(error.mean_absolute, _number_text),
        f"{name}, correlation": _text(error.correlation, _unit_text),
        f"{head}hard mask, flipped pixels": _text(mask.flipped, _share),
        f"{head}hard mask, hard pixels stored": _text(mask.hard_stored, _share),
        f"{head}hard mask, hard pixels live": _text(mask.hard_live, _share),
        f"{head}hard mask, IoU": _text(mask.iou, _unit_text),
    }


def _key_figures(comparison: Comparison) -> list[tuple[Figure, Callable[[float], str]]]:
    found: list[tuple[Figure, Callable[[float], str]]] = [
        (comparison.weight.mean_absolute, _number_text),
        (comparison.weight.correlation, _unit_text),
        (comparison.hard_mask.flipped, _share),
        (comparison.hard_mask.iou, _unit_text),
    ]
    if comparison.logits is not None:
        found += [(comparison.logits.divergence, _number_text),
                  (comparison.logits.agreement, _share)]  # fmt: skip
    return found


def _text(figure: Figure, form: Callable[[float], str]) -> str:
    if figure.value is None:
        return _NONE
    if figure.low is None or figure.high is None:
        return form(figure.value)
    return f"{form(figure.value)} ({form(figure.low)} to {form(figure.high)})"


def _number_text(value: float) -> str:
    return f"{value:.3g}"


def _unit_text(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.2f}%"


def _number(value: float) -> float | None:
    return float(value) if value == value else None  # NaN has no place in JSON
