"""What other deployments may wait for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.events.schemas.events import Event
from prefect.runtime import flow_run
from prefect.types._datetime import now

if TYPE_CHECKING:  # without torch, for commands that only register deployments
    from rdd_pipeline.build import BuildResult

logger = logging.getLogger("rdd.flows")

MAPS_COMPLETE = "maps.complete"
RUN_LABEL = "rdd.run"
"""Label of the event's resource that holds the name of the run's configuration."""


def announce_maps(maps: BuildResult, run: str) -> None:
    """Emit ``maps.complete`` for a version of a store; returns when the server has it.

    Its resource is ``rdd.store.NAME``; its payload holds ``store`` (path or URL), ``version``,
    ``fingerprint`` and ``images``.

    Args:
        maps: The build that published the version.
        run: Name of the run's configuration.

    Raises:
        httpx.TransportError: The server does not answer.
    """
    name = maps.path.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    related = []
    if flow_run.id is not None:
        related.append(
            {
                "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
                "prefect.resource.role": "flow-run",
            }
        )
    event = Event.model_validate(
        {
            "event": MAPS_COMPLETE,
            "occurred": now("UTC"),
            "resource": {
                "prefect.resource.id": f"rdd.store.{name}",
                "prefect.resource.name": name,
                RUN_LABEL: run,
            },
            "related": related,
            "payload": {
                "store": maps.path,
                "version": maps.version,
                "fingerprint": maps.fingerprint,
                "images": maps.images,
            },
        }
    )
    # Prefect's emit_event hands events to a thread that drops them when the process ends or the
    # server is away; this one is not sent again, so it is sent here and acknowledged.
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
    logger.info("%s: version %d is announced", maps.path, maps.version)
