"""What a teacher pass will take, measured on a few images before it is begun."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rdd_pipeline.build import build_maps
from rdd_pipeline.config import RunConfig, TrainingConfig, without_pretrained
from rdd_pipeline.data import JSON, Sample, SegmentationDataset
from rdd_pipeline.data.base import Examined, in_threads
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.networks import SegmentationNetwork, build_network, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.run_images import open_split
from rdd_storage import store_status


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsPlan:
    """Bytes, objects, time and memory of a map store, extrapolated from a sample."""

    images: int
    sampled: int
    """Images that were measured."""
    bytes_per_image: float
    arrays: dict[str, float]
    """Bytes an image of each array."""
    bytes_total: int
    objects: int
    """Files, or objects of a bucket, of the finished store."""
    seconds_per_image: float
    """By one process on this machine, start left out."""
    seconds: float
    """For all images, by one process."""
    workers: int
    """Worker processes of the configuration, which share the machine."""
    shard_bytes: int
    """Maps of one shard before compression; two shards are in memory at a time."""
    online_seconds: float
    """The teacher's forward passes over all crops of one student trained ``teacher: online``."""
    trained_teacher: bool
    """Whether the teacher's own weights were used; bytes depend on them, time does not."""

    @property
    def break_even_students(self) -> int:
        """Number of students from which the stored maps are cheaper than the teacher online."""
        return max(1, math.ceil(self.seconds / max(self.online_seconds, 1e-9)))


class _Part(SegmentationDataset):
    """Some images of a data set."""

    def __init__(self, whole: SegmentationDataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, tuple(indices)
        self.name, self.split = whole.name, whole.split
        self.class_names, self.palette = whole.class_names, whole.palette
        self.image_ids = tuple(whole.image_ids[index] for index in indices)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.indices[index]]

    def size(self, index: int) -> tuple[int, int]:
        return self.whole.size(self.indices[index])

    def digest(self, index: int) -> str:
        return self.whole.digest(self.indices[index])

    def identity(self) -> dict[str, JSON]:
        return self.whole.identity()

    def examine(self, index: int) -> Examined:
        return self.whole.examine(self.indices[index])


def plan_maps(
    config: RunConfig,
    teacher: SegmentationNetwork | None,
    *,
    sample: int,
    device: str,
    reporter: Reporter,
) -> MapsPlan:
    """Run the teacher over a sample of images into a temporary store and extrapolate.

    The sample is built twice, with ``sample`` and twice as many images: the difference is free of
    what a build costs once.

    Args:
        config: The run.
        teacher: The teacher; None takes one with random weights, which takes as long.
        sample: Images of the smaller build, at least 1.
        device: Torch device of the teacher pass.
        reporter: Where progress is shown.

    Raises:
        ConfigError: The data set is smaller than three samples.
    """
    dataset = open_split(config.data, "train")
    if 3 * sample > len(dataset):
        raise ConfigError(
            f"--sample {sample}: three times as many images are needed, the training split has "
            f"{len(dataset)}; give at most {len(dataset) // 3}"
        )
    chosen = np.linspace(0, len(dataset) - 1, 3 * sample).astype(int).tolist()
    twice = [index for number, index in enumerate(chosen) if number % 3]
    # The first build, of one image, takes what is slow once: imports, first kernels.
    parts = [_Part(dataset, indices) for indices in (chosen[:1], chosen[::3], twice)]
    network = teacher or build_network(
        without_pretrained(config.teacher.network), dataset.num_classes, seed=config.seed
    )
    seconds, objects, sizes = [], [], []
    with tempfile.TemporaryDirectory(prefix="rdd-plan-") as folder:
        weights = Path(folder) / "weights.safetensors"
        save_weights(network, weights)
        maps = config.maps.model_copy(update={"workers": 0, "shard_images": sample})
        for number, part in enumerate(parts):
            built = build_maps(
                part,
                config.teacher.network,
                weights,
                maps=maps,
                root=Path(folder) / str(number),
                device=device,
                reporter=reporter,
            )
            seconds.append(built.seconds)
            objects.append(sum(path.is_file() for path in Path(built.path).rglob("*")))
            sizes.append(built.bytes_on_disk)
        arrays = store_status(built.path).arrays
    images = len(dataset)
    shards = math.ceil(images / config.maps.shard_images)
    seconds_per_image = max(seconds[2] - seconds[1], 0.0) / sample
    bytes_per_image = (sizes[2] - sizes[1]) / sample
    return MapsPlan(
        images=images,
        sampled=3 * sample,
        bytes_per_image=bytes_per_image,
        arrays={name: size / (2 * sample) for name, size in arrays.items() if name != "metadata"},
        bytes_total=sizes[1] + round(bytes_per_image * (images - sample)),
        objects=objects[1] + (objects[2] - objects[1]) * (shards - 1),
        seconds_per_image=seconds_per_image,
        seconds=seconds_per_image * images,
        workers=config.maps.workers,
        shard_bytes=_shard_bytes(config, dataset, network),
        online_seconds=_online_seconds(network, config.student.training, torch.device(device)),
        trained_teacher=teacher is not None,
    )


def _shard_bytes(
    config: RunConfig, dataset: SegmentationDataset, network: SegmentationNetwork
) -> int:
    """Maps of the largest shard there can be, in memory: codes, half-precision fields."""
    height, width = max(
        in_threads(dataset.size, len(dataset), None, dataset.over_network), key=math.prod
    )
    points = math.prod(network.grid_size(height, width))
    pixel_maps = 3 + bool(config.maps.stores_aux_hardness)
    point_values = 1 + (dataset.num_classes if config.maps.soft_labels else 0)
    return config.maps.shard_images * (pixel_maps * height * width + 2 * point_values * points)


@torch.inference_mode()
def _online_seconds(
    network: SegmentationNetwork, training: TrainingConfig, device: torch.device
) -> float:
    """Teacher's forward passes of one training, from the median of five."""
    network.to(device).eval()
    images = torch.zeros(training.batch_size, 3, *training.crop_size, device=device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * training.iterations
