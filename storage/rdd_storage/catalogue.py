"""Many stores below one root: finding the one that fits, their size, and who used them."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from typing import Any

from rdd_storage.additions import ADDABLE
from rdd_storage.errors import (
    StoreMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
)
from rdd_storage.identity import canonical, identity_difference
from rdd_storage.layout import group_metadata
from rdd_storage.location import locate
from rdd_storage.manifest import read_head
from rdd_storage.schema import MapSchema
from rdd_storage.status import StoreStatus, list_stores

_SHORTEST_PREFIX = 6  # characters of a hash that may stand for all of it
_LISTED = 5  # differences that a message shows for each store


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUsage:
    """What the stores below a root take."""

    total: int
    """Bytes of all stores."""
    stores: dict[str, int]
    """Bytes of each store by its path, the largest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreUse:
    """One run that used a version of a store."""

    run: str
    """Name of the run, such as its folder."""
    version: int
    """The version it read."""
    manifest_sha256: str
    """SHA-256 of that version's manifest."""
    at: datetime
    """When the use was recorded, UTC."""
    host: str
    user: str
    details: dict[str, Any]
    """What else the caller recorded."""


def find_stores(
    root: str | PathLike[str],
    *,
    teacher: str | Mapping[str, Any] | None = None,
    data: str | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    complete: bool | None = None,
    kind: str | None = MapSchema.kind,
) -> list[StoreStatus]:
    """The stores directly below a folder or bucket that fit, in order of their names.

    Stores that cannot be read are left out; :func:`~rdd_storage.status.list_stores` lists them.

    Args:
        root: Path or URL of the folder.
        teacher: What to find below ``teacher`` in a store's identity: a mapping of keys to values,
            nested like the identity or with dots in the keys; or a text that some value there
            equals or, from six characters on, begins with, such as the start of a hash.
        data: The same below ``data``.
        settings: A mapping as above, within the whole identity, such as
            ``{"evaluation.scales": [1.0]}``.
        complete: Whether a version has to be published; None takes both.
        kind: ``maps`` or ``pack``; None takes both.
    """
    found = []
    for item in list_stores(root):
        status = item.status
        if status is None or (complete is not None and status.complete != complete):
            continue
        if kind not in (None, status.kind):
            continue
        if not _differences(status.identity, teacher, data, settings):
            found.append(status)
    return found


def find_store(
    root: str | PathLike[str],
    *,
    teacher: str | Mapping[str, Any] | None = None,
    data: str | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    arrays: Collection[str] = (),
) -> StoreStatus:
    """The one published store of maps below a root that fits.

    Args:
        root, teacher, data, settings: As for :func:`find_stores`.
        arrays: Maps that the published version has to have.

    Raises:
        StoreNotFoundError: There is no store below the root.
        StoreMismatchError: None fits, or several do; the message says how each differs, or which
            they are.
    """
    stores = [
        item.status
        for item in list_stores(root)
        if item.status is not None and item.status.kind == MapSchema.kind
    ]
    if not stores:
        raise StoreNotFoundError(f"{root}: no map store below it; check the path, or build maps")
    lines, fitting = [], []
    for status in stores:
        differences = _differences(status.identity, teacher, data, settings)
        if not status.complete:
            differences.append("expected a published version, found an unfinished build")
        elif lacking := [name for name in arrays if name not in status.arrays]:
            differences.append(f"expected the maps {', '.join(lacking)}, found none")
            differences += [f"{ADDABLE[name]} adds {name}" for name in lacking if name in ADDABLE]
        if not differences:
            fitting.append(status)
            continue
        lines.append(f"  {status.path}:")
        lines += [f"    {line}" for line in differences[:_LISTED]]
        if len(differences) > _LISTED:
            lines.append(f"    ... and {len(differences) - _LISTED} more")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        paths = "\n".join(f"  {status.path}" for status in fitting)
        raise StoreMismatchError(
            f"{root}: expected one store that fits, got {len(fitting)}; ask for more:\n{paths}"
        )
    raise StoreMismatchError(
        "\n".join(
            [
                f"{root}: expected a store that fits, got {len(stores)} that do not:",
                *lines,
                "build maps for these settings and data, or ask for others",
            ]
        )
    )


def disk_usage(root: str | PathLike[str]) -> DiskUsage:
    """What the stores directly below a folder or bucket take; unreadable ones are not counted."""
    stores = {
        item.path: item.status.bytes_on_disk
        for item in list_stores(root)
        if item.status is not None
    }
    largest_first = sorted(stores.items(), key=lambda item: -item[1])
    return DiskUsage(total=sum(stores.values()), stores=dict(largest_first))


def record_use(
    path: str | PathLike[str],
    version: int,
    *,
    run: str,
    details: Mapping[str, Any] | None = None,
) -> StoreUse:
    """Record in a store that a run used one of its versions.

    One object per run and version, so that any number of runs record at once.

    Args:
        path: Path or URL of the store.
        version: The version that is read.
        run: Name of the run; recording it again replaces what was recorded.
        details: Further JSON values to keep, such as the student's configuration.

    Raises:
        StoreNotFoundError: There is no map store.
        UnknownVersionError: The store has no such version.
        StoreFormatError: The details are no JSON.
        StoreWriteError: The place cannot be written.
    """
    head = read_head(locate(path))
    if version not in head.versions:
        has = ", ".join(map(str, sorted(head.versions))) or "none yet"
        raise UnknownVersionError(
            f"{head.location}: expected one of the store's versions ({has}), got {version!r}"
        )
    use = StoreUse(
        run=run,
        version=version,
        manifest_sha256=head.versions[version],
        at=datetime.now(UTC),
        host=socket.gethostname(),
        user=_user(),
        details=canonical(dict(details or {}), "details"),
    )
    content = {name: getattr(use, name) for name in StoreUse.__slots__}
    content["at"] = use.at.isoformat()
    # Groups, so that plain Zarr knows what they are.
    head.location.create("uses/zarr.json", group_metadata({}))
    head.location.put(_use_key(run, version), group_metadata({"rdd_use": content}))
    return use


def uses(path: str | PathLike[str], version: int | None = None) -> list[StoreUse]:
    """The recorded uses of a store, or of one version, the earliest first.

    Records that are damaged are left out.

    Raises:
        StoreNotFoundError: There is no map store.
    """
    location = read_head(locate(path)).location
    keys = [key for key, _ in location.list_sizes("uses") if key.count("/") == 2]
    found = []
    for data in location.get_many(keys):
        use = None if data is None else _decode_use(data)
        if use is not None and version in (None, use.version):
            found.append(use)
    return sorted(found, key=lambda use: (use.at, use.run))


def _use_key(run: str, version: int) -> str:
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", run).strip("-")[-40:]
    digest = hashlib.sha256(f"{version} {run}".encode()).hexdigest()[:12]
    return f"uses/v{version:06d}-{readable}-{digest}/zarr.json"


def _decode_use(data: bytes) -> StoreUse | None:
    try:
        content = json.loads(data)["attributes"]["rdd_use"]
        known = {name: content[name] for name in StoreUse.__slots__}
        return StoreUse(**(known | {"at": datetime.fromisoformat(known["at"])}))
    except (KeyError, TypeError, ValueError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return ""


def _differences(
    identity: Mapping[str, Any],
    teacher: str | Mapping[str, Any] | None,
    data: str | Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
) -> list[str]:
    """How an identity differs from what is asked for; what is not asked for does not matter."""
    lines = []
    for name, wanted in (("teacher", teacher), ("data", data)):
        found = identity.get(name)
        if isinstance(wanted, str):
            if not _has_text(found, wanted):
                values = ", ".join(_texts(found)) or "nothing"
                lines.append(f"{name}: expected {wanted!r}, found {values}")
        elif wanted is not None:
            lines += _mapping_differences({name: dict(wanted)}, identity)
    return lines + _mapping_differences(settings or {}, identity)


def _mapping_differences(wanted: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    nested = _unfold(wanted)
    return identity_difference(nested, _part(nested, identity))


def _unfold(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings in place of dots in the keys."""
    nested: dict[str, Any] = {}
    for key, value in wanted.items():
        unfolded = _unfold(value) if isinstance(value, Mapping) else value
        *parents, last = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if isinstance(unfolded, dict) and isinstance(inner.get(last), dict):
            inner[last] |= unfolded
        else:
            inner[last] = unfolded
    return nested


def _part(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``found`` only the keys that are asked for."""
    part = {}
    for key, value in wanted.items():
        if key in found:
            both = isinstance(value, Mapping) and isinstance(found[key], Mapping)
            part[key] = _part(value, found[key]) if both else found[key]
    return part


def _has_text(value: Any, text: str) -> bool:
    return any(
        found == text or (len(text) >= _SHORTEST_PREFIX and found.startswith(text))
        for found in _texts(value)
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
