"""Planning the next version of a store: which images keep their rows, and which get new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdd_storage.manifest import Head, Manifest, read_draft
from rdd_storage.rows import RowEntry, RowTable
from rdd_storage.schema import ImageRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Difference between the published version of a store and the images asked for."""

    added: tuple[str, ...]
    """Images that the published version does not have."""
    changed: tuple[str, ...]
    """Images whose digest or sizes differ from the published version's."""
    removed: tuple[str, ...]
    """Images of the published version that are not asked for."""
    kept: int
    """Number of images that keep their maps."""

    @property
    def empty(self) -> bool:
        """Whether nothing has changed, so that no new version is made."""
        return not (self.added or self.changed or self.removed)

    def __str__(self) -> str:
        if self.empty:
            return f"no change ({self.kept} images)"
        return (
            f"{len(self.added)} added, {len(self.changed)} changed, {len(self.removed)} removed, "
            f"{self.kept} kept"
        )


def compare_images(base: Manifest | None, images: Sequence[ImageRecord]) -> Growth:
    """What growing from a version to these images means; None stands for an empty version."""
    before = {record.image_id: record for record in base.records} if base is not None else {}
    names = {record.image_id for record in images}
    return Growth(
        added=tuple(r.image_id for r in images if r.image_id not in before),
        changed=tuple(r.image_id for r in images if before.get(r.image_id, r) != r),
        removed=tuple(name for name in before if name not in names),
        kept=sum(before.get(record.image_id) == record for record in images),
    )


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


def plan_version(
    version: int,
    images: Sequence[ImageRecord],
    *,
    base: Manifest | None,
    draft: Manifest | None,
    versions: Sequence[int],
    free_row: int,
    shard_images: int,
) -> Manifest:
    """The manifest of the next version.

    An image keeps the row that it has in the published version or in an earlier plan for the next
    one. The others get rows that were never used, from the border of a shard on, so that no shard
    that may be finished is written again, and a row never changes its image.

    Args:
        version: Number of the version to plan.
        images: Its images.
        base: The published version; None where there is none.
        draft: An earlier plan for the same version.
        versions: Versions that can be read; rows that none of them has are forgotten.
        free_row: No row from here on has ever been used.
        shard_images: K, images per shard.
    """
    known = {entry.record: entry for entry in (draft.entries if draft is not None else ())}
    if base is not None:
        known |= {entry.record: entry for entry in base.entries}
    entries = [known[record] for record in images if record in known]
    used = max(free_row, *(part.num_rows for part in (base, draft) if part is not None), 0)
    num_rows = used
    new = [record for record in images if record not in known]
    if new:
        start = -(-used // shard_images) * shard_images
        num_rows = start + len(new)
        entries += [
            RowEntry(row=start + index, record=record, first_version=version)
            for index, record in enumerate(new)
        ]
    retired: list[RowEntry] = []
    if base is not None:
        kept = {entry.row for entry in entries}
        retired = [entry for entry in base.living(versions) if entry.last_version < base.version]
        retired += [
            replace(entry, last_version=base.version)
            for entry in base.entries
            if entry.row not in kept
        ]
    return Manifest(
        version=version,
        num_rows=num_rows,
        entries=RowTable.of(sorted(entries, key=lambda entry: entry.row)),
        retired=RowTable.of(sorted(retired, key=lambda entry: entry.row)),
    )
