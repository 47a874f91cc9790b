"""The lease of a store: at any moment at most one build changes what a store will publish.

The lease is one small object of the store, made and replaced by conditional writes alone. Its
holder renews it; when it no longer does, the lease runs out and the next build may take it over.
See docs/store-format.md, section 7.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Any

from rdd_storage.errors import LeaseLostError, StoreError, StoreLockedError
from rdd_storage.layout import group_metadata
from rdd_storage.location import Location, locate

logger = logging.getLogger("rdd.maps")

LEASE_KEY = "lease/zarr.json"
DEFAULT_TTL = 60.0
"""Seconds after which a lease that is not renewed runs out."""

_RENEWALS = 3  # per time to live
_LONGEST_POLL = 1.0  # seconds between two looks at a lease that is waited for


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseInfo:
    """Who holds the lease of a store."""

    host: str
    """Name of the holder's machine."""
    pid: int
    """Its process there."""
    since: datetime
    """When it got the lease, UTC."""
    expires: datetime
    """When the lease runs out unless it is renewed, UTC."""
    token: str
    """Tells this holder from every other."""
    machine: str
    """Identifies the running system within which ``pid`` is meant; empty where unknown."""
    started: str
    """Start time of the process as that system counts it; empty where unknown."""
    released: bool = False
    """Whether the holder has given it back."""

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host} (since {_shown(self.since)}, lease until "
            f"{_shown(self.expires)})"
        )

    @property
    def in_force(self) -> bool:
        """Whether the lease keeps others out: not given back, run out or left by the dead."""
        return not (self.released or datetime.now(UTC) >= self.expires or self._holder_is_gone())

    def _holder_is_gone(self) -> bool:
        # Only within one running system and one pid namespace does a missing pid mean anything.
        if not self.machine or self.machine != _machine():
            return False
        return _process_started(self.pid) != self.started

    def encode(self) -> bytes:
        """The lease as a Zarr group, so that plain Zarr knows what it is."""
        times = {"since": self.since.isoformat(), "expires": self.expires.isoformat()}
        return group_metadata({"rdd_lease": asdict(self) | times})

    @classmethod
    def decode(cls, data: bytes) -> LeaseInfo | None:
        """The lease from :meth:`encode`; None where the content is no lease."""
        try:
            content: dict[str, Any] = json.loads(data)["attributes"]["rdd_lease"]
            times = {
                name: datetime.fromisoformat(content[name]).astimezone(UTC)
                for name in ("since", "expires")
            }
            known = {name: content[name] for name in cls.__slots__ if name in content}
            return cls(**(known | times))
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class LeaseTicket:
    """Shows that its bearer works under a lease; picklable, for the workers of a build."""

    location: Location
    token: str

    def check(self) -> None:
        """Refuse to go on when the lease is no longer the one this ticket belongs to.

        Raises:
            LeaseLostError: Another build has taken over, or the lease was given back or ran out.
        """
        info = read_lease(self.location)
        if info is None or info.token != self.token:
            now_held = f"{info} took it over" if info is not None else "it is gone"
            raise self._lost(now_held)
        if info.released:
            raise self._lost("it was given back")
        if datetime.now(UTC) >= info.expires:
            raise self._lost(f"it ran out at {_shown(info.expires)}")

    def _lost(self, reason: str) -> LeaseLostError:
        return LeaseLostError(
            f"{self.location}: expected to hold the store's lease, but {reason}; this build "
            "stops. Finished shards are kept: build again to go on"
        )


class StoreLease:
    """A lease that is held and renewed by a thread of its own; made by :func:`hold_lease`."""

    def __init__(self, location: Location, info: LeaseInfo, ttl: float) -> None:
        self._location = location
        self._info = info
        self._ttl = ttl
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store-lease", daemon=True)
        self._thread.start()

    @property
    def info(self) -> LeaseInfo:
        """What the store says about this lease."""
        return self._info

    @property
    def ticket(self) -> LeaseTicket:
        """What workers need to write under this lease."""
        return LeaseTicket(self._location, self._info.token)

    def release(self) -> None:
        """Stop renewing and let others in; does nothing when the lease is lost already."""
        self._ended.set()
        self._thread.join()
        try:
            self._replace(replace(self._info, released=True))
        except (StoreError, OSError) as error:
            # What was written is written; the others wait until the lease has run out.
            logger.warning("the lease of %s could not be given back: %s", self._location, error)

    def _keep(self) -> None:
        while not self._ended.wait(self._ttl / _RENEWALS):
            renewed = replace(self._info, expires=_from_now(self._ttl))
            try:
                if not self._replace(renewed):
                    return  # lost; the next check of a ticket says so
            except (StoreError, OSError) as error:
                # A short outage is no reason to give up: the lease lasts for further attempts.
                logger.warning("the lease of %s could not be renewed: %s", self._location, error)

    def _replace(self, info: LeaseInfo) -> bool:
        current = self._location.get_with_token(LEASE_KEY)
        if current is None:
            return False
        held = LeaseInfo.decode(current[0])
        if held is None or held.token != self._info.token:
            return False
        if not self._location.replace_if(LEASE_KEY, info.encode(), current[1]):
            return False
        self._info = info
        return True


@contextmanager
def hold_lease(
    location: Location, *, wait: float = 0.0, ttl: float = DEFAULT_TTL
) -> Iterator[StoreLease]:
    """Hold the lease of a store for the time of a ``with`` block.

    The lease of a holder that stopped renewing it is taken over once it has run out; that of a
    process of this machine that has ended, at once.

    Args:
        location: The store.
        wait: Seconds to wait for another holder.
        ttl: Seconds that the lease lasts without renewal; it is renewed three times as often.
            Clocks of machines that build one store have to agree to within a third of it.

    Raises:
        StoreLockedError: Another build holds the store; the message says which.
        StoreWriteError: The place cannot be written.
    """
    if ttl <= 0 or wait < 0:
        raise ValueError(f"expected wait >= 0 and ttl > 0 seconds, got {wait} and {ttl}")
    lease = StoreLease(location, _acquire(location, wait, ttl), ttl)
    try:
        yield lease
    finally:
        lease.release()


def read_lease(location: Location) -> LeaseInfo | None:
    """The lease as it is stored, in force or not; None where there is none."""
    data = location.get(LEASE_KEY)
    return None if data is None else LeaseInfo.decode(data)


def lease_holder(path: str | PathLike[str]) -> LeaseInfo | None:
    """Who is building the store at a path or URL; None when nobody is."""
    info = read_lease(locate(path))
    return info if info is not None and info.in_force else None


def _acquire(location: Location, wait: float, ttl: float) -> LeaseInfo:
    deadline = time.monotonic() + wait
    while True:
        now = datetime.now(UTC)
        wanted = LeaseInfo(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=now,
            expires=now + timedelta(seconds=ttl),
            token=secrets.token_hex(16),
            machine=_machine(),
            started=_process_started(os.getpid()) or "",
        )
        current = location.get_with_token(LEASE_KEY)
        if current is None:
            if location.create(LEASE_KEY, wanted.encode()):
                return wanted
            continue
        # Something that is no lease guards nothing: it is what a failing disk left.
        holder = LeaseInfo.decode(current[0])
        if holder is None or not holder.in_force:
            if location.replace_if(LEASE_KEY, wanted.encode(), current[1]):
                return wanted
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            raise StoreLockedError(
                f"{location}: expected to be the only one that builds this store, but {holder} "
                "is at it; wait until it has ended, or end it"
            )
        time.sleep(min(left, _LONGEST_POLL, ttl / 10))


def _from_now(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


@functools.cache
def _machine() -> str:
    """Identifies this boot of this machine and its pid namespace; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_started(pid: int) -> str | None:
    """Start time of a living process in clock ticks since boot; None when it has ended."""
    try:
        # The name in parentheses may itself hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]
