"""The manifest of a version, and the head of a store (docs/store-format.md, section 5).

The head is the root ``zarr.json``: it says which version is published and carries the consolidated
metadata that readers go by. It is replaced in one atomic step, so that readers see one version or
the other. A manifest is the list of a version's images with their rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rdd_storage.errors import (
    StoreFormatError,
    StoreLockedError,
    StoreMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
)
from rdd_storage.identity import FORMAT_VERSION
from rdd_storage.layout import consolidated_metadata, group_metadata
from rdd_storage.location import Location
from rdd_storage.rows import RowEntry, RowTable
from rdd_storage.schema import ImageRecord, Schema, schema_from_json, with_arrays

HEAD_KEY = "zarr.json"
VERSIONS_KEY = "versions/zarr.json"

_NO_ROWS = RowTable.of(())


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The images of one version of a store."""

    version: int
    """1 for the first build of a store."""
    num_rows: int
    """Length of the image axis that this version needs; rows without an image are gaps."""
    entries: RowTable
    """The current images, in rising order of their rows."""
    retired: RowTable = _NO_ROWS
    """Rows of earlier versions whose image is gone or has changed."""
    adds: tuple[str, ...] = ()
    """Arrays that this version adds to the images of the version before it."""
    images_of: int | None = None
    """The version that first had this list of images, where that is an earlier one."""

    @classmethod
    def first(cls, records: Sequence[ImageRecord]) -> Manifest:
        """The manifest of version 1: image i has row i."""
        return cls(
            version=1,
            num_rows=len(records),
            entries=RowTable.of(
                RowEntry(row=row, record=record, first_version=1)
                for row, record in enumerate(records)
            ),
        )

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images, in the order of their rows."""
        return self.entries.records()

    @property
    def rows(self) -> Sequence[int]:
        """Row of each record, in rising order."""
        return self.entries.rows

    def by_shard(self, shard_images: int) -> dict[int, list[RowEntry]]:
        """The current images of each shard that has any, in the order of their rows."""
        shards: dict[int, list[RowEntry]] = {}
        for entry in self.entries:
            shards.setdefault(entry.row // shard_images, []).append(entry)
        return shards

    def living(self, versions: Collection[int]) -> Iterator[RowEntry]:
        """Current rows, and the retired ones that one of these versions still has."""
        yield from self.entries
        for entry in self.retired:
            if any(entry.in_version(version) for version in versions):
                yield entry

    def encode(self) -> bytes:
        """The manifest as a Zarr group without members, so that plain Zarr knows what it is."""
        content: dict[str, Any] = {
            "version": self.version,
            "num_rows": self.num_rows,
            "images": self.entries.columns(versions=["first_version"]),
        }
        if self.retired:
            content["retired"] = self.retired.columns(versions=["first_version", "last_version"])
        if self.adds:
            content |= {"adds": list(self.adds), "images_of": self.images_of}
        return group_metadata({"rdd_manifest": content})

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """The manifest from :meth:`encode`.

        Raises:
            StoreFormatError: It does not follow the format.
        """
        try:
            content = json.loads(data)["attributes"]["rdd_manifest"]
            return cls(
                version=content["version"],
                num_rows=content["num_rows"],
                entries=RowTable(content["images"]),
                retired=RowTable(content["retired"]) if "retired" in content else _NO_ROWS,
                adds=tuple(content.get("adds", ())),
                images_of=content.get("images_of"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(
                f"{where}: expected a manifest, got something else ({error!r}); "
                "restore it from a copy or build the store again"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The root of a store, parsed."""

    location: Location
    version: int
    """The published version; 0 while the first is being built."""
    fingerprint: str
    identity: dict[str, Any]
    schema: Schema
    versions: dict[int, str]
    """The versions that can be read, with the SHA-256 of their manifests."""
    latest: int
    """Highest version ever published; its number is not used again when it is removed."""
    num_rows: int
    """Length of the image axis of all arrays; versions may use fewer rows."""
    draft: tuple[int, str] | None
    """Number and SHA-256 of the manifest of the version that is being built; None if none is."""
    software: str
    attributes: dict[str, Any]
    """All attributes of the root group but ``rdd``."""
    arrays: dict[str, Any]
    """Consolidated metadata: the published view of the arrays."""
    added: dict[str, int] = field(default_factory=dict)
    """Arrays that the store was made without, with the version that added each."""

    @property
    def complete(self) -> bool:
        """Whether a version is published."""
        return self.version > 0

    @property
    def next_version(self) -> int:
        """Number of the version that is built next."""
        return self.latest + 1

    def schema_of(self, version: int) -> Schema:
        """The schema of a version: without the arrays that a later one added."""
        return with_arrays(self.schema, self._added_after(version), present=False)

    def has(self, array: str, entry: RowEntry) -> bool:
        """Whether an array has a row: not if the row was retired before the array was added."""
        return entry.last_version >= self.added.get(array, 0)

    def back_to(self, version: int) -> Head:
        """The root with an earlier version as the published one."""
        late = self._added_after(version)
        if not late:
            return replace(self, version=version)
        schema = self.schema_of(version)
        return replace(
            self,
            version=version,
            schema=schema,
            added={name: first for name, first in self.added.items() if name not in late},
            arrays=consolidated_metadata(schema, self.num_rows),
        )

    def _added_after(self, version: int) -> tuple[str, ...]:
        return tuple(name for name, first in self.added.items() if version < first)

    def encode(self) -> bytes:
        """The content of the root ``zarr.json``."""
        draft = self.draft and {"version": self.draft[0], "manifest_sha256": self.draft[1]}
        rdd = {
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "schema": self.schema.to_json(),
            "manifest_sha256": self.versions.get(self.version, ""),
            "versions": {str(version): self.versions[version] for version in sorted(self.versions)},
            "latest": self.latest,
            "num_rows": self.num_rows,
            "draft": draft,
            "software": self.software,
        }
        if self.added:
            rdd["added"] = self.added
        return group_metadata(self.attributes | {"rdd": rdd}, self.arrays)

    @classmethod
    def decode(cls, location: Location, data: bytes) -> Head:
        """The root from :meth:`encode`.

        Raises:
            StoreNotFoundError: It is not the root of a map store.
            StoreFormatError: It is of another format version, or is not understood.
        """
        try:
            document = json.loads(data)
            attributes = document["attributes"]
            rdd = attributes["rdd"]
            format_version = rdd["format_version"]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreNotFoundError(
                f"{location}: expected a map store, got something else (its {HEAD_KEY} has no rdd "
                "attributes); check the path"
            ) from error
        if format_version != FORMAT_VERSION:
            raise StoreFormatError(
                f"{location}: expected format version {FORMAT_VERSION}, got {format_version!r}; "
                "upgrade rdd-maps to read this store"
            )
        try:
            version = rdd["version"]
            arrays = document["consolidated_metadata"]["metadata"]
            # Stores that never grew may lack what growth needs.
            digests = rdd.get("versions", {version: rdd["manifest_sha256"]} if version else {})
            draft = rdd.get("draft")
            return cls(
                location=location,
                version=version,
                fingerprint=rdd["fingerprint"],
                identity=rdd["identity"],
                schema=schema_from_json(rdd["schema"]),
                versions={int(number): digest for number, digest in digests.items()},
                latest=rdd.get("latest", version),
                num_rows=rdd.get("num_rows", arrays["done"]["shape"][0] if version else 0),
                draft=draft and (draft["version"], draft["manifest_sha256"]),
                software=rdd["software"],
                attributes={key: value for key, value in attributes.items() if key != "rdd"},
                arrays=arrays,
                added=dict(rdd.get("added", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreFormatError(
                f"{location}: expected the root of a map store, got one without {error}; "
                "restore it from a copy or build the store again"
            ) from error


def read_head(location: Location) -> Head:
    """Read and check the root of a store.

    Raises:
        StoreNotFoundError: There is no map store.
        StoreFormatError: The store is of another format version, or its root is not understood.
    """
    return read_head_with_token(location)[0]


def require_schema(head: Head, wanted: type[Schema] | None) -> None:
    """Refuse a store of another kind than wanted; None takes any.

    Raises:
        StoreMismatchError: It is of another kind.
    """
    if wanted is not None and not isinstance(head.schema, wanted):
        raise StoreMismatchError(
            f"{head.location}: expected a store of {wanted.made_by}, got one of "
            f"{head.schema.made_by}; give the path of the other"
        )


def read_head_with_token(location: Location) -> tuple[Head, str]:
    """Like :func:`read_head`, with the token for its conditional replacement."""
    found = location.get_with_token(HEAD_KEY)
    if found is None:
        raise StoreNotFoundError(
            f"{location}: no map store there (no {HEAD_KEY}); check the path, or build the maps"
        )
    return Head.decode(location, found[0]), found[1]


def replace_head(head: Head, token: str) -> None:
    """Replace the root in one atomic step, if it is still the one that the token came with.

    Raises:
        StoreLockedError: It has changed.
        StoreWriteError: It cannot be written.
    """
    if not head.location.replace_if(HEAD_KEY, head.encode(), token):
        raise StoreLockedError(
            f"{head.location}: expected to change this store alone, but another process has "
            "changed it meanwhile; try again"
        )


def store_draft(head: Head, token: str, draft: Manifest) -> Head:
    """Write the plan of the next version and name it in the root, under the store's lease.

    Raises:
        StoreLockedError: The root has changed since the token was given.
        StoreWriteError: Plan or root cannot be written.
    """
    content = draft.encode()
    head.location.put(manifest_key(draft.version), content)
    head = replace(head, draft=(draft.version, manifest_digest(content)))
    replace_head(head, token)
    return head


def manifest_key(version: int) -> str:
    """Key of a version's manifest."""
    return f"versions/{version:06d}/zarr.json"


def manifest_digest(data: bytes) -> str:
    """SHA-256 of an encoded manifest."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(head: Head, version: int | None = None) -> Manifest:
    """The manifest of a version: the published one, or the first where none is published.

    Raises:
        StoreFormatError: The manifest is missing, damaged or no manifest.
        UnknownVersionError: The store has no such version.
    """
    if version is None and not head.complete:
        version = head.next_version
        wanted = head.draft[1] if head.draft else ""
    elif version is None:
        version = head.version
        wanted = head.versions.get(version, "")
    elif version in head.versions:
        wanted = head.versions[version]
    else:
        has = ", ".join(map(str, sorted(head.versions))) or "none yet"
        raise UnknownVersionError(
            f"{head.location}: expected one of the store's versions ({has}), got {version!r}; "
            "it was removed, or is still being built"
        )
    where = f"{head.location}: {manifest_key(version)}"
    data = head.location.get(manifest_key(version))
    if data is None:
        raise StoreFormatError(
            f"{where}: expected the manifest of version {version}, got nothing; "
            "restore it from a copy or build the store again"
        )
    if wanted and manifest_digest(data) != wanted:
        raise StoreFormatError(
            f"{where}: expected SHA-256 {wanted[:12]}, got {manifest_digest(data)[:12]}; "
            "restore it from a copy or build the store again"
        )
    return Manifest.decode(data, where)


def read_draft(head: Head) -> Manifest | None:
    """The manifest of the version that is being built; None where none is, or it is damaged."""
    if head.draft is None:
        return None
    data = head.location.get(manifest_key(head.draft[0]))
    if data is None or manifest_digest(data) != head.draft[1]:
        return None
    return Manifest.decode(data, f"{head.location}: {manifest_key(head.draft[0])}")
