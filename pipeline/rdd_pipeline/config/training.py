"""How a network is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rdd_pipeline.config._base import Count, Fraction, Model


class JitterConfig(Model):
    """Random changes of a crop's colours, with the customary meaning of their strengths."""

    brightness: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Brightness times a factor from ``[max(0, 1 - brightness), 1 + brightness]``."""
    contrast: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Likewise the distance from the crop's mean grey."""
    saturation: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Likewise the distance from each pixel's own grey."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Hue shifted by ``[-hue, hue]`` turns of the colour circle."""


class EvaluationConfig(Model):
    """How a network is evaluated on whole images; probabilities are averaged over all passes."""

    flip: bool = False
    """Pass the mirrored images too."""
    scales: Annotated[
        tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...], Field(min_length=1)
    ] = (1.0,)
    """Sizes to pass the images at, as multiples of their own."""
    batch_size: Count = 4
    """Images of equal size that are passed together; it changes no result."""


class TrainingConfig(Model):
    """How a network is trained; the defaults follow the published Cityscapes set-up."""

    iterations: Count = 40_000
    batch_size: Count = 16
    """Images per forward pass and process."""
    accumulate: Count = 1
    """Forward passes per optimiser step, whose gradients are averaged. All iterations count
    optimiser steps."""
    crop_size: tuple[Count, Count] = (512, 1024)
    """Height and width of the training crop in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale."""
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Probability of a horizontal flip."""
    jitter: JitterConfig | None = None
    """Random changes of the image's colours; None, as published, makes none."""
    shuffle: Literal["images", "shards"] = "images"
    """Order of an epoch: all images at random, or shard by shard in random order through a buffer
    of ``shuffle_buffer`` images, so that reads stay within few shards at a time."""
    shuffle_buffer: Count = 256
    """Images that ``shuffle: shards`` mixes with each other."""
    lr: Annotated[float, Field(gt=0.0)] = 0.02
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    poly_power: Annotated[float, Field(gt=0.0)] = 0.9
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations over which the learning rate rises linearly to ``lr``."""
    head_lr_factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of everything but the encoder, as a multiple of ``lr``."""
    gradient_clip: Annotated[float, Field(gt=0.0)] | None = None
    """Largest gradient norm; None does not clip."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the network; losses are computed in float32 whatever it is."""
    channels_last: bool = False
    """Keep the network's tensors with the channels innermost, which suits convolutions in mixed
    precision on GPUs."""
    compile: bool = False
    """Compile the network with torch.compile for training; evaluation does without."""
    ema: Fraction | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; where it is set, the
    averaged weights are evaluated and saved."""
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.4
    """Weight of the auxiliary head's loss."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes; 0 loads in the training process."""
    checkpoint_every: Count = 1_000
    """Iterations between checkpoints from which training resumes."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations; 0 evaluates at the end alone."""
    evaluation: EvaluationConfig = EvaluationConfig()
    keep_best: bool = True
    """Keep the weights of the best evaluation in ``best``; does nothing without
    ``evaluate_every``."""
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Weights to keep on the way, spread evenly over the training, beside those of its end. Each
    takes as many bytes as ``weights.safetensors``."""
    overlays: Annotated[int, Field(ge=0)] = 4
    """Validation images shown in TensorBoard at each evaluation."""
    log_every: Count = 10

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError(f"expected 0 < low <= high, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainingConfig:
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations ({self.warmup_iterations}) must be below iterations "
                f"({self.iterations})"
            )
        return self
