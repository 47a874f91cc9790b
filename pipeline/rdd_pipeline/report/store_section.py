"""The report's section about the map store: what it takes, and its hardest images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rdd_pipeline.comparison import network_label
from rdd_pipeline.inspection import DataSource, EmptySelectionError, ImageView, Maps, RankedImage
from rdd_pipeline.report.panels import LONGEST_SIDE, Panel, PictureBook, image_panels
from rdd_storage import RddError, StoreStatus

HARDEST_IMAGES = 8
"""Images shown unless said otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayBytes:
    """Storage of one array, or of everything that is no map."""

    name: str
    bytes_per_image: float
    share: float
    """Of all bytes of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardImage:
    """One of the hardest images."""

    image_id: str
    figures: RankedImage
    """Its measures."""
    panels: tuple[Panel, ...]
    note: str
    """Why image and label are missing; empty when they are there, or there is no data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSection:
    """What the report says about the store; ``problem`` says why it can say nothing."""

    path: str
    """Relative to the run's folder where the store lies in it."""
    problem: str = ""
    fingerprint: str = ""
    format_version: int = 0
    version: int | None = None
    teacher: str = ""
    data: str = ""
    images: int = 0
    bytes_on_disk: int = 0
    bytes_per_image: float = 0.0
    arrays: tuple[ArrayBytes, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    """Empty when the store was built without colours."""


def store_section(maps: Maps, shown: str) -> StoreSection:
    """What a store is and takes.

    Args:
        maps: The store.
        shown: Its path, as the reader is to see it.
    """
    status, identity = maps.status, maps.reader.identity
    teacher = identity.get("teacher")
    network = teacher.get("network") if isinstance(teacher, dict) else None
    data = identity.get("data")
    dataset = maps.source.dataset
    coloured = bool(maps.reader.attributes.get("palette")) or bool(dataset and dataset.palette)
    return StoreSection(
        path=shown,
        fingerprint=status.fingerprint,
        format_version=status.format_version,
        version=maps.reader.version,
        teacher=network_label(network) if isinstance(network, dict) else "",
        data=f"{data.get('name', '')} {data.get('split', '')}" if isinstance(data, dict) else "",
        images=len(maps),
        bytes_on_disk=status.bytes_on_disk,
        bytes_per_image=status.bytes_per_image,
        arrays=_arrays(status, maps.reader.arrays),
        palette=tuple((r, g, b) for r, g, b in maps.palette.tolist()) if coloured else (),
    )


def open_maps(path: str | Path, data: DataSource | None) -> tuple[Maps, str]:
    """A store with its data set, or without it and the reason why.

    Raises:
        StoreError: The store itself cannot be read.
    """
    maps = Maps(path)
    try:
        return (maps if data is None else Maps(path, data)), ""
    except RddError as error:
        return maps, str(error)


def hardest_images(
    maps: Maps,
    *,
    count: int = HARDEST_IMAGES,
    book: PictureBook | None = None,
    side: int = LONGEST_SIDE,
) -> tuple[HardImage, ...]:
    """The hardest images of a store by the mean hardness of their labelled pixels.

    Args:
        maps: The store.
        count: Images, at most.
        book: Keeps the pictures small; None takes them as they are.
        side: Longest side of a picture, pixels, where there is no book.

    Raises:
        StoreIncompleteError: The store is not built to the end.
    """
    if count < 1:
        return ()
    book = PictureBook(count, side=side) if book is None else book
    try:
        ranking = maps.hardest(count)
    except EmptySelectionError:  # no image has a label
        return ()
    return tuple(_hard_image(maps[image.image_id], image, book) for image in ranking)


def _hard_image(view: ImageView, figures: RankedImage, book: PictureBook) -> HardImage:
    sample, note = shown_sample(view)

    def draw(side: int, quality: int) -> tuple[Panel, ...]:
        return image_panels(
            image=view.image if sample else None,
            label=view.label if sample else None,
            prediction=view.prediction,
            weight=view.weight,
            hardness=view.hardness,
            palette=view.palette,
            side=side,
            quality=quality,
        )

    return HardImage(image_id=view.image_id, figures=figures, panels=book.add(draw), note=note)


def shown_sample(view: ImageView) -> tuple[bool, str]:
    """Whether image and label can be shown, and else why not."""
    if view.problem:
        return False, view.problem
    try:
        _ = view.image
    except RddError as error:  # it cannot be decoded
        return False, str(error)
    return True, ""


def _arrays(status: StoreStatus, maps: Sequence[str]) -> tuple[ArrayBytes, ...]:
    sizes = {name: status.arrays[name] for name in (*maps, "statistics")}
    sizes["names, sizes and metadata"] = status.bytes_on_disk - sum(sizes.values())
    return tuple(
        ArrayBytes(
            name=name,
            bytes_per_image=size / max(status.images_done, 1),
            share=size / max(status.bytes_on_disk, 1),
        )
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )


def find_store(path: str, run_dir: Path) -> str:
    """A run's store; the run may have been moved, or be read from another folder."""
    moved = run_dir / "maps" / Path(path).name
    if "://" not in path and not Path(path).exists() and moved.exists():
        return str(moved)
    return path


def relative_path(path: str, run_dir: Path) -> str:
    """A path relative to the run's folder where it lies in it."""
    if "://" in path:
        return path
    try:
        return str(Path(path).resolve().relative_to(run_dir.resolve()))
    except ValueError:
        return path
