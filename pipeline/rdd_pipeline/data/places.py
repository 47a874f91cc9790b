"""Folders of data sets, on file systems and in object stores alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePath

from rdd_pipeline.errors import DataError
from rdd_storage.objects import ObjectLocation, object_location


class Place(ABC):
    """A folder or file that may be there, with as much of :class:`pathlib.Path` as is needed."""

    listings: Listings
    """What has been listed of object stores since the data set's root was opened."""

    @property
    def name(self) -> str:
        """The last part."""
        return PurePath(str(self)).name

    @abstractmethod
    def __truediv__(self, below: str) -> Place:
        """What is below, or, for an absolute path or a URL, that."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether it is a folder; one in an object store is never empty."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether it is a folder or a file."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of the files in the folder, sorted; on file systems those of folders too."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders in the folder, sorted."""

    @abstractmethod
    def glob(self, pattern: str) -> list[str]:
        """Paths or URLs of the files that match a pattern, as of ``Path.glob``, sorted."""

    @abstractmethod
    def read_text(self) -> str:
        """Content of a text file.

        Raises:
            OSError: It cannot be read.
            UnicodeDecodeError: It is not UTF-8.
        """


def open_place(root: Path | str) -> Place:
    """The folder of a path or URL.

    Raises:
        LocationError: The URL names no bucket.
        ExtraNotInstalledError: Object stores need the extra ``s3``, which is not installed.
    """
    return _place(str(root), Listings())


def _place(text: str, listings: Listings) -> Place:
    if "://" in text:
        return ObjectPlace(object_location(text).url, listings)
    return LocalPlace(Path(text), listings)


@dataclass(frozen=True, slots=True)
class LocalPlace(Place):
    """A place on a file system."""

    path: Path
    listings: Listings

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, below: str) -> Place:
        if "://" in below:
            return _below_bucket(below, self.listings)
        return LocalPlace(self.path / below, self.listings)

    def is_folder(self) -> bool:
        """See :meth:`Place.is_folder`."""
        return self.path.is_dir()

    def exists(self) -> bool:
        """See :meth:`Place.exists`."""
        return self.path.exists()

    def files(self) -> list[str]:
        """See :meth:`Place.files`. One scan that asks for the state of none."""
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries)

    def folders(self) -> list[str]:
        """See :meth:`Place.folders`."""
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def glob(self, pattern: str) -> list[str]:
        """See :meth:`Place.glob`."""
        # As strings: a hundred thousand paths would take seconds to sort and take apart.
        return sorted(map(str, self.path.glob(pattern)))

    def read_text(self) -> str:
        """See :meth:`Place.read_text`."""
        return self.path.read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class ObjectPlace(Place):
    """A place in an object store."""

    url: str
    """Not quoted: ``%``, ``?`` and ``#`` in names are themselves."""
    listings: Listings

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, below: str) -> Place:
        if "://" in below:
            return _below_bucket(below, self.listings)
        if below.startswith("/"):
            return LocalPlace(Path(below), self.listings)
        parts = [part for part in below.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise DataError(f"{self.url}/{below}: expected a path without '..', got one with it")
        return ObjectPlace("/".join([self.url, *parts]), self.listings)

    def is_folder(self) -> bool:
        """See :meth:`Place.is_folder`."""
        return self.listings.has_any(self.url)

    def exists(self) -> bool:
        """See :meth:`Place.exists`."""
        if self.is_folder():
            return True
        bucket, key = in_bucket(self.url)
        return bucket.size(key) is not None

    def files(self) -> list[str]:
        """See :meth:`Place.files`."""
        return self.listings.of(self.url).names.get(self.url, [])

    def folders(self) -> list[str]:
        """See :meth:`Place.folders`."""
        start = f"{self.url}/"
        below = (name for name in self.listings.of(self.url).names if name.startswith(start))
        return sorted({name[len(start) :].partition("/")[0] for name in below})

    def glob(self, pattern: str) -> list[str]:
        """See :meth:`Place.glob`."""
        start, wanted = f"{self.url}/", PurePath(pattern).parts
        return [
            url
            for url in self.listings.of(self.url).stamps
            if url.startswith(start) and _matches(url[len(start) :].split("/"), wanted)
        ]

    def read_text(self) -> str:
        """See :meth:`Place.read_text`."""
        bucket, key = in_bucket(self.url)
        found = bucket.get(key)
        if found is None:
            raise FileNotFoundError(f"{self.url}: no such object")
        return found.decode("utf-8")


def _below_bucket(pattern: str, listings: Listings) -> Place:
    """The place of a URL of the configuration that may have wildcards."""
    scheme, _, rest = pattern.partition("://")
    bucket, _, path = rest.partition("/")
    return _place(f"{scheme}://{bucket}", listings) / path


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        return len(pattern) > 1 and any(
            _matches(parts[start:], pattern[1:]) for start in range(len(parts))
        )
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All objects below a folder."""

    stamps: dict[str, str | None]
    """By URL, in order: see :meth:`rdd_storage.objects.ObjectLocation.get_stamped`."""
    names: dict[str, list[str]]
    """Names of the files in each folder that has some, by the folder's URL."""


@dataclass(slots=True)
class Listings:
    """What is in object stores below the folders of a data set, each listed once.

    Copies in other processes begin without any.
    """

    _found: dict[str, Listing] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Listings], tuple[()]]:
        return Listings, ()

    def of(self, folder: str) -> Listing:
        """A listing that has all that is below a folder, and maybe more.

        Raises:
            LocationError: There is no such bucket.
            StoreUnavailableError, StoreAccessError: The object store does not answer or refuses.
        """
        known = self._covering(folder)
        if known is None:
            known = self._found[folder] = _list(folder)
        return known

    def has_any(self, folder: str) -> bool:
        """Whether anything is below a folder; one that has not been listed is not for that."""
        known = self._covering(folder)
        if known is None:
            bucket, key = in_bucket(folder)
            return bucket.has_any(key)
        return any(name == folder or name.startswith(f"{folder}/") for name in known.names)

    def stamp(self, url: str) -> str | None:
        """Stamp of an object; None where there is none, or no such object."""
        return self.of(url.rpartition("/")[0]).stamps.get(url)

    def _covering(self, folder: str) -> Listing | None:
        return next((self._found[one] for one in _upwards(folder) if one in self._found), None)


def _upwards(url: str) -> Iterator[str]:
    """A folder and those above it, up to the bucket."""
    while not url.endswith(":/"):
        yield url
        url = url.rpartition("/")[0]


def _list(folder: str) -> Listing:
    bucket, prefix = in_bucket(folder)
    stamps = {f"{bucket.url}/{key}": stamp for key, stamp in bucket.list_stamped(prefix).items()}
    names: defaultdict[str, list[str]] = defaultdict(list)
    for url in stamps:
        above, _, name = url.rpartition("/")
        names[above].append(name)
    return Listing(stamps=stamps, names={above: sorted(found) for above, found in names.items()})


def in_bucket(url: str) -> tuple[ObjectLocation, str]:
    """The bucket of an object's URL that is not quoted, and the object's key."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return _bucket(f"{scheme}://{bucket}"), key


@lru_cache(maxsize=8)
def _bucket(url: str) -> ObjectLocation:
    return object_location(url)
