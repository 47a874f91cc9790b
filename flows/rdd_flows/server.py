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
        answer = _ask(url, "health")
        answer.raise_for_status()
        # Prefect Cloud has no such page.
        has_database = _ask(url, "ready").status_code != httpx.codes.SERVICE_UNAVAILABLE
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({error or type(error).__name__})"
            f"; {remedy}"
        ) from error
    if not has_database:
        raise ServerError(
            f"PREFECT_API_URL: the server at {url} does not reach its database; start that "
            "(in a stack: 'rdd stack up'), or unset PREFECT_API_URL to do without"
        )
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


def _ask(url: str, page: str) -> httpx.Response:
    return httpx.get(f"{url.rstrip('/')}/{page}", timeout=_SECONDS, follow_redirects=True)


def is_away(error: BaseException) -> bool:
    """Whether an error says that a server cannot be reached, or cannot answer (its database is
    away, say)."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, httpx.TransportError)


def lost_server(error: Exception) -> ServerError | None:
    """The error to tell when a flow ended because the server went away; None where it did not."""
    url = server_url()
    if url is None or not is_away(error):
        return None
    return ServerError(
        f"the Prefect server at {url} was lost ({error or type(error).__name__}), so that it does "
        "not know how this run ended; what is finished is kept: run the same command again when "
        "the server is back"
    )
