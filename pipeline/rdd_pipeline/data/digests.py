"""Digests of image files, kept so that files that have not changed are not read again.

What an image and its label were, and that nothing was wrong with them, is known by their places
together with their stamps: size and times of a local file, size and ETag of an object. It is kept
in ``digests.sqlite`` in ``$RDD_CACHE`` (else ``$XDG_CACHE_HOME/rdd-maps``, else
``~/.cache/rdd-maps``), for all runs of a user and for several processes at once. The file can be
deleted at any time.

A file that is changed twice within one tick of the file system's clock has the same times after
both. So, as git does, what was read of a file that had just been changed is not kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rdd_pipeline.data.base import Progress, in_threads
from rdd_pipeline.data.places import Listings, in_bucket
from rdd_pipeline.data.reading import EncodedImage, ObjectFile, image_size, read_bytes, source_of
from rdd_pipeline.errors import ImageReadError
from rdd_pipeline.files import cache_folder

logger = logging.getLogger("rdd.data")

_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use, FAT's
_BATCH = 1000  # images asked for, or written, at a time: what an interruption loses
_WAIT_SECONDS = 10.0  # for another process that writes
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What an image and its label are."""

    digest: str
    """SHA-256, as hex, of the image file's bytes followed by the label file's bytes."""
    size: tuple[int, int] | None
    """Height and width; None where the image's header is damaged."""


def pair_contents(
    images: Sequence[str],
    labels: Sequence[str],
    listings: Listings,
    *,
    read_all: bool = False,
    progress: Progress | None = None,
) -> list[Content]:
    """Digests and sizes of images with their labels.

    Args:
        images: Paths or URLs.
        labels: As many.
        listings: Where the stamps of objects come from.
        read_all: Read every file, whatever is known of it.
        progress: Called with the number of images finished since the last call.

    Returns:
        The contents, in order.

    Raises:
        ImageReadError: A file is missing or cannot be read. What was read before is kept.
        StoreUnavailableError, StoreAccessError: An object store does not answer or refuses.
    """
    keys = _keys(images, labels)
    known: dict[int, Content] = {}
    with DigestCache(cache_file()) as cache:
        if not read_all:
            known = cache.find(keys, _stamps(images, labels, listings))
        if known and progress is not None:
            progress(len(known))
        missing = [index for index in range(len(images)) if index not in known]
        logger.debug("%d of %d images are read for their digests", len(missing), len(images))

        def read(number: int) -> tuple[Content, bytes | None]:
            index = missing[number]
            return _read(images[index], labels[index])

        found: list[tuple[bytes, bytes, Content]] = []
        try:
            reading = in_threads(read, len(missing), progress, over_network(images, labels))
            for index, (content, stamp) in zip(missing, reading, strict=True):
                known[index] = content
                if stamp is not None and content.size is not None:
                    found.append((keys[index], stamp, content))
                if len(found) >= _BATCH:
                    cache.keep(found)
                    found = []
        finally:
            cache.keep(found)
    return [known[index] for index in range(len(images))]


def pair_problems(
    images: Sequence[str],
    labels: Sequence[str],
    listings: Listings,
    examine: Callable[[int], Sequence[str]],
    *,
    how: str,
    read_all: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Everything wrong with images and labels; those known to be in order are not read again.

    Args:
        images: Paths or URLs.
        labels: As many.
        listings: Where the stamps of objects come from.
        examine: Gives the problems of the pair at an index.
        how: What the outcome depends on, apart from the files.
        read_all: Examine every pair, whatever is known of it.
        progress: Called with the number of images finished since the last call.

    Raises:
        StoreUnavailableError, StoreAccessError: An object store does not answer or refuses.
    """
    keys = [_hash(f"{key.hex()}\n{how}") for key in _keys(images, labels)]
    stamps = _stamps(images, labels, listings, settled=True)
    problems: list[str] = []
    with DigestCache(cache_file()) as cache:
        good = set() if read_all else cache.find_good(keys, stamps)
        if good and progress is not None:
            progress(len(good))
        left = [index for index in range(len(images)) if index not in good]
        logger.debug("%d of %d images are checked", len(left), len(images))
        found: list[tuple[bytes, bytes]] = []
        remote = over_network(images, labels)
        try:
            checking = in_threads(lambda n: examine(left[n]), len(left), progress, remote)
            for index, lines in zip(left, checking, strict=True):
                problems += lines
                stamp = stamps[index]
                if stamp is not None and not lines:
                    found.append((keys[index], stamp))
        finally:
            cache.keep_good(found)
    return problems


def cache_file() -> Path | None:
    """Where digests are kept; None where the user has no home."""
    folder = cache_folder()
    return None if folder is None else folder / "digests.sqlite"


class DigestCache:
    """Contents by keys and stamps, in a file of SQLite; a context manager.

    Whatever is wrong with the file is logged, and files are read.

    Args:
        file: The file, which is made when something is kept; None to keep nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> DigestCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def find(self, keys: Sequence[bytes], stamps: Sequence[bytes | None]) -> dict[int, Content]:
        """Contents of those pairs, by position, that are known with these stamps."""
        found: dict[int, Content] = {}

        def look(connection: sqlite3.Connection) -> None:
            for index, (key, stamp) in enumerate(zip(keys, stamps, strict=True)):
                if stamp is None:
                    continue
                row = connection.execute(
                    "SELECT digest, height, width FROM contents WHERE key = ? AND stamp = ?",
                    (key, stamp),
                ).fetchone()
                if row is not None:
                    found[index] = Content(digest=row[0].hex(), size=(row[1], row[2]))

        self._try(look)
        return found

    def keep(self, contents: Iterable[tuple[bytes, bytes, Content]]) -> None:
        """Keep contents by key and stamp, in one transaction; earlier ones of the keys go."""
        rows = [
            (key, stamp, bytes.fromhex(content.digest), *content.size)
            for key, stamp, content in contents
            if content.size is not None
        ]

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)", rows)

        if rows:
            self._try(write)

    def find_good(self, keys: Sequence[bytes], stamps: Sequence[bytes | None]) -> set[int]:
        """Positions of those pairs with which, with these stamps, nothing was wrong."""
        found: set[int] = set()

        def look(connection: sqlite3.Connection) -> None:
            for index, pair in enumerate(zip(keys, stamps, strict=True)):
                query = "SELECT 1 FROM good WHERE key = ? AND stamp = ?"
                if connection.execute(query, pair).fetchone():
                    found.add(index)

        self._try(look)
        return found

    def keep_good(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep keys and stamps of pairs with which nothing is wrong."""
        if pairs:
            self._try(
                lambda connection: connection.executemany(
                    "INSERT OR REPLACE INTO good VALUES (?, ?)", pairs
                )
            )

    def _try(self, act: Callable[[sqlite3.Connection], object]) -> None:
        if self._file is None:
            return
        try:
            if self._connection is None:
                self._connection = _open(self._file)
            with self._connection:  # a transaction
                act(self._connection)
        except (OSError, sqlite3.OperationalError) as error:
            logger.warning(
                "%s: digests cannot be kept there (%s); files are read again next time. RDD_CACHE "
                "names another folder",
                self._file,
                error,
            )
            self._close()
            self._file = None
        except sqlite3.DatabaseError as error:
            logger.warning("%s: is damaged (%s) and begun anew; files are read", self._file, error)
            self._close()
            self._remove(self._file)

    def _remove(self, file: Path) -> None:
        try:
            # The journal first: a new file must not be rolled back by it.
            for path in (file.with_name(f"{file.name}-journal"), file):
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: cannot be removed (%s)", file, error)
            self._file = None

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _open(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file, timeout=_WAIT_SECONDS)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS contents (key BLOB PRIMARY KEY, stamp BLOB NOT NULL, "
            "digest BLOB NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL) WITHOUT ROWID"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS good (key BLOB PRIMARY KEY, stamp BLOB NOT NULL) "
            "WITHOUT ROWID"
        )
    except BaseException:
        connection.close()
        raise
    return connection


def _keys(images: Sequence[str], labels: Sequence[str]) -> list[bytes]:
    """What stands for the places of pairs: sixteen bytes each, however long the paths are."""
    here = str(Path.cwd())

    def place(file: str) -> str:
        if "://" in file:
            return f"{in_bucket(file)[0].server} {file}"
        return file if file.startswith("/") else f"{here}/{file}"

    return [
        _hash(f"{_FORMAT}\n{place(image)}\n{place(label)}")
        for image, label in zip(images, labels, strict=True)
    ]


def _stamps(
    images: Sequence[str], labels: Sequence[str], listings: Listings, *, settled: bool = False
) -> list[bytes | None]:
    """Stamps of pairs as they are now; None for those of which nothing can be known.

    ``settled`` leaves out files that were changed too lately to tell another change.
    """

    def stamp(file: str) -> str | None:
        return listings.stamp(file) if "://" in file else _file_stamp(file, settled=settled)

    def part(number: int) -> list[bytes | None]:
        some = slice(number * _BATCH, (number + 1) * _BATCH)
        pairs = zip(images[some], labels[some], strict=True)
        return [_pair_stamp(stamp(image), stamp(label)) for image, label in pairs]

    # In threads, for file systems that have to ask a server. Stamps of objects have been listed.
    count = -(-len(images) // _BATCH)
    parts = (
        map(part, range(count)) if over_network(images, labels) else in_threads(part, count, None)
    )
    return [stamp for found in parts for stamp in found]


def over_network(images: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether files of a data set come from an object store: all of a kind do, or none."""
    return any("://" in file for file in (*images[:1], *labels[:1]))


def _file_stamp(path: str, *, settled: bool = False) -> str | None:
    """Size and times of a file; None if it is not there, or was changed too lately to tell."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path would take longer than the question
    except OSError:
        return None
    # Writing sets both times; programs can set the first one back, but not the second.
    if settled and found.st_ctime_ns > time.time_ns() - _SETTLED_NS:
        return None
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _pair_stamp(image: str | None, label: str | None) -> bytes | None:
    return None if image is None or label is None else _hash(f"{image}\n{label}")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16]


def _read(image: str, label: str) -> tuple[Content, bytes | None]:
    """Read a pair; its stamp is of what was read, or of an earlier state."""
    first, image_stamp = _stamped(image)
    digest = hashlib.sha256(first.data)
    try:
        size = image_size(first)
    except ImageReadError:  # named by the check of the files, and by whoever needs the size
        size = None
    del first
    second, label_stamp = _stamped(label)
    digest.update(second.data)
    return Content(digest=digest.hexdigest(), size=size), _pair_stamp(image_stamp, label_stamp)


def _stamped(file: str) -> tuple[EncodedImage, str | None]:
    source = source_of(file)
    if isinstance(source, ObjectFile):
        return source.fetch()
    stamp = _file_stamp(file, settled=True)  # before reading: later changes make another stamp
    return EncodedImage(name=file, data=read_bytes(source)), stamp
