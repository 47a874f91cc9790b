"""One version of a store, opened to be built or restored, and the lease under which that is done.

The common base of what writes to a store: :mod:`rdd_storage.writer` makes, grows and fills stores,
:mod:`rdd_storage.restoring` mends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from typing import ClassVar, Generic, Self, cast

from rdd_storage.coordinates import coordinate_objects, metadata_objects
from rdd_storage.errors import StoreMismatchError
from rdd_storage.layout import LAST_VERSION, ArraySpec, done_spec
from rdd_storage.lease import DEFAULT_TTL, LeaseTicket, StoreLease, hold_lease
from rdd_storage.location import locate
from rdd_storage.manifest import (
    Head,
    Manifest,
    manifest_digest,
    read_head,
    read_manifest,
    require_schema,
)
from rdd_storage.marks import read_done
from rdd_storage.rows import RowEntry
from rdd_storage.schema import ImageRecord, Schema, SchemaT, with_arrays

BRIEF_WAIT = 5.0  # seconds; planning and publishing hold the lease for less


class OpenVersion(Generic[SchemaT]):
    """A version of a store that may be changed: its images and shards, and who may change it.

    Args:
        head: The root as it was read.
        manifest: The version, published or planned.
        ticket: Of the lease that the caller holds; by default none is held, and :meth:`lease` or
            each change by itself takes it.
    """

    _schema_type: ClassVar[type[Schema] | None] = None
    """What the stores of a subclass have; None opens all."""

    def __init__(self, head: Head, manifest: Manifest, ticket: LeaseTicket | None = None) -> None:
        self._head = head
        self._manifest = manifest
        self._ticket = ticket

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """Open the published version of a store, or the first one to go on building it.

        Raises:
            StoreNotFoundError: There is no map store.
            StoreFormatError: The store is of another format version or damaged.
            StoreMismatchError: The store is of the other kind.
        """
        head = read_head(locate(path))
        require_schema(head, cls._schema_type)
        return cls(head, read_manifest(head))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, version {self.version})"

    @property
    def path(self) -> str:
        """Path or URL of the store."""
        return self._head.location.url

    @property
    def schema(self) -> SchemaT:
        """The store's schema, as this version has it."""
        # open() has seen that it is of this kind.
        return with_arrays(cast("SchemaT", self._head.schema), self._manifest.adds)

    @property
    def fingerprint(self) -> str:
        """The store's fingerprint."""
        return self._head.fingerprint

    @property
    def version(self) -> int:
        """Number of the version, published or not."""
        return self._manifest.version

    @cached_property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images, in the order of their rows."""
        return self._manifest.records

    @property
    def complete(self) -> bool:
        """Whether the version was published when the root was last read or written here."""
        return self.version in self._head.versions

    @property
    def num_shards(self) -> int:
        """Number of shards, those that hold no current image included."""
        return -(-self._manifest.num_rows // self.schema.shard_images)

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard, along the first axis of the arrays.

        In a store that never grew they are indices into :attr:`records` too; in others a row may
        have no current image: take :meth:`shard_records`.

        Raises:
            IndexError: There is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard: expected 0 to {self.num_shards - 1}, got {shard}")
        size = self.schema.shard_images
        return range(shard * size, min((shard + 1) * size, self._manifest.num_rows))

    def shard_records(self, shard: int) -> tuple[ImageRecord, ...]:
        """The current images of a shard, in the order of their rows; empty where it has none.

        Raises:
            IndexError: There is no such shard.
        """
        self.shard_rows(shard)
        return tuple(entry.record for entry in self._by_shard.get(shard, []))

    def pending_shards(self) -> list[int]:
        """Shards with images that are not done, in rising order; read from the store each time."""
        done = read_done(self._head.location, self._done_spec)
        return [
            shard
            for shard, entries in sorted(self._by_shard.items())
            if not all(done[entry.row] for entry in entries)
        ]

    @contextmanager
    def lease(self, *, wait: float = 0.0, ttl: float = DEFAULT_TTL) -> Iterator[StoreLease]:
        """Keep other builds of this store out for the time of a ``with`` block.

        Copies of the writer that are pickled within the block work under the same lease: once it
        is lost, neither this writer nor they mark a shard or publish. A writer without a lease may
        write shards, and takes the lease itself to publish.

        Args:
            wait: Seconds to wait for another build to end.
            ttl: Seconds after which the lease of a holder that went silent may be taken over.

        Raises:
            StoreLockedError: Another build holds the store; the message says which.
            StoreMismatchError: While this build waited, another one planned or published something
                else.
        """
        with hold_lease(self._head.location, wait=wait, ttl=ttl) as lease:
            self._refresh()
            self._ticket = lease.ticket
            try:
                yield lease
            finally:
                self._ticket = None

    # -- the lease ---------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Under the lease that is held, or one for this block alone."""
        if self._ticket is not None:
            self._ticket.check()
            yield
            return
        with self.lease(wait=BRIEF_WAIT):
            yield

    def _check_lease(self) -> None:
        if self._ticket is not None:
            self._ticket.check()

    def _refresh(self) -> None:
        """Take over what happened to the store since it was opened.

        Raises:
            StoreMismatchError: This version was planned or published otherwise.
        """
        head = read_head(self._head.location)
        self._refuse_changes(head)
        self._head = head

    def _refuse_changes(self, head: Head) -> None:
        planned = head.draft[1] if head.draft and head.draft[0] == self.version else None
        stored = head.versions.get(self.version, planned)
        if self.version == 1 and stored is None and not head.complete:
            stored = self._digest  # a store from before plans were recorded in the root
        if head.fingerprint != self.fingerprint or stored != self._digest:
            raise StoreMismatchError(
                f"{self.path}: expected to build version {self.version} as it was planned, but "
                "another process has planned, published or removed something since; open or "
                "extend the store again"
            )

    @cached_property
    def _digest(self) -> str:
        """SHA-256 of this version's manifest as it was when it was opened."""
        head = self._head
        if self.version in head.versions:
            return head.versions[self.version]
        if head.draft is not None and head.draft[0] == self.version:
            return head.draft[1]
        return manifest_digest(self._manifest.encode())

    # -- shards and objects ------------------------------------------------------------------

    @cached_property
    def _by_shard(self) -> dict[int, list[RowEntry]]:
        return self._manifest.by_shard(self.schema.shard_images)

    @cached_property
    def _done_spec(self) -> ArraySpec:
        return done_spec(self.schema, self._manifest.num_rows)

    def _derived_objects(self, num_rows: int, first_row: int = 0) -> dict[str, bytes]:
        """Metadata, and coordinates from a row on."""
        keys = self._head.location.list_sizes(f"{LAST_VERSION}/c")
        chunks = [int(key.rpartition("/")[2]) for key, _ in keys]
        coordinates = coordinate_objects(
            self.schema, self._manifest, num_rows, first_row=first_row, rewritten=chunks
        )
        return metadata_objects(self.schema, num_rows) | coordinates

    def _put(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            self._head.location.put(key, content)

    def _put_changed(self, objects: Mapping[str, bytes]) -> tuple[str, ...]:
        location = self._head.location
        changed = tuple(key for key, data in objects.items() if location.get(key) != data)
        for key in changed:
            location.put(key, objects[key])
        return changed
