"""The smallest configuration that takes the whole way; shared by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rdd_pipeline.config import RunConfig, parse_config

_NETWORK: dict[str, Any] = {
    "architecture": "FPN",
    "encoder": "tu-mobilenetv3_small_050",
    "auxiliary": {},
    "options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
}
_TRAINING: dict[str, Any] = {
    "iterations": 6,
    "batch_size": 2,
    "crop_size": [32, 64],
    "lr": 0.05,
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 2,
}


def tiny_tree(output: Path) -> dict[str, Any]:
    """The configuration as it would stand in YAML."""
    # By way of JSON: no two sections share a dictionary, so that a test may change one alone.
    tree: dict[str, Any] = json.loads(
        json.dumps(
            {
                "name": "tiny",
                "output": str(output),
                "device": "cpu",
                "data": {
                    "type": "synthetic",
                    "train_images": 7,
                    "val_images": 3,
                    "height": 48,
                    "width": 80,
                },
                "teacher": {"network": _NETWORK, "training": _TRAINING},
                "maps": {"shard_images": 2, "workers": 0},
                "student": {"network": _NETWORK, "training": _TRAINING},
                "students": [
                    {"name": "supervised", "method": "supervised"},
                    {"name": "kd", "method": "kd"},
                    {"name": "rdd", "method": "rdd", "rdd": {"min_kept": 0.05, "switch": 0.5}},
                ],
            }
        )
    )
    return tree


def tiny_config(output: Path, **sections: Any) -> RunConfig:
    """The configuration, with whole top-level sections replaced."""
    return parse_config(tiny_tree(output) | sections)


def write_tiny(path: Path, output: Path) -> Path:
    """Write the configuration as YAML."""
    path.write_text(yaml.safe_dump(tiny_tree(output)), encoding="utf-8")
    return path
