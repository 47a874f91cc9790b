"""Adding logits to a store that was built without them (docs/store-format.md, 7.12).

The addition is a version of its own, with the images of the one before: it writes one object for
each shard and touches no other map. A shard whose object has all its images is done, so that an
interrupted addition goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike

import numpy as np

from rdd_storage.chunks import ChunkError, ChunkLayout, chunk_range
from rdd_storage.errors import LeaseLostError, ShardDataError, StoreIncompleteError, StoreWriteError
from rdd_storage.growth import plan_images
from rdd_storage.layout import ArraySpec, array_metadata, encode_objects, map_specs, object_key
from rdd_storage.lease import hold_lease
from rdd_storage.location import Location, locate
from rdd_storage.manifest import (
    Head,
    Manifest,
    read_draft,
    read_head,
    read_head_with_token,
    read_manifest,
    require_schema,
    store_draft,
)
from rdd_storage.maps import ImageLogits, ImageMaps, check_logits
from rdd_storage.open_version import BRIEF_WAIT
from rdd_storage.rows import RowEntry
from rdd_storage.schema import with_arrays
from rdd_storage.writer import MapWriter

ADDABLE = {"logits": "'rdd maps build CONFIG --set maps.soft_labels=true'"}
"""Arrays that a published store may be given later, since no other map depends on them; and the
command that adds each."""

_REQUESTS = 16  # at a time, for the ends of objects


class MapAddition(MapWriter):
    """Adds logits to the images of a published version, as the next version.

    Made by :meth:`plan`; otherwise used like :class:`~rdd_storage.writer.MapWriter`. Readers of
    the published version see nothing of it before :meth:`publish`, and nothing but the new
    version's number and logits after it.
    """

    @classmethod
    def plan(cls, path: str | PathLike[str]) -> MapAddition:
        """Plan the addition, or resume it; the writer is complete where there are logits.

        A plan for other images that was not finished is given up: extend the store first.

        Args:
            path: Path or URL of the store.

        Raises:
            StoreNotFoundError: There is no map store.
            StoreIncompleteError: No version is published yet.
            StoreLockedError: Another build of this store is under way.
            StoreWriteError: The place cannot be written.
        """
        location = locate(path)
        head = read_head(location)
        require_schema(head, cls._schema_type)
        manifest = _plan(head)
        if manifest.version in head.versions or manifest == read_draft(head):
            return cls(head, manifest)
        with hold_lease(location, wait=BRIEF_WAIT) as lease:
            head, token = read_head_with_token(location)
            manifest = _plan(head)
            if manifest.version not in head.versions:
                lease.ticket.check()
                head = store_draft(head, token, manifest)
        return cls(head, manifest)

    def pending_shards(self) -> list[int]:
        """Shards without logits of all their images, in rising order; read each time."""
        if self.complete:
            return []
        return shards_without(
            self._head.location, list(self._added_specs().values()), self._by_shard
        )

    def write_shard(self, shard: int, maps: Sequence[ImageMaps | ImageLogits]) -> None:
        """Write the logits of a shard, and nothing else; see :meth:`MapWriter.write_shard`.

        Args:
            shard: Number of the shard.
            maps: The logits of its images, one for each, in any order.

        Raises:
            ShardDataError: An image is missing, foreign or given twice, or its logits have a wrong
                shape, dtype or value; nothing has been written then.
            StoreWriteError: The object could not be written.
            LeaseLostError: The lease this writer worked under is lost; nothing has been written.
        """
        self.shard_rows(shard)
        entries = self._by_shard.get(shard, [])
        ordered = self._in_row_order(shard, [entry.record for entry in entries], maps)
        offsets = [entry.row % self.schema.shard_images for entry in entries]
        present = np.zeros(max(offsets) + 1, np.bool_)
        present[offsets] = True
        try:
            for name, spec in self._added_specs().items():
                batch = np.full((len(present), *spec.shape[1:]), spec.fill, spec.numpy_dtype)
                for offset, entry, item in zip(offsets, entries, ordered, strict=True):
                    values = getattr(item, name)
                    check_logits(name, values, entry.record, self.schema, wanted=True)
                    batch[offset, ..., : values.shape[-2], : values.shape[-1]] = values
                self._check_lease()
                self._put(encode_objects(spec, batch, first=shard, present=present))
        except (ShardDataError, StoreWriteError, LeaseLostError) as error:
            error.add_note(f"while adding logits to shard {shard} of {self.path}")
            raise

    def _added_specs(self) -> dict[str, ArraySpec]:
        return added_specs(self._head, self._manifest)


def added_specs(head: Head, manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays that a version adds, for one shard."""
    schema = with_arrays(head.schema, manifest.adds)
    specs = map_specs(schema, schema.shard_images)
    return {name: specs[name] for name in manifest.adds if name in specs}


def shards_without(
    location: Location, specs: Sequence[ArraySpec], entries: Mapping[int, Sequence[RowEntry]]
) -> list[int]:
    """The shards of which an array's object does not have all rows, in rising order.

    Args:
        location: The store.
        specs: Sharded arrays.
        entries: The rows asked for, by shard.
    """
    layouts = {
        spec.name: ChunkLayout.from_metadata(json.loads(array_metadata(spec))) for spec in specs
    }

    def lacks(shard: int) -> bool:
        return not all(
            _has_rows(location, spec, layouts[spec.name], shard, entries[shard]) for spec in specs
        )

    shards = sorted(entries)
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="rdd-addition") as pool:
        return [shard for shard, is_open in zip(shards, pool.map(lacks, shards), strict=True)
                if is_open]  # fmt: skip


def _has_rows(
    location: Location, spec: ArraySpec, layout: ChunkLayout, shard: int, rows: Sequence[RowEntry]
) -> bool:
    # Objects are written in one step, so that the index vouches for the chunks.
    tail = location.get_tail(object_key(spec, shard), layout.index_size)
    try:
        index = layout.decode_index(tail or b"")
        per_row = len(index) // spec.units[0]
        for entry in rows:
            first = entry.row % spec.units[0] * per_row
            for number in range(first, first + per_row):
                chunk_range(index, number)
    except ChunkError:
        return False
    return True


def _plan(head: Head) -> Manifest:
    """The version that has logits: the next one, or the published one where that has them."""
    if not head.complete:
        raise StoreIncompleteError(
            f"{head.location}: expected a published version to add logits to, got an unfinished "
            "build; build the maps to their end first"
        )
    base = read_manifest(head)
    missing = tuple(name for name in ADDABLE if not getattr(head.schema, name))
    if not missing:
        return base
    plan = plan_images(head, base, base.records)
    size = head.schema.shard_images
    if -(-plan.num_rows // size) == -(-head.num_rows // size):
        # No rows of a plan given up are to be left alone: the arrays keep their length.
        plan = replace(plan, num_rows=base.num_rows)
    images_of = base.version if base.images_of is None else base.images_of
    return replace(plan, adds=missing, images_of=images_of)
