"""Stores in object stores: ``s3://``, ``gs://``, ``az://`` and, within one process, ``memory://``.

Requests go through obstore (the extra ``s3``), reads of maps too, so that one set of credentials,
time limits and retries holds for everything. Credentials come from the environment or from the
provider's usual files and are never part of a URL, an error or a pickle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from rdd_storage.clients import import_obstore, open_client, pause, retries, safe_reason, server_of
from rdd_storage.errors import (
    LocationError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    StoreWriteError,
)
from rdd_storage.location import Location
from rdd_storage.processes import check_process, request_pool

SCHEMES = ("s3", "gs", "az", "memory")
"""URL schemes of object stores."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ObjectLocation(Location):
    """A prefix in a bucket or container; see :func:`object_location`."""

    url: str
    scheme: str
    bucket: str
    prefix: str
    process: int | None
    """Of memory stores: the process whose memory it is."""

    def get(self, key: str) -> bytes | None:
        """See :meth:`Location.get`."""
        found = self._get(key)
        return None if found is None else found[0]

    def get_many(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """See :meth:`Location.get_many`. The requests overlap."""
        check_process()
        return request_pool().map(self.get, keys)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """See :meth:`Location.get_ranges`. Neighbouring ranges are one request."""
        starts, lengths = zip(*ranges, strict=True)

        def read(client: Any) -> list[bytes]:
            import obstore

            path = self._path(key)
            found = obstore.get_ranges(client, path, starts=list(starts), lengths=list(lengths))
            contents = [bytes(content) for content in found]
            if [len(content) for content in contents] != list(lengths):
                raise _CutShort(f"{sum(map(len, contents))} of {sum(lengths)} bytes")
            return contents

        return self._read(key, read)

    def get_tail(self, key: str, length: int) -> bytes | None:
        """See :meth:`Location.get_tail`."""

        def read(client: Any) -> bytes:
            import obstore

            path = self._path(key)
            if self.scheme == "az":  # Azure knows no ranges from the end
                size = obstore.head(client, path)["size"]
                start = max(size - length, 0)
                content = bytes(obstore.get_range(client, path, start=start, end=size))
            else:
                found = obstore.get(client, path, options={"range": {"suffix": length}})
                size, content = found.meta["size"], bytes(found.bytes())
            if len(content) != min(length, size):
                raise _CutShort(f"{len(content)} of {min(length, size)} bytes")
            return content

        return self._read(key, read)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`Location.put`. One PUT request, whatever the size, which is atomic."""
        self._write(key, bytes(data), "overwrite")

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Location.create`. A conditional PUT (``If-None-Match: *``)."""
        return self._write(key, data, "create")

    def get_with_token(self, key: str) -> tuple[bytes, str] | None:
        """See :meth:`Location.get_with_token`. The token is the object's ETag and generation."""
        return self._get(key)

    def replace_if(self, key: str, data: bytes, token: str) -> bool:
        """See :meth:`Location.replace_if`. A conditional PUT (``If-Match``)."""
        return self._write(key, data, json.loads(token))

    def delete(self, key: str) -> None:
        """See :meth:`Location.delete`."""
        client = self._client(for_writing=True)  # says what is missing if obstore is
        import obstore

        try:
            obstore.delete(client, self._path(key))
        except FileNotFoundError:
            pass
        except Exception as error:
            self._refuse_write(key, error)

    def size(self, key: str) -> int | None:
        """See :meth:`Location.size`."""

        def read(client: Any) -> int:
            import obstore

            return int(obstore.head(client, self._path(key))["size"])

        return self._read(key, read)

    def list_sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :meth:`Location.list_sizes`."""
        yield from sorted((key, size) for key, size, _ in self._list(prefix))

    def get_stamped(self, key: str) -> tuple[bytes, str | None] | None:
        """Content of an object and a stamp that another content does not have.

        Returns:
            Content and stamp, which is None where the server gives no strong ETag; None where
            there is no object.
        """
        found = self._get(key)
        if found is None:
            return None
        content, token = found
        return content, self._stamp(len(content), json.loads(token).get("e_tag"))

    def list_stamped(self, prefix: str = "") -> dict[str, str | None]:
        """Stamps, as of :meth:`get_stamped`, of all objects below a prefix, by key in order.

        Raises:
            LocationError: There is no such bucket.
        """
        found = sorted(self._list(prefix))
        return {key: self._stamp(size, e_tag or None) for key, size, e_tag in found}

    def has_any(self, prefix: str = "") -> bool:
        """Whether there are objects below a prefix: one request, however many there are.

        Raises:
            LocationError: There is no such bucket.
        """
        return bool(self._list(prefix, pages=1))

    @property
    def server(self) -> str:
        """Endpoint or account that the bucket is at, as far as the environment says."""
        return server_of(self.scheme)

    def children(self) -> list[Location]:
        """See :meth:`Location.children`."""

        def read(client: Any) -> list[str]:
            import obstore

            return list(obstore.list_with_delimiter(client, self.prefix or None)["common_prefixes"])

        names = sorted(path.rpartition("/")[2] for path in self._read("", read) or [])
        return [object_location(f"{self.url.rstrip('/')}/{name}") for name in names]

    def remove_partial_writes(self) -> None:
        """See :meth:`Location.remove_partial_writes`. An object store has none."""

    def kvstore(self, key: str) -> None:
        """See :meth:`Location.kvstore`. Maps are read with range requests instead.

        Tensorstore's own drivers look for credentials in other places than obstore, wait for ever
        on a connection that stalls, put response bodies into their errors, and know no Azure.
        """

    def __str__(self) -> str:
        return self.url

    def _stamp(self, size: int, e_tag: str | None) -> str | None:
        """Size and ETag; listings of some servers have it without quotes.

        Weak ETags may stay when the content changes, and those of memory stores are numbers that
        begin anew in each process.
        """
        if not e_tag or e_tag.startswith("W/") or self.scheme == "memory":
            return None
        return f"{size} {e_tag.strip(chr(34))}"

    # -- requests ----------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{key}".strip("/")

    def _client(self, *, for_writing: bool = False) -> Any:
        check_process()
        if self.process not in (None, os.getpid()):
            raise LocationError(
                f"{self.url}: expected use in process {self.process}, whose memory it is, got "
                f"process {os.getpid()}; use a folder or a bucket to share a store"
            )
        return open_client(self.scheme, self.bucket, for_writing=for_writing)

    def _get(self, key: str) -> tuple[bytes, str] | None:
        def read(client: Any) -> tuple[bytes, str]:
            import obstore

            found = obstore.get(client, self._path(key))
            meta, content = found.meta, bytes(found.bytes())
            if len(content) != meta["size"] or (
                _contradicts(content, meta["e_tag"])
                # An encrypted object's ETag is no MD5 of it: ask before calling it cut short.
                and obstore.head(client, self._path(key))["size"] != len(content)
            ):
                raise _CutShort(f"{len(content)} bytes")
            token = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
            return content, json.dumps(token)

        return self._read(key, read)

    def _list(self, prefix: str, pages: int | None = None) -> list[tuple[str, int, str]]:
        """Key, size and ETag of the objects below a prefix."""

        def read(client: Any) -> list[tuple[str, int, str]]:
            import obstore

            skip = len(self.prefix) + 1 if self.prefix else 0
            try:
                listed = itertools.islice(obstore.list(client, self._path(prefix) or None), pages)
                return [
                    (entry["path"][skip:], int(entry["size"]), entry["e_tag"] or "")
                    for page in listed
                    for entry in page
                ]
            except Exception as error:
                self._refuse_listing(prefix, error)
                raise

        return self._read(prefix, read) or []

    def _read(self, key: str, read: Callable[[Any], _T]) -> _T | None:
        """Call ``read`` with the client; None where there is no object.

        Obstore retries requests that fail; a response that is whole for HTTP and yet too short is
        asked for again here.
        """
        client = self._client()
        tries = retries() + 1
        for attempt in range(tries):
            try:
                return read(client)
            except FileNotFoundError:
                return None
            except Exception as error:
                if not _is_cut_short(error):
                    self._refuse_read(key, error)
                problem = f"the answer was cut short ({safe_reason(error)}), {tries} times"
                if attempt + 1 < tries:
                    pause(attempt)
        raise StoreUnavailableError(f"{self._name(key)}: {problem}; check what lies between")

    def _write(self, key: str, data: bytes, mode: Any) -> bool:
        """PUT an object; False where the condition of ``mode`` does not hold."""
        client = self._client(for_writing=True)  # says what is missing if obstore is
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            obstore.put(
                client,
                self._path(key),
                data,
                mode=mode,
                use_multipart=False,
            )
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and not isinstance(mode, dict):
                self._refuse_write(key, error)  # there is no such bucket
            # The response of a first try may have been lost after it had taken effect.
            return self.get(key) == data
        except Exception as error:
            self._refuse_write(key, error)
        return True

    def _name(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def _refuse_read(self, key: str, error: Exception) -> NoReturn:
        if isinstance(error, StoreError):
            raise error
        reason = safe_reason(error)
        # Without the cause: the library's own text holds responses with the signed request in it.
        if _is_refusal(error):
            raise StoreAccessError(
                f"{self._name(key)}: access refused ({reason}); check the credentials in the "
                "environment and the bucket's permissions"
            ) from None
        raise StoreUnavailableError(
            f"{self._name(key)}: cannot be read ({reason}); check the network, the endpoint and "
            "the region, then try again"
        ) from None

    def _refuse_listing(self, prefix: str, error: Exception) -> None:
        """Name what only a listing finds; obstore has one error for all of it."""
        reason = safe_reason(error)
        if reason.startswith("404"):
            raise LocationError(
                f"{self._name(prefix)}: there is no bucket {self.bucket!r}; correct the name, or "
                "the endpoint in the environment (see docs/object-stores.md)"
            ) from None
        if "invalid path" in reason:
            raise LocationError(
                f"{self._name(prefix)}: an object there has a name that is no path ({reason}); "
                "rename or remove it"
            ) from None

    def _refuse_write(self, key: str, error: Exception) -> NoReturn:
        if isinstance(error, StoreError):
            raise error
        missing = isinstance(error, FileNotFoundError)
        reason = f"there is no bucket {self.bucket!r}" if missing else safe_reason(error)
        raise StoreWriteError(
            f"{self._name(key)}: cannot be written ({reason}); check bucket, credentials and "
            "network, then build again: finished shards are kept"
        ) from None


class _CutShort(Exception):
    """A response with fewer bytes than the object or range has."""


def object_location(url: str) -> ObjectLocation:
    """The location of an ``s3://``, ``gs://``, ``az://`` or ``memory://`` URL.

    Raises:
        LocationError: It names no bucket, or has more than bucket and path: credentials are never
            taken from a URL.
        ExtraNotInstalledError: The extra ``s3`` is not installed.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    example = f"{scheme}://{'name' if scheme == 'memory' else 'bucket'}/path"
    if "@" in bucket or "?" in rest or "#" in rest:
        raise LocationError(
            f"{scheme}://…: expected {example}, got a URL with user, query or fragment; "
            "credentials come from the environment (see docs/object-stores.md)"
        )
    parts = [part for part in urllib.parse.unquote(path).split("/") if part]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or {".", ".."} & set(parts):
        raise LocationError(f"{url}: expected {example}")
    import_obstore()
    return ObjectLocation(
        url="/".join([f"{scheme}://{bucket}", *parts]),
        scheme=scheme,
        bucket=bucket,
        prefix="/".join(parts),
        process=os.getpid() if scheme == "memory" else None,
    )


def _contradicts(content: bytes, e_tag: str | None) -> bool:
    """Whether an ETag of the usual kind, an MD5, is not that of the content."""
    tag = (e_tag or "").strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", tag):
        return False
    return hashlib.md5(content, usedforsecurity=False).hexdigest() != tag


def _is_cut_short(error: Exception) -> bool:
    """Whether a response was not whole; obstore does not ask again for such a listing or error."""
    broken = ("list response", "response body error")
    return isinstance(error, _CutShort) or any(text in safe_reason(error) for text in broken)


def _is_refusal(error: Exception) -> bool:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    kinds = (PermissionError, PermissionDeniedError, UnauthenticatedError)
    return isinstance(error, kinds) or safe_reason(error).startswith(("401", "403"))
