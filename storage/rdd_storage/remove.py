"""Removing versions and stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path

from rdd_storage.additions import ADDABLE
from rdd_storage.errors import StoreRemovalError, UnknownVersionError
from rdd_storage.layout import done_spec, map_specs, statistics_specs
from rdd_storage.lease import LEASE_KEY, hold_lease
from rdd_storage.location import LocalLocation, Location, locate
from rdd_storage.manifest import (
    HEAD_KEY,
    VERSIONS_KEY,
    Head,
    manifest_key,
    read_draft,
    read_head_with_token,
    read_manifest,
    replace_head,
)
from rdd_storage.schema import with_arrays


def remove_version(
    path: str | PathLike[str], version: int, *, newest: bool = False, wait: float = 0.0
) -> int:
    """Remove a version, and the shards that no other version needs.

    One atomic step takes the version away; what it leaves behind is then deleted, and by the next
    removal or repair if this one is interrupted. Readers that have the version open lose it.

    Args:
        path: Path or URL of the store.
        version: Number of the version.
        newest: Whether the published version may be removed: the one before is published again.
        wait: Seconds to wait for a build of the store to end.

    Returns:
        Bytes that were freed.

    Raises:
        StoreNotFoundError: There is no map store.
        UnknownVersionError: The store has no such version.
        StoreRemovalError: It is the newest version and ``newest`` is not set, or the only one.
        StoreLockedError: A build of the store is under way.
        StoreWriteError: The store cannot be changed.
    """
    location = locate(path)
    read_head_with_token(location)  # no lease is left where there is no store
    with hold_lease(location, wait=wait) as lease:
        head, token = read_head_with_token(location)
        if version not in head.versions:
            has = ", ".join(map(str, sorted(head.versions))) or "none yet"
            raise UnknownVersionError(
                f"{location}: expected one of the store's versions ({has}), got {version!r}"
            )
        left = {number: sha for number, sha in head.versions.items() if number != version}
        if version == head.version and not left:
            raise StoreRemovalError(
                f"{location}: expected to keep at least one version, got the only one to remove; "
                "remove the store as a whole"
            )
        if version == head.version and not newest:
            raise StoreRemovalError(
                f"{location}: expected an earlier version than the published one, got {version}; "
                "say that the newest may be removed to go back to the version before"
            )
        head = replace(head, versions=left).back_to(max(left))
        if head.draft is not None and version > head.version:
            head = replace(head, draft=None)  # it was planned to follow the version removed
        lease.ticket.check()
        replace_head(head, token)
        return remove_unused(head)


def remove_store(path: str | PathLike[str], *, wait: float = 0.0) -> int:
    """Remove a map store with all that is in its folder.

    Args:
        path: Path or URL of the store.
        wait: Seconds to wait for a build of the store to end.

    Returns:
        Bytes that were freed.

    Raises:
        StoreNotFoundError: There is no map store; nothing is removed.
        StoreFormatError: The store is of another format version; nothing is removed.
        StoreLockedError: A build of the store is under way.
        StoreWriteError: An object cannot be removed; call again to remove the rest.
    """
    location = locate(path)
    read_head_with_token(location)
    with hold_lease(location, wait=wait) as lease:
        head, token = read_head_with_token(location)
        sizes = dict(location.list_sizes())
        # From here on it is an unfinished store, whatever happens on the way.
        lease.ticket.check()
        replace_head(replace(head, version=0, versions={}, draft=None, arrays={}), token)
        location.remove_partial_writes()
        for key in sizes.keys() - {HEAD_KEY, LEASE_KEY}:
            location.delete(key)
        location.delete(HEAD_KEY)
        # The lease last: until then nobody begins a new store here.
        location.delete(LEASE_KEY)
    if isinstance(location, LocalLocation):
        _remove_empty_folders(Path(location.url))
    return sum(sizes.values())


def remove_unused(head: Head) -> int:
    """Delete manifests and shards that no version needs, under the store's lease.

    Returns:
        Bytes that were freed.

    Raises:
        StoreWriteError: An object cannot be removed.
    """
    freed = 0
    for key, size in _unused(head.location, head):
        head.location.delete(key)
        freed += size
    return freed


def _unused(location: Location, head: Head) -> Iterator[tuple[str, int]]:
    schema = head.schema
    manifest, draft = read_manifest(head), read_draft(head)
    needed = {entry.row // schema.shard_images for entry in manifest.living(head.versions)}
    if draft is not None:
        needed |= {row // schema.shard_images for row in draft.rows}
    versions = {*head.versions, *([head.draft[0]] if head.draft else [])}
    folders = {manifest_key(version).rpartition("/")[0] for version in versions}
    for key, size in list(location.list_sizes("versions")):  # manifests and summaries
        if key != VERSIONS_KEY and "/".join(key.split("/")[:2]) not in folders:
            yield key, size
    # The marks first: a shard that is gone in part must not look done.
    rows = max(manifest.num_rows, head.num_rows)
    adds = draft.adds if draft is not None else ()
    maps = (*map_specs(with_arrays(schema, adds), rows), *statistics_specs(schema, rows))
    for name in set(ADDABLE) - set(maps):  # of a version that is gone or was never finished
        yield from list(location.list_sizes(name))
    for name in (done_spec(schema, rows).name, *maps):
        for key, size in list(location.list_sizes(f"{name}/c")):
            shard = int(key.removeprefix(f"{name}/c/").partition("/")[0])
            if shard not in needed:
                yield key, size


def _remove_empty_folders(root: Path) -> None:
    folders = [path for path in root.rglob("*") if path.is_dir()]
    for folder in [*sorted(folders, reverse=True), root]:
        with suppress(OSError):  # somebody has begun a new store there
            folder.rmdir()
