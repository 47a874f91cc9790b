"""How far a store is built and what it takes on disk; and the stores below a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from rdd_storage.additions import added_specs, shards_without
from rdd_storage.errors import StoreError, StoreNotFoundError
from rdd_storage.identity import FORMAT_VERSION
from rdd_storage.layout import NEVER, all_specs, done_spec
from rdd_storage.lease import LeaseInfo, read_lease
from rdd_storage.location import Location, locate
from rdd_storage.manifest import read_draft, read_head, read_manifest
from rdd_storage.marks import read_done


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthStatus:
    """How far the next version of a store is built."""

    version: int
    images: int
    """All images of the next version."""
    images_done: int
    """Those that have their maps already, kept ones included."""
    adds: tuple[str, ...] = ()
    """Arrays that it adds to the images of the published version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatus:
    """State of one store."""

    path: str
    kind: str
    """``maps``, or ``pack`` for decoded images and labels."""
    fingerprint: str
    format_version: int
    version: int
    """The published version; 0 when none is."""
    versions: tuple[int, ...]
    """All versions that can be read, in rising order."""
    images: int
    """Images of the published version, or of the first while it is built."""
    images_done: int
    shards: int
    """Shards that hold these images."""
    shards_done: int
    complete: bool
    """Whether a version is published, that is, whether students may train from it."""
    bytes_on_disk: int
    """Sum of all objects of the store."""
    bytes_per_image: float
    """Map bytes for each image that is done; 0 when none is."""
    rows_retired: int
    """Images, or earlier states of images, that only earlier versions have."""
    growth: GrowthStatus | None
    """The version that is being built beside the published one; None where none is."""
    holder: LeaseInfo | None
    """Who is building the store at this moment; None when nobody is."""
    arrays: dict[str, int]
    """Bytes of each array of the published version; ``statistics`` together, arrays that are being
    added as ``unfinished``, the rest as ``metadata``."""
    identity: dict[str, Any]
    """What decided the content."""
    software: str
    """Name and version of the program that made the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedStore:
    """A store found below a folder; one that cannot be read has a problem and no status."""

    path: str
    status: StoreStatus | None
    problem: str
    """Why the status is missing; empty when it is there."""


def store_status(path: str | PathLike[str]) -> StoreStatus:
    """State of the store at a path or URL. Reads the marks and lists the objects.

    Raises:
        StoreNotFoundError: There is no map store.
        StoreFormatError: The store is of another format version, or damaged.
    """
    return _status(locate(path))


def list_stores(root: str | PathLike[str]) -> list[ListedStore]:
    """The map stores directly below a folder, in order of their names.

    Folders that hold no map store are left out; stores that cannot be read (of a newer version,
    damaged) are listed with the problem.
    """
    found = []
    for location in locate(root).children():
        try:
            status = _status(location)
        except StoreNotFoundError:
            continue
        except StoreError as error:
            found.append(ListedStore(path=location.url, status=None, problem=str(error)))
        else:
            found.append(ListedStore(path=location.url, status=status, problem=""))
    return found


def _status(location: Location) -> StoreStatus:
    head = read_head(location)
    manifest = read_manifest(head)
    draft = read_draft(head) if head.complete else None
    schema = head.schema
    num_rows = max(part.num_rows for part in (head, manifest, draft) if part is not None)
    done = read_done(location, done_spec(schema, num_rows))
    shard_of = [row // schema.shard_images for row in manifest.rows]
    shards = set(shard_of)
    undone = {shard for row, shard in zip(manifest.rows, shard_of, strict=True) if not done[row]}
    images_done = int(done[list(manifest.rows)].sum())
    adding = {} if draft is None else added_specs(head, draft)
    sizes = dict.fromkeys((*all_specs(schema, num_rows), *adding, "metadata"), 0)
    for key, size in location.list_sizes():
        name = key.partition("/c/")[0]
        sizes[name if name in sizes else "metadata"] += size
    arrays: dict[str, int] = {}
    for name, size in sizes.items():
        group = "statistics" if name.startswith("statistics/") else name
        group = "unfinished" if name in adding else group
        arrays[group] = arrays.get(group, 0) + size
    map_bytes = sum(arrays.values()) - arrays["metadata"] - arrays.get("unfinished", 0)
    lease = read_lease(location)
    growth = None
    if draft is not None:
        growth = GrowthStatus(
            version=draft.version,
            images=len(draft.entries),
            images_done=int(done[list(draft.rows)].sum()),
        )
        if adding:
            by_shard = draft.by_shard(schema.shard_images)
            pending = shards_without(location, list(adding.values()), by_shard)
            left = sum(len(by_shard[shard]) for shard in pending)
            growth = replace(growth, images_done=growth.images - left, adds=draft.adds)
    return StoreStatus(
        path=location.url,
        kind=schema.kind,
        fingerprint=head.fingerprint,
        format_version=FORMAT_VERSION,
        version=head.version,
        versions=tuple(sorted(head.versions)),
        images=len(manifest.entries),
        images_done=images_done,
        shards=len(shards),
        shards_done=len(shards) - len(undone),
        complete=head.complete,
        bytes_on_disk=sum(sizes.values()),
        bytes_per_image=map_bytes / images_done if images_done else 0.0,
        rows_retired=sum(entry.last_version != NEVER for entry in manifest.living(head.versions)),
        growth=growth,
        holder=lease if lease is not None and lease.in_force else None,
        arrays=arrays,
        identity=head.identity,
        software=head.software,
    )
