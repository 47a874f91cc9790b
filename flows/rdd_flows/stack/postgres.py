"""PostgreSQL from the system's packages, with a data folder of its own."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from rdd_flows.stack.errors import StackError
from rdd_flows.stack.state import HOST, Stack, write_private

_ACCOUNT = "postgres"
_INSTALL = "install it with scripts/install-system-packages"


def program(name: str) -> str:
    """Path of one of PostgreSQL's programs, of the newest version that is installed.

    Raises:
        StackError: PostgreSQL is not installed.
    """
    # Debian keeps the servers of its versions side by side and off the PATH.
    versions = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4])
    )
    found = str(versions[-1]) if versions else shutil.which(name)
    if found is None:
        raise StackError(f"{name}: expected PostgreSQL's program, got none; {_INSTALL}")
    return found


def account() -> tuple[int, int] | None:
    """User and group for the server; None where this process's own will do.

    The server refuses to run as root; Debian's package brings an account for it.

    Raises:
        StackError: There is none.
    """
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(_ACCOUNT)
    except KeyError:
        raise StackError(
            f"PostgreSQL does not run as root: expected the account {_ACCOUNT}, got none; "
            f"{_INSTALL}, or run this as another user"
        ) from None
    return entry.pw_uid, entry.pw_gid


def data_folder(stack: Stack) -> Path:
    """Folder of the database."""
    return stack.root / "postgres"


def command(stack: Stack) -> list[str]:
    """Command of the server."""
    return [
        program("postgres"),
        *("-D", str(data_folder(stack))),
        *("-c", f"listen_addresses={HOST}"),
        *("-c", f"port={stack.ports['postgres']}"),
        *("-c", "unix_socket_directories="),
    ]


def prepare(stack: Stack) -> None:
    """Make the database's folder, unless it is there.

    Raises:
        StackError: The server's account cannot enter the stack's folder, or initdb failed.
    """
    folder = data_folder(stack)
    if (folder / "PG_VERSION").exists():
        return
    who = account()
    folder.mkdir(mode=0o700, exist_ok=True)
    password = folder.with_name("postgres.password")
    write_private(password, stack.secrets["postgres"])
    if who is not None:
        _require_way(folder, who[0])
        os.chown(folder, *who)
        os.chown(password, *who)
    try:
        made = subprocess.run(
            [
                program("initdb"),
                *("-D", str(folder)),
                *("-U", "prefect"),
                *("-A", "scram-sha-256"),
                *("-E", "UTF8"),
                "--no-locale",
                f"--pwfile={password}",
            ],
            cwd="/",
            capture_output=True,
            text=True,
            user=None if who is None else who[0],
            group=None if who is None else who[1],
            extra_groups=None if who is None else [],
        )
    finally:
        password.unlink()
    if made.returncode:
        shutil.rmtree(folder)
        raise StackError(f"{folder}: initdb failed: {made.stderr.strip()}")


def _require_way(folder: Path, user: int) -> None:
    for parent in folder.parents:
        status = parent.stat()
        if status.st_uid != user and not status.st_mode & 0o001:
            raise StackError(
                f"{parent}: expected a folder that the account {_ACCOUNT} can enter (its server "
                f"does not run as root), got mode {status.st_mode & 0o777:o}; choose another "
                "place with --state, or run this as another user"
            )


def ready(stack: Stack) -> bool:
    """Whether the server answers; makes Prefect's database on the first time."""
    return asyncio.run(_ready(stack))


async def _ready(stack: Stack) -> bool:
    import asyncpg

    try:
        connection = await asyncpg.connect(
            host=HOST,
            port=stack.ports["postgres"],
            user="prefect",
            password=stack.secrets["postgres"],
            database="postgres",
            timeout=5,
        )
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return False
    try:
        if not await connection.fetchval("select 1 from pg_database where datname = 'prefect'"):
            await connection.execute("create database prefect")
    finally:
        await connection.close()
    return True
