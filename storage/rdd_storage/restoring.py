"""Restoring a store: shards that are to be built again, metadata and summaries that are made anew.

See docs/store-format.md, 7.10. What is damaged is found by :mod:`rdd_storage.verify`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from rdd_storage.coordinates import coordinates_attribute
from rdd_storage.errors import StoreFormatError
from rdd_storage.layout import consolidated_metadata, done_spec, encode_objects
from rdd_storage.manifest import (
    HEAD_KEY,
    Manifest,
    read_head,
    read_head_with_token,
    read_manifest,
    replace_head,
)
from rdd_storage.marks import read_done
from rdd_storage.open_version import OpenVersion
from rdd_storage.schema import MapSchema, SchemaT
from rdd_storage.summary_store import delete_summary, open_summary, summary_key, summary_objects


class RestorableVersion(OpenVersion[SchemaT]):
    """A version of a store, with what restores the store or has parts of it built again."""

    def reopen_shards(self, shards: Iterable[int]) -> None:
        """Make shards pending again, so that a build writes them anew.

        A published version stays published: its undamaged images are read as before. Summaries
        that have to do with the shards are deleted; the build's publishing makes them again.

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
            arrays = consolidated_metadata(self.schema, num_rows) if head.complete else head.arrays
            attributes = head.attributes | {
                "coordinates": coordinates_attribute(self.schema),
                "class_names": list(self.schema.class_names),
            }
            outdated = any(head.arrays.get(name) != node for name, node in arrays.items())
            if outdated or attributes != head.attributes:
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

    def _complete_summaries(self) -> None:
        """Make the summaries that are missing, as after a repair, unless shards are pending."""
        location = self._head.location
        missing = isinstance(self.schema, MapSchema) and any(
            location.get(summary_key(version)) is None for version in self._head.versions
        )
        if missing and not self.pending_shards():
            self.restore_summaries()
