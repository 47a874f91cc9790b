"""Identity of a store: what decides its content, as a fingerprint and as readable differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdd_storage.errors import StoreFormatError, StoreMismatchError
from rdd_storage.location import join_path

FORMAT_VERSION = 1
"""Version of the store format that this library writes and reads (docs/store-format.md)."""

_SHOWN = 60  # characters of a value in a difference
_LISTED = 20  # differences that a message shows
_MISSING = object()


def canonical(value: Any, name: str = "identity") -> Any:
    """The value as plain JSON: tuples become lists, mappings become dicts.

    Raises:
        StoreFormatError: Something in it is no JSON value, or is NaN or infinite.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_to_json))
    except (TypeError, ValueError) as error:
        raise StoreFormatError(
            f"{name}: expected JSON values (strings, finite numbers, lists, mappings): {error}"
        ) from error


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the format version and the identity as canonical JSON.

    Canonical: keys sorted, no blanks, UTF-8, numbers as Python writes them. The order of keys and
    the difference of tuple and list do not matter.

    Raises:
        StoreFormatError: The identity is no JSON.
    """
    content = {"format_version": FORMAT_VERSION, "identity": canonical(dict(identity))}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Readable differences, one line each: ``teacher.weights: expected 3f2a, found 9b01``."""
    return _difference(canonical(dict(expected)), canonical(dict(found)), "")


def store_path(root: str | Path, dataset: str, split: str, identity: Mapping[str, Any]) -> str:
    """Path or URL of a store: ``<root>/<dataset>-<split>-<12 hex of the fingerprint>.zarr``.

    Raises:
        StoreFormatError: A name holds a character other than letters, digits, ``.``, ``_``, ``-``.
    """
    for key, name in (("dataset", dataset), ("split", split)):
        if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
            raise StoreFormatError(
                f"{key}: expected letters, digits, '.', '_' and '-', got {name!r}"
            )
    return join_path(root, f"{dataset}-{split}-{fingerprint(identity)[:12]}.zarr")


def mismatch_error(path: str, lines: Sequence[str]) -> StoreMismatchError:
    """The error for a store that is not the one asked for, with its differences."""
    shown = [f"  {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"  ... and {len(lines) - _LISTED} more")
    return StoreMismatchError(
        "\n".join(
            [
                f"{path}: the store does not match ({len(lines)} difference(s)):",
                *shown,
                "build maps for these settings and data, or point to the store that fits",
            ]
        )
    )


def _to_json(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _difference(expected: Any, found: Any, path: str) -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        lines: list[str] = []
        for key in sorted(expected.keys() | found.keys()):
            child = f"{path}.{key}" if path else key
            lines += _difference(expected.get(key, _MISSING), found.get(key, _MISSING), child)
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for index, pair in enumerate(zip(expected, found, strict=True))
            for line in _difference(*pair, f"{path}.{index}")
        ]
    # Equal in Python but not in JSON: True and 1, 1 and 1.0.
    if type(expected) is type(found) and expected == found:
        return []
    return [f"{path}: expected {_shown(expected)}, found {_shown(found)}"]


def _shown(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
