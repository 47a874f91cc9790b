"""Steps of a training, one by one, for the benchmarks that time them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from rdd_pipeline.config import RunConfig, StudentConfig, without_pretrained
from rdd_pipeline.data import SegmentationDataset
from rdd_pipeline.loader import make_loader
from rdd_pipeline.machine import resolve_device
from rdd_pipeline.networks import build_network, load_weights
from rdd_pipeline.prefetch import DevicePrefetcher
from rdd_pipeline.student import prepare_student
from rdd_pipeline.teacher_views import autocast
from rdd_storage import MapReader


def training_steps(
    config: RunConfig,
    student: StudentConfig,
    dataset: SegmentationDataset,
    *,
    store: str | Path,
    teacher_weights: Path,
) -> Iterator[tuple[float, float]]:
    """Seconds of each step, and of it those without a batch; endless, from the second stage on.

    Args:
        config: The run.
        student: One of its students.
        dataset: Images and labels to train on.
        store: Map store; read where the student needs maps.
        teacher_weights: Read where the student needs the teacher in memory.
    """
    training, device = config.student_training(student), resolve_device(config.device)
    teacher = None
    if student.needs_teacher:
        teacher = build_network(without_pretrained(config.teacher.network), dataset.num_classes)
        load_weights(teacher, teacher_weights)
    prepared = prepare_student(
        config,
        student,
        dataset,
        reader=MapReader(store) if student.needs_maps else None,
        teacher=teacher,
    )
    prepared.stream.length = 10**9
    iteration = training.iterations * 3 // 4  # the second stage, the dearer one
    loader = make_loader(
        prepared.stream,
        batch_size=training.batch_size,
        start=iteration * training.batch_size,
        workers=training.workers,
        pin_memory=device.type == "cuda",
    )
    model = prepared.model.to(device).train()
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
    with DevicePrefetcher(loader, device) as batches:
        while True:
            started, waited = time.perf_counter(), batches.waited
            batch = batches.take()
            optimizer.zero_grad(set_to_none=True)
            images = batch["image"]
            if training.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(device, training.precision):
                outputs = model(images)
            result = prepared.loss(outputs, batch["label"], prepared.signals(batch), iteration)
            scaler.scale(result.total).backward()
            scaler.step(optimizer)
            scaler.update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter() - started, batches.waited - waited
