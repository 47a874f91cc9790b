from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_servers import running_server

Rdd = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the database in which the tests' runs are recorded."""
    return tmp_path_factory.mktemp("prefect")


def _command(home: Path, **settings: str) -> Rdd:
    """The installed command ``rdd`` with a Prefect home of its own."""
    command = Path(sys.executable).parent / "rdd"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(home), "COLUMNS": "160"} | settings

    def run(
        *arguments: str | Path, timeout: float = 300, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(command), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            input=stdin,
        )

    return run


@pytest.fixture(scope="session")
def rdd(prefect_home: Path) -> Rdd:
    """Run ``rdd`` as a user of one machine types it: a flow starts a Prefect server for itself."""
    return _command(prefect_home)


@pytest.fixture(scope="session")
def rdd_on_server(prefect_home: Path, prefect_server: str) -> Rdd:
    """Run ``rdd`` where a Prefect server runs already, as flows start much sooner there."""
    return _command(prefect_home, PREFECT_API_URL=prefect_server)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the API of a Prefect server that all tests share."""
    with running_server(tmp_path_factory.mktemp("prefect-server")) as (url, _):
        yield url
