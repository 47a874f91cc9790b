"""What a run is computed on, and when."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from rdd_pipeline.config import RunConfig
from rdd_pipeline.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device: auto|cpu|cuda`` means here.

    Raises:
        ConfigError: ``cuda`` is asked for but torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU; use device: auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def maps_device(config: RunConfig) -> str:
    """Device of the teacher pass; at a cluster elsewhere each worker says what ``auto`` is."""
    if config.cluster.gpus:
        return "cuda"
    if config.cluster.address is not None:
        return config.device
    return str(resolve_device(config.device))


def machine() -> dict[str, Any]:
    """What a result was measured on: processor, device, versions."""
    packages = ("rdd-maps", "torch", "torchvision", "segmentation-models-pytorch", "zarr",
                "tensorstore", "prefect", "distributed", "numpy")  # fmt: skip
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def now() -> str:
    """The time as results hold it."""
    return datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
