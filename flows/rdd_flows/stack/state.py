"""What a stack remembers between commands: its ports, passwords and choices."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rdd_flows.stack.errors import StackError

HOST = "127.0.0.1"
MARK = "RDD_STACK"
"""Environment variable by which every process of a stack is known."""
PORTS = ("postgres", "redis", "s3", "prefect", "worker", "dask", "dask-dashboard")
SECRETS = ("postgres", "redis", "prefect", "s3")
_SERVER = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "prefect_redis.messaging",
    "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "prefect_redis.messaging",
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
    # A run whose turn it is not asks again after so many seconds.
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
    "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE": "prefect_redis.cleanup_queue",
}
# These would lead Prefect, Dask or the S3 client elsewhere.
_FOREIGN = ("PREFECT_PROFILE", "PREFECT_API_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN",
            "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One stack; everything that it writes is below ``root``."""

    root: Path
    """Folder of data, logs, passwords and process numbers."""
    mark: str
    """What its processes carry in the environment variable ``RDD_STACK``."""
    ports: dict[str, int]
    """Port of each listening service, all on 127.0.0.1."""
    fixed: tuple[str, ...] = ()
    """Services whose ports were chosen; others move when somebody else takes their port."""
    secrets: dict[str, str]
    """Generated passwords."""
    workers: int = 2
    """Number of Dask workers, each a process of one teacher."""
    gpus: bool = False
    """Whether each Dask worker has a GPU: the first the first, and so on."""
    s3: str = "none"
    """``weed``, ``moto``, ``none``, or the URL of a running server."""
    bucket: str = "rdd"
    """Bucket that is made for the map stores."""
    pool: str = "rdd"
    """Prefect work pool of the worker."""

    @property
    def prefect_url(self) -> str:
        """Address of the Prefect server's user interface."""
        return f"http://{HOST}:{self.ports['prefect']}"

    @property
    def dask_url(self) -> str:
        """Address of the Dask scheduler."""
        return f"tcp://{HOST}:{self.ports['dask']}"

    @property
    def s3_url(self) -> str | None:
        """Address of the object store; None where there is none."""
        if self.s3 == "none":
            return None
        return self.s3 if "://" in self.s3 else f"http://{HOST}:{self.ports['s3']}"

    @property
    def redis_url(self) -> str:
        """Address of Redis, with its password."""
        return f"redis://default:{self.secrets['redis']}@{HOST}:{self.ports['redis']}"

    @property
    def postgres_url(self) -> str:
        """Address of the database, with its password; the driver's name is not in it."""
        return (
            f"postgresql://prefect:{self.secrets['postgres']}@{HOST}:"
            f"{self.ports['postgres']}/prefect"
        )

    def client_environment(self) -> dict[str, str]:
        """What a process needs to use the stack: the Prefect API, Dask and the object store."""
        environment = {
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_API_AUTH_STRING": f"rdd:{self.secrets['prefect']}",
            "DASK_SCHEDULER_ADDRESS": self.dask_url,
        }
        if self.s3 in ("weed", "moto"):
            environment |= {
                "AWS_ENDPOINT_URL": str(self.s3_url),
                "AWS_ACCESS_KEY_ID": "rdd",
                "AWS_SECRET_ACCESS_KEY": self.secrets["s3"],
                "AWS_REGION": "us-east-1",
            }
        elif self.s3_url is not None:  # credentials are the user's
            environment["AWS_ENDPOINT_URL"] = self.s3_url
        return environment

    def environment(self) -> dict[str, str]:
        """Environment of the stack's own processes."""
        foreign = _FOREIGN if self.s3 in ("weed", "moto") else _FOREIGN[:2]
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        return (
            kept
            | self.client_environment()
            | {
                MARK: self.mark,
                "DO_NOT_TRACK": "1",
                "PYTHONUNBUFFERED": "1",
                "PREFECT_HOME": str(self.root / "prefect"),
                "PREFECT_PROFILES_PATH": str(self.root / "prefect" / "profiles.toml"),
            }
        )

    def server_environment(self) -> dict[str, str]:
        """Environment of the Prefect server and of its background services."""
        return (
            self.environment()
            | _SERVER
            | {
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres_url.replace(
                    "postgresql://", "postgresql+asyncpg://"
                ),
                "PREFECT_SERVER_API_AUTH_STRING": f"rdd:{self.secrets['prefect']}",
                "PREFECT_SERVER_UI_API_URL": f"{self.prefect_url}/api",
                "PREFECT_REDIS_MESSAGING_URL": f"{self.redis_url}/0",
                "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL": f"{self.redis_url}/0",
                "PREFECT_SERVER_DOCKET_URL": f"{self.redis_url}/1",
            }
        )

    def log(self, service: str) -> Path:
        """Log file of a service."""
        return self.root / "logs" / f"{service}.log"

    def save(self) -> None:
        """Write the state, and the file ``env`` for the user's shell; both for the owner alone."""
        tree = asdict(self)
        del tree["root"]
        write_private(self.root / "stack.json", json.dumps(tree, indent=2))
        lines = (
            f"{name}={shlex.quote(value)}" for name, value in self.client_environment().items()
        )
        write_private(self.root / "env", "\n".join(lines) + "\n")


def load_stack(root: Path) -> Stack | None:
    """The stack of a folder; None where there is none.

    Raises:
        StackError: The folder's state cannot be read.
    """
    path = root.absolute() / "stack.json"
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Stack(root=path.parent, **(tree | {"fixed": tuple(tree["fixed"])}))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise StackError(
            f"{path}: expected the state of a stack, got {error}; "
            "end its processes and remove the folder"
        ) from error


def new_stack(root: Path) -> Stack:
    """A stack with free ports and new passwords."""
    return Stack(
        root=root.absolute(),
        mark=secrets.token_hex(16),
        ports=dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
        secrets={name: secrets.token_urlsafe(24) for name in SECRETS},
    )


def with_free_ports(stack: Stack) -> Stack:
    """The stack, with another port wherever somebody else listens now and none was chosen."""
    moving = stack.ports.keys() - set(stack.fixed)
    taken = [name for name in moving if not port_is_free(stack.ports[name])]
    others = dict(zip(taken, free_ports(len(taken)), strict=True))
    return replace(stack, ports=stack.ports | others)


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 on which nobody listens."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def port_is_free(port: int) -> bool:
    """Whether a server can listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that its owner alone can read."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
