"""Whether the Prefect server answers, before work begins that takes hours."""

from __future__ import annotations

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from rdd_storage import RddError

_SECONDS = 10.0


class ServerError(RddError, ConnectionError):
    """The Prefect server does not answer, or refuses the credentials."""


def server_url() -> str | None:
    """Address of the server that runs are recorded on; None for one of this process's own."""
    url = PREFECT_API_URL.value()
    return None if url is None else str(url)


def require_server() -> None:
    """Ask the server that is configured, if one is.

    Raises:
        ServerError: It does not answer, or refuses.
    """
    url = server_url()
    if url is None:
        return
    remedy = "start it with 'prefect server start', or unset PREFECT_API_URL to do without"
    try:
        # Prefect's own retries would hold this up for a minute.
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=_SECONDS, follow_redirects=True)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({error or type(error).__name__})"
            f"; {remedy}"
        ) from error
    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        why = (
            "refuses the credentials; set PREFECT_API_AUTH_STRING (USER:PASSWORD) or "
            "PREFECT_API_KEY to the server's"
            if status in (401, 403)
            else f"answers {status} ({error.response.reason_phrase}); {remedy}"
        )
        raise ServerError(f"PREFECT_API_URL: the server at {url} {why}") from error
    except (httpx.HTTPError, RuntimeError) as error:
        raise ServerError(
            f"PREFECT_API_URL: the server at {url} cannot be used ({error}); {remedy}"
        ) from error


def lost_server(error: Exception) -> ServerError | None:
    """The error to tell when a flow ended because the server went away; None where it did not."""
    url = server_url()
    if url is None or not isinstance(error, httpx.TransportError):
        return None
    return ServerError(
        f"the Prefect server at {url} was lost ({error or type(error).__name__}), so that it does "
        "not know how this run ended; what is finished is kept: run the same command again when "
        "the server is back"
    )
