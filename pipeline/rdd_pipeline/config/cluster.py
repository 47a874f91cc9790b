"""Where the workers are."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from rdd_pipeline.config._base import Count, Model

_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}")


class ClusterConfig(Model):
    """Dask workers: processes of this machine, or those of a scheduler that is running already.

    In YAML also ``local`` or the scheduler's address alone.
    """

    address: str | None = None
    """Address of a Dask scheduler, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``; None starts worker
    processes on this machine and ends them with the work."""
    workers: Count | None = None
    """Worker processes to start here, or to wait for at ``address``; None leaves it to the work
    (``maps.workers``, or one for each of ``gpus``)."""
    threads: Count | None = None
    """Pieces of work that a worker has under way at once; None leaves it to the work. Workers that
    were started elsewhere have their own ``--nthreads``."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs to use: here one worker process is started for each; at ``address`` that many workers
    have to offer the resource ``GPU``."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {} if value == "local" else {"address": value}

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        if self.address is not None and not _ADDRESS.fullmatch(self.address):
            raise ValueError(
                "expected local, tcp://HOST:PORT, tls://HOST:PORT or the keys workers, threads "
                f"and gpus, got '{self.address}'"
            )
        if self.address is not None and self.threads is not None:
            raise ValueError(
                "threads: workers at an address have those of their own --nthreads; leave it out"
            )
        if self.address is None and self.gpus and self.workers not in (None, self.gpus):
            raise ValueError(
                f"workers: one is started for each of the {self.gpus} GPUs; leave it out"
            )
        return self
