"""Errors of looking at maps; unknown images and arrays raise the store's own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rdd_storage import RddError

_COMPARED = 20_000  # names that are compared letter by letter; more would take seconds


class InspectionError(RddError, ValueError):
    """What was asked for cannot be shown or computed from this store."""


class EmptySelectionError(InspectionError):
    """No image or pixel is left to look at."""


class UnknownClassError(InspectionError):
    """The store has no such class."""


class DataNeededError(InspectionError):
    """Images or labels are needed, and no data set was given, or it lacks them."""


class CircularScoreError(InspectionError):
    """A score that was made from the labels is to be tested on the errors it was made from."""


def nearest_names(name: str, names: Sequence[str]) -> str:
    """The names most like one that is unknown, as the end of a message; empty if none is."""
    parts = [other for other in names if name and (name in other or other in name)][:3]
    near = parts or difflib.get_close_matches(name, names[:_COMPARED], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
