"""Clients of object stores, set up from the environment; what they say, without credentials.

docs/object-stores.md lists the variables. Credentials are handed to obstore and kept nowhere else.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import time
import urllib.parse
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from rdd_storage.errors import ExtraNotInstalledError, LocationError, StoreError

_RETRIES, _READ_SECONDS, _WRITE_SECONDS = 8, 30.0, 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0  # seconds between tries, doubling
_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "RDD_REQUEST_")
_SERVERS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_ENDPOINT"),
}
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SIGNATURE", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; shorter values are no secrets and would garble messages
_SHOWN = 300  # characters of a message from elsewhere
_CREDENTIAL_LIFE = timedelta(minutes=5)


def import_obstore() -> None:
    """Make sure that obstore is there.

    Raises:
        ExtraNotInstalledError: It is not.
    """
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise _missing_extra("obstore") from None


def safe_reason(error: BaseException) -> str:
    """What an error from elsewhere says, in one line and without credentials.

    Responses of object stores may repeat parts of the request; of their bodies only code and
    message are kept.
    """
    text = str(error) or type(error).__name__
    status = re.search(r"status code: (\d{3}[^:\n]*)", text)
    code = re.search(r"<Code>([^<]{1,100})</Code>", text)
    message = re.search(r"<Message>([^<]{1,200})</Message>", text)
    named = [match[1].strip() for match in (status, code, message) if match]
    line = ": ".join(named) if named else text.splitlines()[0]
    line = re.sub(r"://[^/\s@]*@", "://", line)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET.search(name):
            line = line.replace(value, "…")
    return line[:_SHOWN]


def open_client(scheme: str, bucket: str, *, for_writing: bool = False) -> Any:
    """An obstore client of a bucket, made once for each state of the environment.

    Raises:
        LocationError: The environment's settings make no sense.
        ExtraNotInstalledError: The extra ``s3`` is not installed.
    """
    import_obstore()
    if scheme == "memory":
        return _memory_store(bucket)
    seconds = _number("RDD_REQUEST_TIMEOUT", _READ_SECONDS)
    # A shard of tens of megabytes goes up in one request.
    seconds = max(seconds, _WRITE_SECONDS) if for_writing else seconds
    return _open(scheme, bucket, seconds, _environment())


def server_of(scheme: str) -> str:
    """What the environment says of where buckets are: names alone are not unique everywhere."""
    return " ".join(os.environ.get(name, "") for name in _SERVERS.get(scheme, ())).strip()


def retries() -> int:
    """How often a request that fails is made again."""
    return int(_number("RDD_REQUEST_RETRIES", _RETRIES))


def pause(attempt: int) -> None:
    """Wait before a request is made again: twice as long each time, and not exactly as long."""
    longest = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
    time.sleep(longest * (0.5 + random.random() / 2))


def _environment() -> str:
    """A digest of the settings in the environment, so that a change of them takes effect."""
    settings = [item for item in sorted(os.environ.items()) if item[0].startswith(_VARIABLES)]
    return hashlib.sha256(repr(settings).encode()).hexdigest()


@cache
def _memory_store(name: str) -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()


@cache
def _open(scheme: str, bucket: str, seconds: float, environment: str) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    options: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=seconds)},
        "retry_config": {
            "max_retries": retries(),
            "backoff": {
                "init_backoff": timedelta(seconds=_FIRST_PAUSE),
                "max_backoff": timedelta(seconds=_LONGEST_PAUSE),
                "base": 2,
            },
            "retry_timeout": timedelta(seconds=(retries() + 1) * (seconds + _LONGEST_PAUSE)),
        },
    }
    try:
        if scheme == "gs":
            return GCSStore(bucket, **options)
        if scheme == "az":
            return AzureStore(bucket, **options)
        return S3Store(bucket, **options, **_s3_settings(options["client_options"]))
    except StoreError:
        raise
    except Exception as error:
        raise LocationError(
            f"{scheme}://{bucket}: cannot be opened ({safe_reason(error)}); check the settings in "
            "the environment (see docs/object-stores.md)"
        ) from None


def _s3_settings(client_options: dict[str, Any]) -> dict[str, Any]:
    """What the other S3 clients read and obstore does not: endpoint, profiles and their region."""
    settings: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urllib.parse.urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query:
            raise LocationError(
                "AWS_ENDPOINT_URL: expected http(s)://host:port without user or query; give the "
                "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        settings["endpoint"] = endpoint
        if parts.scheme == "http":
            client_options["allow_http"] = True
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if _uses_profile():
        session = _profile_session()
        region = region or session.get_config_variable("region")
        settings["credential_provider"] = _profile_credentials
    settings["region"] = region or "us-east-1"
    return settings


def _uses_profile() -> bool:
    """Whether the credentials are in the files of the AWS command line."""
    environment = os.environ
    if environment.get("AWS_PROFILE"):
        return True
    if any(
        environment.get(name)
        for name in (
            "AWS_ACCESS_KEY_ID",
            "AWS_SKIP_SIGNATURE",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        )
    ):
        return False
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
        "AWS_CONFIG_FILE": "~/.aws/config",
    }
    return any(
        Path(environment.get(name, usual)).expanduser().is_file() for name, usual in files.items()
    )


def _profile_session() -> Any:
    try:
        module = importlib.import_module("botocore.session")
    except ImportError:
        raise _missing_extra("botocore") from None
    return module.Session()


def _profile_credentials() -> dict[str, Any]:
    credentials = _profile_session().get_credentials()
    if credentials is None:
        raise LocationError(
            "s3://…: expected credentials in the environment or in the files of the AWS command "
            "line, got none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    frozen = credentials.get_frozen_credentials()
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
    }


def _missing_extra(module: str) -> ExtraNotInstalledError:
    return ExtraNotInstalledError(
        f"expected the module '{module}', which stores in object stores need, got none; install "
        "it with: pip install 'rdd-maps[s3]'"
    )


def _number(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise LocationError(f"{name}: expected a number of 0 or more, got {text!r}")
    return value
