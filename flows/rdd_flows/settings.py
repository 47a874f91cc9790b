"""Prefect's settings for quiet runs without the internet, as defaults of the environment."""

from __future__ import annotations

import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A cold start of the embedded server takes up to half a minute on two cores.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    # Threads that belong to no run may log, such as the one that renews a store's lease.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def configure_prefect() -> None:
    """Set the defaults above; whatever the user has set in the environment wins."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
