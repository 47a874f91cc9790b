"""Building a map store: the shards of one teacher pass, spread over Dask workers.

One task per shard, a bounded number of them under way. The store's own ``done`` marks are the
resume point: a build that was interrupted, or a worker that was killed, costs its unfinished
shards alone.
"""

from __future__ import annotations

import functools
import logging
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker
from distributed.worker import Worker

from rdd_pipeline.cluster import (
    CheckedPlugin,
    open_client,
    prepared_workers,
    require_readable,
    run_tasks,
    send_elsewhere,
)
from rdd_pipeline.config import ClusterConfig, MapsConfig, NetworkConfig, without_pretrained
from rdd_pipeline.data import Sample, SegmentationDataset, dataset_digests
from rdd_pipeline.errors import ClusterError
from rdd_pipeline.networks import (
    SegmentationNetwork,
    build_network,
    load_weights,
    network_identity,
    weights_hash,
)
from rdd_pipeline.progress import Reporter
from rdd_pipeline.teacher_batches import BatchLimit, DecodedImages, decoder_threads
from rdd_pipeline.teacher_pass import PassOptions, PendingShard, evaluate_shard
from rdd_pipeline.teacher_views import discrepancy_definition
from rdd_pipeline.teacher_windows import ImageView
from rdd_storage import (
    ImageRecord,
    MapAddition,
    MapSchema,
    MapWriter,
    RddError,
    StoreNotFoundError,
    fingerprint,
    store_path,
    store_status,
)

logger = logging.getLogger("rdd.maps")

_SHARDS_PER_GPU = 2  # one is computed while the other is written, see ShardBuilder


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did."""

    path: str
    fingerprint: str
    images: int
    images_built: int
    """Images whose maps were made; 0 when a finished store was reused."""
    soft_labels_added: int
    """Images of a store without soft labels that were given them."""
    version: int
    """Version of the store that is published now."""
    seconds: float
    bytes_on_disk: int
    bytes_per_image: float


def store_identity(
    dataset: SegmentationDataset, network: NetworkConfig, weights: str, maps: MapsConfig
) -> dict[str, Any]:
    """Everything that decides a store's content, apart from the images themselves.

    Soft labels are no part of it: a store may get them later, and its other maps stay the same.

    Args:
        dataset: The data set the teacher sees.
        network: The teacher's network, input normalisation included.
        weights: Hash of its weights.
        maps: What is stored, and how.
    """
    return {
        "data": dataset.identity(),
        "teacher": {
            "network": network_identity(network),
            "weights": weights,
        },
        "evaluation": {"view": image_view(maps).description,
                       "scales": list(maps.averaging.scales), "flip": maps.averaging.flip,
                       "precision": maps.precision},
        "method": {"discrepancy": discrepancy_definition(maps.discrepancy, maps.scales),
                   "upsampling": "bilinear, align_corners"},
        "arrays": {
            "aux_hardness": maps.stores_aux_hardness,
            "shard_images": maps.shard_images,
        },
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """All that a worker needs to build any shard of one store; small and picklable."""

    writer: MapWriter
    dataset: SegmentationDataset
    network: NetworkConfig
    weights: Path
    options: PassOptions
    device: str
    """Torch device; ``auto`` takes what the worker has."""


class ShardBuilder:
    """A teacher in memory, ready to build shards; :meth:`close` it in the end."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.device = _device(task.device)
        self.network: SegmentationNetwork = build_network(
            without_pretrained(task.network), task.dataset.num_classes
        )
        load_weights(self.network, task.weights)
        self.network.to(self.device).eval()
        self._views = task.options.views(self.network)
        self._limit = BatchLimit(
            task.options.batch_size, task.writer.schema.shard_images, self.device
        )
        threads = decoder_threads(self.device)
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="rdd-decode")
        self._quantiser = ThreadPoolExecutor(1, thread_name_prefix="rdd-quantise")
        # The next batch is decoded while one is computed.
        self._ahead = self._limit.wanted + threads
        # Two shards are under way in a Dask worker: one is computed while the other is written.
        self._computing = threading.Lock()
        self._index = {image_id: i for i, image_id in enumerate(task.dataset.image_ids)}

    def close(self) -> None:
        """End the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._quantiser.shutdown(cancel_futures=True)

    def build(self, shard: int) -> int:
        """Build one shard and mark it done; returns its number of images.

        May be called by several threads: one computes, the others decode their first images or
        write.
        """
        with closing(self._decoded(self._indices(shard))) as images:
            with self._computing:
                pending = self._evaluate(shard, images)
            return self._write(shard, pending)

    def build_all(self, shards: Sequence[int], progress: Callable[[int, int], object]) -> None:
        """Build shards in order, each computed while the one before is written.

        Args:
            shards: Which.
            progress: Called with every shard that is done, and its number of images.

        Raises:
            Exception: The first error; the shards before are done, none after it is.
        """
        indices = [self._indices(shard) for shard in shards]
        with (
            closing(self._decoded(list(chain.from_iterable(indices)))) as images,
            ThreadPoolExecutor(1, thread_name_prefix="rdd-write") as writing,
        ):
            samples = iter(images)
            written: tuple[int, Future[int]] | None = None
            for shard, own in zip(shards, indices, strict=True):
                pending = self._evaluate(shard, islice(samples, len(own)))
                if written is not None:
                    progress(written[0], written[1].result())
                written = shard, writing.submit(self._write, shard, pending)
            if written is not None:
                progress(written[0], written[1].result())

    def _indices(self, shard: int) -> list[int]:
        return [self._index[record.image_id] for record in self.task.writer.shard_records(shard)]

    def _decoded(self, indices: Sequence[int]) -> DecodedImages:
        return DecodedImages(self._decoders, self.task.dataset, indices, self._ahead)

    def _evaluate(self, shard: int, images: Iterable[Sample]) -> PendingShard:
        with self._naming(shard):
            return evaluate_shard(
                self._views,
                images,
                self.task.options,
                self.device,
                limit=self._limit,
                quantiser=self._quantiser,
            )

    def _write(self, shard: int, pending: PendingShard) -> int:
        with self._naming(shard):
            maps = pending.result()
            self.task.writer.write_shard(shard, maps)
        return len(maps)

    @contextmanager
    def _naming(self, shard: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"while building shard {shard} of {self.task.writer.path}")
            raise


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"device: cuda was asked for, but torch sees no GPU on {platform.node()}; use device: "
            "auto, or end the workers there"
        )
    return torch.device(name)


class TeacherPlugin(CheckedPlugin):
    """Loads the teacher once per Dask worker, late and restarted workers included."""

    def __init__(self, task: ShardTask, threads: int | None) -> None:
        super().__init__()
        self.task = task
        self.threads = threads
        self.builder: ShardBuilder | None = None

    def start(self, worker: Worker) -> None:
        """Load the teacher into this worker.

        Raises:
            ClusterError: The weights, the data or the store are not there on its machine.
        """
        task = self.task
        require_readable(task.weights, "the teacher's weights")
        try:
            task.dataset.size(0)
            MapWriter.open(task.writer.path)
        except (RddError, OSError) as error:
            raise ClusterError(
                f"cluster: on {platform.node()}, {error}; data and store have to be where all "
                "workers find them under these paths"
            ) from error
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.builder = ShardBuilder(task)

    def teardown(self, worker: Worker) -> None:
        """End the threads and let go of the teacher."""
        if self.builder is not None:
            self.builder.close()
            self.builder = None


def _build_on_worker(shard: int, *, plugin: str) -> int:
    teacher = get_worker().plugins[plugin]
    if not isinstance(teacher, TeacherPlugin) or teacher.builder is None:
        send_elsewhere()
    return teacher.builder.build(shard)


def build_maps(
    dataset: SegmentationDataset,
    network_config: NetworkConfig,
    weights: Path,
    *,
    maps: MapsConfig,
    root: str | Path,
    device: str,
    reporter: Reporter,
    digests: Sequence[str] | None = None,
    cluster: ClusterConfig | None = None,
    guard: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> BuildResult:
    """Build, resume, extend or reuse the store of one teacher and data set, and publish it.

    Where images were added, changed or removed since the store was published, its next version is
    built: the teacher sees the new and changed images alone. Where soft labels are asked for and
    the store is without, a version after that adds them: the teacher sees all images again, and
    no other map is made or written.

    Args:
        dataset: Images and labels the teacher runs over once.
        network_config: The teacher's network.
        weights: Its weights, as :func:`rdd_pipeline.networks.save_weights` writes them.
        maps: What to store and how many workers to use.
        root: Folder or URL of the store; its name carries data set, split and fingerprint.
        device: Torch device of the teacher pass; ``auto`` takes what each worker has.
        reporter: Where progress is shown.
        digests: Digests of the images in the data set's order, if they are known already.
        cluster: Where the workers are; by default so many of this machine as ``maps`` says.
        guard: Called with the store's path where there is something to build; what it returns is
            held while that is done.

    Raises:
        ClusterError: The workers cannot do what is asked of them.
        StoreMismatchError: The store there was built from other settings.
        StoreLockedError: Another process is building this store; the message says which.
        StoreWriteError: The disk is full or not writable; finished shards are kept.
        NonFiniteError: The teacher gave NaN or infinity on an image, which is named.
        TeacherMemoryError: One image alone does not fit into the device's memory.
        NetworkError: The teacher cannot give the discrepancy that is asked for.
    """
    started = time.perf_counter()
    network = build_network(without_pretrained(network_config), dataset.num_classes)
    options = pass_options(maps)
    options.views(network).check()
    load_weights(network, weights)
    identity = store_identity(dataset, network_config, weights_hash(network), maps)
    path = str(store_path(root, dataset.name, dataset.split, identity))
    if digests is None:
        with reporter.bar("digest images", len(dataset)) as bar:
            digests = dataset_digests(dataset, progress=bar.advance)
    writer = create_writer(path, dataset, network, maps, identity=identity, digests=digests)
    if writer.growth is not None and not writer.growth.empty:
        reporter.say(f"maps: {path} grows to version {writer.version}: {writer.growth}")
    task = ShardTask(
        writer=writer,
        dataset=dataset,
        network=network_config,
        weights=weights,
        options=replace(options, soft_labels=writer.schema.logits),
        device=device,
    )
    built = added = 0
    if writer.complete and not writer.pending_shards():
        reporter.say(f"maps: reused, all {len(dataset)} images are in {path}")
    else:
        with guard(path), writer.lease():
            built = _build_pending(task, cluster or ClusterConfig(), maps.workers, reporter)
            writer.publish()
    if maps.soft_labels and not writer.schema.logits:
        writer = MapAddition.plan(path)
        reporter.say(
            f"maps: adds soft labels to {len(writer.records)} images of {path}, as version "
            f"{writer.version}"
        )
        with guard(path), writer.lease():
            options = replace(options, logits_only=True)
            task = replace(task, writer=writer, options=options)
            added = _build_pending(task, cluster or ClusterConfig(), maps.workers, reporter)
            writer.publish()
    status = store_status(path)
    return BuildResult(
        path=path,
        fingerprint=fingerprint(identity),
        images=len(dataset),
        version=writer.version,
        images_built=built,
        soft_labels_added=added,
        seconds=time.perf_counter() - started,
        bytes_on_disk=status.bytes_on_disk,
        bytes_per_image=status.bytes_per_image,
    )


def create_writer(
    path: str,
    dataset: SegmentationDataset,
    network: SegmentationNetwork,
    maps: MapsConfig,
    *,
    identity: dict[str, Any],
    digests: Sequence[str],
) -> MapWriter:
    """Open or make the store of a teacher and a data set, without maps yet.

    Whether there are soft labels in it ``maps`` decides for a new store alone.
    """
    logits = maps.soft_labels
    with suppress(StoreNotFoundError):
        logits = MapWriter.open(path).schema.logits
    sizes = [dataset.size(index) for index in range(len(dataset))]
    grids = {size: network.grid_size(*size) for size in set(sizes)}
    records = [
        ImageRecord(
            image_id=image_id,
            height=size[0],
            width=size[1],
            grid_height=grids[size][0],
            grid_width=grids[size][1],
            digest=digest,
        )
        for image_id, size, digest in zip(dataset.image_ids, sizes, digests, strict=True)
    ]
    schema = MapSchema(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        height=max(size[0] for size in sizes),
        width=max(size[1] for size in sizes),
        grid_height=max(grid[0] for grid in grids.values()),
        grid_width=max(grid[1] for grid in grids.values()),
        output_stride=network.output_stride,
        shard_images=maps.shard_images,
        aux_hardness=maps.stores_aux_hardness,
        logits=logits,
        discrepancy=discrepancy_definition(maps.discrepancy, maps.scales),
    )
    return MapWriter.create(
        path, schema=schema, images=records, identity=identity, palette=dataset.palette, grow=True
    )


def image_view(maps: MapsConfig) -> ImageView:
    """How the teacher looks at an image with these settings."""
    return ImageView(
        window=maps.window if maps.view == "sliding" else None,
        overlap=maps.overlap,
        flip=maps.averaging.flip,
        scales=maps.averaging.scales,
    )


def pass_options(maps: MapsConfig) -> PassOptions:
    """What the teacher pass computes for these settings."""
    return PassOptions(
        soft_labels=maps.soft_labels,
        aux_hardness=maps.stores_aux_hardness,
        batch_size=maps.batch_size,
        precision=maps.precision,
        discrepancy=maps.discrepancy,
        scales=maps.scales,
        view=image_view(maps),
    )


def _build_pending(
    task: ShardTask, cluster: ClusterConfig, workers: int, reporter: Reporter
) -> int:
    """Build the shards that are not done; returns their number of images."""
    writer = task.writer
    pending = writer.pending_shards()
    images = sum(len(writer.shard_records(shard)) for shard in pending)
    if not pending:
        return 0
    if images < len(task.dataset):
        reporter.say(
            f"maps: {len(task.dataset) - images} of {len(task.dataset)} images are done, "
            f"{images} to build"
        )
    what = "soft labels" if task.options.logits_only else "teacher pass"
    store = writer.path.rstrip("/").rpartition("/")[2]
    with reporter.bar(what, images) as bar:

        def done(shard: int, built: int) -> None:
            logger.debug("%s: shard %d is done, %d images", writer.path, shard, built)
            bar.advance(built, note=f"shard {shard} of {store}")

        if workers == 0 and cluster == ClusterConfig():
            with closing(ShardBuilder(task)) as builder:
                builder.build_all(pending, done)
            return images
        count = cluster.gpus or cluster.workers or max(workers, 1)
        # What the user gave torch here, by OMP_NUM_THREADS or by default, is shared out; workers
        # elsewhere have their own.
        threads = None if cluster.address else max(1, torch.get_num_threads() // count)
        gpu = 1 / _SHARDS_PER_GPU if asks_for_gpu(cluster, task.device) else 0.0
        # Of one store only one build is under way, so that its name cannot meet another's.
        name = f"rdd-teacher-{writer.fingerprint[:12]}"
        with (
            open_client(cluster, workers=workers, threads=2, gpus_each=gpu) as client,
            prepared_workers(client, TeacherPlugin(task, threads), name),
        ):
            run_tasks(
                client,
                functools.partial(_build_on_worker, plugin=name),
                pending,
                done,
                name=f"{name}-{secrets.token_hex(4)}",
                gpus_each=gpu,
            )
    return images


def asks_for_gpu(cluster: ClusterConfig, device: str) -> bool:
    """Whether tasks have to ask for a worker with a GPU."""
    return cluster.gpus > 0 or (cluster.address is not None and device == "cuda")
