"""Where a store lives: the one place that turns a path or URL into something readable.

Everything else in the package asks a :class:`Location` for objects by key, for the Zarr store
that plain Zarr reads through, and for the key-value store that tensorstore reads through.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rdd_storage.errors import LocationError, StoreWriteError

_T = TypeVar("_T")
_PARTIAL = ".partial"
_ATTEMPTS = 3
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Location(ABC):
    """A prefix in a file system or object store. Keys are relative and use ``/``."""

    url: str
    """The path or URL as a user would write it."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """Content of an object; None where there is none."""

    def get_many(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """Contents of several objects, in order, fetched together where that saves time."""
        return map(self.get, keys)

    @abstractmethod
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Parts of an object, each given by offset and length; None where there is no object."""

    @abstractmethod
    def get_tail(self, key: str, length: int) -> bytes | None:
        """The last bytes of an object; all of a shorter one; None where there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object so that readers see all of it or nothing, replacing what was there.

        Raises:
            StoreWriteError: The disk is full, permission is missing, or the like.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none of that key; of several callers one succeeds.

        Returns:
            Whether the object was written; False where there was one already.

        Raises:
            StoreWriteError: As for :meth:`put`.
        """

    @abstractmethod
    def get_with_token(self, key: str) -> tuple[bytes, str] | None:
        """Content of an object and a token for :meth:`replace_if`; None where there is none."""

    @abstractmethod
    def replace_if(self, key: str, data: bytes, token: str) -> bool:
        """Replace an object only if it is still the one that ``token`` came with.

        Of several callers with one token at most one succeeds, provided that the new contents
        differ from the old one and that the key is written by :meth:`create` and
        :meth:`replace_if` alone.

        Returns:
            Whether the object was replaced; False where it has changed or is gone.

        Raises:
            StoreWriteError: As for :meth:`put`.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that does not exist is no error."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Size of an object in bytes; None where there is none."""

    @abstractmethod
    def list_sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and size in bytes of every object below a prefix, in order of the keys."""

    @abstractmethod
    def children(self) -> list[Location]:
        """The locations one level below, in order of their names."""

    @abstractmethod
    def remove_partial_writes(self) -> None:
        """Remove what killed writers left behind; only while nobody writes."""

    @abstractmethod
    def kvstore(self, key: str) -> dict[str, Any] | None:
        """A tensorstore key-value store specification for the objects below ``key``.

        None where tensorstore is not used.
        """

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class LocalLocation(Location):
    """A folder of a local or network file system with atomic rename."""

    url: str

    def _path(self, key: str) -> Path:
        return Path(self.url, key)

    def get(self, key: str) -> bytes | None:
        """See :meth:`Location.get`."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """See :meth:`Location.get_ranges`."""
        try:
            with self._path(key).open("rb") as file:
                return [os.pread(file.fileno(), length, offset) for offset, length in ranges]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def get_tail(self, key: str, length: int) -> bytes | None:
        """See :meth:`Location.get_tail`."""
        size = self.size(key)
        found = self.get_ranges(key, [(max((size or 0) - length, 0), length)])
        return None if found is None else found[0]

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`Location.put`. A temporary file beside the target, then a rename."""
        path = self._path(key)
        _write_beside(path, data, lambda partial: partial.replace(path))

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Location.create`. A hard link to a temporary file, which is atomic on NFS too.

        File systems without hard links get an exclusively created file, whose content readers may
        see before it is whole.
        """
        path = self._path(key)

        def finish(partial: Path) -> bool:
            try:
                try:
                    path.hardlink_to(partial)
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    with path.open("xb") as file:
                        file.write(data)
            except FileExistsError:
                return False
            return True

        return _write_beside(path, data, finish)

    def get_with_token(self, key: str) -> tuple[bytes, str] | None:
        """See :meth:`Location.get_with_token`. The token is a digest of the content."""
        data = self.get(key)
        return None if data is None else (data, _content_token(data))

    def replace_if(self, key: str, data: bytes, token: str) -> bool:
        """See :meth:`Location.replace_if`.

        The file is locked while it is compared and then replaced by a rename. Whoever waits for
        the lock gets it on the file that was replaced, notices, and looks again. The operating
        system frees the lock of a process that dies.
        """
        import fcntl  # absent where there is no flock; nothing else here needs it

        path = self._path(key)
        while True:
            try:
                file = path.open("r+b")  # NFS grants exclusive locks to writable files alone
            except FileNotFoundError:
                return False
            except OSError as error:
                raise write_error(path, error) from error
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
                except FileNotFoundError:
                    return False
                except OSError as error:
                    raise write_error(path, error) from error
                if not current:
                    continue
                if _content_token(file.read()) != token:
                    return False
                self.put(key, data)
                return True

    def delete(self, key: str) -> None:
        """See :meth:`Location.delete`."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(self._path(key), error) from error

    def size(self, key: str) -> int | None:
        """See :meth:`Location.size`."""
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def list_sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :meth:`Location.list_sizes`. Partial writes are left out."""
        root = Path(self.url)
        for path in sorted(self._path(prefix).rglob("*")):
            if path.suffix != _PARTIAL and path.is_file():
                yield path.relative_to(root).as_posix(), path.stat().st_size

    def children(self) -> list[Location]:
        """See :meth:`Location.children`."""
        root = Path(self.url)
        if not root.is_dir():
            return []
        return [LocalLocation(str(path)) for path in sorted(root.iterdir()) if path.is_dir()]

    def remove_partial_writes(self) -> None:
        """See :meth:`Location.remove_partial_writes`."""
        for path in Path(self.url).rglob(f"*{_PARTIAL}"):
            path.unlink(missing_ok=True)

    def kvstore(self, key: str) -> dict[str, Any]:
        """See :meth:`Location.kvstore`."""
        return {"driver": "file", "path": f"{self._path(key).absolute()}/"}


def _content_token(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_beside(
    path: Path, data: bytes | bytearray | memoryview, finish: Callable[[Path], _T]
) -> _T:
    """Write a temporary file beside ``path`` and call ``finish``, which renames or links it.

    Raises:
        StoreWriteError: The operating system refuses.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        # A name of its own: two writers of one key must not mix their bytes.
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                return finish(partial)
            except FileNotFoundError:
                # Another process has just cleared up partial writes, or removed the store.
                if not attempts_left:
                    raise
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
    raise AssertionError  # the last attempt returns or raises


def locate(path: str | os.PathLike[str]) -> Location:
    """The location of a path or of a ``file``, ``s3``, ``gs``, ``az`` or ``memory`` URL.

    Raises:
        LocationError: The URL's scheme is not supported, or it names no place.
        ExtraNotInstalledError: Object stores need the extra ``s3``, which is not installed.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if re.match(r"(file|s3|gs|az|memory):/[^/]", text):
            raise LocationError(
                f"{text}: expected two slashes after the colon; give a URL as a string, since "
                "pathlib.Path takes one of them away"
            )
        return LocalLocation(str(Path(text)))
    if scheme == "file":
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise LocationError(f"{text}: expected file:///absolute/path")
        return LocalLocation(str(Path(urllib.parse.unquote(parts.path))))
    from rdd_storage import objects  # which needs this module

    if scheme in objects.SCHEMES:
        return objects.object_location(text)
    # Whatever stands before the host may be a password.
    shown = f"{scheme}://{rest.rpartition('@')[2]}"
    raise LocationError(
        f"{shown}: expected a local path or a URL of file, {', '.join(objects.SCHEMES)}, got the "
        f"scheme {scheme!r}; copy the store to such a place"
    )


def join_path(root: str | os.PathLike[str], name: str) -> str:
    """A name below a path or URL, in the same spelling."""
    text = os.fspath(root)
    return f"{text.rstrip('/')}/{name}" if "://" in text else str(Path(text) / name)


def write_error(where: object, error: OSError) -> StoreWriteError:
    """A :class:`StoreWriteError` that keeps the number of the operating system's error."""
    wrapped = StoreWriteError(
        f"{where}: cannot be written ({error.strerror or error}); check free space and "
        "permissions, then build again: finished shards are kept"
    )
    wrapped.errno = error.errno
    return wrapped
