"""Making a damaged store whole again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

from rdd_storage.lease import hold_lease
from rdd_storage.location import locate
from rdd_storage.manifest import read_head, read_manifest
from rdd_storage.remove import remove_unused
from rdd_storage.restoring import RestorableVersion
from rdd_storage.schema import Schema
from rdd_storage.verify import Damage, VerifyReport, verify_store


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """Result of :func:`repair_store`."""

    path: str
    version: int
    """The published version; 0 for an unfinished store."""
    damages: tuple[Damage, ...]
    """Everything that was found wrong."""
    restored: tuple[str, ...]
    """Keys of what was written anew: metadata and coordinates from the manifest, summaries from
    the counts."""
    reopened: tuple[int, ...]
    """Shards that are pending now: build the maps, or pack the data, again to have them made
    anew."""
    lost: tuple[int, ...]
    """Damaged shards that hold images of earlier versions alone, which no build can make again;
    remove these versions."""
    bytes_freed: int
    """Of shards and manifests that no version needs."""


def repair_store(
    path: str | PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    wait: float = 0.0,
) -> RepairReport:
    """Verify a store, restore what follows from the rest of it, and reopen its damaged shards.

    A published store stays published: its undamaged images are read as before. The teacher then
    builds the reopened shards as it builds those of a new store, or ``rdd data pack`` decodes their
    images; nothing else is written again. Images of damaged shards that only earlier versions have
    keep what can be read of them. No build can begin while the store is read and repaired; a repair
    that is killed leaves the rest to the next one.

    Args:
        path: Path or URL of the store.
        progress: Called with the number of objects read and their total.
        wait: Seconds to wait for a build of the store to end.

    Raises:
        StoreNotFoundError: There is no map store.
        StoreFormatError: The root or the manifest is damaged, so that nothing can be repaired.
        StoreLockedError: A build of the store is under way.
        LeaseLostError: This process stood still for so long that a build took the store over.
        StoreWriteError: The store cannot be changed.
    """
    location = locate(path)
    read_head(location)  # no lease is left where there is no store
    # Before the store is read: a build must not change meanwhile what the repair goes by.
    with hold_lease(location, wait=wait) as lease:
        report = verify_store(path, progress)
        location.remove_partial_writes()
        head = read_head(location)
        opened = RestorableVersion[Schema](head, read_manifest(head), lease.ticket)
        restored = opened.restore_metadata()
        bad = report.bad_shards
        reopened = tuple(shard for shard in bad if opened.shard_records(shard))
        opened.reopen_shards(reopened)
        restored += opened.restore_summaries(_damaged_summaries(report))
        freed = remove_unused(read_head(location)) if head.complete else 0
    return RepairReport(
        path=report.path,
        version=report.version,
        damages=report.damages,
        restored=restored,
        reopened=reopened,
        lost=tuple(shard for shard in bad if shard not in reopened),
        bytes_freed=freed,
    )


def _damaged_summaries(report: VerifyReport) -> set[int]:
    """The versions of which a summary is damaged."""
    keys = [damage.key.split("/") for damage in report.damages]
    return {int(key[1]) for key in keys if key[0] == "versions" and key[2] == "summary"}
