"""Writing a store shard by shard; see docs/store-format.md, section 7, for the protocol.

Any number of processes may write different shards of one store at once. A shard has one writer,
and its completion marks are the last thing it writes, so that a killed build loses the shards
under way and nothing else. What is planned and published is decided under the store's lease.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np

from rdd_storage.coordinates import (
    coordinate_objects,
    coordinates_attribute,
    metadata_objects,
    root_attributes,
)
from rdd_storage.errors import (
    LeaseLostError,
    ShardDataError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreWriteError,
)
from rdd_storage.growth import Growth, compare_images, plan_version
from rdd_storage.identity import canonical, fingerprint, identity_difference, mismatch_error
from rdd_storage.layout import (
    FIRST_VERSION,
    LAST_VERSION,
    NEVER,
    ArraySpec,
    consolidated_metadata,
    done_spec,
    encode_objects,
    group_metadata,
)
from rdd_storage.lease import DEFAULT_TTL, LeaseTicket, StoreLease, hold_lease
from rdd_storage.location import locate
from rdd_storage.manifest import (
    HEAD_KEY,
    VERSIONS_KEY,
    Head,
    Manifest,
    manifest_digest,
    manifest_key,
    read_draft,
    read_head,
    read_head_with_token,
    read_manifest,
    replace_head,
    require_schema,
    store_draft,
)
from rdd_storage.maps import ImageLogits, ImageMaps
from rdd_storage.marks import read_done
from rdd_storage.packs import PackedImage
from rdd_storage.rows import RowEntry
from rdd_storage.schema import (
    ImageRecord,
    MapSchema,
    PackSchema,
    Schema,
    SchemaT,
    check_images,
    record_differences,
    with_arrays,
)
from rdd_storage.shards import Content, ShardContent, check_content
from rdd_storage.summary_store import delete_summary, open_summary, summary_key, summary_objects

_CHUNKS = ("chunk_height", "chunk_width")
_LISTED = 10  # differing images that a message names
BRIEF_WAIT = 5.0  # seconds; planning and publishing hold the lease for less

_Item = TypeVar("_Item", bound=Content | ImageLogits)
_ContentT = TypeVar("_ContentT", bound=Content)


class StoreWriter(Generic[SchemaT, _ContentT]):
    """Writes what is stored of a data set split; :class:`MapWriter` and :class:`PackWriter` are
    for the two kinds of stores, this class is for what they share.

    Made by :meth:`create`, :meth:`extend` or :meth:`open`. Picklable: a worker process that
    receives one writes to the same store, under the lease that was held when it was pickled.
    """

    _schema_type: ClassVar[type[Schema] | None] = None
    """What the stores of a subclass have; None opens all."""

    def __init__(self, head: Head, manifest: Manifest, growth: Growth | None = None) -> None:
        self._head = head
        self._manifest = manifest
        self._growth = growth
        self._ticket: LeaseTicket | None = None

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        *,
        schema: SchemaT,
        images: Sequence[ImageRecord],
        identity: Mapping[str, Any],
        palette: Sequence[Sequence[int]] | None = None,
        attributes: Mapping[str, Any] | None = None,
        grow: bool = False,
    ) -> Self:
        """Make an empty store, or open the one that is there to go on building it.

        Args:
            path: Local path or URL.
            schema: Arrays and sizes.
            images: The images, in the order of their rows.
            identity: What decides the content: teacher, preprocessing, settings. JSON values.
            palette: RGB colours 0..255 of the classes, for display; fixed by the first call.
            attributes: Further attributes of the root group; fixed by the first call.
            grow: Whether a store with other images is to be extended, see :meth:`extend`, instead
                of refused.

        Raises:
            StoreMismatchError: The store there has another identity, schema or other images; the
                message lists the differences.
            StoreFormatError: Images or identity cannot be stored, or the store there is of
                another format version.
            StoreLockedError: Another build is just making or planning this store.
            StoreWriteError: The place cannot be written.
        """
        location = locate(path)
        records = tuple(images)
        check_images(schema, records)
        head = Head(
            location=location,
            version=0,
            fingerprint=fingerprint(identity),
            identity=canonical(dict(identity)),
            schema=schema,
            versions={},
            latest=0,
            num_rows=0,
            draft=None,
            software=f"rdd-maps {importlib.metadata.version('rdd-maps')}",
            attributes=root_attributes(schema, palette, attributes),
            arrays={},
        )
        writer = cls(head, Manifest.first(records))
        if location.get(HEAD_KEY) is None:
            with hold_lease(location, wait=BRIEF_WAIT) as lease:
                if location.get(HEAD_KEY) is None:
                    writer._lay_out(lease.ticket)
                    return writer
        existing = cls.open(path)  # raises where it is another Zarr group: never write into that
        if grow and not _same_images(records, existing.records):
            return cls.extend(path, images=records, schema=schema, identity=identity)
        existing._refuse_mismatch(schema, identity, () if grow else schema.sizes)
        existing._refuse_other_images(records, ordered=not grow)
        return existing

    @classmethod
    def extend(
        cls,
        path: str | PathLike[str],
        *,
        images: Sequence[ImageRecord],
        schema: SchemaT | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> Self:
        """Plan the next version of a store for another list of images, or resume building it.

        Images that the published version has with the same digest and sizes keep their maps; new
        and changed ones are to be built, in shards of their own; the others leave the list. The
        published version stays as it is until :meth:`publish`, and can be read after it. See
        :attr:`growth` for what the next version changes: where that is empty, the writer is that
        of the published version, and nothing is written.

        Args:
            path: Path or URL of the store.
            images: All images of the next version.
            schema: If given, refuse a store with another one; sizes may be smaller than its.
            identity: If given, refuse a store of another identity.

        Raises:
            StoreNotFoundError: There is no map store.
            StoreMismatchError: The store has another identity or schema.
            StoreFormatError: An image is larger than the store's arrays, or a name is used twice.
            StoreLockedError: Another build of this store is under way.
            StoreWriteError: The place cannot be written.
        """
        location = locate(path)
        records = tuple(images)
        opened = cls.open(path)
        opened._refuse_mismatch(schema, identity, ())
        try:
            check_images(opened.schema, records)
        except StoreFormatError as error:
            error.add_note("a store keeps its sizes: build a new one for larger images")
            raise
        head = opened._head
        base = opened._manifest if head.complete else None
        growth = compare_images(base, records)
        if base is not None and growth.empty:
            return cls(head, base, growth)
        if (draft := plan_images(head, base, records)) == read_draft(head):
            return cls(head, draft, growth)
        with hold_lease(location, wait=BRIEF_WAIT) as lease:
            head, token = read_head_with_token(location)
            base = read_manifest(head) if head.complete else None
            growth = compare_images(base, records)
            if base is not None and growth.empty:
                return cls(head, base, growth)
            draft = plan_images(head, base, records)
            writer = cls(head, draft, growth)
            if base is None:  # readers of an unfinished store go by the arrays' own metadata
                writer._put_changed(writer._derived_objects(draft.num_rows))
            lease.ticket.check()
            head = store_draft(head, token, draft)
        return cls(head, draft, growth)

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
        """The store's schema, as the version that is written has it."""
        # open() has seen that it is of this kind.
        return with_arrays(cast("SchemaT", self._head.schema), self._manifest.adds)

    @property
    def fingerprint(self) -> str:
        """The store's fingerprint."""
        return self._head.fingerprint

    @property
    def version(self) -> int:
        """The version that is written, published or not."""
        return self._manifest.version

    @property
    def growth(self) -> Growth | None:
        """What this version changes; None unless made by :meth:`extend`."""
        return self._growth

    @cached_property
    def records(self) -> tuple[ImageRecord, ...]:
        """The images, in the order of their rows."""
        return self._manifest.records

    @property
    def complete(self) -> bool:
        """Whether the version was published when it was opened or by this writer."""
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

    def write_shard(self, shard: int, maps: Sequence[_ContentT]) -> None:
        """Write all arrays of a shard, then mark its images done.

        Writing a shard again is allowed and gives the same bytes for the same maps. Each object
        is replaced in one atomic step; while a shard that is done is written again it is not
        marked as undone. Images that only earlier versions have keep what can be read of them.

        Args:
            shard: Number of the shard.
            maps: The maps, or decoded images, of its images, one for each, in any order.

        Raises:
            ShardDataError: An image is missing, foreign or given twice, or an array has a wrong
                shape, dtype or value; nothing has been written then.
            StoreWriteError: An object could not be written; the shard is not marked done.
            LeaseLostError: The lease this writer worked under is lost; the shard is not marked
                done by it.
        """
        rows = self.shard_rows(shard)
        entries = self._by_shard.get(shard, [])
        ordered = self._in_row_order(shard, [entry.record for entry in entries], maps)
        try:
            for entry, item in zip(entries, ordered, strict=True):
                check_content(item, entry.record, self.schema)
            self._check_lease()
            content = ShardContent(self._head, self.schema, shard)
            content.add(entries, ordered)
            content.keep(self._retired_by_shard.get(shard, []))
            for objects in content.encode():
                self._put(objects)
            self._check_lease()
            self._put(encode_objects(self._done_spec, content.done[: len(rows)], first=shard))
        except (ShardDataError, StoreWriteError, LeaseLostError) as error:
            error.add_note(f"while writing shard {shard} of {self.path}")
            raise

    def publish(self) -> None:
        """Make the version visible to readers, in one atomic step.

        Its summary is made before that. Where the version is published already, nothing is done
        but to make summaries that shards built again have left missing.

        Raises:
            StoreIncompleteError: Shards are not done.
            StoreLockedError: Another build holds the store, or has changed it since.
            StoreWriteError: The root cannot be written.
        """
        if self.complete:
            self._complete_summaries()
            return
        self._refuse_pending()
        with self._locked():
            head, token = read_head_with_token(self._head.location)
            self._refuse_changes(head)
            if self.version in head.versions:  # another process of the same build was quicker
                self._head = head
                return
            num_rows = max(head.num_rows, self._manifest.num_rows)
            base = read_manifest(head) if head.complete else None
            if self.version > 1 or num_rows != len(self._manifest.entries):
                grew = base is not None and FIRST_VERSION in head.arrays
                base_rows = base.num_rows if base is not None and grew else 0
                self._put_changed(self._derived_objects(num_rows, base_rows))
            location = self._head.location
            location.remove_partial_writes()
            if manifest_digest(location.get(manifest_key(self.version)) or b"") != self._digest:
                raise StoreDamagedError(
                    f"{self.path}: {manifest_key(self.version)}: expected SHA-256 "
                    f"{self._digest[:12]}, got another; extend the store again"
                )
            summary = summary_objects(head, self._manifest, self._digest, base)
            self._check_lease()
            self._put_changed(summary)
            head = replace(
                head,
                version=self.version,
                versions=head.versions | {self.version: self._digest},
                latest=self.version,
                num_rows=num_rows,
                draft=None,
                attributes=head.attributes | {"coordinates": coordinates_attribute(self.schema)},
                arrays=consolidated_metadata(self.schema, num_rows),
                schema=self.schema,
                added=head.added | dict.fromkeys(self._manifest.adds, self.version),
            )
            self._check_lease()
            replace_head(head, token)
            self._head = head

    def reopen_shards(self, shards: Iterable[int]) -> None:
        """Make shards pending again, so that a build writes them anew.

        A published version stays published: its undamaged images are read as before. Summaries
        that have to do with the shards are deleted; :meth:`publish` makes them again.

        Raises:
            IndexError: There is no such shard.
            StoreLockedError: Another build holds the store.
            StoreWriteError: A mark cannot be written.
        """
        with self._locked():
            rows = {shard: self.shard_rows(shard) for shard in shards}
            entries = [entry for shard in rows for entry in self._by_shard.get(shard, ())]
            for version in self._head.versions:
                if any(entry.in_version(version) for entry in entries):
                    self._check_lease()
                    delete_summary(self._head, version)
            for shard in rows:
                marks = np.zeros(len(rows[shard]), np.bool_)
                self._check_lease()
                self._put(encode_objects(self._done_spec, marks, first=shard))

    def restore_metadata(self) -> tuple[str, ...]:
        """Write the metadata and coordinates that are not as schema and manifest want them.

        Returns:
            Keys of the objects that were written.

        Raises:
            StoreLockedError: Another build holds the store, or has changed it since.
            StoreWriteError: An object cannot be written.
        """
        with self._locked():
            head, token = read_head_with_token(self._head.location)
            num_rows = head.num_rows if head.complete else self._manifest.num_rows
            written = self._put_changed(self._derived_objects(num_rows))
            arrays = consolidated_metadata(self.schema, num_rows) if head.complete else {}
            if any(head.arrays.get(name) != node for name, node in arrays.items()):
                attributes = head.attributes | {"coordinates": coordinates_attribute(self.schema)}
                self._check_lease()
                replace_head(replace(head, arrays=arrays, attributes=attributes), token)
                written = (*written, HEAD_KEY)
        return written

    def restore_summaries(self, damaged: Collection[int] = ()) -> tuple[str, ...]:
        """Make the summaries of published versions that are missing or damaged.

        Versions of which images are not done, or counts are damaged, are left without.

        Args:
            damaged: Versions whose summary is to be made anew.

        Returns:
            Keys of the objects that were written.

        Raises:
            StoreLockedError: Another build holds the store.
            StoreWriteError: An object cannot be written.
        """
        written: tuple[str, ...] = ()
        with self._locked():
            head = read_head(self._head.location)
            if not isinstance(head.schema, MapSchema) or not head.complete:
                return ()
            done = read_done(head.location, done_spec(head.schema, head.num_rows))
            base: Manifest | None = None
            for version, digest in sorted(head.versions.items()):
                try:
                    manifest = read_manifest(head, version)
                except StoreFormatError:
                    continue  # damaged: verification lists it
                if version in damaged:
                    delete_summary(head, version)
                if open_summary(head, manifest) is None and done[list(manifest.rows)].all():
                    summary = summary_objects(head, manifest, digest, base)
                    self._check_lease()
                    written += self._put_changed(summary)
                base = manifest
        return written

    # -- making ------------------------------------------------------------------------------

    def _lay_out(self, ticket: LeaseTicket) -> None:
        """Write everything but maps; the root comes last, so that it vouches for the rest."""
        location = self._head.location
        manifest = self._manifest.encode()
        for key, data in self._derived_objects(self._manifest.num_rows).items():
            location.put(key, data)
        location.put(VERSIONS_KEY, group_metadata({}))
        location.put(manifest_key(self.version), manifest)
        ticket.check()
        self._head = replace(self._head, draft=(self.version, manifest_digest(manifest)))
        location.create(HEAD_KEY, self._head.encode())

    def _derived_objects(self, num_rows: int, first_row: int = 0) -> dict[str, bytes]:
        """Metadata, and coordinates from a row on."""
        keys = self._head.location.list_sizes(f"{LAST_VERSION}/c")
        chunks = [int(key.rpartition("/")[2]) for key, _ in keys]
        coordinates = coordinate_objects(
            self.schema, self._manifest, num_rows, first_row=first_row, rewritten=chunks
        )
        return metadata_objects(self.schema, num_rows) | coordinates

    def _put_changed(self, objects: Mapping[str, bytes]) -> tuple[str, ...]:
        location = self._head.location
        changed = tuple(key for key, data in objects.items() if location.get(key) != data)
        for key in changed:
            location.put(key, objects[key])
        return changed

    def _refuse_mismatch(
        self,
        schema: Schema | None,
        identity: Mapping[str, Any] | None,
        sizes: Sequence[str],
    ) -> None:
        """Compare what is given; of the schema's sizes only those listed, and no chunk shapes."""
        lines: list[str] = []
        if identity is not None:
            lines += identity_difference(identity, self._head.identity)
        if schema is not None:
            left_out = {*self.schema.sizes, *_CHUNKS} - set(sizes)
            wanted, found = (
                {key: value for key, value in each.to_json().items() if key not in left_out}
                for each in (schema, self.schema)
            )
            lines += [f"schema.{line}" for line in identity_difference(wanted, found)]
        if lines:
            raise mismatch_error(self.path, lines)

    def _refuse_other_images(self, images: Sequence[ImageRecord], ordered: bool) -> None:
        if not ordered and _same_images(images, self.records):
            return
        lines = record_differences(images, self.records)
        if lines:
            raise mismatch_error(self.path, lines)

    # -- leases ------------------------------------------------------------------------------

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
            StoreMismatchError: This writer's version was planned or published otherwise.
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
        """SHA-256 of this version's manifest as it was when the writer was made."""
        head = self._head
        if self.version in head.versions:
            return head.versions[self.version]
        if head.draft is not None and head.draft[0] == self.version:
            return head.draft[1]
        return manifest_digest(self._manifest.encode())

    def _complete_summaries(self) -> None:
        """Make the summaries that are missing, as after a repair, unless shards are pending."""
        location = self._head.location
        missing = isinstance(self.schema, MapSchema) and any(
            location.get(summary_key(version)) is None for version in self._head.versions
        )
        if missing and not self.pending_shards():
            self.restore_summaries()

    def _refuse_pending(self) -> None:
        pending = self.pending_shards()
        if pending:
            shown = ", ".join(map(str, pending[:_LISTED]))
            more = f" and {len(pending) - _LISTED} more" if len(pending) > _LISTED else ""
            raise StoreIncompleteError(
                f"{self.path}: expected all {len(self._by_shard)} shards to be done, but "
                f"{len(pending)} are not ({shown}{more}); {self.schema.remedy} to finish them"
            )

    # -- writing -----------------------------------------------------------------------------

    @cached_property
    def _by_shard(self) -> dict[int, list[RowEntry]]:
        return self._manifest.by_shard(self.schema.shard_images)

    @cached_property
    def _retired_by_shard(self) -> dict[int, list[RowEntry]]:
        """Rows of each shard that only earlier versions have."""
        shards: dict[int, list[RowEntry]] = {}
        for entry in self._manifest.living(self._head.versions):
            if entry.last_version != NEVER:
                shards.setdefault(entry.row // self.schema.shard_images, []).append(entry)
        return shards

    @cached_property
    def _done_spec(self) -> ArraySpec:
        return done_spec(self.schema, self._manifest.num_rows)

    def _in_row_order(
        self, shard: int, records: list[ImageRecord], maps: Sequence[_Item]
    ) -> list[_Item]:
        if not records:
            raise ShardDataError(
                f"{self.path}: shard {shard}: expected a shard with images of version "
                f"{self.version}, got one that earlier versions alone use; write pending shards"
            )
        by_id = {item.image_id: item for item in maps}
        wanted = {record.image_id for record in records}
        missing = [record.image_id for record in records if record.image_id not in by_id]
        foreign = sorted(by_id.keys() - wanted)
        if missing or foreign or len(by_id) != len(maps):
            raise ShardDataError(
                f"{self.path}: shard {shard}: expected those of its {len(records)} images, got "
                f"{len(maps)}; missing: {missing[:_LISTED] or 'none'}, not of this shard: "
                f"{foreign[:_LISTED] or 'none'}"
            )
        return [by_id[record.image_id] for record in records]

    def _put(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            self._head.location.put(key, content)


class MapWriter(StoreWriter[MapSchema, ImageMaps]):
    """Writes the maps of a data set split."""

    _schema_type = MapSchema


class PackWriter(StoreWriter[PackSchema, PackedImage]):
    """Writes the decoded images and labels of a data set split."""

    _schema_type = PackSchema


def _same_images(images: Sequence[ImageRecord], others: Sequence[ImageRecord]) -> bool:
    return len(images) == len(others) and set(images) == set(others)


def plan_images(head: Head, base: Manifest | None, images: Sequence[ImageRecord]) -> Manifest:
    """The plan of the next version for these images, which keeps what an earlier plan has done."""
    draft = read_draft(head)
    free_row = head.num_rows
    if draft is None:
        # A plan that cannot be read may have left finished shards: no row of theirs is used.
        marks = [int(key.split("/")[2]) for key, _ in head.location.list_sizes("done/c")]
        free_row = max([free_row, *((shard + 1) * head.schema.shard_images for shard in marks)])
    return plan_version(
        head.next_version,
        images,
        base=base,
        draft=draft,
        versions=sorted(head.versions),
        free_row=free_row,
        shard_images=head.schema.shard_images,
    )
