"""Errors a user can act on.

Every error the project raises on purpose derives from :class:`RddError` and from the builtin
that fits it, so that callers may catch either. A message says what was expected, what came, and
what to do about it.
"""


class RddError(Exception):
    """Base of every error that rdd-maps raises on purpose; its message is meant for the user."""


class StoreError(RddError):
    """Base of the map store's errors."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """The path holds no map store."""


class StoreFormatError(StoreError, ValueError):
    """The store is of another format version, or its metadata does not follow the format."""


class StoreDamagedError(StoreError, OSError):
    """Stored data is missing or fails its checksum."""


class LocationError(StoreError, ValueError):
    """The path or URL names no place where a store can live."""


class ExtraNotInstalledError(StoreError, ImportError):
    """A library of an optional extra is needed and not installed."""


class StoreUnavailableError(StoreError, ConnectionError):
    """An object store does not answer, or answers with errors, after all retries."""


class StoreAccessError(StoreError, PermissionError):
    """An object store, or the file system, refuses access with the credentials at hand."""


class ForkedProcessError(StoreError, RuntimeError):
    """A reader is used in a process forked from one that had already read."""


class StoreMismatchError(StoreError, ValueError):
    """The store was built from another teacher, data set or settings."""


class StoreIncompleteError(StoreError, RuntimeError):
    """The store, or one image of it, has not been built to the end."""


class StoreLockedError(StoreError, RuntimeError):
    """Another living process is building this store."""


class LeaseLostError(StoreLockedError):
    """This build no longer holds the store: another has taken over, or its lease has run out."""


class StoreWriteError(StoreError, OSError):
    """A shard could not be written: disk full, no permission, object store out of reach."""


class ShardDataError(StoreError, ValueError):
    """Maps handed to the writer have a wrong shape, dtype or value."""


class UnknownVersionError(StoreError, ValueError):
    """The store has no such version."""


class StoreRemovalError(StoreError, RuntimeError):
    """A version or store that is still needed is to be removed."""


class UnknownImageError(StoreError, KeyError):
    """The store holds no image of that name."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownArrayError(StoreError, KeyError):
    """The store was built without that array."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class WindowError(StoreError, IndexError):
    """The requested window does not lie inside the image."""
