"""What a flow run shows on its page in Prefect: a summary with pictures, and where the report is.

An artifact that cannot be recorded is a line in the log, never the end of a run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import RunConfig
from rdd_pipeline.errors import DataError
from rdd_pipeline.files import readable_bytes
from rdd_pipeline.inspection import Maps
from rdd_pipeline.report.store_section import HardImage, hardest_images
from rdd_pipeline.run_images import open_split

logger = logging.getLogger("rdd.flows")

_PICTURES = 4
_SIDE = 224  # pixels; some 15 kB of text a picture


def show_maps(config: RunConfig, maps: BuildResult) -> None:
    """Record the summary of a build: what was done, what it takes, and the hardest images."""

    def summary() -> None:
        create_markdown_artifact(
            maps_summary(config, maps), key=_key("maps", config.name), description=maps.path
        )

    _try("summary", summary)


def show_report(report: Path) -> None:
    """Record where the report of a run is."""
    _try(
        "link to the report",
        lambda: create_link_artifact(
            report.absolute().as_uri(),
            link_text=str(report.absolute()),
            key=_key("report", report.parent.name),
            description="The run's report, a file of the machine that ran it.",
        ),
    )


def show_students(name: str, text: str) -> None:
    """Record a comparison of students, in Markdown."""
    _try(
        "comparison",
        lambda: create_markdown_artifact(text, key=_key("students", name), description=name),
    )


def maps_summary(config: RunConfig, maps: BuildResult) -> str:
    """A build in Markdown.

    Args:
        config: The run.
        maps: What the build did.
    """
    rate = maps.images_built / maps.seconds if maps.images_built else 0.0
    built = f"{maps.images_built} built in {maps.seconds:.1f} s"
    each = readable_bytes(maps.bytes_per_image)
    rows = [
        ("store", f"`{maps.path}`"),
        ("version", str(maps.version)),
        ("images", f"{maps.images}, {built if maps.images_built else 'none built'}"),
        *([("speed", f"{rate:.2f} images/s")] if maps.images_built else []),
        ("on disk", f"{readable_bytes(maps.bytes_on_disk)}, {each} an image"),
    ]
    lines = ["| map store | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    try:
        dataset = open_split(config.data, "train")
    except DataError:
        dataset = None
    hardest = hardest_images(Maps(maps.path, dataset), count=_PICTURES, side=_SIDE)
    return "\n".join([*lines, "", *_pictures(hardest)]) + "\n"


def _pictures(images: Sequence[HardImage]) -> list[str]:
    lines = [
        "## Hardest images",
        "",
        "Hardness is sqrt(1 - p) of the true class under the teacher; yellow is hard.",
        "",
        "| image | mean hardness | teacher's accuracy | | |",
        "|---|---|---|---|---|",
    ]
    for image in images:
        shown = [panel for panel in image.panels if panel.title in ("image", "hardness")]
        pictures = [f"![{panel.title}]({panel.uri})" for panel in shown]
        cells = [
            image.image_id.replace("|", "\\|"),
            f"{image.figures.mean:.3f}",
            f"{1.0 - image.figures.error:.1%}",
            *([""] * (2 - len(pictures))),
            *pictures,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _key(*parts: str) -> str:
    """Prefect's keys are made of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _try(what: str, record: Callable[[], Any]) -> None:
    try:
        record()
    except Exception as error:
        logger.warning("the %s could not be recorded: %s", what, error)
        logger.debug("recording the %s failed", what, exc_info=error)
