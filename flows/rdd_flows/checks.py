"""Whether the places that a run needs can be reached, before anything long starts."""

from __future__ import annotations

from rdd_pipeline.build import asks_for_gpu
from rdd_pipeline.cluster import open_client
from rdd_pipeline.config import RunConfig
from rdd_pipeline.machine import maps_device
from rdd_storage.location import locate

_PROBE = ".rdd-check"


def check_places(config: RunConfig) -> None:
    """Connect to the cluster and write to the object store, where the run uses them.

    Without Prefect's retries, so that a mistyped address is told at once.

    Raises:
        ClusterError: The workers are not there or cannot do what is asked of them.
        StoreUnavailableError: The object store does not answer.
        StoreAccessError: It refuses the credentials.
        StoreWriteError: There is no such bucket.
    """
    if config.cluster.address is not None:
        gpu = 0.5 if asks_for_gpu(config.cluster, maps_device(config)) else 0
        with open_client(config.cluster, workers=1, threads=1, gpus_each=gpu):
            pass
    if "://" in config.maps_root:
        location = locate(config.maps_root)
        location.put(_PROBE, b"rdd-maps was able to write here\n")
        location.delete(_PROBE)
