"""Writing a store shard by shard; see docs/store-format.md, section 7, for the protocol.

Any number of processes may write different shards of one store at once. A shard has one writer,
and its completion marks are the last thing it writes, so that a killed build loses the shards
under way and nothing else. What is planned and published is decided under the store's lease.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, Generic, Self, TypeVar

from rdd_storage.coordinates import coordinates_attribute, root_attributes
from rdd_storage.errors import (
    LeaseLostError,
    ShardDataError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreWriteError,
)
from rdd_storage.growth import Growth, compare_images, plan_images
from rdd_storage.identity import canonical, fingerprint, identity_difference, mismatch_error
from rdd_storage.layout import (
    FIRST_VERSION,
    NEVER,
    consolidated_metadata,
    encode_objects,
    group_metadata,
)
from rdd_storage.lease import LeaseTicket, hold_lease
from rdd_storage.location import locate
from rdd_storage.manifest import (
    HEAD_KEY,
    VERSIONS_KEY,
    Head,
    Manifest,
    manifest_digest,
    manifest_key,
    read_draft,
    read_head_with_token,
    read_manifest,
    replace_head,
    store_draft,
)
from rdd_storage.maps import ImageLogits, ImageMaps
from rdd_storage.open_version import BRIEF_WAIT
from rdd_storage.packs import PackedImage
from rdd_storage.restoring import RestorableVersion
from rdd_storage.rows import RowEntry
from rdd_storage.schema import (
    ImageRecord,
    MapSchema,
    PackSchema,
    Schema,
    SchemaT,
    check_images,
    record_differences,
)
from rdd_storage.shards import Content, ShardContent, check_content
from rdd_storage.summary_store import summary_objects

_CHUNKS = ("chunk_height", "chunk_width")
_LISTED = 10  # differing images that a message names

_Item = TypeVar("_Item", bound=Content | ImageLogits)
_ContentT = TypeVar("_ContentT", bound=Content)


class StoreWriter(RestorableVersion[SchemaT], Generic[SchemaT, _ContentT]):
    """Writes what is stored of a data set split; :class:`MapWriter` and :class:`PackWriter` are
    for the two kinds of stores, this class is for what they share.

    Made by :meth:`create`, :meth:`extend` or :meth:`open`. Picklable: a worker process that
    receives one writes to the same store, under the lease that was held when it was pickled.
    """

    def __init__(self, head: Head, manifest: Manifest, growth: Growth | None = None) -> None:
        super().__init__(head, manifest)
        self._growth = growth

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

    @property
    def growth(self) -> Growth | None:
        """What this version changes; None unless made by :meth:`extend`."""
        return self._growth

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

    # -- writing -----------------------------------------------------------------------------

    @cached_property
    def _retired_by_shard(self) -> dict[int, list[RowEntry]]:
        """Rows of each shard that only earlier versions have."""
        shards: dict[int, list[RowEntry]] = {}
        for entry in self._manifest.living(self._head.versions):
            if entry.last_version != NEVER:
                shards.setdefault(entry.row // self.schema.shard_images, []).append(entry)
        return shards

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

    def _refuse_pending(self) -> None:
        pending = self.pending_shards()
        if pending:
            shown = ", ".join(map(str, pending[:_LISTED]))
            more = f" and {len(pending) - _LISTED} more" if len(pending) > _LISTED else ""
            raise StoreIncompleteError(
                f"{self.path}: expected all {len(self._by_shard)} shards to be done, but "
                f"{len(pending)} are not ({shown}{more}); {self.schema.remedy} to finish them"
            )


class MapWriter(StoreWriter[MapSchema, ImageMaps]):
    """Writes the maps of a data set split."""

    _schema_type = MapSchema


class PackWriter(StoreWriter[PackSchema, PackedImage]):
    """Writes the decoded images and labels of a data set split."""

    _schema_type = PackSchema


def _same_images(images: Sequence[ImageRecord], others: Sequence[ImageRecord]) -> bool:
    return len(images) == len(others) and set(images) == set(others)
