"""What notebooks show: short tables with a few small pictures, that need no network."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rdd_pipeline.files import readable_bytes
from rdd_pipeline.inspection.measures import MEASURES
from rdd_pipeline.inspection.pictures import png_uri, scale_picture, shrunk
from rdd_pipeline.inspection.quality import SCORE_NAMES
from rdd_storage import RddError

if TYPE_CHECKING:
    from rdd_pipeline.inspection.assessment import QualityReport
    from rdd_pipeline.inspection.comparison import StoreComparison
    from rdd_pipeline.inspection.maps import Maps
    from rdd_pipeline.inspection.ranking import Ranking

THUMBNAILS = 4
"""Pictures in a representation."""

_LONGEST_SIDE = 160  # pixels of a thumbnail
_MOST_SORTED = 2000  # images whose counts are read for the sake of a representation alone
_MOST_LISTED = 20_000  # images of a store whose objects are listed for the sake of its bytes
_MOST_ROWS = 50


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rdd_pipeline.inspection", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(block: str, **values: Any) -> str:
    return _environment().get_template("tables.html.jinja").render(block=block, **values)


def maps_html(maps: Maps) -> str:
    """What a store is, how many images, whose teacher, how many bytes, and the first pictures."""
    reader = maps.reader
    schema, identity = reader.schema, reader.identity
    listed = len(maps) <= _MOST_LISTED or "status" in maps.__dict__
    rows = [
        ("store", maps.path),
        ("images", _images(maps)),
        ("sizes", f"up to {schema.height} x {schema.width} pixels, grid {schema.grid_height} x "
                  f"{schema.grid_width}, hardness in {schema.hardness_bits} bits"),
        ("classes", f"{schema.num_classes}: {_some(schema.class_names)}"),
        ("teacher", _teacher(identity)),
        ("discrepancy", schema.discrepancy),
        ("data", _data(maps)),
        ("fingerprint", reader.fingerprint[:12]),
    ]  # fmt: skip
    arrays = []
    if listed:
        status = maps.status
        each = readable_bytes(status.bytes_per_image)
        rows.append(("bytes", f"{readable_bytes(status.bytes_on_disk)}, {each} an image"))
        arrays = [(name, readable_bytes(size)) for name, size in status.arrays.items() if size]
    else:
        rows.append(("bytes", "many objects: maps.status counts them"))
        arrays = [(name, "") for name in reader.arrays]
    return _render("maps", rows=rows, arrays=arrays, **_first_pictures(maps))


def ranking_html(ranking: Ranking) -> str:
    """The list, with pictures of its first images."""
    return _render(
        "ranking",
        title=ranking.title,
        by=ranking.by,
        measures=MEASURES,
        images=ranking.images[:_MOST_ROWS],
        more=max(len(ranking) - _MOST_ROWS, 0),
        pictures=[] if ranking.maps is None else _pictures(ranking.maps, ranking.image_ids),
    )


def quality_html(report: QualityReport) -> str:
    """The table of scores and baselines."""
    return _render("quality", report=report, figures=SCORE_NAMES)


def comparison_html(comparison: StoreComparison) -> str:
    """The figures, and the images that changed most."""
    return _render("comparison", comparison=comparison, images=comparison.images[:20])


def _images(maps: Maps) -> str:
    if maps.reader.complete:
        return f"{len(maps)}, version {maps.reader.version}"
    return f"{maps.status.images_done} of {len(maps)} done; the store is not finished"


def _teacher(identity: dict[str, Any]) -> str:
    teacher = identity.get("teacher")
    if not isinstance(teacher, dict):
        return str(teacher or "not recorded")
    network = teacher.get("network")
    described = network
    if isinstance(network, dict):
        named = ("type", "architecture", "encoder", "name", "model", "factory")
        described = ", ".join(str(network[key]) for key in named if network.get(key))
    return f"{described or 'network'}, weights {str(teacher.get('weights', ''))[:12]}"


def _data(maps: Maps) -> str:
    dataset = maps.source.dataset
    recorded = maps.reader.identity.get("data")
    name = recorded.get("name", "") if isinstance(recorded, dict) else str(recorded or "")
    if dataset is not None:
        return f"{dataset.name} {dataset.split}, {len(dataset)} images"
    return f"{name or 'not recorded'}; open with data=... to see images and labels"


def _first_pictures(maps: Maps) -> dict[str, Any]:
    """The hardest images where they are known quickly, else the first."""
    try:
        if maps.reader.complete and (maps.summary_is_ready or len(maps) <= _MOST_SORTED):
            names = maps.hardest(THUMBNAILS).image_ids
            return {"title": "hardest images", "pictures": _pictures(maps, names)}
        return {"title": "first images", "pictures": _pictures(maps, maps.image_ids)}
    except RddError as error:  # a representation never fails for its pictures
        return {"title": f"no pictures: {error}", "pictures": []}


def _pictures(maps: Maps, names: tuple[str, ...]) -> list[dict[str, str]]:
    pictures: list[dict[str, str]] = []
    for name in names:
        if len(pictures) == THUMBNAILS:
            break
        if maps.reader.is_done(name):
            hardness = shrunk(maps[name].hardness, _LONGEST_SIDE)
            pictures.append({"name": name, "uri": png_uri(scale_picture(hardness))})
    return pictures


def _some(names: tuple[str, ...], most: int = 12) -> str:
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
